# %% [markdown]
# # 12 · Offline batches
#
# **Question.** A thousand questions about a hundred documents, and nobody waits for a single answer, only for all of
# them. If an engine may choose the order, which one lets it read each document once?
#
# You will measure what bad luck in the order costs a prefix cache, build the tree of all prefixes, choose the best
# groups in it with a dynamic program, check that against all possibilities, and let minipaged's prefix cache count what
# each order is worth.
#
# *45 minutes. You need Python, and [tutorial 9](09_prefix_cache.md). "The paper" is
# [BatchLLM](https://arxiv.org/abs/2412.03594) (Zheng et al., 2024). By default minipaged serves in order of arrival;
# the orders are made here, outside of it, and at the end you meet the one that it has built in.*

# %% [markdown]
# ## The work
#
# A *prompt* is a list of token numbers. Ours have up to three parts: instructions, a document, a question. There are
# two sets of instructions, of 32 and 16 tokens; each goes with documents of 24 tokens; each document has some questions
# of 4 tokens. Six prompts have nothing in common with anybody. Everything is a multiple of 4, the size of our blocks,
# so that no rounding spoils the sums.

# %%
import random
from itertools import count

new_token = count(1)


def some(length):
    """Tokens that occur nowhere else."""
    return [next(new_token) for _ in range(length)]


prompts = [some(40) for _ in range(6)]
for instructions, questions in ((some(32), (1, 1, 2, 2)), (some(16), (4, 5, 5, 6, 6, 8))):
    for number in questions:  # of this document
        document = some(24)
        prompts += [instructions + document + some(4) for _ in range(number)]
random.Random(0).shuffle(prompts)  # the order in which they arrive
total = sum(map(len, prompts))
print(f"{len(prompts)} prompts, {total} tokens in all")

# %% [markdown]
# ## What the order costs
#
# We take the real engine: its scheduler, its block tables, its prefix cache. Only the model is left out, since nothing
# here depends on what it says. Such a runner is two lines. The events `Scheduled` tell how many rows were
# computed; those of decoding are known, and the rest is what the prompts cost.

# %%
from minipaged import EngineConfig, SamplingParams
from minipaged.build import assemble
from minipaged.core.plan import SampledToken
from minipaged.events import Preempted, Scheduled


class NoModel:
    def execute(self, plan):
        return None


def serve(prompts, num_blocks, lengths=None, max_num_seqs=2):
    """Runs prompts in this order. Returns (rows computed for prompts, steps, preemptions)."""
    lengths = lengths or [4] * len(prompts)
    config = EngineConfig(
        num_blocks=num_blocks, block_size=4, max_model_len=256, max_num_batched_tokens=64, max_num_seqs=max_num_seqs
    )
    engine = assemble(config, NoModel(), lambda _, plan: [SampledToken(0) for _ in plan.samples], vocab_size=10_000)
    events, steps = [], 0
    engine.events.subscribe(events.append)
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        engine.add_request(str(number), prompt, SamplingParams(max_tokens=length, ignore_eos=True))
    while engine.has_unfinished():
        engine.step()
        steps += 1
    rows = sum(event.num_tokens for event in events if isinstance(event, Scheduled))
    preemptions = sum(isinstance(event, Preempted) for event in events)
    return rows - sum(length - 1 for length in lengths), steps, preemptions  # a text's last token is never computed


# %% [markdown]
# **Predict.** A pool of 48 blocks holds 192 tokens, two or three prompts. In which order will the cache find more: as
# they arrived, or sorted like words in a dictionary? And with a pool that holds everything?
#
# <details><summary>Then look</summary>

# %%
for num_blocks in (48, 600):
    for name, order in (("as they arrived", prompts), ("sorted", sorted(prompts))):
        rows = serve(order, num_blocks)[0]
        print(f"{num_blocks:3} blocks, {name:15}: {rows:4} of {total} tokens computed, the others found")

# %% [markdown]
# The cache keeps what was used last. If the next question about a document comes when it has been forgotten, the
# document is read again. Sorting puts prompts that begin alike next to each other, so what they share is always fresh.
# With a large pool nothing is forgotten, and in any order the same is found.
#
# So for a batch whose prompts are all known, sorting is a strong and simple answer. Keep it in mind as the one to beat.
# </details>
#
# ## The tree
#
# Sorting knows nothing of *how much* is shared. To decide anything, look at the whole: a tree in which each node is a
# beginning that several prompts have in common.


# %%
class Node:
    """A common beginning of `depth` tokens. `requests` end their sharing here; `children` share more."""

    def __init__(self, depth):
        self.depth, self.requests, self.children = depth, [], []


def common(a, b):
    """How many tokens two prompts have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def tree(prompts, group, depth=0):
    """The node of prompts (by number) that agree in `depth` tokens."""
    node, branches = Node(depth), {}
    for number in group:
        next_one = prompts[number][depth] if len(prompts[number]) > depth else None
        branches.setdefault(next_one, []).append(number)
    for next_one, members in branches.items():
        if next_one is None or len(members) == 1:
            node.requests += members
        else:
            first = prompts[members[0]]
            shared = min(common(first, prompts[number]) for number in members)
            node.children.append(tree(prompts, members, shared))
    return node


root = tree(prompts, range(len(prompts)))


def draw(node, indent=0):
    print(f"{' ' * indent}depth {node.depth}: {len(node.requests)} prompt(s) end here")
    for child in node.children:
        draw(child, indent + 4)


draw(root)

# %% [markdown]
# Find the two sets of instructions, and the documents with two or more questions. A document with a single question is
# no node: nobody shares it.
#
# ## One level
#
# The paper's engine does not use a cache for this. It takes a *group* of requests with a common beginning, computes
# that once, keeps it exactly as long as the group runs, and its attention kernel reads the common part once for all of
# them. That works with **one** common part for each group. But our tree has two levels: instructions, then documents.
# If a group is "the questions about one document", the instructions are computed again for each document. If a group is
# "all with these instructions", the documents are computed again for each question.
#
# So we must *choose* for each prompt which of its beginnings is the shared one. A node that is chosen ("open") saves
# `depth` tokens for each of its requests, and costs `depth` once. Nodes below an open one may be open themselves; then
# their requests belong to them.
#
# **Predict.** In our work: instructions of 32 tokens with documents of 1, 1, 2 and 2 questions; instructions of 16 with
# documents of 4, 5, 5, 6, 6 and 8. All documents have 24 tokens. For each of the two: which is better, to open the
# instructions, the documents, or both?
#
# <details><summary>Then look</summary>
#
# Let F(v, u) be the most that can be saved in the subtree of v, if u is the nearest open node above. Either v stays
# closed: its own requests save depth(u), and the children see u as before. Or v is opened.


# %%
def best(node, above=0):
    """(tokens saved, depths of the nodes that are opened) in a subtree; `above`: depth of the nearest open ancestor."""
    closed = [best(child, above) for child in node.children]
    opened = [best(child, node.depth) for child in node.children]
    if_closed = sum(saved for saved, _ in closed) + len(node.requests) * above
    if_opened = sum(saved for saved, _ in opened) + len(node.requests) * node.depth - node.depth
    if if_opened > if_closed:
        return if_opened, [node] + [n for _, nodes in opened for n in nodes]
    return if_closed, [n for _, nodes in closed for n in nodes]


saved, open_nodes = best(root)
print(f"saved: {saved} tokens; open:", [(node.depth, len(node.requests)) for node in open_nodes])

# %% [markdown]
# Of the first family the instructions are opened, and *nothing else*: a document with two questions would save 56
# tokens for each and cost 56 once, which is less than leaving both under instructions that are paid for anyway. Of the
# second family each document is opened, and the instructions are not: nobody is left who would use them. No rule of
# thumb ("the longest prefix", "the most requests") gets both right:


# %%
def saved_by(is_open, node=root, above=0):
    """What a rule saves: it says of each node whether it is open."""
    cost = 0
    if node.depth and is_open(node):
        above = cost = node.depth
    return len(node.requests) * above - cost + sum(saved_by(is_open, child, above) for child in node.children)


print("all documents:      ", saved_by(lambda node: not node.children))
print("all instructions:   ", saved_by(lambda node: bool(node.children)))
print("everything:         ", saved_by(lambda node: True))
print("the dynamic program:", saved_by(lambda node: node in open_nodes))

# %% [markdown]
# </details>
#
# ## Groups, in order
#
# The open nodes make groups, and who belongs to none runs alone. In which order? The paper sorts groups by how much
# they *decode* for each token of prompt, the largest ratio first. In a step, decodes take one row each; a prompt fills
# the rest of the step's budget. If all that decodes long comes last, the end of the run is steps with few rows. If it
# comes first, the prompts of later groups fill its steps.
#
# Some of our requests answer with 4 tokens, others with 60. Which groups answer long is drawn at random.


# %%
def groups_of(node, open_nodes, group=None):
    """Lists of prompt numbers. `group`: that of the nearest open node above."""
    if node in open_nodes:
        group = []
        yield group
    for number in node.requests:
        if group is None:
            yield [number]
        else:
            group.append(number)
    for child in node.children:
        yield from groups_of(child, open_nodes, group)


groups = list(groups_of(root, open_nodes))
rng, lengths = random.Random(1), [0] * len(prompts)
for group in groups:
    answer = rng.choice((4, 60))
    for number in group:
        lengths[number] = answer


def ratio(group):
    return sum(lengths[number] for number in group) / sum(len(prompts[number]) for number in group)


orders = {
    "as they arrived": range(len(prompts)),
    "sorted": sorted(range(len(prompts)), key=lambda number: prompts[number]),
    "groups": [number for group in groups for number in group],
    "groups, by ratio": [number for group in sorted(groups, key=ratio, reverse=True) for number in group],
    "the reverse": [number for group in sorted(groups, key=ratio) for number in group],
}
print("sizes of the groups:", [len(group) for group in groups])

# %% [markdown]
# **Predict.** Five orders through the real prefix cache, in a pool of 160 blocks, up to 6 at a time. Which computes
# least? Which takes the fewest steps? Does any order change the number of answers, or what they say?
#
# <details><summary>Then look</summary>

# %%
for name, order in orders.items():
    result = serve([prompts[n] for n in order], 160, [lengths[n] for n in order], max_num_seqs=6)
    print(f"{name:16}: {result[0]} of {total} tokens computed, {result[1]} steps, {result[2]} preemptions")

# %% [markdown]
# The groups compute least. By ratio they take the fewest steps, and compute a little more: now two documents of one
# family may lie far apart, and their instructions are forgotten in between. Sorting computes little and takes the most
# steps, for it knows nothing of answers. The differences are small, since the work is; what counts is that there are
# *two* goals, rows and steps, and that no order here is best at both. (Chance plays a part as well: requests that are
# admitted in one step cannot find each other's blocks.) The answers are the same in any order, because a text's tokens
# do not depend on who else is in the batch (up to rounding: other batches add numbers in another order).
#
# And the program's promise? It saves 1,280 tokens with *one* level, so it computes 816. The cache found more, because
# it follows a chain of blocks through any number of levels.
# </details>
#
# ## In the engine
#
# Until here the engine had no idea of groups. What did the finding was the search that you know from tutorial 9, and
# the decision who is admitted next. (`admission` is a policy. Without groups it is first come, first served, and its
# `hits` are what `match` finds.)

# %%
from show import source

from minipaged.core.block_table import BlockTables
from minipaged.core.scheduler import Scheduler

source(BlockTables.match)

# %%
source(Scheduler.admit)

# %% [markdown]
# Whoever hands in the requests in a good order needs nothing else. The paper goes further: no cache to be lucky with,
# but groups that own their common part; a batch limited by memory alone; a kernel for the common part. It reports 1.1
# to 2 times vLLM's throughput.
#
# All but the kernel is in minipaged, too. Here is its `best`. It is yours, without recursion, so that prompts of
# thousands of blocks cannot exhaust Python's stack; and it counts in blocks, since a block table shares nothing less.

# %%
from minipaged.features.batchllm import planning as batchllm

source(batchllm.best)

# %% [markdown]
# A group must *keep* its common part, whoever of it ends or is preempted. To the block pool the group is one more owner
# of these blocks, and the reference counts of tutorial 8 do the rest. (`pinned` tells the block tables' own check which
# references are not from a table.)

# %%
from minipaged.features.batchllm.groups import Groups

source(Groups.keep)

# %% [markdown]
# And nobody may begin before the common part has been computed: else two requests would compute it side by side. So the
# first of a group goes ahead, and the others let requests of other groups pass. `Groups` is the admission policy here;
# `base` is the policy that it wraps.

# %%
source(Groups.eligible)

# %% [markdown]
# **Predict.** `add_batch` takes requests as a whole and returns what it promises to save. What will it promise for our
# work, and how many tokens will really be found, in a pool of 160 blocks? And in one of 48?
#
# <details><summary>Then look</summary>

# %%
from minipaged.events import Admitted
from minipaged.features.batchllm.groups import BatchItem


def serve_batch(num_blocks):
    """Runs the prompts as one batch. Returns (tokens promised, tokens found, steps, preemptions)."""
    config = EngineConfig(
        num_blocks=num_blocks, block_size=4, max_model_len=256, max_num_batched_tokens=64, max_num_seqs=6
    )
    engine = assemble(config, NoModel(), lambda _, plan: [SampledToken(0) for _ in plan.samples], vocab_size=10_000)
    events, found, steps = [], {}, 0
    engine.events.subscribe(events.append)
    promised = engine.add_batch(
        [
            BatchItem(str(number), prompt, SamplingParams(max_tokens=length, ignore_eos=True))
            for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
    )
    while engine.has_unfinished():
        engine.step()
        steps += 1
    for event in events:
        if isinstance(event, Admitted):
            found.setdefault(event.request_id, event.num_cached)  # not when it comes back after a preemption
    return promised, sum(found.values()), steps, sum(isinstance(event, Preempted) for event in events)


for num_blocks in (160, 48):
    promised, found, steps, preemptions = serve_batch(num_blocks)
    print(f"{num_blocks:3} blocks: {promised} promised, {found} found, {steps} steps, {preemptions} preemptions")

# %% [markdown]
# Exactly what the dynamic program said, in both pools: what a group keeps cannot be evicted. (Only a request that
# needs the pool for itself alone may take it away.) Compare the steps in the larger pool with the table above. There
# at most six run at once, as `max_num_seqs` says; of a batch as many run as memory holds, and some are preempted.
#
# Is it the best of all orders? Not always. One level is less than a cache that follows a chain through all levels can
# find: sorted, our prompts cost fewer rows. minipaged leaves what the cache holds by luck alone, which is the price of
# a promise. Run `minipaged experiments run batchllm` to see where each wins.
# </details>
#
# With a model it is one word. The answers are those of any other schedule, in the order of the prompts:

# %%
from minipaged import LLM

llm = LLM("tiny")
story = "Once upon a time, in a small town by the sea, there lived a girl named Anna. She had a red boat and a dog."
texts = [f"{story} {ending}" for ending in ("One morning", "Her dog", "The boat", "At night")] + ["A fox", "Two owls"]
greedy = SamplingParams(temperature=0, max_tokens=12)
grouped, plain = (llm.generate(texts, greedy, schedule=schedule) for schedule in ("batchllm", "fcfs"))
print("the same answers:", [a.outputs[0].text for a in grouped] == [b.outputs[0].text for b in plain])

# %% [markdown]
# For a file of requests: `minipaged batch questions.jsonl -o answers.jsonl --schedule batchllm`.
#
# ## In the visualizer
#
# Start `make demo` (or `minipaged visualize`) and choose **A batch in groups** (menu *scenario*). Below the pool you
# see the tree, a branch for each group; in the pool, the blocks that are kept wear its colour. Compare it with **Shared
# system prompt**: would D find its instructions if twenty strangers had come between?
#
# Source lines: `match` in [`minipaged/core/block_table.py`](../minipaged/core/block_table.py), `LRU` in
# [`minipaged/core/prefix_cache.py`](../minipaged/core/prefix_cache.py), `admit` in
# [`minipaged/core/scheduler.py`](../minipaged/core/scheduler.py); `plan` in
# [`minipaged/features/batchllm/planning.py`](../minipaged/features/batchllm/planning.py), `Groups` in
# [`minipaged/features/batchllm/groups.py`](../minipaged/features/batchllm/groups.py).
#
# ## Exercises
#
# **1. Trust nobody's dynamic program.** Compare `best` with brute force: on 200 random trees try every set of open
# nodes.
#
# <details><summary>Answer</summary>

# %%
from itertools import combinations


def random_tree(rng, depth=0, level=0):
    node = Node(depth)
    node.requests = list(range(rng.randint(0, 4)))
    if level < 3:
        for _ in range(rng.randint(0, 2)):
            node.children.append(random_tree(rng, depth + rng.randint(1, 9), level + 1))
    return node


def nodes_of(node):
    return [node] + [n for child in node.children for n in nodes_of(child)]


rng, tried, largest = random.Random(2), 0, 0
while tried < 200:
    random_root = random_tree(rng)
    nodes = nodes_of(random_root)
    if len(nodes) > 9:
        continue  # too many sets to wait for
    tried += 1
    sets = [set(chosen) for size in range(len(nodes) + 1) for chosen in combinations(nodes, size)]
    assert best(random_root)[0] == max(saved_by(chosen.__contains__, random_root) for chosen in sets)
    largest = max(largest, len(sets))
print(f"equal on {tried} trees; of the largest, {largest} sets of nodes were tried")

# %% [markdown]
# The program looks at each node once for each of its ancestors, instead of at every set.
# </details>
#
# **2. How much memory makes order irrelevant?** Let the first work run in pools from 32 to 512 blocks, as it arrived
# and sorted. Where do the two meet, and what does that say about servers with much memory?
#
# <details><summary>Answer</summary>

# %%
for num_blocks in (32, 64, 128, 256, 512):
    rows = [serve(order, num_blocks)[0] for order in (prompts, sorted(prompts))]
    print(f"{num_blocks:3} blocks: {rows[0]:4} tokens computed as they arrived, {rows[1]} sorted")

# %% [markdown]
# Sorted, a small pool is as good as a large one. As they arrived, the pool must hold everything that will ever be asked
# for again. With a thousand documents instead of ten no pool does.
# </details>
#
# **3. When the future is not known.** A server cannot sort what has not arrived. But it can choose among those who
# wait: the request whose beginning is in the cache *now* for the longest stretch. Let at most 8 wait at a time. How
# much of sorting's gain does that bring? (Use `BlockTables` as in tutorial 9, one request at a time.) What can go wrong
# for a request with no relatives?
#
# <details><summary>Answer</summary>

# %%
from minipaged.core.plan import Write


def found_online(window, num_blocks=48):
    """Always the waiting request with the longest match; of equal ones the first to arrive."""
    tables, arriving, waiting, found, delays = BlockTables(num_blocks, 4), list(enumerate(prompts)), [], 0, []
    for turn in range(len(prompts)):
        while arriving and len(waiting) < window:
            waiting.append(arriving.pop(0))
        request = max(waiting, key=lambda request: (len(tables.match(request[1])), -request[0]))
        waiting.remove(request)
        number, prompt = request
        delays.append(turn - number)
        hits = tables.match(prompt)
        tables.open(number, hits)
        tables.reserve(Write(number, 4 * len(hits), len(prompt)))
        tables.mark_computed(number, prompt, len(prompt))
        tables.free(number)
        found += 4 * len(hits)
    return found, max(delays)


for window in (1, 4, 8, 16):
    found, delay = found_online(window)
    print(f"{window:2} wait: {found / total:.0%} found; somebody was served {delay} turns late")

# %% [markdown]
# A window of eight brings more than half of it, one of sixteen nearly all. The price is fairness: who has no relatives
# is overtaken again and again, in a busy server for ever. SGLang's scheduler orders its queue by the longest match in
# this way; some bound on the waiting has to go with it.
# </details>
#
# **Back to** [the list of tutorials](README.md)

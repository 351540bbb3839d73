# %% [markdown]
# # 9 · The prefix cache
#
# **Question.** Every chat with an assistant begins with the same long instructions. Their keys and values are the same
# each time. How can an engine notice that, and be *sure* of it? And what should it forget first when memory gets tight?
#
# You will build a cache that finds blocks by their content, break it in two ways that real caches must guard against,
# and see why the order in which blocks are freed decides what survives.
#
# *45 minutes. You need Python, and [tutorial 3](03_blocks_and_tables.md). The paper
# ([PagedAttention](https://arxiv.org/abs/2309.06180), Kwon et al., SOSP 2023) shares prefixes that the operator names
# beforehand. Finding them automatically, in a chain of blocks, is how vLLM does it today.*

# %% [markdown]
# ## What a block depends on
#
# A token's key and value depend on the token *and on everything before it* ([tutorial 2](02_kv_cache.md), exercise 3).
# We need a stand-in for them that shows this. Ours is the text up to the token:


# %%
def kv(words, i):
    """Stands for the key and value of word i."""
    return " ".join(words[: i + 1])


x, y = "the cat saw a dog".split(), "one old cat saw a dog".split()
print("KV of 'dog' in x:", repr(kv(x, 4)))
print("KV of 'dog' in y:", repr(kv(y, 5)))

# %% [markdown]
# The same word, another KV. Now cut texts into blocks of 4 words. A full block never changes again, so it is a fine
# thing to keep. How shall we call it, so that it can be found?
#
# ## First try: by its own words


# %%
SIZE = 4


def blocks_of(words):
    """The full blocks of a text: (their words, their KV)."""
    ends = range(SIZE, len(words) + 1, SIZE)
    return [(tuple(words[e - SIZE : e]), [kv(words, i) for i in range(e - SIZE, e)]) for e in ends]


class ByWords:
    """Finds a block by the words in it."""

    def __init__(self):
        self.found = {}

    def keys(self, words):
        """What each full block of a text is called."""
        return [block for block, _ in blocks_of(words)]

    def serve(self, text):
        """Returns the number of blocks found, and whether the KV found is right. Then keeps all blocks."""
        words, hits, right = text.split(), 0, True
        for key, (_, true_kv) in zip(self.keys(words), blocks_of(words), strict=True):
            if key not in self.found:
                break  # from here on everything is computed
            hits += 1
            right &= self.found[key] == true_kv
        for key, (_, true_kv) in zip(self.keys(words), blocks_of(words), strict=True):
            self.found.setdefault(key, true_kv)
        return hits, right


RULES, JOKES = "you are very polite", "you tell silly jokes"
cache = ByWords()
for text in (
    RULES + " what is a block",
    RULES + " what is a table",
    JOKES + " what is a table",
    JOKES + " what is a block",
):
    hits, right = cache.serve(text)
    print(f"{text:40} {hits} block(s) found, right: {right}")

# %% [markdown]
# **Predict.** That is the output, and the last line is wrong. Before you read on: which block was taken for which, and
# why did the third line find nothing?
#
# <details><summary>Then look</summary>
#
# The third text's first block, the jokes, was new; so nothing behind it was looked up. It was kept. The fourth text
# finds the jokes, rightly, and goes on: "what is a block" is there, too. But that block was computed behind the
# *polite* rules. Its keys and values have looked at them. The assistant would now tell its jokes politely, and no error
# is raised anywhere.
# </details>
#
# ## Second try: a chain
#
# A block's name must stand for *everything up to its end*. Comparing whole prefixes would do, but they are long. So
# make a chain: the name of a block is a hash of (name of the block before it, its own words). If the names of two
# blocks are equal, their words are, and the names before them, and so on to the beginning.


# %%
from hashlib import sha256


class ByChain(ByWords):
    def hash(self, data):
        return int.from_bytes(sha256(repr(data).encode()).digest()[:8])  # 64 bits of it

    def keys(self, words):
        names, parent = [], 0
        for block, _ in blocks_of(words):
            parent = self.hash((parent, block))
            names.append(parent)
        return names


cache = ByChain()
for text in (
    RULES + " what is a block",
    JOKES + " what is a table",
    JOKES + " what is a block",
    RULES + " what is a block",
):
    hits, right = cache.serve(text)
    print(f"{text:40} {hits} block(s) found, right: {right}")

# %% [markdown]
# Now the third text finds its rules and no more, and the fourth finds all of itself. But "if the names are equal" was a
# little too quick.
#
# ## The trap: two texts, one name
#
# A hash is a number of so many bits, and there are more texts than numbers. Two prefixes may have the same hash: a
# **collision**. With a good hash of 64 bits that is rare; but if it happens, a user reads an answer to somebody else's
# prompt. And whoever can compute the hash can *search* for a collision. So let us. To be quick about it, the hash keeps
# 12 bits only.
#
# **Predict.** 12 bits, 4,096 possible names. Roughly how many prompts must one try until some two of them collide?
#
# <details><summary>Then look</summary>

# %%
from itertools import count


class ByShortHash(ByChain):
    def hash(self, data):
        return super().hash(data) % 2**12


cache, seen = ByShortHash(), {}
for number in count():
    prompt = f"the secret number is {number} and that is all"
    name = cache.keys(prompt.split())[-1]
    if name in seen:
        break
    seen[name] = prompt
print(f"after {len(seen)} prompts:")
print("  first: ", seen[name], "→", cache.serve(seen[name]))
print("  second:", prompt, "→", cache.serve(prompt))

# %% [markdown]
# It takes about as many as the square root of the number of names, 64: the birthday paradox. The second prompt "finds"
# two blocks that the first one left. The first of them, "the secret number is", is rightly found. The second holds the
# other one's number.
# </details>
#
# The cure costs nothing: do not *trust* a hash, *compare*. A Python dict does that by itself: it uses a hash to find an
# entry quickly, and then asks whether the keys are equal. So the key is the pair (name of the block before, words), and
# the name is simply a number that has never been used before.


# %%
class ByPair(ByWords):
    """The chain, by comparison: no two prefixes can ever have one name."""

    def __init__(self):
        super().__init__()
        self.names, self.numbers = {}, count(1)

    def keys(self, words):
        names, parent = [], 0
        for block, _ in blocks_of(words):
            if (parent, block) not in self.names:
                self.names[parent, block] = next(self.numbers)
            parent = self.names[parent, block]
            names.append(parent)
        return names


cache = ByPair()
print([cache.serve(text) for text in (seen[name], prompt, prompt)])

# %% [markdown]
# One block is found for the second prompt (the common beginning), and both for the third (the same text again).
#
# ## A cache without a memory of its own
#
# Where are cached blocks kept? In the pool. A block without owner is *free*: anybody may have it. But until somebody
# takes it, it still holds what it held. So the cache needs no memory of its own: it only remembers what free blocks
# hold.
#
# **Free and found are no opposites.** A hit takes the block out of the free list again. A new text takes the block at
# the *head* of that list, and then its content must be forgotten. Therefore the order of the free list decides what is
# forgotten first.

# %%
from collections import OrderedDict


class CachingPool:
    """Blocks, of which the free ones can still be found. One text runs at a time, to keep it short."""

    def __init__(self, num_blocks, tail_first=True):
        self.free = OrderedDict.fromkeys(range(num_blocks))  # in the order in which they are handed out
        self.index, self.key_of = {}, {}  # (parent, words) -> (name, block), and back
        self.numbers, self.tail_first = count(1), tail_first

    def allocate(self):
        block, _ = self.free.popitem(last=False)
        if block in self.key_of:  # what it held can no longer be found
            del self.index[self.key_of.pop(block)]
        return block

    def serve(self, text):
        """Runs a text to its end; returns its table, and how many of its blocks were found."""
        words, table, parent = text.split(), [], 0
        for end in range(SIZE, len(words), SIZE):  # stops before the last word: see below
            found = self.index.get((parent, tuple(words[end - SIZE : end])))
            if not found:
                break
            parent, block = found
            del self.free[block]
            table.append(block)
        hits = len(table)
        while len(table) * SIZE < len(words):
            table.append(self.allocate())
        for i in range(hits, len(words) // SIZE):  # now computed: can be found from here on
            key = parent, tuple(words[i * SIZE : (i + 1) * SIZE])
            if key not in self.index:
                self.index[key] = next(self.numbers), table[i]
                self.key_of[table[i]] = key
            parent = self.index[key][0]
        for block in reversed(table) if self.tail_first else table:
            self.free[block] = None
        return table, hits


RULES = "you are a polite assistant and you never tell any silly jokes about cats"  # 14 words: 3 blocks and a half
pool = CachingPool(8)
for question in ("so what is a block please", "so what is a table please"):
    table, hits = pool.serve(f"{RULES} {question}")
    print(f"table {table}, found {hits}; free now, next one first: {list(pool.free)}")

# %% [markdown]
# Both texts have 20 words, 5 blocks. They agree in 17 words. Four full blocks hold 16 words, so four were found.
#
# **Predict.** The very same text comes again, all 20 words, all 5 blocks full. How many blocks are found?
#
# <details><summary>Then look</summary>

# %%
table, hits = pool.serve(f"{RULES} so what is a table please")
print(f"found {hits} of {len(table)}")

# %% [markdown]
# Four, not five. The cache holds keys and values, but to go on the model needs the *logits* after the last word, and
# they are not stored. At least one token must be computed. Only whole blocks are shared, so the last block is computed
# anew.
# </details>
#
# ## Tail before head
#
# When a text ends, all of its blocks become free. In which order? A free list hands out its first block first. So
# whatever is freed first is forgotten first.
#
# **Predict.** A pool of 8 blocks. Text P (5 blocks: the rules and a question) runs and ends. Then a text Q of 5 other
# blocks: 3 come from blocks never used, 2 must be taken from P's. Then the rules come with a new question. How many
# blocks does it find, if P freed its tail first? If its head first?
#
# <details><summary>Then look</summary>

# %%
P = f"{RULES} so what is a block please"
Q = "once upon a time there was a farmer who lived alone on a very green hill by the sea"
for tail_first in (True, False):
    pool = CachingPool(8, tail_first)
    pool.serve(P)
    pool.serve(Q)
    kept = sum(set(words) <= set(P.split()) for _, words in pool.key_of.values())
    _, hits = pool.serve(f"{RULES} so what is a table please")
    print(f"{'tail' if tail_first else 'head'} first: {kept} of P's blocks still hold its KV, {hits} are found")

# %% [markdown]
# Both times P kept 3 of its 5 blocks. Tail first, these are the first three, and they are found. Head first, the first
# two are gone; the other three are still there and can never be found, because a search begins at the beginning. A tail
# without its head is garbage.
# </details>
#
# ## In the engine
#
# minipaged's index is your `ByPair`. Its names are never used twice, so the name of something that was forgotten can
# match nothing new. A `Hit` is a prefix's name and its block.

# %%
from show import source

from minipaged.core.prefix_cache import PrefixCache

source(PrefixCache.lookup)

# %%
source(PrefixCache.insert)

# %% [markdown]
# The search, block by block, which stops before the last token:

# %%
from minipaged.core.block_table import BlockTables

source(BlockTables.match)

# %% [markdown]
# And tail before head is these three signs: `[::-1]`. (`detach` removes the table and returns it.)

# %%
source(BlockTables.free)

# %% [markdown]
# On the real model: instructions of 40 tokens, blocks of 16. The third question is the first one again. The fourth
# prompt goes on with the first chat: instructions, question, answer, and two tokens more. The event `Admitted` tells
# how many tokens came from the cache.
#
# **Predict.** How many tokens will each of the four find?
#
# <details><summary>Then look</summary>

# %%
from minipaged import LLM, SamplingParams
from minipaged.events import Admitted, Scheduled

instructions = [100 + i for i in range(40)]  # token ids; their meaning does not matter here
questions = [[200, 201, 202], [300, 301, 302, 303], [200, 201, 202]]


def ask(**settings):
    llm = LLM("tiny", device="cpu", num_blocks=32, **settings)
    events, outputs = [], []
    llm.engine.events.subscribe(events.append)
    for question in questions:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        outputs.append(llm.generate(instructions + question, params)[0].outputs[0].token_ids)
    llm.generate(instructions + questions[0] + outputs[0] + [400, 401], params)  # the first chat goes on
    cached = [event.num_cached for event in events if isinstance(event, Admitted)]
    rows = sum(event.num_tokens for event in events if isinstance(event, Scheduled))
    return outputs, cached, rows


with_cache, cached, rows = ask()
print(f"with the cache:    tokens found {cached}, {rows} rows computed")
without, cached, rows = ask(enable_prefix_caching=False)
print(f"without the cache: tokens found {cached}, {rows} rows computed")
print("same output:", with_cache == without)

# %% [markdown]
# 40 tokens are common, but only two full blocks of them: 32. The third prompt is the first one again, 43 tokens, and
# finds no more than that, because its third block is not full. But in the first chat it *became* full, with the answer.
# So the fourth prompt finds three blocks, 48 tokens. That is what a chat does: each turn brings all earlier ones along.
# </details>
#
# ## In the visualizer
#
# Start `make demo` (or `minipaged visualize`), and choose **Shared system prompt** from the menu *scenario*. Dotted
# blocks are free, but still know what they hold. The last question comes when everybody has gone, and finds them. The
# page asks you how many tokens will be found; the tab *Prefix cache* counts them.
#
# Source lines: [`minipaged/core/prefix_cache.py`](../minipaged/core/prefix_cache.py); `match`, `mark_computed` and
# `free` in [`minipaged/core/block_table.py`](../minipaged/core/block_table.py); `BlockPool.allocate` in
# [`minipaged/core/pool.py`](../minipaged/core/pool.py).
#
# ## Exercises
#
# **1. Count the hits.** Blocks of 16. A prompt of 100 tokens has run. How many tokens does each of these find: the same
# prompt; its first 64 tokens and nothing else; its first 65; the prompt with token 20 changed; the prompt with one
# token put in front? Check with `BlockTables.match`.
#
# <details><summary>Answer</summary>

# %%
from minipaged.core.plan import Write

tables, prompt = BlockTables(num_blocks=16, block_size=16), list(range(100))
tables.open(0)
tables.reserve(Write(0, 0, 100))
tables.mark_computed(0, prompt, 100)
for what, tokens in {
    "the same": prompt,
    "the first 64": prompt[:64],
    "the first 65": prompt[:65],
    "token 20 changed": [*prompt[:20], 999, *prompt[21:]],
    "one put in front": [999, *prompt],
}.items():
    print(f"{what:17} {16 * len(tables.match(tokens)):3} tokens found")

# %% [markdown]
# 100 tokens fill 6 blocks, 96 tokens. The first 64 alone find 48, since one token must be left to compute. After a
# change everything behind it is lost. A token in front shifts every block: nothing is found. So put what changes (a
# date, a user's name) at the *end* of a system prompt.
# </details>
#
# **2. Another order.** Least recently used is one policy. Write another: *most* recently used goes first. It needs
# three methods (see `EvictionPolicy` in the file above), and can be plugged into the engine. When is it better than
# LRU? Try a pool of 12 blocks and five prompts of 3 blocks each that come again and again in turn.
#
# <details><summary>Answer</summary>


# %%
class MostRecent:
    """Gives up the block that became free last."""

    def __init__(self):
        self.blocks = []

    def add(self, block):
        self.blocks.append(block)

    def remove(self, block):
        self.blocks.remove(block)

    def evict(self):
        return self.blocks.pop()


def found(policy):
    tables, total = BlockTables(num_blocks=12, block_size=4, policy=policy), 0
    for number in range(50):
        prompt = [100 * (number % 5) + i for i in range(12)]
        hits = tables.match(prompt)
        tables.open(number, hits)
        tables.reserve(Write(number, 4 * len(hits), 12))
        tables.mark_computed(number, prompt, 12)
        tables.free(number)
        tables.check()
        total += len(hits)
    return total


from minipaged.core.prefix_cache import LRU

print("LRU: ", found(LRU()), "blocks found of at most", 2 * 45)
print("MRU: ", found(MostRecent()), "blocks found of at most", 2 * 45)

# %% [markdown]
# Going round in a circle that is a little too large is LRU's worst case: it always forgets what comes next. Most recent
# first keeps some of the circle. Only some, since of the latest prompt it gives up the *head* first, which was freed
# last, and a tail without its head is garbage. To use it on an engine: `LLM("tiny", eviction_policy=MostRecent)`.
# </details>
#
# **3. What the cache tells.** A hit is quicker than a miss. Mallory shares a server with Alice. How can she find out
# whether Alice has asked "is my boss a crook", and what is the cheapest cure? Change `CachingPool.serve` so that only
# prompts of the same tenant share.
#
# <details><summary>Answer</summary>
#
# She sends the same prompt and measures the time until the first token: quick means that somebody has asked it. She can
# even guess it block by block. The cure: each tenant begins its chain at a name of its own instead of at 0.


# %%
class TenantPool(CachingPool):
    def serve(self, text, tenant=""):
        salt = [f"<{tenant}>"] * SIZE  # a block of its own in front: other tenants' chains begin differently
        table, hits = super().serve(" ".join([*salt, *text.split()]))
        return table, max(0, hits - 1)


pool = TenantPool(32)
secret = "is my boss a crook or is it me who is a crook"
pool.serve(secret, "alice")
for tenant in ("alice", "mallory"):
    print(f"{tenant}: {pool.serve(secret, tenant)[1]} blocks found")

# %% [markdown]
# Nobody but Alice finds Alice's blocks. (This answer spends a block on the salt, which keeps `serve` as it was. To
# start the chain with `parent = tenant` instead of `parent = 0` spends none: change that line in a copy of `serve`.)
# The price is that tenants no longer share common instructions either.
# </details>
#
# **Back to** [the list of tutorials](README.md)

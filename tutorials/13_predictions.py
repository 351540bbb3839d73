# %% [markdown]
# # 13 · Predictions of one bit
#
# **Question.** A cache is full, and something has to go. The best choice is known: what will be needed latest. But who
# knows the future? Say somebody *guesses*, one bit for each request: "will be needed again" or "will not". How good can
# a cache become with such bits, and how bad, if the guesses are wrong?
#
# You will build a cache of pages, find the best that any cache can do, let two algorithms listen to bits, break the
# bits in two ways that do not hurt alike, and watch minipaged's prefix cache listen to a guess about chats.
#
# *45 minutes. You need Python, and [tutorial 9](09_prefix_cache.md). "The paper" is
# [Paging with Succinct Predictions](https://arxiv.org/abs/2210.02775) (Antoniadis et al., ICML 2023). It is about pages
# in general; that blocks of a prefix cache are such pages is minipaged's use of it.*

# %% [markdown]
# ## Pages, hits and faults
#
# A cache has room for `k` pages. A request for a page that is there is a *hit*; else it is a *fault*, the page is
# brought in, and if the cache is full another page goes. Which one? That is all there is to decide. Here is the cache,
# with least recently used (LRU) as its rule:


# %%
import random


class LRU:
    def __init__(self, k):
        self.k, self.pages = k, []  # oldest first

    def request(self, page, bit=0):
        """Returns whether it was a fault."""
        fault = page not in self.pages
        if not fault:
            self.pages.remove(page)
        elif len(self.pages) == self.k:
            self.pages.remove(self.victim())
        self.pages.append(page)
        return fault

    def victim(self):
        return self.pages[0]


def faults(cache, requests, bits=None):
    return sum(cache.request(page, bit) for page, bit in zip(requests, bits or [0] * len(requests), strict=True))


rng = random.Random(0)
requests = []
while len(requests) < 3000:
    if rng.random() < 0.02:  # a scan: ten pages, never asked for again
        requests += [f"scan {len(requests)}.{i}" for i in range(10)]
    else:
        requests.append(min(int(rng.paretovariate(0.7)), 200))  # some pages are asked for much more often
K = 20
print(f"{len(requests)} requests for {len(set(requests))} pages; LRU: {faults(LRU(K), requests)} faults")

# %% [markdown]
# ## The best there is
#
# In 1966 Belady said what the best rule is: evict the page that is *requested latest* from now on. No rule makes fewer
# faults. It needs the future, so it is no rule for an engine, but it is the ruler against which all others are
# measured.


# %%
def next_use(requests):
    """For each request when its page is requested next; never: infinity."""
    upcoming, result = {}, [0.0] * len(requests)
    for now in reversed(range(len(requests))):
        result[now] = upcoming.get(requests[now], float("inf"))
        upcoming[requests[now]] = now
    return result


def belady(requests, k):
    """The number of faults, and for each request whether its page was evicted before it was requested again."""
    coming, cache, count, discarded = next_use(requests), {}, 0, [0] * len(requests)
    for now, page in enumerate(requests):
        if page not in cache:
            count += 1
            if len(cache) == k:
                victim = max(cache, key=lambda held: coming[cache[held]])
                discarded[cache.pop(victim)] = 1
        cache[page] = now  # its latest request
    return count, discarded


best, right_bits = belady(requests, K)
print(f"Belady: {best} faults; after {sum(right_bits)} of {len(requests)} requests it evicted the page unused")

# %% [markdown]
# ## One bit
#
# `right_bits` is all that a cache needs to know of the future: one bit for each request. **1**: Belady would evict this
# page before it is requested again. **0**: it would keep it. The bit comes with the request, and the page keeps it
# until its next request.
#
# The simplest rule that listens, called *FlushWhenAll0*: evict a page with bit 1. If there is none, empty the cache.


# %%
class FlushWhenAll0(LRU):
    def __init__(self, k):
        super().__init__(k)
        self.bits = {}

    def request(self, page, bit=0):
        fault = page not in self.pages
        if fault and len(self.pages) == self.k:
            ones = [held for held in self.pages if self.bits[held]]
            if ones:
                self.pages.remove(ones[0])
            else:
                self.pages.clear()
        if fault:
            self.pages.append(page)
        self.bits[page] = bit
        return fault


# %% [markdown]
# **Predict.** With all bits right: how many faults does FlushWhenAll0 make? More than Belady, fewer, or as many? And
# how often does it empty the cache?
#
# <details><summary>Then look</summary>

# %%
print("FlushWhenAll0:", faults(FlushWhenAll0(K), requests, right_bits), "faults. Belady:", best)

# %% [markdown]
# Exactly as many, and the cache is never emptied. Why? A page with bit 0 is one that Belady still holds. If all pages
# in our cache had bit 0, and a fault came, Belady would hold all of them *and* the new page: k + 1 pages in a cache for
# k. So there is always a 1. And it does not matter which of the 1s goes: none of them will be a hit.
# </details>
#
# ## Wrong bits
#
# Nobody predicts without errors. There are two kinds, and they are counted apart: a **wrong 0** (the page will not be
# needed, but is kept) and a **wrong 1** (it will be needed, but is thrown away).
#
# **Predict.** Let one bit in ten be wrong, first only 0s that should be 1, then only 1s that should be 0. Which costs
# FlushWhenAll0 more?
#
# <details><summary>Then look</summary>


# %%
def spoil(bits, kind, rate, seed=1):
    """Makes this part of the bits of one kind wrong: a 0 that should be 1 is made of a 1."""
    rng = random.Random(seed)
    return [1 - bit if bit != kind and rng.random() < rate else bit for bit in bits]


print("right bits:     ", faults(FlushWhenAll0(K), requests, right_bits), "faults")
for kind in (0, 1):
    bits = spoil(right_bits, kind, 0.1)
    wrong = sum(a != b for a, b in zip(bits, right_bits, strict=True))
    print(f"{wrong:3} wrong {kind}s:   ", faults(FlushWhenAll0(K), requests, bits), "faults")
print("LRU, no bits:   ", faults(LRU(K), requests))

# %% [markdown]
# A wrong 1 costs one fault at most: a page that is missing once. A wrong 0 stays in the cache like a stone. When there
# are k stones, everything is thrown away, and that costs up to k − 1 pages that were good. The paper proves it: with
# η₀ wrong 0s and η₁ wrong 1s, there are at most OPT + (k − 1)·η₀ + η₁ faults, where OPT are Belady's.
# </details>
#
# ## A net to fall into
#
# Emptying the cache is rash. When no bit helps, one could do what one would do without bits. *Marking* does well then:
# a page that is used gets a mark, a random page *without* a mark goes, and when all are marked, all marks are wiped
# off. A wrong 0 then costs not k − 1 pages in the worst case but about log k in the mean.


# %%
class Mark0(LRU):
    def __init__(self, k, seed=0):
        super().__init__(k)
        self.bits, self.marked, self.random = {}, set(), random.Random(seed)

    def request(self, page, bit=0):
        fault = super().request(page)
        self.bits[page] = bit
        self.marked.add(page)
        return fault

    def victim(self):
        ones = [held for held in self.pages if self.bits[held]]
        if ones:
            return self.random.choice(ones)
        if self.marked >= set(self.pages):
            self.marked.clear()
        return self.random.choice([held for held in self.pages if held not in self.marked])


def flip(bits, rate, seed=2):
    """Makes this part of all bits wrong."""
    rng = random.Random(seed)
    return [1 - bit if rng.random() < rate else bit for bit in bits]


print("wrong bits   FlushWhenAll0   Mark0")
for rate in (0, 0.1, 0.3, 1):
    bits = flip(right_bits, rate)
    print(f"{rate:10.0%} {faults(FlushWhenAll0(K), requests, bits):15} {faults(Mark0(K), requests, bits):7}")
print(f"Belady: {best}, LRU: {faults(LRU(K), requests)}")

# %% [markdown]
# With right bits both are Belady. With some errors Mark0 stays nearer to it. And if *all* bits are wrong, it throws
# away all that is good and keeps all that is not: who believes everything can be fooled completely. (To make a rule
# that is never much worse than marking, stop listening when the bits have been wrong too often.)
#
# ## Pages that hang together
#
# In the prefix cache a page is a block, and blocks make trees: a search begins at the root. A block whose beginning is
# gone is garbage ([tutorial 9](09_prefix_cache.md)). So whatever the rule says: **leaves first**. minipaged's policies
# look only at blocks that no other evictable block continues:

# %%
from show import source

from minipaged.core.prefix_cache import LRU as EnginesLRU
from minipaged.features.eviction.policies import FlushWhenAll0 as EnginesFlush
from minipaged.features.eviction.policies import LeafFirst, Marker
from minipaged.features.eviction.policies import Mark0 as EnginesMark0

source(EnginesLRU.leaves)

# %%
source(EnginesFlush.choose)

# %%
source(EnginesMark0.choose)

# %% [markdown]
# (`EnginesFlush` empties the cache only as blocks are needed: a block that nobody has taken yet can still be found.)
#
# ## A guess about chats
#
# Where do bits come from, in an engine? A chat that goes on sends all that was said before, and finds it in the cache.
# A chat that has ended never will. So the question is: *was this the last turn?* minipaged's `LastTurn` looks at how
# many turns there have been, and whether the user said thanks or goodbye. It counts, of the chats it has seen, how many
# went on after such a turn and how many did not, and says what the majority did.

# %%
from minipaged.features.eviction.prediction import LastTurn

source(LastTurn.expects_end)

# %% [markdown]
# Now a small office: 8 chats at a time. Three in ten have one turn, the others three. In most last turns, but not all,
# somebody says goodbye (token 99), and sometimes somebody says it and comes back. One prompt at a time goes through
# minipaged's real block tables, in a pool of 40 blocks of 4 tokens. Before its blocks are freed, `note` keeps its bit
# with them. (In the engine the stage `Predictions` does this.)


# %%
def turns(rng, number):
    """The prompts of one chat. Each begins with all of the one before."""
    count, said = rng.choice((1, 3, 3)), []
    for turn in range(1, count + 1):
        bye = rng.random() < (0.8 if turn == count else 0.05)
        said = said + [1000 * number + 100 * turn + i for i in range(10)] + [99 if bye else 98]
        yield said


def office(seed=0, chats=150, at_once=8):
    rng, number, result = random.Random(seed), 0, []
    rooms = []
    while number < chats:
        while len(rooms) < at_once:
            number += 1
            rooms.append(turns(rng, number))
        room = rng.choice(rooms)
        prompt = next(room, None)
        if prompt is None:
            rooms.remove(room)
        else:
            result.append(prompt)
    return result


from minipaged.core.block_table import BlockTables, Demand
from minipaged.core.plan import Write


def found(policy, prompts, num_blocks=40):
    """The part of all prompts' tokens that was found in the cache."""
    tables, hit = BlockTables(num_blocks, 4, policy=policy), 0
    predict = getattr(policy, "predict", None)
    for number, prompt in enumerate(prompts):
        hits = tables.match(prompt)
        tables.open(number, hits, Demand([len(prompt)], len(prompt), len(prompt), 1))
        tables.reserve(Write(number, 4 * len(hits), len(prompt)))
        tables.mark_computed(number, prompt, len(prompt))
        if predict:
            policy.note(tables.tables[number], predict(prompt))
        tables.free(number)
        tables.check()
        hit += 4 * len(hits)
    return hit / sum(map(len, prompts))


def says_goodbye(tokens):
    return tokens[-1] == 99


prompts = office()
last = {tuple(prompt) for prompt in prompts if not any(p[: len(prompt)] == prompt and p != prompt for p in prompts)}
print(f"{len(prompts)} prompts, of which {len(last)} are last turns; {sum(map(says_goodbye, prompts))} say goodbye")

# %% [markdown]
# **Predict.** Of all tokens in the prompts, LRU finds a part in the cache. Does it find more with guessed last turns?
# And if they are *known*, can anything be better still?
#
# <details><summary>Then look</summary>

# %%
known = EnginesMark0(lambda tokens: tuple(tokens) in last)
print(f"marking:               {found(Marker(), prompts):.1%} found")
print(f"LRU:                   {found(EnginesLRU(), prompts):.1%} found")
print(f"Mark0, guessed:        {found(EnginesMark0(LastTurn(says_goodbye, patience=30)), prompts):.1%} found")
print(f"Mark0, known:          {found(known, prompts):.1%} found")
print(f"LRU, 5,000 blocks:     {found(EnginesLRU(), prompts, num_blocks=5000):.1%} found")

# %% [markdown]
# Guesses are nearly as good as knowledge here, and knowledge finds nearly all that could ever be found. That is because
# this office is kind to guesses: who has ended is the *only* thing that matters, and most people say goodbye. On chats
# with long breaks, where many more are open than fit, knowing who has ended helps less: one would have to know *when*
# the others come back. `minipaged experiments run eviction` measures such chats on the whole engine.
# </details>
#
# On an engine: `LLM("tiny", eviction="mark-0")`, or `minipaged serve --eviction mark-0`. There words of goodbye are
# looked for in the text.
#
# ## In the visualizer
#
# Start `make demo` (or `minipaged visualize`), and choose **Who comes back?** from the menu *scenario*. When a chat has
# its answer, its cached blocks are marked 0 or 1. The page asks you which block goes first, and says of every eviction
# why it was this one.
#
# Source lines: `note` and the rules in
# [`minipaged/features/eviction/policies.py`](../minipaged/features/eviction/policies.py), `LastTurn` in
# [`prediction.py`](../minipaged/features/eviction/prediction.py), `Predictions` in
# [`predictions.py`](../minipaged/features/eviction/predictions.py); `LRU`, `retire` and `evict` in
# [`minipaged/core/prefix_cache.py`](../minipaged/core/prefix_cache.py).
#
# ## Exercises
#
# **1. Attack the bound.** FlushWhenAll0 makes at most OPT + (k − 1)·η₀ + η₁ faults. Try it on 2,000 random sequences
# with random bits, for caches of 1 to 4 pages. Does the bound always hold? How near does anything come to it? Find a
# sequence and bits that meet it exactly, with at least one wrong 0.
#
# <details><summary>Answer</summary>

# %%
rng, slack, worst = random.Random(4), [], None
for _ in range(2000):
    k = rng.randint(1, 4)
    pages = [rng.randrange(k + 2) for _ in range(rng.randint(5, 25))]
    opt, right = belady(pages, k)
    bits = spoil(right, rng.choice((0, 1)), rng.random(), seed=rng.random())
    wrong_0 = sum(a == 0 != b for a, b in zip(bits, right, strict=True))
    wrong_1 = sum(a == 1 != b for a, b in zip(bits, right, strict=True))
    slack.append(opt + (k - 1) * wrong_0 + wrong_1 - faults(FlushWhenAll0(k), pages, bits))
    if slack[-1] == 0 and wrong_0 and k > 2 and (worst is None or len(pages) < len(worst[0])):
        worst = pages, bits, right, k
print(f"least slack {min(slack)}; none at all in {sum(s == 0 for s in slack)} of {len(slack)} runs")
pages, bits, right, k = worst
print(f"room for {k}, requests {pages}\n  bits  {bits}\n  right {right}")
print(f"Belady {belady(pages, k)[0]}, FlushWhenAll0 {faults(FlushWhenAll0(k), pages, bits)}")

# %% [markdown]
# It holds, and it is tight: after a single wrong 0 everything is thrown away and asked for again. With Mark0 a wrong 0
# costs at most 2·(1 + 1/2 + … + 1/k) in the mean.
# </details>
#
# **2. Any block, or any leaf?** Write a policy that evicts a *random* block, wherever in its tree it is (three methods,
# `add`, `remove`, `evict`, as in exercise 2 of tutorial 9), and another one that evicts a random *leaf* (derive it from
# `LeafFirst`; `choose` returns a block, and a reason in words). Compare them on the chats, in the mean over ten seeds.
#
# <details><summary>Answer</summary>


# %%
class AnyBlock:
    def __init__(self, seed):
        self.blocks, self.random = [], random.Random(seed)

    def add(self, block):
        self.blocks.append(block)

    def remove(self, block):
        self.blocks.remove(block)

    def evict(self):
        block = self.random.choice(self.blocks)
        self.blocks.remove(block)
        return block


class AnyLeaf(LeafFirst):
    def __init__(self, seed):
        super().__init__()
        self.random = random.Random(seed)

    def choose(self):
        return self.random.choice(list(self.leaves())), "a leaf, at random"


for kind in (AnyBlock, AnyLeaf):
    print(f"{kind.__name__:9} {sum(found(kind(seed), prompts) for seed in range(10)) / 10:.1%} found")

# %% [markdown]
# Chance hits a beginning as often as an end, and then everything behind it is lost, though it still lies in the pool.
# </details>
#
# **3. When to stop listening.** If all bits are wrong, Mark0 is far worse than a cache without bits. Make it doubt: at
# each eviction it takes one page with a 1 and watches it, whether it evicts it or not. If that page is asked for soon,
# before k pages have been brought in, the 1 was wrong. While more than half of the latest 1s that it watched were
# wrong, it goes by marks alone. What does the doubt cost with right bits, and what does it save with wrong ones?
#
# <details><summary>Answer</summary>


# %%
class Doubting(Mark0):
    def __init__(self, k, seed=0):
        super().__init__(k, seed)
        self.suspects, self.verdicts, self.clock = {}, [0] * 20, 0  # page -> when it was evicted; 1: wrong

    def request(self, page, bit=0):
        if page not in self.pages:
            self.clock += 1
        if page in self.suspects:
            soon = self.clock - self.suspects.pop(page) <= self.k
            self.verdicts = [*self.verdicts[1:], int(soon)]
        for old in [p for p, when in self.suspects.items() if self.clock - when > self.k]:
            del self.suspects[old]
            self.verdicts = [*self.verdicts[1:], 0]
        return super().request(page, bit)

    def victim(self):
        ones = [held for held in self.pages if self.bits[held]]
        if ones:
            self.suspects.setdefault(self.random.choice(ones), self.clock)
        if sum(self.verdicts) <= len(self.verdicts) / 2:
            return super().victim()
        if self.marked >= set(self.pages):
            self.marked.clear()
        return self.random.choice([held for held in self.pages if held not in self.marked])


print("wrong bits    Mark0   Doubting")
for rate in (0, 0.1, 0.3, 1):
    bits = flip(right_bits, rate)
    print(f"{rate:10.0%} {faults(Mark0(K), requests, bits):8} {faults(Doubting(K), requests, bits):10}")
print(f"no bits: marking {faults(Mark0(K), requests)}")

# %% [markdown]
# Right bits cost nothing, and if all are wrong it comes near to marking. In between it sometimes stops listening to
# bits that still helped. Since it goes on watching while it does not listen, it can begin to trust again.
# </details>
#
# **Back to** [the list of tutorials](README.md)

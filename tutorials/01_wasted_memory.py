# %% [markdown]
# # 1 · Wasted KV memory
#
# **Question.** A GPU has room for the KV cache of 15,728 tokens. A conversation is 500 tokens long on average. So about
# 31 conversations should fit at once. The systems of 2022 ran **7**. Where did the rest go?
#
# You will write an allocator like theirs, in 30 lines, fill it with conversations, and give every lost slot a name.
# Then you will see the same accounting in minipaged.
#
# *35 minutes. You need Python, and nothing else: no GPU, no knowledge of attention. "The paper" is
# [PagedAttention](https://arxiv.org/abs/2309.06180) (Kwon et al., SOSP 2023).*

# %% [markdown]
# ## What a token costs
#
# A language model writes one token at a time. For every token that it has read or written it keeps a *key* and a
# *value* in every layer, because every later token will look at them. That store is the **KV cache**. (Why it exists is
# [tutorial 2](02_kv_cache.md); here it is enough that it does.) A **slot** is the room for one token.
#
# For one token the cache holds 2 vectors (key and value) × layers × KV heads × head dimension × bytes of a number.


# %%
def bytes_per_token(layers, kv_heads, head_dim, bytes_per_number):
    return 2 * layers * kv_heads * head_dim * bytes_per_number


opt_13b = bytes_per_token(layers=40, kv_heads=40, head_dim=128, bytes_per_number=2)  # 16-bit numbers
tiny = bytes_per_token(layers=4, kv_heads=4, head_dim=32, bytes_per_number=4)  # minipaged's own model, 32-bit
print(f"OPT-13B: {opt_13b:,} bytes = {opt_13b // 1024} KB for one token")
print(f"tiny:    {tiny:,} bytes =   {tiny // 1024} KB for one token")

# %% [markdown]
# 800 KB for one token: that is the paper's own example. A text of 2,048 tokens, the longest that OPT can read, takes
# 1.6 GB. An A100 with 40 GB holds 26 GB of weights and has 12 GB left for the KV cache (the paper's numbers; a GB is
# 1024³ bytes here):

# %%
SLOTS = 12 * 1024**3 // opt_13b
print(f"{SLOTS:,} slots")

# %% [markdown]
# ## Conversations
#
# We need some. The generator below makes lengths *like* those of ShareGPT, the collection of real conversations that
# the paper measures with: long-tailed, 161 tokens of prompt and 338 of output on average. They are drawn at random
# from two distributions, not taken from the collection.

# %%
import random
from itertools import islice
from statistics import fmean

LONGEST = 2048  # tokens, prompt and output together


def conversations(seed=0):
    """Endless pairs (prompt tokens, output tokens)."""
    rng = random.Random(seed)
    while True:
        prompt, output = round(rng.lognormvariate(4.590, 1.2)), round(rng.lognormvariate(5.507, 0.85))
        if 4 <= prompt <= 1024 and 4 <= output and prompt + output <= LONGEST:
            yield prompt, output


many = list(islice(conversations(), 20_000))
print("the first five:", many[:5])
print(f"mean prompt {fmean(p for p, _ in many):.0f}, mean output {fmean(o for _, o in many):.0f}")
print(f"{SLOTS / fmean(p + o for p, o in many):.1f} average conversations fill {SLOTS:,} slots")

# %% [markdown]
# ## An allocator of 2022
#
# Attention kernels used to want the keys of one text in one piece of memory, one after the other. So a text got one
# contiguous piece when it started. This is such an allocator: first fit, with a list of holes.


# %%
class Contiguous:
    """Pieces of a pool of slots, each in one place."""

    def __init__(self, size):
        self.holes = [(0, size)]  # (start, length), in order of start

    def allocate(self, length):
        """The start of a piece, from the first hole that is large enough; None if there is none."""
        for i, (start, room) in enumerate(self.holes):
            if room >= length:
                self.holes[i : i + 1] = [(start + length, room - length)] if room > length else []
                return start
        return None

    def free(self, start, length):
        """Gives a piece back and joins the holes that now touch."""
        holes = []
        for hole in sorted([*self.holes, (start, length)]):
            if holes and sum(holes[-1]) == hole[0]:
                holes[-1] = (holes[-1][0], holes[-1][1] + hole[1])
            else:
                holes.append(hole)
        self.holes = holes


pool = Contiguous(100)
a, b, c = pool.allocate(30), pool.allocate(40), pool.allocate(20)
print("pieces start at", a, b, c, "- holes:", pool.holes)
pool.free(a, 30)
print("the first one is gone - holes:", pool.holes)
print("free slots:", sum(length for _, length in pool.holes), "- a piece of 35:", pool.allocate(35))

# %% [markdown]
# Look at the last line: 40 slots are free, and a piece of 35 cannot be had. The free slots are not in one place. This
# is **external** waste, the first of three kinds.
#
# The other two come from a question that an allocator like this must answer when a text *starts*: how long will it get?
# Nobody knows. The model ends a text when it likes. So one must guess, and guess high, because a piece cannot grow when
# another one begins right behind it. The safest guess is the longest length there is.
#
# **Predict.** Every conversation gets a piece of 2,048 slots, in a pool of 15,728. How many run at once? Which
# percentage of the pool can no conversation use, at any moment?
#
# <details><summary>Then look</summary>

# %%
pool = Contiguous(SLOTS)
running = 0
while pool.allocate(LONGEST) is not None:
    running += 1
left = sum(length for _, length in pool.holes)
print(f"{running} conversations; {left:,} slots left over, {100 * left / SLOTS:.2f} % of the pool")

# %% [markdown]
# Seven. This needs no data at all: ⌊15,728 / 2,048⌋ = 7. It is the number that the paper measured for this way of
# reserving, which it calls *Orca (Max)*.
# </details>
#
# ## Where the slots are
#
# Inside a piece there are two more kinds of waste. Take one conversation: 161 tokens of prompt, and it will write 338,
# but nobody knows that. It has written 100 so far.

# %%
from show import BLUE, EMPTY, ORANGE, PINK, SKY, box, drawing, label

prompt, output, written = 161, 338, 100
token = prompt + written  # hold a key and a value
reserved = output - written  # will hold one later; blocked until then
internal = LONGEST - prompt - output  # will never hold one
KINDS = {"token": BLUE, "reserved": SKY, "internal": ORANGE, "external": PINK}


def bars(rows, alt, scale=6.4):
    """One bar of 100 % per row; rows: {name: {kind: percent}}."""
    shapes = []
    for i, (name, parts) in enumerate(rows.items()):
        x, y = 110, 10 + 34 * i
        shapes.append(label(100, y + 17, name, "end"))
        for kind, percent in parts.items():
            if percent:
                text = f"{percent:.0f}" if percent >= 4 else ""
                shapes.append(box(x, y, percent * scale, 26, KINDS.get(kind, EMPTY), text))
                x += percent * scale
    y = 26 + 34 * len(rows)
    for i, (kind, colour) in enumerate(KINDS.items()):
        shapes += [box(110 + 130 * i, y, 14, 14, colour), label(130 + 130 * i, y + 12, kind)]
    return drawing(770, y + 26, shapes, alt)


piece = {"token": token, "reserved": reserved, "internal": internal}
print(piece, "sum", sum(piece.values()))
bars(
    {"one piece": {kind: 100 * slots / LONGEST for kind, slots in piece.items()}},
    "A piece of 2,048 slots: 13 % hold tokens, 12 % are reserved for later, 76 % will never be used",
)

# %% [markdown]
# The paper's names, which minipaged uses too:
#
# | class | meaning |
# | --- | --- |
# | **token** | holds the key and value of a token |
# | **reserved** | will hold one later; until then nobody else may use it |
# | **internal** | will never hold one: the text ends before. Known only when it has ended |
# | **external** | free, but not in a piece that anybody can use |
#
# ## Better guesses
#
# The paper compares three, on top of a system called Orca:
#
# - **Max** reserves the longest possible length.
# - **Pow2** reserves the prompt and the output rounded up to a power of two (it is told that much).
# - **Oracle** is told the true length. No real system can be. It is the best that reserving can do.
#
# We run a pool that is always full: there is always a next conversation waiting, and it starts as soon as a piece for
# it is found. In a step, every running conversation writes one token.


# %%
def pow2(n):
    return 1 << (n - 1).bit_length()


GUESSES = {
    "Max": lambda prompt, output: LONGEST,
    "Pow2": lambda prompt, output: min(prompt + pow2(output), LONGEST),
    "Oracle": lambda prompt, output: prompt + output,
}


def serve(guess, steps=40_000, warm_up=500):
    """Returns the mean number of conversations at once, and the mean percentage of each class."""
    pool, coming = Contiguous(SLOTS), conversations()
    waiting = next(coming)
    running = []  # [start, length of the piece, tokens, final length]
    batch, sums = [], dict.fromkeys(KINDS, 0.0)
    for step in range(steps):
        while (start := pool.allocate(guess(*waiting))) is not None:
            prompt, output = waiting
            running.append([start, guess(prompt, output), prompt, prompt + output])
            waiting = next(coming)
        if step >= warm_up:
            batch.append(len(running))
            sums["token"] += sum(tokens for _, _, tokens, _ in running)
            sums["reserved"] += sum(final - tokens for _, _, tokens, final in running)
            sums["internal"] += sum(length - final for _, length, _, final in running)
            sums["external"] += SLOTS - sum(length for _, length, _, _ in running)
        for conversation in running:
            conversation[2] += 1
        for start, length, tokens, final in running:
            if tokens == final:
                pool.free(start, length)
        running = [c for c in running if c[2] < c[3]]
    return fmean(batch), {kind: 100 * total / SLOTS / len(batch) for kind, total in sums.items()}


# %% [markdown]
# **Predict.** With Max, 7 run at once, and about 9 % of the pool is external waste. Which percentage holds tokens?
# Nearer to 50 %, 35 % or 20 %? And how far can the Oracle get: is 100 % possible?
#
# <details><summary>Then look</summary>

# %%
served = {name: serve(guess) for name, guess in GUESSES.items()}
for name, (mean_batch, shares) in served.items():
    print(f"{name:7} {mean_batch:4.1f} at once  ", "  ".join(f"{k} {v:4.1f} %" for k, v in shares.items()))
bars({name: shares for name, (_, shares) in served.items()}, "Shares of the pool by class, for Max, Pow2 and Oracle")

# %% [markdown]
# With Max, four fifths of the memory do nothing. Even the Oracle, which knows the future, leaves a third to *reserved*:
# a text takes all of its final length on its first step, and fills it only on its last.
#
# The paper measured (mean number at once, token share): Max 7.00, 20.4 %; Pow2 9.81, 26.8 %; Oracle 13.62, 38.2 %.
# Ours is the same for Max and *better* than the paper's for the other two. The reason is external waste: Orca's pieces
# come from a *buddy allocator*, which hands out powers of two only. Exercise 2 does that.
# </details>
#
# ## What would help
#
# Both *reserved* and *internal* come from deciding once, at the start. *External* comes from pieces of different sizes.
# So: decide again and again, and make all pieces the same size. A piece of fixed size is a **block**. A text takes a
# block when its last one is full, and not before. How a text is put together from blocks that lie anywhere is
# [tutorial 3](03_blocks_and_tables.md). Here we only count.
#
# Blocks can run out in the midst of a text. Then the latest arrival gives all of its blocks back and starts over later.


# %%
def serve_in_blocks(block_size, steps=10_000, warm_up=500):
    num_free, coming = SLOTS // block_size, conversations()
    waiting = [next(coming)]
    running = []  # [tokens, final length], in order of arrival
    batch, shares = [], []

    def blocks(tokens):
        return -(-tokens // block_size)  # rounded up

    for step in range(steps):
        while blocks(waiting[-1][0]) <= num_free - len(running):  # each running one may want a block in this step
            prompt, output = waiting.pop()
            num_free -= blocks(prompt)
            running.append([prompt, prompt + output])
            waiting = waiting or [next(coming)]
        if step >= warm_up:
            batch.append(len(running))
            shares.append(100 * sum(tokens for tokens, _ in running) / SLOTS)
        for i in range(len(running)):
            if i < len(running) and running[i][0] % block_size == 0:  # its last block is full
                while num_free == 0:
                    tokens, final = running.pop()
                    num_free += blocks(tokens)
                    waiting.append((tokens, final - tokens))
                num_free -= i < len(running)
            if i < len(running):  # else it has been thrown out itself
                running[i][0] += 1
        num_free += sum(blocks(tokens) for tokens, final in running if tokens == final)
        running = [c for c in running if c[0] < c[1]]
    return fmean(batch), fmean(shares)


mean_batch, share = serve_in_blocks(16)
print(f"blocks of 16: {mean_batch:.1f} at once, {share:.1f} % of the pool holds tokens")

# %% [markdown]
# From 7 conversations to almost five times as many, in the same memory. The paper measured 30.4 at once, with requests
# that arrive at a given rate, and 96.3 % token share. Ours always has one more waiting, so a few more fit.
#
# What is left of the waste is the empty end of each text's last block: at most 15 slots of 16 (the paper's bound, too:
# less than one block per sequence).
#
# ## In the engine
#
# minipaged runs in blocks, and keeps the books of the other managers beside it: what *would* they hold for the very
# same sequences? This is the function that does it for one sequence. Its terms are yours. (A *page-group* is
# vAttention's unit, and `block_size` lets Orca hand out whole blocks; both are another tutorial's matter.)

# %%
from show import source

from minipaged.events import waste

source(waste.held)

# %% [markdown]
# Here is the toy's conversation, told to the real accounting. For Max you should recognise all four numbers.

# %%
moment = waste.Progress(seq_id=0, num_prompt=161, num_computed=161 + 100, final=161 + 338)
for manager in ("orca-max", "orca-pow2", "orca-oracle"):
    print(f"{manager:12}", waste.held(manager, moment, LONGEST, 16))

# %% [markdown]
# And here are eight texts of very different lengths on the real engine, with the real (tiny) model: a pool of 64 blocks
# of 16 tokens. The engine tells everything it does as *events*; `timeline` makes one row of each step.

# %%
from minipaged import LLM, SamplingParams
from minipaged.events import Recorder

llm = LLM("tiny", device="cpu", num_blocks=64, max_num_seqs=12, max_num_batched_tokens=64)
recorder = Recorder()
recorder(llm.engine.started_event())
llm.engine.events.subscribe(recorder)
lengths = (150, 20, 90, 35, 130, 15, 70, 50)
llm.generate(
    [[100 + i, 200, 300, 400] for i in range(8)],  # prompts of four tokens; what they say does not matter here
    [SamplingParams(max_tokens=n, ignore_eos=True, temperature=0) for n in lengths],
)
row = waste.timeline(recorder.events)[9]
print(f"step {row.step}: {row.running} texts run")
print(f"{'manager':12} token reserved internal external   how many of them would fit")
for manager in ("orca-max", "orca-pow2", "orca-oracle", "paged"):
    held = row.held[manager]
    cells = f"{held.token:5} {held.reserved:8} {held.internal:8} {held.external:8}"
    print(f"{manager:12} {cells}   {row.fit[manager]}")

# %% [markdown]
# Max would promise each text the model's whole context of 1,024 tokens, and the pool has 1,024 slots. So one text would
# run, and seven would wait.
#
# ## In the visualizer
#
# Start it with `make demo` (or `minipaged visualize`), and choose **Holes in contiguous memory** from the menu
# *scenario*: there the engine runs on contiguous memory, and half of the pool is free while a text waits. The page asks
# you what happens next. Then choose **The same requests, paged**. Below the pool, the tab *Waste* draws the classes of
# this tutorial live.
#
# Source lines: `held`, `reservation` and `timeline` in [`minipaged/events/waste.py`](../minipaged/events/waste.py).
#
# ## Exercises
#
# **1. Fewer KV heads.** Llama-3-8B has 32 layers and a head dimension of 128. It has 32 query heads, but only 8 KV
# heads: four query heads share one. Numbers have 2 bytes. What does a token cost, and how many tokens fit in 12 GB?
# Does that make reserving less wasteful?
#
# <details><summary>Answer</summary>

# %%
llama = bytes_per_token(layers=32, kv_heads=8, head_dim=128, bytes_per_number=2)
print(f"{llama // 1024} KB for one token, {12 * 1024**3 // llama:,} tokens in 12 GB")

# %% [markdown]
# Tokens are cheaper by a factor of 6, so more conversations fit. The *share* that is wasted stays what it was: that
# depends on the lengths and the guess, not on the bytes of a slot. And longer contexts take it all back: Llama 3.1 can
# read 131,072 tokens, and not one piece of that length fits into 98,304 slots.
# </details>
#
# **2. Buddies.** A buddy allocator hands out powers of two only: who asks for 500 slots gets 512, who asks for 600 gets
# 1,024. The rest of a piece counts as external. What do Pow2 and Oracle reach then? Change `serve` in one place. (The
# place of a piece does not matter for this; keep first fit.)
#
# <details><summary>Answer</summary>
#
# Only the *size* of a piece changes. Internal waste is counted from the guess, so the difference becomes external.


# %%
class Buddy(Contiguous):
    def allocate(self, length):
        return super().allocate(pow2(length))

    def free(self, start, length):
        super().free(start, pow2(length))


first_fit, Contiguous = Contiguous, Buddy  # `serve` looks the name up when it runs
for name in ("Pow2", "Oracle"):
    mean_batch, shares = serve(GUESSES[name])
    print(f"{name:7} {mean_batch:4.1f} at once  ", "  ".join(f"{k} {v:4.1f} %" for k, v in shares.items()))
Contiguous = first_fit

# %% [markdown]
# Now both are near the paper's 9.81 and 13.62. Rounding up costs the Oracle more than a third of the pool.
# </details>
#
# **3. How large should a block be?** Call `serve_in_blocks` with 1, 16, 128 and 1,024. What speaks against 1, when it
# wastes nothing?
#
# <details><summary>Answer</summary>

# %%
for block_size in (1, 16, 128, 1024):
    mean_batch, share = serve_in_blocks(block_size)
    print(f"block size {block_size:5}: {mean_batch:4.1f} at once, {share:4.1f} % tokens")

# %% [markdown]
# A block of 1 wastes nothing, but every token needs an entry in a table, and a kernel reads memory in tiny scattered
# pieces: slow. A text's last block is half empty on average, so large blocks waste more; with 1,024 we are back at
# reserving. The paper found 16 to 128 good for these lengths and took 16 as its default.
# </details>
#
# **Next:** [2 · The KV cache](02_kv_cache.md)

# %% [markdown]
# # 3 · Blocks and tables
#
# **Question.** How can a text's memory lie scattered all over a GPU, be handed out to others and taken back all the
# time, and still be read in order?
#
# You will write a paged memory manager in 40 lines, watch a pool fill and empty, read a text back from its pieces, and
# then find every line of yours in minipaged.
#
# *40 minutes. You need Python only. "The paper" is [PagedAttention](https://arxiv.org/abs/2309.06180) (Kwon et al.,
# SOSP 2023).*

# %% [markdown]
# ## The idea
#
# An operating system gives a program memory in *pages* of one size. They lie anywhere. A *page table* says where, and
# the program notices nothing. The paper does the same with a KV cache:
#
# - The memory for keys and values is cut into **physical blocks**, each with slots for `BLOCK_SIZE` tokens.
# - A text's tokens 0, 1, 2, … fill its **logical blocks** 0, 1, 2, … from left to right.
# - Its **block table** says which physical block holds which logical one. It is a plain list: `table[logical] =
#   physical`.
#
# A new block is taken only when the last one is full. Blocks are all alike, so any free one will do: no external waste.
#
# ## A pool
#
# The smaller half: who hands out blocks? A queue of free ones is enough.

# %%
from collections import deque

BLOCK_SIZE = 4  # tokens; the paper's default is 16, but 4 is better to look at


class Pool:
    """Physical blocks 0 … num_blocks − 1: which of them are free."""

    def __init__(self, num_blocks):
        self.free_blocks = deque(range(num_blocks))

    def allocate(self):
        if not self.free_blocks:
            raise MemoryError("no free block")
        return self.free_blocks.popleft()

    def free(self, block):
        self.free_blocks.append(block)


# %% [markdown]
# ## Tables
#
# The larger half: a table for each text. `reserve` makes sure that the first `num_tokens` tokens of a text have a slot.


# %%
class Tables:
    def __init__(self, num_blocks):
        self.pool = Pool(num_blocks)
        self.tables = {}  # text -> its physical blocks, in logical order

    def blocks_for(self, num_tokens):
        return -(-num_tokens // BLOCK_SIZE)  # num_tokens / BLOCK_SIZE, rounded up

    def open(self, text):
        self.tables[text] = []

    def reserve(self, text, num_tokens):
        table = self.tables[text]
        while len(table) < self.blocks_for(num_tokens):
            table.append(self.pool.allocate())

    def free(self, text):
        for block in reversed(self.tables.pop(text)):
            self.pool.free(block)

    def slot(self, text, position):
        """Where token number `position` of a text lives, counted in slots from the start of the pool."""
        return self.tables[text][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


# %% [markdown]
# That is all of it. The last method is the heart: a division finds the logical block, the table finds the physical one,
# and the remainder is the place inside. In a real engine the slots hold keys and values. Ours hold words, so that you
# can read them.

# %%
NUM_BLOCKS = 6
tables = Tables(NUM_BLOCKS)
slots = [""] * (NUM_BLOCKS * BLOCK_SIZE)
lengths = {}


def write(text, words):
    """Appends words to a text, as prefill and decode do."""
    for word in words.split():
        position = lengths.get(text, 0)
        if position == 0:
            tables.open(text)
        tables.reserve(text, position + 1)
        slots[tables.slot(text, position)] = word
        lengths[text] = position + 1


def picture():
    """The pool as it is, a line for each physical block."""
    owner = {block: (text, i) for text, table in tables.tables.items() for i, block in enumerate(table)}
    for block in range(NUM_BLOCKS):
        content = slots[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
        text, logical = owner.get(block, ("", ""))
        filled = lengths[text] - logical * BLOCK_SIZE if text else 0
        shown = [word if i < filled else "·" for i, word in enumerate(content)]
        whose = f"{text}, logical block {logical}" if text else "free"
        print(f"block {block} [{' '.join(f'{word:6}' for word in shown)}] {whose}")
    for text, table in tables.tables.items():
        print(f"table of {text}: {table}")


write("A", "once upon a time a fox")
picture()

# %% [markdown]
# Six words, two blocks. Two slots of block 1 are empty: that is all the waste there is. Now a second text begins, and
# then the first goes on.
#
# **Predict.** B writes "the owl sat on a wall", 6 words. Then A writes 3 more. What is A's table?
#
# <details><summary>Then look</summary>

# %%
write("B", "the owl sat on a wall")
write("A", "met an owl")
picture()

# %% [markdown]
# A's seventh and eighth word went into the slots that were still empty in block 1. Its ninth needed a block. Block 2
# and 3 were B's by then, so it got block 4. A's table is `[0, 1, 4]`: its memory is in two places, and nothing had to
# move.
# </details>
#
# ## Coming and going
#
# A ends, and all of its blocks are free again. A third text, C, takes its place.
#
# **Predict.** C has 10 words. How many blocks does it need, and which ones does it get? (Look at `Tables.free` and at
# `Pool`: the queue is first in, first out.)
#
# <details><summary>Then look</summary>

# %%
tables.free("A")
del lengths["A"]
write("C", "a robot found a golden key in the old boat")
picture()
print("free now, in this order:", list(tables.pool.free_blocks))

# %% [markdown]
# Block 5 had never been used and was at the head of the queue. Then came A's, last block first: 4, then 1. So the table
# of C is `[5, 4, 1]`. There is nothing orderly about it, and it does not matter.
# </details>
#
# On the left, what C sees: three logical blocks in order. On the right, where they are. The lines are its block table.

# %%
from show import BLUE, EMPTY, ORANGE, box, drawing, label, line

shapes = [label(10, 20, "logical blocks of C"), label(400, 20, "physical blocks")]
colours = {"B": ORANGE, "C": BLUE}
owners = {block: name for name, table in tables.tables.items() for block in table}
for block in range(NUM_BLOCKS):
    words = slots[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
    shapes.append(label(392, 48 + 30 * block, str(block), "end"))
    shapes.append(box(400, 30 + 30 * block, 240, 26, colours.get(owners.get(block), EMPTY), "   ".join(words)))
for logical, block in enumerate(tables.tables["C"]):
    words = [slots[tables.slot("C", i)] for i in range(logical * 4, min(logical * 4 + 4, lengths["C"]))]
    shapes.append(box(30, 60 + 30 * logical, 200, 26, BLUE, "   ".join(words)))
    shapes.append(label(22, 78 + 30 * logical, str(logical), "end"))
    shapes.append(line(230, 73 + 30 * logical, 380, 43 + 30 * block))
drawing(650, 220, shapes, "C's logical blocks 0, 1, 2 lie in the physical blocks 5, 4, 1; B has 2 and 3; 0 is free")

# %% [markdown]
# Reading goes through the table, and comes out in order:


# %%
def read(text):
    return " ".join(slots[tables.slot(text, position)] for position in range(lengths[text]))


print("C:", read("C"))
print("slots of C:", [tables.slot("C", position) for position in range(10)])
print("all of block 1:", slots[4:8])

# %% [markdown]
# Look at the last line. Block 1 belongs to C now. Its last two slots still hold A's words. Nobody cleaned up. That is
# normal, in minipaged too: a slot is written before it is read, and `lengths` says how far a text may be read. Remember
# this when you come to [tutorial 4](04_paged_attention.md). There it is a trap.
#
# ## The price, and the gain
#
# **Predict.** Four slots a block. How many slots can a text of any length waste at most? Which lengths waste nothing?
#
# <details><summary>Then look</summary>

# %%
for length in range(1, 10):
    blocks = tables.blocks_for(length)
    print(f"{length} tokens: {blocks} block(s), {blocks * BLOCK_SIZE - length} empty")

# %% [markdown]
# At most `BLOCK_SIZE − 1` per text (the paper's bound, too), and never more, however long the text gets. Compare: an
# allocator that reserves ahead wasted three quarters of a piece in [tutorial 1](01_wasted_memory.md).
#
# The price is the table, and a look-up for every block that is read.
# </details>
#
# ## In the engine
#
# minipaged's pool does what yours does. It also counts owners, because blocks can be shared ([tutorial
# 8](08_copy_on_write.md)), and it can take back blocks that a cache had kept ([tutorial 9](09_prefix_cache.md)). Skip
# what speaks of the cache for now.

# %%
from show import source

from minipaged.core.pool import BlockPool

source(BlockPool.allocate)

# %% [markdown]
# `Tables.reserve` is called `reserve` there, too. The second loop is yours. (The first is copy-on-write.)

# %%
from minipaged.core.block_table import BlockTables

source(BlockTables.reserve)

# %% [markdown]
# And your `slot`? It is computed for a whole step at once, when the plan of a step becomes tensors: find the line that
# says `slots +=`. (The last field, `virtual_slots=`, is vAttention's, and `None` with blocks.)

# %%
from minipaged.execution.batch import build_batch

source(build_batch)

# %% [markdown]
# Is it really the same? A thousand random operations, on yours and on the engine's, and all tables compared after each:

# %%
import random

from minipaged.core.plan import Write

rng = random.Random(0)
mine, engines = Tables(64), BlockTables(num_blocks=64, block_size=BLOCK_SIZE, enable_prefix_caching=False)
sizes = {}
for text in range(1000):
    if sizes and (rng.random() < 0.3 or len(mine.pool.free_blocks) < 8):
        gone = rng.choice(list(sizes))
        del sizes[gone]
        mine.free(gone)
        engines.free(gone)
    else:
        if not sizes or rng.random() < 0.3:
            sizes[text] = 0
            mine.open(text)
            engines.open(text)
        grown = rng.choice(list(sizes))
        more = rng.randint(1, 20)
        mine.reserve(grown, sizes[grown] + more)
        engines.reserve(Write(grown, sizes[grown], sizes[grown] + more))
        sizes[grown] += more
    engines.check()
    assert mine.tables == engines.tables
print("the same after each of 1,000 operations; the last tables:")
for text, table in list(mine.tables.items())[:4]:
    print(f"  text {text}: {sizes[text]} tokens in {table}")

# %% [markdown]
# `engines.check()` is worth knowing: it verifies that every block is in exactly one place and that the reference counts
# equal what the tables say. minipaged's tests call it after every step.
#
# ## In the visualizer
#
# `make demo` (or `minipaged visualize`) begins with **Eight stories** (menu *scenario*). On the left the texts and
# their block tables, on the right the physical blocks. Click a block: the page says whose it is, and which part of the
# text. Rewind to the first steps, and go event by event (Shift and an arrow key) to see `Allocated` when, and only
# when, a last block is full.
#
# Source lines: `BlockPool` in [`minipaged/core/pool.py`](../minipaged/core/pool.py), `BlockTables` in
# [`minipaged/core/block_table.py`](../minipaged/core/block_table.py), `build_batch` in
# [`minipaged/execution/batch.py`](../minipaged/execution/batch.py).
#
# ## Exercises
#
# **1. When does a block come?** With blocks of 16, a text has a prompt of 33 tokens. How many blocks does it hold then?
# After which generated token does it take its fourth, and its fifth? (Mind that a token's key and value are computed in
# the step *after* the one that wrote it.) Check with `BlockTables`.
#
# <details><summary>Answer</summary>
#
# 33 tokens take ⌈33 / 16⌉ = 3 blocks with 48 slots. The fourth is needed for the 49th token of the text, that is the
# 16th generated one; the fifth for the 65th, the 32nd generated one. They are taken in the step that computes these
# tokens' KV, one step after they were sampled.

# %%
engine_tables = BlockTables(num_blocks=8, block_size=16)
engine_tables.open(0)
engine_tables.reserve(Write(0, 0, 33))
print("prompt:", engine_tables.tables[0])
for generated in range(1, 35):
    held = len(engine_tables.tables[0])
    engine_tables.reserve(Write(0, 32 + generated, 33 + generated))
    if len(engine_tables.tables[0]) > held:
        print(f"generated token {generated}: {engine_tables.tables[0]}")

# %% [markdown]
# </details>
#
# **2. All or nothing.** Your `reserve` may take two blocks and then fail at the third. The caller is left with a table
# that is half grown. Write `blocks_needed(requests)` for a list of `(text, num_tokens)`, so that a scheduler can ask
# *before* it reserves for any of them.
#
# <details><summary>Answer</summary>


# %%
class CarefulTables(Tables):
    def blocks_needed(self, requests):
        return sum(max(0, self.blocks_for(tokens) - len(self.tables[text])) for text, tokens in requests)

    def can_reserve(self, requests):
        return self.blocks_needed(requests) <= len(self.pool.free_blocks)


careful = CarefulTables(5)
for name in "AB":
    careful.open(name)
    careful.reserve(name, 7)
print("5 blocks, 2 texts of 7 tokens:", careful.tables)
for requests in ([("A", 8), ("B", 8)], [("A", 9), ("B", 8)], [("A", 9), ("B", 9)]):
    print(requests, "needs", careful.blocks_needed(requests), "possible:", careful.can_reserve(requests))

# %% [markdown]
# The engine has it under the same name, `BlockTables.blocks_needed`, and counts copies too. What happens when the
# answer is no is the scheduler's decision: somebody must give blocks back, by *preemption*.
# </details>
#
# **3. Freed twice.** Call `pool.free(3)` twice on your `Pool`. Which harm does it do, and when would you notice? Then
# try it on minipaged's `BlockPool`.
#
# <details><summary>Answer</summary>

# %%
pool = Pool(4)
block = [pool.allocate() for _ in range(4)][3]
pool.free(block)
pool.free(block)
print("two texts get blocks", pool.allocate(), "and", pool.allocate())

# %% [markdown]
# Both texts write into the same block. Nothing fails; one of them reads the other's words. You would notice, if at all,
# by a strange answer, long after the mistake. So minipaged refuses at once:

# %%
from minipaged.errors import BlockError

engine_pool = BlockPool(4)
block = engine_pool.allocate()
engine_pool.free(block)
try:
    engine_pool.free(block)
except BlockError as error:
    print("BlockError:", error)

# %% [markdown]
# </details>
#
# **Next:** [4 · Paged attention in torch](04_paged_attention.md)

# %% [markdown]
# # 4 · Paged attention in torch
#
# **Question.** Attention wants the keys of a text as one tensor. Blocks lie anywhere. How do we compute the very same
# numbers, and what may go wrong without anybody noticing?
#
# You will write attention over blocks three times: for one text, for a batch, and block by block as a GPU kernel does
# it. On the way you will fall into a trap that a careless test does not notice.
#
# *45 minutes. You need torch, and [tutorial 3](03_blocks_and_tables.md). "The paper" is
# [PagedAttention](https://arxiv.org/abs/2309.06180) (Kwon et al., SOSP 2023).*

# %% [markdown]
# ## Dense attention, for one query
#
# A token's query is compared with the key of each token before it (and its own). The softmax of these scores are
# weights, and the result is the weighted mean of the values. There are several **heads**, and each does that on its
# own. In *grouped-query attention* several query heads share one KV head: here 4 query heads, 2 KV heads.
#
# Letters in the comments on shapes: `L` tokens, `H` query heads, `KH` KV heads, `D` numbers in a head.

# %%
import torch

torch.manual_seed(0)
H, KH, D = 4, 2, 8
SCALE = D**-0.5


def dense_attention(q, k, v):
    """q: [H, D]; k, v: [L, KH, D] → [H, D]."""
    k = k.repeat_interleave(H // KH, dim=1)  # [L, H, D]: query heads 0 and 1 read KV head 0, 2 and 3 read 1
    v = v.repeat_interleave(H // KH, dim=1)
    scores = SCALE * torch.einsum("hd,lhd->hl", q, k)  # [H, L]
    return torch.einsum("hl,lhd->hd", scores.softmax(dim=-1), v)


k, v, q = torch.randn(10, KH, D), torch.randn(10, KH, D), torch.randn(H, D)
truth = dense_attention(q, k, v)
print("a text of 10 tokens:", tuple(k.shape), "→", tuple(truth.shape))

# %% [markdown]
# This is our truth: whatever we do with blocks must give these numbers.
#
# ## Into the pool
#
# The pool is one tensor for all keys of a layer, and one for all values: `[blocks, slots of a block, KH, D]`. Token i
# of a text goes to slot `table[i // SIZE] * SIZE + i % SIZE`, as in tutorial 3.

# %%
SIZE, NUM_BLOCKS = 4, 6
k_cache, v_cache = torch.zeros(NUM_BLOCKS, SIZE, KH, D), torch.zeros(NUM_BLOCKS, SIZE, KH, D)
table = [5, 0, 3]


def slots_of(table, length):
    return torch.tensor([table[i // SIZE] * SIZE + i % SIZE for i in range(length)])


def store(k, v, slots):
    """Scatters keys and values to their slots; `flatten` makes [blocks · SIZE, KH, D] of the pool, without a copy."""
    k_cache.flatten(0, 1)[slots] = k
    v_cache.flatten(0, 1)[slots] = v


# %% [markdown]
# **Predict.** Our text has 10 tokens and the table `[5, 0, 3]`, with 4 slots a block. In which slot is token 0? Token
# 9? How many slots of its blocks hold nothing?
#
# <details><summary>Then look</summary>

# %%
store(k, v, slots_of(table, 10))
print("slots:", slots_of(table, 10).tolist())

# %% [markdown]
# 20 = 5 · 4 and 13 = 3 · 4 + 1. The last block has two slots left, 14 and 15. They are *dead*: nothing of this text is
# there. They will be important.
# </details>
#
# ## One text
#
# Indexing a tensor with a list of blocks gathers them in that order. Then cut off what is behind the text's end.


# %%
def paged_attention_of_one(q, table, length):
    k = k_cache[table].flatten(0, 1)[:length]  # [blocks of the text · SIZE, KH, D], cut to [length, KH, D]
    v = v_cache[table].flatten(0, 1)[:length]
    return dense_attention(q, k, v)


print("equal to the truth:", torch.allclose(paged_attention_of_one(q, table, 10), truth, atol=1e-6))

# %% [markdown]
# Not only equal: the order is the same too, so the sums are the same sums.
#
# ## A batch
#
# A server computes many texts in one step. They have different lengths, and a tensor has no ragged edge. So short
# tables are padded with block 0, every context gets the same padded length, and what is behind a text's end is
# *masked*: its score becomes −∞, so its weight becomes 0.


# %%
def paged_attention_masked(q, tables, lengths):
    """q: [B, H, D]; tables: [B, M], padded; lengths: [B] → [B, H, D]."""
    k = k_cache[tables].flatten(1, 2).repeat_interleave(H // KH, dim=2)  # [B, M · SIZE, H, D]
    v = v_cache[tables].flatten(1, 2).repeat_interleave(H // KH, dim=2)
    alive = torch.arange(k.shape[1]) < lengths[:, None]  # [B, M · SIZE]
    scores = SCALE * torch.einsum("bhd,blhd->bhl", q, k)
    scores = scores.masked_fill(~alive[:, None], -torch.inf)
    return torch.einsum("bhl,blhd->bhd", scores.softmax(dim=-1), v)


# A second text, of 3 tokens in block 2. Its table is padded with two zeros.
k2, v2, q2 = torch.randn(3, KH, D), torch.randn(3, KH, D), torch.randn(H, D)
store(k2, v2, slots_of([2], 3))
queries = torch.stack((q, q2))
tables, lengths = torch.tensor([table, [2, 0, 0]]), torch.tensor([10, 3])
both = torch.stack((truth, dense_attention(q2, k2, v2)))
print("equal to the truth:", torch.allclose(paged_attention_masked(queries, tables, lengths), both, atol=1e-6))

# %% [markdown]
# This is what was gathered: a row for each text, with the numbers of the slots in the pool. Grey ones are masked. Note
# the last eight of text 1: they are its padding, and were gathered from block 0, which belongs to text 0.

# %%
from show import BLUE, EMPTY, ORANGE, box, drawing, label

shapes = []
for row, (blocks, length, colour) in enumerate(zip(tables.tolist(), lengths.tolist(), (BLUE, ORANGE), strict=True)):
    shapes.append(label(10, 37 + 36 * row, f"text {row}"))
    for i in range(len(blocks) * SIZE):
        x = 60 + 48 * i + 8 * (i // SIZE)  # a gap between blocks
        slot = blocks[i // SIZE] * SIZE + i % SIZE
        shapes.append(box(x, 20 + 36 * row, 46, 26, colour if i < length else EMPTY, str(slot)))
drawing(670, 90, shapes, "Text 0: slots 20 to 23, 0 to 3, 12 and 13, 2 masked. Text 1: 8, 9, 10, 9 masked")

# %% [markdown]
# ## The trap
#
# The pool was full of zeros at the start. That was too kind. In [tutorial 3](03_blocks_and_tables.md) you saw that
# freed blocks keep what their last owner wrote. And memory that a GPU hands out is not cleaned either: it may hold
# anything, also the bits of NaN ("not a number").
#
# We fill every dead slot with NaN: those that no text owns, and the empty ends of last blocks.

# %%
dead = torch.ones(NUM_BLOCKS * SIZE, dtype=torch.bool)
dead[slots_of(table, 10)] = False
dead[slots_of([2], 3)] = False
k_cache.flatten(0, 1)[dead] = torch.nan
v_cache.flatten(0, 1)[dead] = torch.nan
print("dead slots:", int(dead.sum()), "of", len(dead))

# %% [markdown]
# **Predict.** The mask gives dead slots the weight 0. Is the result of `paged_attention_masked` still right? And that
# of `paged_attention_of_one`?
#
# <details><summary>Then look</summary>

# %%
result = paged_attention_masked(queries, tables, lengths)
print("masked: NaN in the result of text 0 and 1:", [bool(row.isnan().any()) for row in result])
print("of one: equal to the truth:", torch.allclose(paged_attention_of_one(q, table, 10), truth, atol=1e-6))

# %% [markdown]
# The masked one is ruined. The scores are fine: `masked_fill` *replaces* a NaN by −∞. But the weighted mean multiplies
# every value by its weight, and **0 · NaN is NaN**. The mask must reach the values, too. (The version for one text is
# safe: it cuts the dead slots off before it computes anything.)
#
# The worst of it: with zeros in the dead slots the test had passed. A test of a kernel that does not poison its dead
# slots proves little. minipaged's kernel tests do poison them.
# </details>
#
# The cure is one line for the values:


# %%
def paged_attention(q, tables, lengths):
    """As above, but what is dead cannot reach the result."""
    k = k_cache[tables].flatten(1, 2).repeat_interleave(H // KH, dim=2)
    v = v_cache[tables].flatten(1, 2).repeat_interleave(H // KH, dim=2)
    alive = torch.arange(k.shape[1]) < lengths[:, None]
    v = v.masked_fill(~alive[:, :, None, None], 0)
    scores = SCALE * torch.einsum("bhd,blhd->bhl", q, k)
    scores = scores.masked_fill(~alive[:, None], -torch.inf)
    return torch.einsum("bhl,blhd->bhd", scores.softmax(dim=-1), v)


print("equal to the truth:", torch.allclose(paged_attention(queries, tables, lengths), both, atol=1e-6))

# %% [markdown]
# ## Block by block
#
# All of these copy the context together first (`k_cache[tables]` is a copy). That is memory traffic for nothing: every
# key is read, written elsewhere and read again. A kernel follows the table instead and never has more than one block in
# its hands. But a softmax needs the sum over *all* scores. How can it begin before it has seen them?
#
# By carrying three things along (the paper gives the sum block by block; the running maximum is known as *online
# softmax*):
#
# - `m`, the largest score so far,
# - `s`, the sum of exp(score − m) so far,
# - `o`, the sum of exp(score − m) · value so far.
#
# When a block brings a larger maximum, what was summed so far is too large by a known factor, and is scaled down.


# %%
def paged_attention_by_blocks(q, table, length):
    """q: [H, D] → [H, D]. Reads one block at a time."""
    m, s, o = torch.full((H,), -torch.inf), torch.zeros(H), torch.zeros(H, D)
    for logical, block in enumerate(table):
        alive = min(SIZE, length - logical * SIZE)  # the others are never touched
        k = k_cache[block, :alive].repeat_interleave(H // KH, dim=1)  # [alive, H, D]
        v = v_cache[block, :alive].repeat_interleave(H // KH, dim=1)
        scores = SCALE * torch.einsum("hd,lhd->hl", q, k)  # [H, alive]
        m_new = torch.maximum(m, scores.amax(dim=-1))
        shrink = (m - m_new).exp()  # exp(−∞) = 0 in the first round: there was nothing yet
        p = (scores - m_new[:, None]).exp()
        s = shrink * s + p.sum(dim=-1)
        o = shrink[:, None] * o + torch.einsum("hl,lhd->hd", p, v)
        m = m_new
        print(f"after block {block}: head 0 has m = {m[0]:.3f}, s = {s[0]:.3f}")
    return o / s[:, None]


print("equal to the truth:", torch.allclose(paged_attention_by_blocks(q, table, 10), truth, atol=1e-6))

# %% [markdown]
# Why the maximum at all? `exp(100)` is infinite in float32 and `exp(12)` is in float16. Only differences from the
# maximum are ever exponentiated, and they are at most 0.
#
# ## In the engine
#
# minipaged's attention in plain torch is the *oracle* that every faster kernel must equal. Look for the line with the
# NaN. Instead of repeating the KV heads, it makes the query heads that share one into rows of a small matrix. The
# scales are for a cache of 8-bit integers; without them `dequantize` gives back what it got.

# %%
from show import source

from minipaged.kernels import reference

source(reference.paged_decode)

# %%
engine = reference.paged_decode(queries, k_cache, v_cache, tables, lengths, SCALE)
print("the engine's, with NaN in all dead slots, equals the truth:", torch.allclose(engine, both, atol=1e-6))

# %% [markdown]
# And keys and values get to their slots by a scatter, as in `store`:

# %%
source(reference.store_kv)

# %% [markdown]
# What does paging cost? The paper measured its kernel 20 to 26 % slower than attention over contiguous memory. A whole
# step also has its products with the weights, which do not care where keys lie. And many more texts run at once.
#
# ## One block table, many workers
#
# A model that is too large for one device is split: every worker gets some of the *heads*, with their part of the
# weights (*tensor parallelism*). Each head attends on its own, as you saw. After attention, a matrix `W` mixes the
# heads of a token; a worker multiplies with the columns of `W` that belong to its heads.
#
# **Predict.** Two workers, each with two query heads and one KV head. What does block 5 hold at worker 0, and what at
# worker 1? Does each need a block table of its own? And what must they tell each other to get the layer's result?
#
# <details><summary>Then look</summary>

# %%
W = torch.randn(H * D, H * D)  # [what comes out, H · D]


def worker(rank, queries, tables, lengths):
    """One of two: half the heads, half the columns of W, a pool of its own. The tables are everybody's."""
    heads, kv_heads = slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1)
    my_k, my_v = k_cache[:, :, kv_heads].clone(), v_cache[:, :, kv_heads].clone()  # on another device, say
    out = reference.paged_decode(queries[:, heads], my_k, my_v, tables, lengths, SCALE)  # [B, 2, D]
    return out.flatten(1) @ W[:, 2 * D * rank : 2 * D * (rank + 1)].T


whole = both.flatten(1) @ W.T
summands = [worker(rank, queries, tables, lengths) for rank in range(2)]
print("text 0, worker 0:", [round(x, 2) for x in summands[0][0, :4].tolist()])
print("text 0, worker 1:", [round(x, 2) for x in summands[1][0, :4].tolist()])
print("text 0, whole:   ", [round(x, 2) for x in whole[0, :4].tolist()])
print("the sum is the whole:", torch.allclose(summands[0] + summands[1], whole, atol=1e-5))

# %% [markdown]
# Block 5 holds the keys and values of the same tokens at both, each of other heads. So *one* table serves all workers,
# and one scheduler, which sends its plan for the step to all of them (§4.6 of the paper). What the workers compute are
# summands: they add them up once after attention and once after the MLP, whose width is split in the same way.
# </details>
#
# The real thing is `torchrun --nproc-per-node 2 -m minipaged generate "Once upon a time"`: two processes. This is what
# the first one does in a step, while the others wait for the plan. (`plain` leaves out what only a scheduler knows:
# requests, and how their tokens are to be sampled. `inner` is the process's own runner, which computes the model.)

# %%
from minipaged.features.tensor_parallel.ranks import LeadingRunner

source(LeadingRunner.execute)

# %% [markdown]
# ## In the visualizer
#
# Start `make demo` (or `minipaged visualize`) and choose **Eight stories** (menu *scenario*). Click a token of a text.
# The page shows its attention weights, spread over the physical blocks of its context: what the softmax above computed,
# from the real model. Look at a text whose blocks are far apart. You cannot tell from its words.
#
# Source lines: [`minipaged/kernels/reference.py`](../minipaged/kernels/reference.py), and `paged_attention` in
# [`minipaged/models/layers.py`](../minipaged/models/layers.py), which calls it in every layer.
#
# ## Exercises
#
# **1. Merge two halves.** For a very long text one wants several processors to work on parts of it. Each gives its `(m,
# s, o)`. Write `merge(a, b)` for two such triples, so that the order of merging does not matter. What is the triple of
# an empty part?
#
# <details><summary>Answer</summary>


# %%
def part(q, k, v):
    """The triple of some of the keys: m [H], s [H], o [H, D]."""
    k, v = k.repeat_interleave(H // KH, dim=1), v.repeat_interleave(H // KH, dim=1)
    scores = SCALE * torch.einsum("hd,lhd->hl", q, k)
    m = scores.amax(dim=-1)
    p = (scores - m[:, None]).exp()
    return m, p.sum(dim=-1), torch.einsum("hl,lhd->hd", p, v)


def merge(a, b):
    (m_a, s_a, o_a), (m_b, s_b, o_b) = a, b
    m = torch.maximum(m_a, m_b)
    shrink_a, shrink_b = (m_a - m).exp(), (m_b - m).exp()
    return m, shrink_a * s_a + shrink_b * s_b, shrink_a[:, None] * o_a + shrink_b[:, None] * o_b


parts = [part(q, k[start:end], v[start:end]) for start, end in ((0, 3), (3, 4), (4, 10))]
empty = torch.full((H,), -torch.inf), torch.zeros(H), torch.zeros(H, D)
for order in ((0, 1, 2), (2, 0, 1)):
    total = empty
    for i in order:
        total = merge(total, parts[i])
    print("order", order, "equal to the truth:", torch.allclose(total[2] / total[1][:, None], truth, atol=1e-6))

# %% [markdown]
# The empty part is m = −∞, s = 0, o = 0. (Merging two empty parts gives −∞ − (−∞) = NaN: a kernel must not let that
# happen.) This merge is how a long context is split among the processors of a GPU, called *split-KV* or *flash
# decoding*.
# </details>
#
# **2. A chunk of a prompt.** In a prefill there are several queries at once: the last `C` tokens of a text. Query
# number i of them may look at the first `length − C + i + 1` tokens. Write it for one text and check it against the
# engine's `paged_prefill` with C = 4.
#
# <details><summary>Answer</summary>


# %%
def paged_prefill_of_one(q, table, length):
    """q: [C, H, D], the last C tokens → [C, H, D]."""
    first = length - len(q)
    return torch.stack([paged_attention_of_one(q[i], table, first + i + 1) for i in range(len(q))])


chunk = torch.randn(4, H, D)
mine = paged_prefill_of_one(chunk, table, 10)
engine = reference.paged_prefill(chunk, k_cache, v_cache, tables[:1], [10], [4], SCALE)
print("equal to the engine's:", torch.allclose(mine, engine, atol=1e-6))

# %% [markdown]
# A query per row, each with a context one longer than the one before: that is all that "causal" means. The engine does
# them in one product with a mask, which is faster and says the same.
# </details>
#
# **3. A forgotten mask.** Remove the mask of the *scores* from `paged_attention` (keep that of the values). Fill the
# dead slots with 0 instead of NaN. Is the result right? Is it the trap's "test that passes"?
#
# <details><summary>Answer</summary>

# %%
clean_k, clean_v = k_cache.nan_to_num(0), v_cache.nan_to_num(0)
k_all = clean_k[tables].flatten(1, 2).repeat_interleave(H // KH, dim=2)
v_all = clean_v[tables].flatten(1, 2).repeat_interleave(H // KH, dim=2)
v_all = v_all.masked_fill(~(torch.arange(12) < lengths[:, None])[:, :, None, None], 0)
scores = SCALE * torch.einsum("bhd,blhd->bhl", queries, k_all)
weights = scores.softmax(dim=-1)
result = torch.einsum("bhl,blhd->bhd", weights, v_all)
print("equal to the truth:", torch.allclose(result, both, atol=1e-6))
lost = weights[0, 0, 10:].sum(), weights[1, 0, 3:].sum()
print(f"weight that dead slots take from head 0: text 0 {lost[0]:.2f}, text 1 {lost[1]:.2f}")

# %% [markdown]
# Wrong, and without any NaN to tell you. A dead key of 0 has the score 0, and exp(0) = 1 takes part in the softmax's
# sum. The true weights become too small. Text 1 suffers most: 9 of its 12 slots are dead (and the padding, block 0, is
# not even empty: it holds text 0's tokens). The error is a matter of degree, so a generated text may still look
# plausible.
# </details>
#
# **Next:** [7 · Continuous batching](07_continuous_batching.md)

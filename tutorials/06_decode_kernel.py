# %% [markdown]
# # 6 · The decode kernel
#
# **Question.** A step of decoding reads every key and value of every text once, and computes very little with each. How
# does a kernel follow block tables without copying anything, and read nothing twice?
#
# You will divide the work among programs, count what each division reads, write the kernel in Triton, set poison and
# canaries around it, and then recognise it in minipaged's own.
#
# *45 minutes. You need torch, [tutorial 4](04_paged_attention.md) and [tutorial 5](05_triton_on_a_laptop.md). Runs on
# Linux, without a GPU; elsewhere it can be read. "The paper" is [PagedAttention](https://arxiv.org/abs/2309.06180)
# (Kwon et al., SOSP 2023).*

# %% [markdown]
# ## The setting
#
# As in tutorial 4: a pool of blocks, block tables, `H` query heads of which `GROUP` share one of `KH` KV heads. Three
# texts, with 10, 3 and 13 tokens. All that belongs to nobody is NaN from the start, since we know better by now.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: see tutorial 5

from importlib.util import find_spec

from show import needs

needs(find_spec("triton") is not None, "Triton is not installed here (it is for Linux only): read the page instead")

import torch
import triton
import triton.language as tl

torch.manual_seed(0)
H, KH, D, SIZE, NUM_BLOCKS = 4, 2, 16, 4, 12
GROUP, SCALE = H // KH, D**-0.5
tables = torch.tensor([[5, 8, 3, 0], [2, 0, 0, 0], [7, 11, 1, 9]])  # padded with 0
lengths = torch.tensor([10, 3, 13])

k_cache = torch.full((NUM_BLOCKS, SIZE, KH, D), torch.nan)
v_cache = torch.full((NUM_BLOCKS, SIZE, KH, D), torch.nan)
for table, length in zip(tables.tolist(), lengths.tolist(), strict=True):
    for i in range(length):
        k_cache[table[i // SIZE], i % SIZE] = torch.randn(KH, D)
        v_cache[table[i // SIZE], i % SIZE] = torch.randn(KH, D)
q = torch.randn(3, H, D)  # each text's newest token asks


def truth_of(q, table, length):
    """q: [H, D] → [H, D], with everything copied together first."""
    k = k_cache[table].flatten(0, 1)[:length].repeat_interleave(GROUP, dim=1)
    v = v_cache[table].flatten(0, 1)[:length].repeat_interleave(GROUP, dim=1)
    weights = (SCALE * torch.einsum("hd,lhd->hl", q, k)).softmax(dim=-1)
    return torch.einsum("hl,lhd->hd", weights, v)


truth = torch.stack([truth_of(*row) for row in zip(q, tables, lengths, strict=True)])
print("no NaN in the truth:", bool(truth.isfinite().all()))

# %% [markdown]
# ## Who does what?
#
# First in plain Python: a program is a function of its number. The obvious division is one program for each text and
# *query* head. It walks through the blocks with the running maximum of tutorial 4. We count the numbers that it reads
# from the cache.

# %%
read = 0


def block_of(cache, block, alive, kv_head):
    """The living tokens of a block, for one KV head: [alive, D]. Counts what is read."""
    global read
    read += alive * D
    return cache[block, :alive, kv_head]


def walk(rows, text, kv_head):
    """Online softmax of some queries [rows, D] over the blocks of a text → [rows, D]."""
    m, s, o = torch.full((len(rows),), -torch.inf), torch.zeros(len(rows)), torch.zeros(len(rows), D)
    for start in range(0, int(lengths[text]), SIZE):
        block, alive = int(tables[text, start // SIZE]), min(SIZE, int(lengths[text]) - start)
        scores = SCALE * rows @ block_of(k_cache, block, alive, kv_head).T  # [rows, alive]
        m_new = torch.maximum(m, scores.amax(dim=1))
        shrink, p = (m - m_new).exp(), (scores - m_new[:, None]).exp()
        s = shrink * s + p.sum(dim=1)
        o = shrink[:, None] * o + p @ block_of(v_cache, block, alive, kv_head)
        m = m_new
    return o / s[:, None]


def a_program_per_query_head(number):
    text, head = divmod(number, H)
    return walk(q[text, head][None], text, head // GROUP)  # [1, D]


out = torch.cat([a_program_per_query_head(number) for number in range(3 * H)]).view(3, H, D)
print(f"{3 * H} programs, right: {torch.allclose(out, truth, atol=1e-6)}, {read} numbers read")

# %% [markdown]
# **Predict.** All keys and values of the three texts together are 2 · 26 tokens · 2 KV heads · 16 = 1,664 numbers.
# How many times was each of them read, and which division among programs would read it once?
#
# <details><summary>Then look</summary>


# %%
def a_program_per_kv_head(number):
    text, kv_head = divmod(number, KH)
    rows = q[text, kv_head * GROUP : (kv_head + 1) * GROUP]  # the queries that share this KV head
    return walk(rows, text, kv_head)  # [GROUP, D]


read = 0
out = torch.cat([a_program_per_kv_head(number) for number in range(3 * KH)]).view(3, H, D)
print(f"{3 * KH} programs, right: {torch.allclose(out, truth, atol=1e-6)}, {read} numbers read")

# %% [markdown]
# `GROUP` times, twice here: every query head read its KV head for itself. A program for each *KV head* reads it once,
# and answers all `GROUP` queries. Since decoding waits for memory and not for arithmetic, that matters most. There is a
# second gain: a single query times the keys is a vector times a matrix; several are a *matrix product*, which a GPU's
# tensor cores can do.
# </details>
#
# ## In Triton
#
# The same walk, with one change: a program takes a *tile* of `KEYS` tokens at a time, whatever the size of a block.
# Each token of the tile looks up its own block: `table[position // SIZE]`. So tiles and blocks need not match, and a
# block may have 3 slots or 100. `tl.dot` wants at least 16 rows; with 2 queries the other 14 are padding.


# %%
@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, len_ptr, out_ptr, scale, table_stride,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    text, head = tl.program_id(0) // KH, tl.program_id(0) % KH
    length = tl.load(len_ptr + text)
    row, dim = tl.arange(0, ROWS), tl.arange(0, D)
    mine = (text * KH * GROUP + head * GROUP + row[:, None]) * D + dim[None, :]  # where my queries and results lie
    live = row[:, None] < GROUP
    q = tl.load(q_ptr + mine, mask=live, other=0.0)  # [ROWS, D]
    m = tl.full([ROWS], float("-inf"), tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, D], tl.float32)
    for start in range(0, length, KEYS):
        position = start + tl.arange(0, KEYS)
        alive = position < length
        block = tl.load(table_ptr + text * table_stride + position // SIZE, mask=alive, other=0)
        at = ((block * SIZE + position % SIZE) * KH + head) * D  # [KEYS]: where each token's numbers begin
        k = tl.load(k_ptr + at[None, :] + dim[:, None], mask=alive[None, :], other=0.0)  # [D, KEYS]
        v = tl.load(v_ptr + at[:, None] + dim[None, :], mask=alive[:, None], other=0.0)  # [KEYS, D]
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where(alive[None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        shrink, p = tl.exp(m - m_new), tl.exp(scores - m_new[:, None])
        s = s * shrink + tl.sum(p, axis=1)
        o = tl.dot(p, v, o * shrink[:, None], input_precision="ieee")
        m = m_new
    tl.store(out_ptr + mine, o / s[:, None], mask=live)


# %% [markdown]
# Read it beside `walk`: line by line it is the same. What was `[:alive]` there is a mask here, four times: the table,
# the keys, the values, the scores.
#
# The test, with both traps of tutorial 5. The dead slots are NaN already. The output gets a fence.

# %%
FENCE, CANARY = 1024, 77.0


def fenced(*shape):
    """A tensor of NaN with canaries on either side, and a function that looks after them."""
    buffer = torch.full((torch.Size(shape).numel() + 2 * FENCE,), CANARY)
    inside = buffer[FENCE:-FENCE].fill_(torch.nan).view(shape)
    return inside, lambda: bool((buffer[:FENCE] == CANARY).all() and (buffer[-FENCE:] == CANARY).all())


def test(kernel):
    """Whether the result is right, and whether the canaries live."""
    out, alive = fenced(3, H, D)
    kernel[(3 * KH,)](
        q, k_cache, v_cache, tables, lengths, out, SCALE, tables.stride(0),
        KH=KH, GROUP=GROUP, D=D, SIZE=SIZE, ROWS=16, KEYS=16,
    )  # fmt: skip
    return torch.allclose(out, truth, atol=1e-5), alive()


print("right, canaries alive:", test(decode_kernel))

# %% [markdown]
# Tiles of 16 tokens on blocks of 4. Where is the gather of tutorial 4, that copied the whole context? Gone: the table
# is looked up *while* reading, and what a program has in its hands is one tile.
#
# ## Three ways to get it wrong
#
# Each of these is one small change in the text of the kernel. To try them we take the source, change it, and compile
# what comes out.

# %%
import inspect
import tempfile
from pathlib import Path


def with_change(old, new):
    """The kernel with a piece of its source replaced. Triton reads sources from files, so it is put into one."""
    text = inspect.getsource(decode_kernel.fn)
    assert text.count(old) == 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "changed.py"
        path.write_text("import triton\nimport triton.language as tl\n\n\n" + text.replace(old, new))
        names = {}
        exec(compile(path.read_text(), path, "exec"), names)
        return names["decode_kernel"]


# %% [markdown]
# **Predict.** (a) `mask=live` of the store is dropped. (b) the mask of the values is dropped; that of the scores stays.
# (c) the mask of the scores is dropped; those of the loads stay. Which give a wrong result, which kill a canary?
#
# <details><summary>Then look</summary>

# %%
changes = {
    "(a) unmasked store": ("o / s[:, None], mask=live)", "o / s[:, None])"),
    "(b) unmasked values": ("dim[None, :], mask=alive[:, None], other=0.0)", "dim[None, :])"),
    "(c) unmasked scores": ('tl.where(alive[None, :], scores, float("-inf"))', "scores"),
}
for name, change in changes.items():
    right, alive = test(with_change(*change))
    print(f"{name:20} right: {right!s:5}  canaries alive: {alive}")

# %% [markdown]
# (a) 14 rows of padding are written behind the two real ones: over the next programs' results, which write theirs
# afterwards in the interpreter, and at the end over the fence. The result is *right* here and the canaries tell. (b) A
# weight of exactly 0 times NaN is NaN. Without poison this one would have passed. (It also passes if block 0 holds a
# text: a dead token looks up block 0, and would find good numbers there. In this tutorial block 0 is nobody's, on
# purpose.) (c) Dead keys read as 0, their scores are 0, exp(0 − m) counts: the weights are too small. No NaN, only
# wrong numbers.
# </details>
#
# ## In the engine
#
# First the pieces. `offsets_of` is the look-up of a tile's tokens:

# %%
from show import source

from minipaged.kernels import paged_decode, reference, tiles

source(tiles.offsets_of.fn)

# %% [markdown]
# `attend` is one round of the walk. It exponentiates with base 2, which is what GPUs have, and the factor log₂e is in
# `scale` already. `peak`, `total` and `acc` are your `m`, `s` and `o`.

# %%
source(tiles.attend.fn)

# %% [markdown]
# And the kernel. What it has beyond yours: strides instead of products of sizes, a sliding window, 8-bit caches, and
# *splits*: a long context is divided among several programs, the subject of [tutorial 10](10_speed.md). Until then
# read `split = 0` and `splits = 1`; then `begin` is 0 and `end` is the length.

# %%
source(paged_decode._decode_kernel.fn)

# %% [markdown]
# It passes our test as well:

# %%
out = paged_decode.paged_decode(q, k_cache, v_cache, tables, lengths, SCALE)
print("the engine's kernel equals the truth:", torch.allclose(out, truth, atol=1e-5))
oracle = reference.paged_decode(q, k_cache, v_cache, tables, lengths, SCALE)
print("and the engine's oracle in plain torch:", torch.allclose(out, oracle, atol=1e-5))

# %% [markdown]
# `minipaged kernels report` compiles it for an A100 and an H100, on your laptop, and says how many registers it takes
# and whether the tensor cores are used. It has not been *timed* here: there is no GPU. The paper reports that its
# kernel took 20 to 26 % longer than one over contiguous memory.
#
# ## In the visualizer
#
# Start `make demo` (or `minipaged visualize`) and choose **Eight stories** (menu *scenario*). Click a token: the bars
# over its blocks are the softmax weights, block by block. Count the running texts: one step of decoding
# would launch that many times `KH` programs, for each layer.
#
# Source lines: [`minipaged/kernels/paged_decode.py`](../minipaged/kernels/paged_decode.py) (with a drawing of who
# computes what), [`minipaged/kernels/tiles.py`](../minipaged/kernels/tiles.py).
#
# ## Exercises
#
# **1. A sliding window.** Some models let a token look at the last `W` tokens only. Change the kernel so that it starts
# at the first tile that matters, instead of masking everything before. Check it against the engine's with
# `sliding_window=5`. Which mask must be added?
#
# <details><summary>Answer</summary>

# %%
window = 5
windowed = with_change("range(0, length, KEYS)", f"range(tl.maximum(length - {window}, 0), length, KEYS)")
out, alive = fenced(3, H, D)
windowed[(3 * KH,)](
    q, k_cache, v_cache, tables, lengths, out, SCALE, tables.stride(0),
    KH=KH, GROUP=GROUP, D=D, SIZE=SIZE, ROWS=16, KEYS=16,
)  # fmt: skip
engine = reference.paged_decode(q, k_cache, v_cache, tables, lengths, SCALE, sliding_window=window)
print("equal to the oracle:", torch.allclose(out, engine, atol=1e-5), " canaries alive:", alive())

# %% [markdown]
# No mask at all. A tile may begin at any token, since each token looks up its own block; so the first tile begins
# exactly at the window's edge. That is what the engine's `oldest` is.
# </details>
#
# **2. Another layout.** FlashAttention-style caches store `[blocks, KH, SIZE, D]`, heads first. Your kernel multiplies
# sizes and cannot read them. The engine's takes strides. Make such a cache *without changing the engine's kernel* and
# show that the result is the same.
#
# <details><summary>Answer</summary>

# %%
k_heads_first = k_cache.permute(0, 2, 1, 3).contiguous()  # [N, KH, SIZE, D] in memory
v_heads_first = v_cache.permute(0, 2, 1, 3).contiguous()
out = paged_decode.paged_decode(
    q, k_heads_first.permute(0, 2, 1, 3), v_heads_first.permute(0, 2, 1, 3), tables, lengths, SCALE
)
print("strides:", k_cache.stride(), "and", k_heads_first.permute(0, 2, 1, 3).stride())
print("equal to the truth:", torch.allclose(out, truth, atol=1e-5))

# %% [markdown]
# A permuted view has the same shape and other strides, and nothing is copied. That is why the engine's kernels ask for
# strides, and why their tests pass views.
# </details>
#
# **3. What must be read?** A model has 32 layers, 8 KV heads, heads of 128 numbers of 2 bytes. 16 texts of 2,000 tokens
# are decoded. How many bytes of KV does one step read at least? What would a program per *query* head read, with 32
# query heads? What is the least time on memory of 2 TB/s, if nothing else happened?
#
# <details><summary>Answer</summary>

# %%
layers, kv_heads, heads, dim, texts, tokens = 32, 8, 32, 128, 16, 2000
once = 2 * layers * kv_heads * dim * 2 * texts * tokens  # keys and values, 2 bytes each
print(f"once: {once / 1e9:.1f} GB; a program per query head: {once * heads // kv_heads / 1e9:.1f} GB")
print(f"at 2 TB/s: {once / 2e12 * 1000:.1f} ms against {once * heads // kv_heads / 2e12 * 1000:.1f} ms")

# %% [markdown]
# 4.2 GB in every step, at least 2.1 ms, and each step gives 16 tokens. This is arithmetic and not a measurement: a
# cache between the programs and the memory would catch some of the repeated reading. But it shows what decides here.
# </details>
#
# **Next:** [7 · Continuous batching](07_continuous_batching.md)

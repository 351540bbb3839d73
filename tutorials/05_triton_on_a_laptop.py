# %% [markdown]
# # 5 · Triton on a laptop
#
# **Question.** A GPU kernel is a small program of which thousands of copies run at once, on memory that nobody checks.
# Can you write one, and be sure of it, on a laptop without a GPU?
#
# You will build a toy GPU in twelve lines of Python, write real Triton kernels that run in Triton's interpreter, and
# see two broken kernels pass an honest-looking test. Then you set the two traps that catch them: poison and canaries.
#
# *40 minutes. You need torch, and nothing of the other tutorials. [Triton](https://triton-lang.org) is a language for
# GPU kernels inside Python. It is published for Linux only; elsewhere this tutorial can be read, but not run.*

# %% [markdown]
# ## A toy GPU
#
# Memory is one long row of numbers; a *pointer* is an index into it. A launch starts a *grid* of program instances.
# They all run the same code; each asks for its own number and works on its own *tile* of the data. Ours run one after
# the other. On a GPU they run in any order, many at once, so they must not depend on each other.

# %%
import torch

memory = torch.zeros(24)
program = {"id": 0}


def launch(kernel, grid, *arguments):
    for program["id"] in range(grid):
        kernel(*arguments)


def load(at, mask):
    """at: [TILE] pointers. What is masked is not touched, and reads as 0."""
    return torch.tensor([memory[i] if alive else 0.0 for i, alive in zip(at.tolist(), mask.tolist(), strict=True)])


def store(at, values, mask):
    for i, value, alive in zip(at.tolist(), values.tolist(), mask.tolist(), strict=True):
        if alive:
            memory[i] = value


# %% [markdown]
# A kernel for it: add 1 to `n` numbers, in tiles of 4.

# %%
TILE = 4


def add_one(x_ptr, y_ptr, n):
    i = program["id"] * TILE + torch.arange(TILE)  # the elements of this program
    alive = i < n
    store(y_ptr + i, load(x_ptr + i, alive) + 1, alive)


X, Y, Z, n = 0, 10, 20, 10  # where x, y and somebody else's z begin; y has 10 numbers
memory[X : X + n] = torch.arange(10.0)
memory[Z:] = 77
launch(add_one, -(-n // TILE), X, Y, n)
print("y:", memory[Y : Y + n].int().tolist())
print("z:", memory[Z:].int().tolist())

# %% [markdown]
# `-(-n // TILE)` is n / TILE rounded up: 3 programs. They have 12 lanes for 10 numbers; the mask silences two.
#
# **Predict.** We forget the mask in `store` (all lanes write). Is y right? Is anything wrong?
#
# <details><summary>Then look</summary>


# %%
def add_one_careless(x_ptr, y_ptr, n):
    i = program["id"] * TILE + torch.arange(TILE)
    store(y_ptr + i, load(x_ptr + i, i < n) + 1, torch.ones(TILE, dtype=torch.bool))


memory[Y : Y + n] = 0
launch(add_one_careless, 3, X, Y, n)
print("y:", memory[Y : Y + n].int().tolist())
print("z:", memory[Z:].int().tolist())

# %% [markdown]
# y is perfect. Two numbers of z, somebody else's, are gone. A test that compares y with the truth passes. Remember this
# picture: it is the reason for the second half of this tutorial.
# </details>
#
# ## The same in Triton
#
# Triton kernels have the same parts under other names: `tl.program_id`, `tl.arange`, `tl.load`, `tl.store`. A tile has
# a size that is known when the kernel is compiled (`tl.constexpr`), and it must be a power of two. The real thing
# compiles for a GPU. With `TRITON_INTERPRET=1` in the environment, set **before triton is imported**, the same source
# is *interpreted* with numpy on a CPU.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"

from importlib.util import find_spec

from show import needs

needs(find_spec("triton") is not None, "Triton is not installed here (it is for Linux only): read the page instead")

import triton
import triton.language as tl


@triton.jit
def add_one_kernel(x_ptr, y_ptr, n, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    alive = i < n
    x = tl.load(x_ptr + i, mask=alive, other=0.0)
    tl.store(y_ptr + i, x + 1, mask=alive)


x, y = torch.arange(10.0), torch.zeros(10)
add_one_kernel[(3,)](x, y, 10, TILE=4)
print("y:", y.int().tolist())

# %% [markdown]
# The grid stands in brackets, the arguments in parentheses; a tensor becomes a pointer to its first number. Nothing
# else of the tensor arrives: not its shape, not its strides, not where it ends.
#
# Now something useful, the mean of each row of a matrix: the heart of every normalisation. One program takes one row.
# Rows have any length, tiles only powers of two, so the tile is longer than the row.


# %%
@triton.jit
def mean_kernel(x_ptr, y_ptr, columns, TILE: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, TILE)
    x = tl.load(x_ptr + row * columns + column, mask=column < columns, other=0.0)
    tl.store(y_ptr + row, tl.sum(x, axis=0) / columns)


torch.manual_seed(0)
x, y = torch.randn(3, 10), torch.empty(3)
mean_kernel[(3,)](x, y, 10, TILE=16)
print("equal to torch's:", torch.allclose(y, x.mean(dim=1), atol=1e-6))

# %% [markdown]
# ## First trap: poison
#
# Here is a mean that has lost its mask. Its test is meant well: the row lies in a larger, clean buffer, as a KV cache
# is clean when an engine starts.


# %%
@triton.jit
def mean_unmasked(x_ptr, y_ptr, columns, TILE: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, TILE)
    x = tl.load(x_ptr + row * columns + column)
    tl.store(y_ptr + row, tl.sum(x, axis=0) / columns)


def passes(kernel, filling):
    """One row of 10 numbers at the start of a buffer of 16. Is its mean right?"""
    buffer, y = torch.full((16,), filling), torch.empty(1)
    buffer[:10] = x[0]
    kernel[(1,)](buffer, y, 10, TILE=16)
    return torch.allclose(y[0], x[0].mean(), atol=1e-6)


# %% [markdown]
# **Predict.** Does `mean_unmasked` pass with a buffer of zeros? Of NaN? And the right kernel, with NaN?
#
# <details><summary>Then look</summary>

# %%
for kernel, name in ((mean_unmasked, "unmasked"), (mean_kernel, "masked  ")):
    print(f"{name}  zeros: {passes(kernel, 0.0)},  NaN: {passes(kernel, torch.nan)}")

# %% [markdown]
# Zeros forgive: adding them changes nothing. NaN spreads through every sum, so it tells of a single lane that read what
# it should not. The rule: **fill everything that must not be read with NaN.** In a paged cache that is every slot that
# belongs to nobody, and the empty end of every last block ([tutorial 4](04_paged_attention.md)). For integers there is
# no NaN; take a value so large that nobody can overlook it.
# </details>
#
# ## Second trap: canaries
#
# The interpreter checks no bounds, and neither does a GPU. A store that goes too far hits whatever lies behind, as in
# the toy. (One that goes *very* far ends the whole process with a segmentation fault. That is the lucky case.) So put
# something there that you know, and look whether it is still alive: miners took canaries along for that.

# %%
FENCE, CANARY = 64, 77.0


def fenced(count):
    """A tensor of `count` NaNs with a fence of canaries on either side, and a function that looks after them."""
    buffer = torch.full((count + 2 * FENCE,), CANARY)
    inside = buffer[FENCE:-FENCE].fill_(torch.nan)

    def alive():
        return bool((buffer[:FENCE] == CANARY).all() and (buffer[-FENCE:] == CANARY).all())

    return inside, alive


@triton.jit
def add_one_unmasked(x_ptr, y_ptr, n, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, x + 1)


x = torch.arange(10.0)
for kernel, name in ((add_one_unmasked, "unmasked"), (add_one_kernel, "masked  ")):
    y, alive = fenced(10)
    kernel[(3,)](x, y, 10, TILE=4)
    print(f"{name}  result right: {torch.equal(y, x + 1)},  canaries alive: {alive()}")

# %% [markdown]
# The inside of a fenced output begins as NaN, too. That catches the opposite mistake: a number that nobody wrote.
#
# **Predict.** A colleague launches `add_one_kernel` with `n // TILE` programs, rounded *down*. Which of these notices:
# a fence, NaN inside the output, both? And would zeros inside have noticed?
#
# <details><summary>Then look</summary>

# %%
y, alive = fenced(10)
add_one_kernel[(10 // 4,)](x, y, 10, TILE=4)
print("canaries alive:", alive(), "  output:", [None if v != v else int(v) for v in y.tolist()])

# %% [markdown]
# Nothing was written out of bounds, so the fence sees nothing. The last two numbers are NaN (here: None), since nobody
# wrote them. With zeros inside you would have noticed only because the truth is not 0 there; a test whose truth happens
# to be 0 would have passed.
# </details>
#
# ## What the interpreter cannot tell you
#
# - **Speed.** It is thousands of times slower than a GPU. Keep shapes small.
# - **Races.** Its programs run one after the other. Two programs that write the same place look fine.
# - **Compile errors.** It accepts some code that the compiler refuses. minipaged compiles each of its kernels for two
#   generations of GPUs without having one: `minipaged kernels report`.
# - **bfloat16 products.** `tl.dot` multiplies matrices. Try it on 16 × 16 numbers:


# %%
@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]  # [N, N] pointers: a tile may have two dimensions
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="ieee"))


for dtype in (torch.float32, torch.float16):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), torch.empty(16, 16)
    product_kernel[(1,)](a, b, c, N=16)
    print(dtype, "equal to torch's:", torch.allclose(c, a.float() @ b.float(), atol=1e-5))

# %% [markdown]
# bfloat16 is left out on purpose. In Triton 3.7.1 the interpreter gave products that were wrong by 10¹⁰ for it: it has
# no such type in numpy and keeps the bits as integers. Test in float32, and in float16 where rounding matters.
#
# ## In the engine
#
# This kernel puts the keys and values of a step into their slots. It has every part that you have used: program ids, a
# mask in two dimensions (`live`), pointers by strides. (The lines with `scale` are for a cache of 8-bit integers.)

# %%
from show import source

from minipaged.kernels import reference, store_kv

source(store_kv._store_kernel.fn)

# %% [markdown]
# Now both traps at once, on the real kernel: 3 tokens, 3 KV heads of 20 numbers (no powers of two), blocks of 4. The
# cache is a fenced tensor full of NaN, and it must be bit for bit what the plain torch version makes of it.

# %%
torch.manual_seed(0)
k, v = torch.randn(3, 3, 20), torch.randn(3, 3, 20)
slots = torch.tensor([9, 10, 2])
caches = [fenced(5 * 4 * 3 * 20) for _ in range(4)]
k_cache, v_cache, k_truth, v_truth = (inside.view(5, 4, 3, 20) for inside, _ in caches)
store_kv.store_kv(k, v, k_cache, v_cache, slots)
reference.store_kv(k, v, k_truth, v_truth, slots)
equal = [torch.equal(*(x.nan_to_num(-1) for x in pair)) for pair in ((k_cache, k_truth), (v_cache, v_truth))]
print("keys and values equal:", equal)
print("canaries alive:", all(alive() for _, alive in caches))
print("slots written:", k_cache.flatten(0, 1).isfinite().all(dim=(1, 2)).nonzero().flatten().tolist())

# %% [markdown]
# minipaged's tests do this for all kernels and many shapes, and then they do it again with bugs put back in: each must
# be noticed.
#
# ## In the visualizer
#
# Start `make demo` (or `minipaged visualize`) and choose **Eight stories** (menu *scenario*). Each new word that
# appears in a block is a row written by this step's `store_kv`; the page says which slot. (On a CPU the engine uses the
# plain torch version, which gives the same bits.)
#
# Source lines: [`minipaged/kernels/store_kv.py`](../minipaged/kernels/store_kv.py), and the traps in
# [`tests/kernels/interpreted/checks.py`](../tests/kernels/interpreted/checks.py).
#
# ## Exercises
#
# **1. Softmax of a row.** Write a kernel that replaces each row of a matrix by its softmax, with one program a row.
# What must `other` be in the load, and why not 0? Test it with poison behind the last row and a fence round the output.
#
# <details><summary>Answer</summary>


# %%
@triton.jit
def softmax_kernel(x_ptr, y_ptr, columns, TILE: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, TILE)
    alive = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=alive, other=float("-inf"))
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(y_ptr + row * columns + column, e / tl.sum(e, axis=0), mask=alive)


buffer = torch.full((64,), torch.nan)
x = buffer[:30].copy_(torch.randn(30)).view(3, 10)
y, alive = fenced(30)
softmax_kernel[(3,)](x, y, 10, TILE=16)
print("right:", torch.allclose(y.view(3, 10), x.softmax(dim=1), atol=1e-6), " canaries alive:", alive())

# %% [markdown]
# exp(−∞) is 0, so dead lanes add nothing to the sum. With 0 each would add exp(0 − maximum). Note that the fence would
# not see an unmasked store of row 0: it writes into row 1 of the same output, where program 1 writes the right numbers
# afterwards. The interpreter hides that race, a GPU might not.
# </details>
#
# **2. Strides.** `mean_kernel` computes `row * columns`. Hand it a transposed matrix, `x.t()`. What happens, and which
# of the traps notices? Mend the kernel.
#
# <details><summary>Answer</summary>


# %%
@triton.jit
def mean_strided(x_ptr, y_ptr, columns, row_stride, column_stride, TILE: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, TILE)
    at = row * row_stride + column * column_stride
    x = tl.load(x_ptr + at, mask=column < columns, other=0.0)
    tl.store(y_ptr + row, tl.sum(x, axis=0) / columns)


x = torch.randn(10, 3).t()  # [3, 10], but its rows lie interleaved in memory
wrong, right = torch.empty(3), torch.empty(3)
mean_kernel[(3,)](x, wrong, 10, TILE=16)
mean_strided[(3,)](x, right, 10, *x.stride(), TILE=16)
print("strides:", x.stride())
print("without:", torch.allclose(wrong, x.mean(dim=1)), " with:", torch.allclose(right, x.mean(dim=1), atol=1e-6))

# %% [markdown]
# All 30 numbers are read once and all lie inside, so neither poison nor canary says anything; only the comparison does.
# A pointer knows no strides. Every kernel of minipaged takes them as arguments, and its tests pass tensors that are
# slices of others.
# </details>
#
# **3. Which test would you trust?** For each of four mistakes, say which traps notice: (a) load without mask, clean
# memory behind; (b) store without mask; (c) too few programs; (d) `<=` instead of `<` in the mask of both.
# Then try (d) on `add_one_kernel`.
#
# <details><summary>Answer</summary>


# %%
@triton.jit
def add_one_off_by_one(x_ptr, y_ptr, n, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    alive = i <= n
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=alive, other=0.0) + 1, mask=alive)


x = torch.cat((torch.arange(10.0), torch.tensor([torch.nan])))[:10]
y, alive = fenced(10)
add_one_off_by_one[(3,)](x, y, 10, TILE=4)
print("result right:", torch.equal(y, x + 1), " canaries alive:", alive())

# %% [markdown]
# (a) poison in what is read; (b) canaries; (c) NaN inside the output; (d) canaries, since the one lane too many writes
# behind the output. The result itself is right, and poison says nothing: what the lane has read goes where nobody
# looks. No single trap catches all four. Set all of them, always: they cost a line each.
# </details>
#
# **Next:** [6 · The decode kernel](06_decode_kernel.md)

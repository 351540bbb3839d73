# %% [markdown]
# # 10 · Speed: CUDA graphs and split-KV
#
# **Question.** A GPU can do a step of a small model faster than Python can tell it what to do. And one long text keeps
# a hundred of its processors waiting for one. What can be done about either?
#
# You will count what a step asks of a GPU, build a recorder that turns hundreds of calls into one, fall into the three
# traps of recording, and cut attention into pieces that are put together again exactly.
#
# *45 minutes. You need torch, [tutorial 4](04_paged_attention.md), and for the second half a look at
# [tutorial 6](06_decode_kernel.md). Everything runs on a CPU, and so there is not one measured time in it: what is
# counted is operations, programs and rows.*

# %% [markdown]
# ## How many calls is a step?
#
# Each operation of torch on a GPU (a product, a sum, a copy) starts at least one kernel, and Python issues them one
# after the other. Views, which only give memory another shape, start none. Torch lets us listen in: a *dispatch mode*
# sees every operation.

# %%
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def tensors_in(result):
    return [x for x in (result if isinstance(result, tuple | list) else [result]) if torch.is_tensor(x)]


def computes(op, args, result):
    """Not if the result is just the memory of an argument in another shape: a view."""
    memory = {x.untyped_storage().data_ptr() for x in tensors_in(args)}
    return op._schema.is_mutable or any(x.untyped_storage().data_ptr() not in memory for x in tensors_in(result))


class Counter(TorchDispatchMode):
    """Counts operations that compute something."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.count += computes(op, args, result)
        return result


with Counter() as counter:
    x = torch.ones(4, 6)
    (x.view(6, 4) @ x).relu()
print("ones, a view, a product, a relu:", counter.count)

# %% [markdown]
# Now the real engine with the embedded model: so many texts of 20 tokens are decoding, and we count one step of the
# model.

# %%
from minipaged import LLM, SamplingParams

settings = {"device": "cpu", "num_blocks": 64, "max_num_seqs": 8, "max_model_len": 128, "enable_prefix_caching": False}
settings["attention"] = "torch"  # plain operations of torch, which the counter sees
engine = LLM("tiny", **settings).engine
greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def operations_of_a_decode_step(num_texts):
    for text in range(num_texts):
        engine.add_request(str(text), [100 + text + i for i in range(20)], greedy)
    engine.step()  # the prompts
    execute, counts = engine.runner.execute, []

    def counted(plan):
        with Counter() as counter:
            logits = execute(plan)
        counts.append(counter.count)
        return logits

    engine.runner.execute = counted
    engine.step()
    engine.runner.execute = execute
    for text in range(num_texts):
        engine.abort(str(text))
    return counts[0]


one = operations_of_a_decode_step(1)
print("layers of the model:", len(engine.runner.kv_cache.k))
print("operations for 1 text:", one)

# %% [markdown]
# **Predict.** That was one text. How many operations is a step of 8 texts?
#
# <details><summary>Then look</summary>

# %%
print("operations for 8 texts:", operations_of_a_decode_step(8))

# %% [markdown]
# The same number, on eight times the rows. That is the reason for batches, and it is the problem with small ones: the
# number of calls does not shrink with the work. A call takes Python and the driver some time, however little there is
# to do; if the GPU is done sooner, it waits for the next. Decoding, with one row a text, is where that happens.
# </details>
#
# (On a GPU minipaged has fewer of them, since Triton kernels do in one call what is several operations here. It is
# still the same number in each step.)
#
# ## A recorder
#
# In every step of decoding the same operations run in the same order. So let us write them down once, with the memory
# that each reads and writes, and from then on only *replay*. This one works on a CPU:


# %%
class Tape(TorchDispatchMode):
    """Runs operations and writes down each that computes, with its arguments and result."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if computes(op, args, result):
            self.operations.append((op, args, kwargs or {}, result))
        return result

    def replay(self):
        """All of it again: the same operations on the same memory. (A GPU writes to `result` directly.)"""
        for op, args, kwargs, result in self.operations:
            again = op(*args, **kwargs)
            if not op._schema.is_mutable:
                for old, new in zip(tensors_in(result), tensors_in(again), strict=True):
                    old.copy_(new)


def record(function):
    """What DecodeGraphs calls such a thing: a way to replay `function`, and the tensor its result will be in."""
    with Tape() as tape:
        result = function()
    return tape.replay, result


w = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
x = torch.tensor([[3.0, 4.0]])


def model():
    return (x @ w).relu() + x


replay, y = record(model)
print("recorded:", y.tolist())

# %% [markdown]
# A CUDA graph is that, made by the driver: recorded once, sent to the GPU with **one** call, and every kernel finds its
# arguments at the addresses that were recorded.
#
# **Predict.** First we write new numbers *into* x and replay. Then we give the name x to a *new* tensor and replay.
# What is y each time?
#
# <details><summary>Then look</summary>

# %%
x.copy_(torch.tensor([[1.0, -2.0]]))
replay()
print("written into x:   ", y.tolist(), " the truth:", model().tolist())
x = torch.tensor([[5.0, 5.0]])
replay()
print("a new tensor as x:", y.tolist(), " the truth:", model().tolist())

# %% [markdown]
# The second time y stays what it was: a recording knows addresses, not names. Whoever replays must *copy* the inputs to
# where they were when it was recorded, and fetch the result before the next replay overwrites it.
# </details>
#
# That was the first trap. The others are of the same kind: whatever is not an operation on memory is not on the tape.
#
# - **Shapes are fixed.** A graph for 4 rows computes 4 rows.
# - **Python is gone.** An `if`, a `print`, a length read with `.item()`: decided when it was recorded, never again
#   (exercise 2).
#
# ## Buckets, and a block for nobody
#
# Shapes are fixed, but the number of running texts changes all the time. A graph for each number would take memory and
# time to record. So graphs are made for a few sizes, and a batch is put into the next larger one:

# %%
from show import source

from minipaged.features import cuda_graphs

source(cuda_graphs.batch_sizes)

# %%
print("for 64 sequences:", cuda_graphs.batch_sizes(64))

# %% [markdown]
# A batch of 5 runs as 8 rows. Three rows are *padding*: they go through the whole model and nobody looks at their
# result. But the model does not only compute. It **stores** each row's key and value in a slot.
#
# **Predict.** In which slot? The inputs hold whatever the last batch left there, or zeros. What happens if it is slot
# 0?
#
# <details><summary>Then look</summary>
#
# Slot 0 is the first token of whoever owns block 0. Its key is overwritten in every layer, and that text goes on with a
# first token that it never had. Nothing fails. So minipaged allocates one block more than the block tables know of, the
# *scratch block*, and all padding writes there. Here is the proof, with our recorder in the place of CUDA's. It is the
# engine's own `DecodeGraphs`; once it gets a scratch block, once block 0.

# %%
from minipaged.execution.kv_cache import KVCache
from minipaged.execution.runner import ModelRunner
from minipaged.features.cuda_graphs import DecodeGraphs

prompts = [[400 + 11 * text + i for i in range(20)] for text in range(5)]
model_of_engine, cpu, recorded = engine.runner.model, torch.device("cpu"), []
size_of_block, dtype = tuple(engine.runner.kv_cache.k[0].shape[1:]), engine.runner.kv_cache.k[0].dtype


def counting_record(function):
    recorded.append(function)
    return record(function)


def with_graphs(scratch_block):
    """The engine's runner, with graphs; a pool of one block more than the engine knows of."""
    kv_cache = KVCache(len(engine.runner.kv_cache.k), 65, *size_of_block, dtype, cpu)
    sizes = {"max_num_seqs": 8, "max_blocks": 8, "scratch_block": scratch_block}
    return ModelRunner(
        model_of_engine, kv_cache, cpu, DecodeGraphs(model_of_engine, kv_cache, cpu, **sizes, record=counting_record)
    )


def run():
    """The texts' outputs, and whether the first token's key in block 0 is still what the prompt made of it."""
    for text, prompt in enumerate(prompts):
        engine.add_request(str(text), prompt, greedy)
    engine.step()
    keys, outputs = engine.runner.kv_cache.k[0], {}
    first_key = keys[0, 0].clone()  # block 0 is the first that a new engine hands out: text 0's
    while engine.has_unfinished():
        for output in engine.step():
            outputs[output.request_id] = output.outputs[0].token_ids
    return outputs, torch.equal(first_key, keys[0, 0])


engine = LLM("tiny", **settings).engine
plain, _ = run()
for name, scratch_block in (("a scratch block", 64), ("block 0", 0)):
    engine = LLM("tiny", **settings).engine
    engine.runner = with_graphs(scratch_block)
    outputs, intact = run()
    print(f"padding writes to {name}: same tokens: {outputs == plain}, first key intact: {intact}")
print("graphs recorded in the two runs:", len(recorded))

# %% [markdown]
# With the scratch block all tokens are the same, though each step was a replay. One graph was recorded a run, for 8
# rows, and used for the eleven steps of decoding with their 5 rows.
# </details>
#
# `run` is what a step is under graphs. Look for the copy of the inputs, the padding, and the one call:

# %%
source(DecodeGraphs.run)

# %% [markdown]
# And this says when: steps that only decode. A prompt has a new shape each time, and enough work to keep a GPU busy.

# %%
source(DecodeGraphs.covers)

# %% [markdown]
# ## One long text
#
# The second problem is the opposite: not too many calls, too little in one. The decode kernel of
# [tutorial 6](06_decode_kernel.md) has one program for each text and KV head. One text with 8 KV heads: 8 programs. An
# A100 has 108 processors. Each program walks alone through 30,000 tokens, and 100 processors have nothing to do.
#
# *Split-KV* (or flash-decoding) cuts the context into parts, with a program each. A part knows only its own tokens: its
# softmax is right among them, and wrong in the whole. How can the whole be put together? Let each part say, beside its
# result, how much weight it stands for: the sum of its exponentials, as a logarithm (`lse`, log of sum of exp).

# %%
torch.manual_seed(0)
L, D = 1000, 16
q, k, v = torch.randn(D), torch.randn(L, D), torch.randn(L, D)
truth = (k @ q * D**-0.5).softmax(dim=0) @ v


def part(start, end):
    """Attention over tokens [start, end) alone: its result [D], and its lse."""
    scores = k[start:end] @ q * D**-0.5
    return scores.softmax(dim=0) @ v[start:end], scores.logsumexp(dim=0)


def merge(outs, lses):
    """outs: [parts, D]; lses: [parts] → the result and lse of all together."""
    return lses.softmax(dim=0) @ outs, lses.logsumexp(dim=0)


parts = [part(start, min(start + 300, L)) for start in range(0, L, 300)]
outs, lses = torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])
print("4 parts, merged:      ", torch.allclose(merge(outs, lses)[0], truth, atol=1e-6))
print("the mean of the parts:", torch.allclose(outs.mean(dim=0), truth, atol=1e-6))

# %% [markdown]
# The merge is a softmax over the parts' lse: the same idea, one floor up. And its result has an lse again, so merges
# can be merged.
#
# **Predict.** Merge the four parts in another order, or first two and two and then the results. Is the answer right? Is
# it the same, bit for bit? What if a part is empty?
#
# <details><summary>Then look</summary>


# %%
def of(*numbers):
    return merge(outs[list(numbers)], lses[list(numbers)])


def of_two(a, b):
    return merge(torch.stack((a[0], b[0])), torch.stack((a[1], b[1])))


ways = {
    "3, 1, 0, 2": of(3, 1, 0, 2),
    "(0, 1), (2, 3)": of_two(of(0, 1), of(2, 3)),
    "one after the other": of_two(of_two(of_two(parts[0], parts[1]), parts[2]), parts[3]),
}
for name, (result, _) in ways.items():
    print(f"{name:20} right: {torch.allclose(result, truth, atol=1e-6)}")
exact = [tuple(x.double() for x in pair) for pair in parts]
in_turn = of_two(of_two(of_two(exact[0], exact[1]), exact[2]), exact[3])[0]
at_once = merge(outs.double(), lses.double())[0]
print("in 64 bits, in turn and at once differ by less than 1e-15:", bool((in_turn - at_once).abs().max() < 1e-15))
empty = torch.zeros(D), torch.tensor(-torch.inf)
print("with an empty part, right:", torch.allclose(of_two(of(0, 1, 2, 3), empty)[0], truth, atol=1e-6))
print("two empty parts:", of_two(empty, empty)[0][:2].tolist())

# %% [markdown]
# In exact arithmetic the merge is associative, so every order is right. In floating point the last bits may differ, as
# with every sum. That is worth knowing: a request's logits can differ in the last bits with the number of splits, which
# changes with the batch, and a greedy choice between two almost equal tokens can then fall out differently.
#
# An empty part has lse −∞, weight 0, and does no harm. *Only* empty parts give −∞ − (−∞), NaN. The engine's merge
# kernel takes the maximum with a very small finite number first; its sum is then 0, which it does not divide by.
# </details>
#
# ## How many splits?
#
# Enough to keep the processors busy; but each part is written and read again, so none should be too short. The rule of
# minipaged: as many as give each processor four programs, but at least 4 tiles of keys in a split, and at most 128.


# %%
def num_splits(longest, keys, programs, processors):
    """longest: tokens of the longest context; keys: of a tile; programs: texts · KV heads."""
    return max(1, min(4 * processors // programs, longest // (4 * keys), 128))


print("splits on 108 processors, 8 KV heads, tiles of 64 keys")
print("texts  " + "".join(f"{longest:>8} tokens" for longest in (500, 4000, 32000)))
for texts in (1, 4, 16, 64):
    row = [num_splits(longest, 64, 8 * texts, 108) for longest in (500, 4000, 32000)]
    print(f"{texts:5}  " + "       ".join(f"{splits:>8}" for splits in row))

# %% [markdown]
# One long text gets many, many texts get one: then there are programs enough, and the merge is saved. In the engine:

# %%
from show import source_in

source_in("minipaged/kernels/paged_decode.py", "splits_of")

# %% [markdown]
# The two halves of this tutorial meet here. Under a graph the number of splits is recorded, too, and the host does not
# even know the lengths. So the kernel is launched for the *longest* context there can be; each text then divides its
# own length among them, on the GPU, and a split for which nothing is left ends at once, with lse −∞ (exercise 3).
#
# minipaged's graphs and split-KV kernel are tested as you have tested them here, with a recorder on a CPU and in
# Triton's interpreter. What they gain in time has to be measured on a GPU.
#
# ## In the visualizer
#
# Start `make demo` (or `minipaged visualize`) and choose **A burst of arrivals** (menu *scenario*). Go step by step,
# and say of each step whether a graph could run it (`covers`), and with how many rows: `batch_sizes(4)` is 1, 2, 4. The
# bar at the bottom shows who computes a prompt.
#
# Source lines: [`minipaged/features/cuda_graphs.py`](../minipaged/features/cuda_graphs.py); `_merge_kernel` and
# `splits_of` in [`minipaged/kernels/paged_decode.py`](../minipaged/kernels/paged_decode.py).
#
# ## Exercises
#
# **1. The price of padding.** Batches of 1 to 64 texts are equally likely. How many rows are padding on average, with
# the engine's sizes, with powers of two, and with a single graph of 64? How many graphs does each record?
#
# <details><summary>Answer</summary>

# %%
for name, sizes in {
    "engine": cuda_graphs.batch_sizes(64),
    "powers of two": [1, 2, 4, 8, 16, 32, 64],
    "only 64": [64],
}.items():
    padding = [next(size for size in sizes if size >= batch) - batch for batch in range(1, 65)]
    print(f"{name:14} {len(sizes):2} graphs, {sum(padding) / 64:5.2f} rows of padding, at most {max(padding)}")

# %% [markdown]
# Four graphs more than with powers of two, and less than a third of the padding.
# </details>
#
# **2. Python is gone.** Record a function with an `if` on the data, such as `-x if x.sum() < 0 else x`. Replay it with
# data that should take the other branch. Then write it so that it can be recorded.
#
# <details><summary>Answer</summary>

# %%
x = torch.tensor([1.0, 2.0])
replay_if, with_if = record(lambda: -x if x.sum() < 0 else x * 1)
replay_where, with_where = record(lambda: torch.where(x.sum() < 0, -x, x))
x.copy_(torch.tensor([-1.0, -2.0]))
replay_if()
replay_where()
print("with if:   ", with_if.tolist())
print("with where:", with_where.tolist())

# %% [markdown]
# The `if` was decided once. `where` computes both and chooses on the device. That is why attention in plain torch
# cannot be recorded as it is in minipaged: it reads lengths in Python to gather no more than necessary. The Triton
# kernel reads them on the GPU. (CUDA refuses to record a read of the data by the host; our tape lets it pass.)
# </details>
#
# **3. Splits for a graph.** A graph was recorded with 13 splits, tiles of 64 keys, and at least 4 tiles in a split.
# Write down which tokens each split gets if the context has 100, 1,000 or 5,000 tokens. How many are empty? (Look at
# `split_len`, `begin` and `end` in `_decode_kernel`.)
#
# <details><summary>Answer</summary>


# %%
from math import ceil


def splits(length, num=13, keys=64, least=4):
    split_len = max(ceil(ceil(length / num) / keys), least) * keys  # a whole number of tiles
    bounds = [(min(i * split_len, length), min((i + 1) * split_len, length)) for i in range(num)]
    return [(begin, end) for begin, end in bounds if begin < end]


for length in (100, 1000, 5000):
    used = splits(length)
    assert sum(end - begin for begin, end in used) == length
    print(f"{length:5} tokens: {13 - len(used):2} empty, the others {used[0]} … {used[-1]}")

# %% [markdown]
# For 100 tokens 12 of 13 programs find nothing to do and end. That is the price of not knowing lengths on the host. It
# is small: such a program reads one number.
# </details>
#
# **Next:** [11 · vAttention](11_vattention.md)

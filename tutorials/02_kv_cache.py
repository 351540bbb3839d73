# %% [markdown]
# # 2 · The KV cache
#
# **Question.** To write its 200th token, a model must look at the 199 before it. Why does that not cost 200 times as
# much as the first one? And what does it cost instead?
#
# You will write a small transformer, make it slow in the obvious way, then fast, and show that both give the same
# numbers. Then you will see the same on minipaged's real model.
#
# *40 minutes. You need Python and some torch: matrix products, softmax. "The paper" is
# [PagedAttention](https://arxiv.org/abs/2309.06180) (Kwon et al., SOSP 2023).*

# %% [markdown]
# ## A transformer in thirty lines
#
# Its weights are random, so it writes nonsense. That does not matter: we only ask whether two ways of computing give
# the same nonsense. Read `forward` slowly, everything below is about it.
#
# - A **row** of `x` belongs to a token. All rows go through the same products, each on its own …
# - … except in one place: attention. There the *query* of a token is compared with the *keys* of the tokens up to
#   itself (`future` hides the others), and it takes a weighted mean of their *values*.

# %%
import torch

VOCAB, WIDTH, LONGEST = 50, 32, 256
torch.manual_seed(0)
EMBED, PLACE, HEAD = torch.randn(VOCAB, WIDTH), torch.randn(LONGEST, WIDTH), torch.randn(WIDTH, VOCAB)
LAYERS = [{name: torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for name in ("q", "k", "v", "out", "mlp")} for _ in range(2)]
rows_computed = 0


def norm(x):
    return x / x.square().mean(dim=-1, keepdim=True).sqrt()


def forward(tokens):
    """tokens: T of them → logits [T, VOCAB], a row for the successor of each; and each layer's (keys, values)."""
    global rows_computed
    rows_computed += len(tokens)
    x = EMBED[tokens] + PLACE[: len(tokens)]  # [T, WIDTH]
    future = torch.ones(len(tokens), len(tokens)).triu(1).bool()  # [T, T], True where a key comes after the query
    made = []
    for w in LAYERS:
        h = norm(x)
        q, k, v = h @ w["q"], h @ w["k"], h @ w["v"]  # [T, WIDTH] each
        made.append((k, v))
        scores = (q @ k.T / WIDTH**0.5).masked_fill(future, -torch.inf)  # [T, T]
        x = x + scores.softmax(dim=-1) @ v @ w["out"]
        x = x + (norm(x) @ w["mlp"]).relu()
    return norm(x) @ HEAD, made


# %% [markdown]
# And this is how a text is written: ask for the next token, append it, ask again.


# %%
def generate_slowly(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        logits, _ = forward(tokens)
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]


prompt = [3, 14, 15, 9, 26, 5, 35, 8]
slow = generate_slowly(prompt, 12)
print("output:       ", slow)
print("rows computed:", rows_computed)

# %% [markdown]
# **Predict.** The prompt has 8 tokens, and 12 were written. Where does the number of rows come from? How many rows
# would it be for a prompt of 100 and an output of 100?
#
# <details><summary>Then look</summary>

# %%
print("8 + 9 + … + 19 =", sum(range(8, 20)))
print("100 + … + 199  =", sum(range(100, 200)))

# %% [markdown]
# The first call computes 8 rows, the next 9, the last 19. (The last token that is written is never put in.) For 100 +
# 100 it is 14,950 rows, though the text has only 200 tokens: every row is computed again and again.
# </details>
#
# ## What stays the same
#
# Is that necessary? Append a token, and compare what the layers made before and after.

# %%
_, before = forward(prompt)
_, after = forward([*prompt, 42])
for layer, ((k, v), (k_after, v_after)) in enumerate(zip(before, after, strict=True)):
    same = torch.allclose(k, k_after[:8], atol=1e-4) and torch.allclose(v, v_after[:8], atol=1e-4)
    print(f"layer {layer}: {len(k)} keys before, {len(k_after)} after; first 8 keys and values the same: {same}")

# %% [markdown]
# They are the same in every layer. The reason is the mask: a token never looks at what comes after it. So nothing that
# comes after it can change its rows, in any layer. What was computed once is right for ever.
#
# And which old numbers does a *new* token need? Its query meets all keys, and its result is a mean of all values. It
# does not need the old tokens' queries, nor their `x`. So keep the keys and values and forget the rest: that is the
# **KV cache**.
#
# ## With a cache
#
# `forward` changes in three places, marked `# 1` to `# 3`. It is given only the tokens whose keys and values are *not*
# in the cache yet, whatever their number.


# %%
def forward_cached(new_tokens, cache):
    """Computes the new tokens, which follow those in the cache, and adds theirs to it. Logits [new, VOCAB]."""
    global rows_computed
    rows_computed += len(new_tokens)
    start = 0 if cache[0] is None else len(cache[0][0])
    length = start + len(new_tokens)
    x = EMBED[new_tokens] + PLACE[start:length]  # 1: they stand at these positions
    future = torch.ones(length, length).triu(1).bool()[start:]  # 2: the mask's last rows, [new, length]
    for layer, w in enumerate(LAYERS):
        h = norm(x)
        q, k, v = h @ w["q"], h @ w["k"], h @ w["v"]
        if cache[layer] is not None:  # 3: old keys and values come from the cache
            k, v = torch.cat((cache[layer][0], k)), torch.cat((cache[layer][1], v))
        cache[layer] = k, v
        scores = (q @ k.T / WIDTH**0.5).masked_fill(future, -torch.inf)
        x = x + scores.softmax(dim=-1) @ v @ w["out"]
        x = x + (norm(x) @ w["mlp"]).relu()
    return norm(x) @ HEAD


def generate(prompt, count):
    cache = [None] * len(LAYERS)
    tokens, num_computed = list(prompt), 0
    while len(tokens) < len(prompt) + count:
        logits = forward_cached(tokens[num_computed:], cache)
        num_computed = len(tokens)
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]


rows_computed = 0
fast = generate(prompt, 12)
print("output:       ", fast)
print("rows computed:", rows_computed)
print("same output:  ", fast == slow)

# %% [markdown]
# The first call computes 8 rows. This is called the **prefill**. Every later call computes one. That is a **decode**
# step. Together 8 + 11 = 19: each row once.
#
# Look at `generate` again. It does not know of prefill and decode. It has `tokens` and one counter, `num_computed`, and
# computes what lies between. Keep this picture. A long prompt may be computed in pieces, and a text whose cache was
# lost may be computed anew: to `forward_cached` it is all the same.
#
# Not only the chosen tokens are equal, the logits are, too:

# %%
text = prompt + slow
cache = [None] * len(LAYERS)
pieces = [forward_cached(text[start:end], cache) for start, end in ((0, 5), (5, 8), (8, 9), (9, 20))]
whole, _ = forward(text)
print("in pieces of 5, 3, 1 and 11:", torch.allclose(torch.cat(pieces), whole, atol=1e-4))

# %% [markdown]
# ## What it costs instead
#
# Memory. For each token, a key and a value in every layer. In our toy:

# %%
num_bytes = sum(tensor.nbytes for pair in cache for tensor in pair)
print(f"{num_bytes:,} bytes for {len(text)} tokens = {num_bytes // len(text)} bytes a token")
print("2 · layers · width · 4 bytes =", 2 * len(LAYERS) * WIDTH * 4)

# %% [markdown]
# For OPT-13B the same formula gives 800 KB a token, the paper's example ([tutorial 1](01_wasted_memory.md) works it
# out).
#
# **Predict.** In a decode step a GPU must read all weights, and the keys and values of the whole text. Which takes
# longer: reading, or computing? Take OPT-13B: 13 billion weights of 2 bytes. Each weight takes part in one
# multiplication and one addition per row. Suppose a GPU that reads 1.3 TB and computes 180 · 10¹² operations in a
# second (what an A100 may reach; an assumption, not a measurement).
#
# <details><summary>Then look</summary>

# %%
WEIGHTS, READ, COMPUTE = 13e9, 1.3e12, 180e12
for batch in (1, 7, 32):
    read = (2 * WEIGHTS + batch * 500 * 819_200) / READ  # each text has 500 tokens in the cache
    compute = batch * 2 * WEIGHTS / COMPUTE
    print(
        f"{batch:2} texts at once: read {1000 * read:4.1f} ms, compute {1000 * compute:4.1f} ms, "
        f"{batch / max(read, compute):5.0f} tokens a second"
    )

# %% [markdown]
# Reading takes 140 times as long as computing when one text is written. The weights are read once per step, for however
# many texts. So the way to be fast is to write *many texts in one step*, and how many is decided by how many KV caches
# fit into memory. This is why a server's speed is a question of memory management, and why this repository exists.
# </details>
#
# ## In the engine
#
# The real model of this repository has 4 layers, and its 8 query heads share 4 KV heads of 32 numbers each. Its keys
# and values have a place of their own, cut into blocks. (`Int8KVCache` in
# [`minipaged/features/kv_int8.py`](../minipaged/features/kv_int8.py) stores 8-bit integers, and a scale for each head's
# key and value.)

# %%
from show import source

from minipaged.execution.kv_cache import KVCache

source(KVCache.bytes_per_block)

# %%
block = KVCache.bytes_per_block(num_layers=4, block_size=16, num_kv_heads=4, head_dim=32, dtype=torch.float32)
print(f"{block:,} bytes a block of 16 tokens, {block // 16:,} bytes a token")

# %% [markdown]
# And this is the counter that drives everything, in the engine's own words:

# %%
from minipaged.core.request import Sequence

source(Sequence)

# %% [markdown]
# Now the experiment from above on the real thing. First with the cache: 12 tokens, greedily. Every step tells how many
# rows it computes (event `Scheduled`).

# %%
from minipaged import LLM, SamplingParams
from minipaged.events import Scheduled

llm = LLM("tiny", device="cpu", num_blocks=64, enable_prefix_caching=False)
scheduled = []
llm.engine.events.subscribe(lambda event: scheduled.append(event) if isinstance(event, Scheduled) else None)

prompt = llm.encode("Once upon a time")
greedy = SamplingParams(temperature=0, max_tokens=12, logprobs=0)
with_cache = llm.generate(prompt, greedy)[0].outputs[0]
print(repr(with_cache.text))
print("rows per step:", [event.num_tokens for event in scheduled])

# %% [markdown]
# Then without: for every token a new request, with everything so far as its prompt.

# %%
scheduled.clear()
tokens = list(prompt)
for _ in range(12):
    tokens += llm.generate(tokens, SamplingParams(temperature=0, max_tokens=1))[0].outputs[0].token_ids
print("rows per step:", [event.num_tokens for event in scheduled])
print("same tokens:  ", tokens[len(prompt) :] == with_cache.token_ids)

# %% [markdown]
# Last, the numbers behind the tokens. One single prefill of the whole text reports the log-probability of each of its
# tokens. The twelve decode steps reported theirs. They agree:

# %%
prefill = llm.generate(tokens, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs
differences = [
    abs(prefill[len(prompt) + i][token] - with_cache.logprobs[i][token]) for i, token in enumerate(with_cache.token_ids)
]
print("largest difference below 0.0001:", max(differences) < 1e-4)

# %% [markdown]
# ## In the visualizer
#
# `make demo` (or `minipaged visualize`) begins with the scenario **Eight stories** (menu *scenario*). Each small cell
# of a block is a token whose key and value are cached. Click a token of a text: you see how strongly it looked at each
# earlier one, block by block. All of those keys were computed long ago.
#
# Source lines: `Sequence` in [`minipaged/core/request.py`](../minipaged/core/request.py), `KVCache` in
# [`minipaged/execution/kv_cache.py`](../minipaged/execution/kv_cache.py), and the model's attention,
# `Attention.forward` in [`minipaged/models/llama.py`](../minipaged/models/llama.py).
#
# ## Exercises
#
# **1. How much is saved?** Write a formula for the rows that are computed for a prompt of `p` and an output of `n`
# tokens, without and with a cache. Check both against the toy with p = 5, n = 9. How many times fewer are they for p =
# n = 1000?
#
# <details><summary>Answer</summary>
#
# Without: p + (p + 1) + … + (p + n − 1) = n·p + n·(n − 1)/2. With: p + n − 1.


# %%
def without(p, n):
    return n * p + n * (n - 1) // 2


def with_a_cache(p, n):
    return p + n - 1


for function, formula in ((generate_slowly, without), (generate, with_a_cache)):
    rows_computed = 0
    function(list(range(5)), 9)
    print(function.__name__, rows_computed, formula(5, 9))
print(f"p = n = 1000: {without(1000, 1000) / with_a_cache(1000, 1000):.0f} times fewer")

# %% [markdown]
# The saving grows with the length. (Attention itself still grows: a decode step at position 1000 compares with 1000
# keys. But the products with the weights, which are most of the work in short texts, are done once per token.)
# </details>
#
# **2. Without the mask.** Models that only *read* (BERT, say) have no mask: every token looks at all others. Set
# `future` to all `False` in a copy of `forward` and repeat "What stays the same". Which layer's keys may still be
# cached?
#
# <details><summary>Answer</summary>


# %%
def forward_unmasked(tokens):
    x = EMBED[tokens] + PLACE[: len(tokens)]
    made = []
    for w in LAYERS:
        h = norm(x)
        q, k, v = h @ w["q"], h @ w["k"], h @ w["v"]
        made.append((k, v))
        x = x + (q @ k.T / WIDTH**0.5).softmax(dim=-1) @ v @ w["out"]
        x = x + (norm(x) @ w["mlp"]).relu()
    return made


before, after = forward_unmasked([3, 14, 15]), forward_unmasked([3, 14, 15, 42])
for layer, ((k, _), (k_after, _)) in enumerate(zip(before, after, strict=True)):
    print(f"layer {layer}: the keys stay the same: {torch.allclose(k, k_after[:3], atol=1e-4)}")

# %% [markdown]
# Only the first layer's: its input is the tokens themselves. Above it, every `x` already contains a look at token 42.
# The KV cache is a gift of the mask.
# </details>
#
# **3. A window.** To save memory, let a token look at itself and the 3 tokens before it only (some models are made so:
# Mistral's is called a *sliding window*). Then older keys can be thrown away. A colleague says: "So the logits depend
# on the last 4 tokens only. I could have computed just those." Is that right with 1 layer? With 2?
#
# <details><summary>Answer</summary>


# %%
def forward_window(tokens, num_layers, window=4, first=0):
    """Logits after the last token; ``first``: the position of the first one."""
    x = EMBED[tokens] + PLACE[first : first + len(tokens)]
    ones = torch.ones(len(tokens), len(tokens)).bool()
    hidden = ones.triu(1) | ones.tril(-window)  # the future, and what is too long ago
    for w in LAYERS[:num_layers]:
        h = norm(x)
        q, k, v = h @ w["q"], h @ w["k"], h @ w["v"]
        x = x + (q @ k.T / WIDTH**0.5).masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v @ w["out"]
        x = x + (norm(x) @ w["mlp"]).relu()
    return norm(x[-1]) @ HEAD


for num_layers in (1, 2):
    all_of_it = forward_window(text, num_layers)
    last_four = forward_window(text[-4:], num_layers, first=len(text) - 4)
    last_seven = forward_window(text[-7:], num_layers, first=len(text) - 7)
    print(
        f"{num_layers} layer(s): the last 4 suffice: {torch.allclose(all_of_it, last_four, atol=1e-4)}, "
        f"the last 7: {torch.allclose(all_of_it, last_seven, atol=1e-4)}"
    )

# %% [markdown]
# Right with one layer, wrong with two. The second layer's key of a token was made from an `x` that had looked 3 tokens
# further back. With L layers the view goes L · 3 tokens back, hence 7 tokens for two layers. So the *cache* of the last
# 4 tokens knows more than these 4 tokens do, and it cannot be rebuilt from them alone. The same is true of every
# prefix: a cached block means something only after the very same tokens before it. [Tutorial 9](09_prefix_cache.md)
# depends on that.
# </details>
#
# **Next:** [3 · Blocks and tables](03_blocks_and_tables.md)

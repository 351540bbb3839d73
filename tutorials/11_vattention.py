# %% [markdown]
# # 11 · vAttention
#
# **Question.** Block tables exist since a text's memory lies scattered. But every computer has hardware that makes
# scattered memory look like one piece. Why not let it do the work, and keep attention as it was before paging?
#
# You will reserve gigabytes that do not exist, lay single pages of memory under them, see one page at two addresses,
# and keep the books of who may have which page. Then you watch minipaged do it under a real model.
#
# *40 minutes. You need torch, and [tutorial 3](03_blocks_and_tables.md). Memory is mapped for real, with Linux's
# functions, so this runs on Linux with pages of 4 KiB; elsewhere it can be read. "The paper" is
# [vAttention](https://arxiv.org/abs/2405.04437) (Prabhu et al., ASPLOS 2025).*

# %%
import mmap
import sys

from show import needs

linux = sys.platform == "linux" and mmap.PAGESIZE == 4096
needs(linux, "This tutorial maps memory by hand, on Linux with pages of 4 KiB: read the page instead")

# %% [markdown]
# ## Addresses are not memory
#
# A program sees *virtual* addresses. The processor looks each of them up in a page table, and finds a *physical* page,
# or none. It is a block table, in hardware, with pages of 4 KiB. `mmap` is how a program asks for changes:
#
# - Reserve addresses with nothing behind them: `PROT_NONE`. That costs nothing, so take plenty.
# - Make a pool of physical pages: a file that exists in memory only (`memfd_create`).
# - Show a page of the pool at an address of ours: `mmap` with `MAP_FIXED`.
#
# Python's own `mmap` cannot choose addresses, so we call C's.

# %%
import ctypes
import os

import torch

PAGE = 4096
FIXED, NORESERVE, NONE = 0x10, 0x4000, 0  # of <sys/mman.h>
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


def map_memory(address, size, protection, flags, file=-1, offset=0):
    result = libc.mmap(address, size, protection, flags, file, offset)
    if result == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap failed")
    return result


def bytes_at(address, size):
    """A tensor over memory, without a copy."""
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


NUM_PAGES, RESERVED = 16, 8 * 2**30
pool_file = os.memfd_create("pool")
os.ftruncate(pool_file, NUM_PAGES * PAGE)
pool = bytes_at(map_memory(None, NUM_PAGES * PAGE, READ_WRITE, mmap.MAP_SHARED, pool_file), NUM_PAGES * PAGE)
space_begins = map_memory(None, RESERVED, NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
space = bytes_at(space_begins, RESERVED)
print(f"reserved: {len(space) >> 20} MiB of addresses; in the pool: {len(pool) >> 10} KiB of memory")

# %% [markdown]
# A tensor of 8 GiB, on any machine. Now three pages of the pool are shown at its beginning, in an order of our choice.


# %%
def show_page(place, page):
    """Place number `place` of the space shows page number `page` of the pool from now on."""
    map_memory(space_begins + place * PAGE, PAGE, READ_WRITE, mmap.MAP_SHARED | FIXED, pool_file, page * PAGE)


for place, page in enumerate((5, 0, 3)):
    show_page(place, page)
pool.view(NUM_PAGES, PAGE)[5] = ord("a")
pool.view(NUM_PAGES, PAGE)[0] = ord("b")
pool.view(NUM_PAGES, PAGE)[3] = ord("c")
print("round the first border: ", bytes(space[PAGE - 4 : PAGE + 4]).decode())
print("round the second border:", bytes(space[2 * PAGE - 4 : 2 * PAGE + 4]).decode())

# %% [markdown]
# Written to pages 5, 0 and 3 of the pool; read as one piece. `[5, 0, 3]` is a block table, and it is nowhere in our
# program any more: the processor has it.
#
# **Predict.** We show page 5 at place 1000, too, and write an X into it *there*. What is at place 0? How much memory do
# the two places take? And what happens to a program that reads place 7, where nothing is?
#
# <details><summary>Then look</summary>

# %%
show_page(1000, 5)
space[1000 * PAGE] = ord("X")
print("place 0:", bytes(space[:4]).decode(), "  in the pool, page 5:", bytes(pool[5 * PAGE : 5 * PAGE + 4]).decode())

import subprocess

touch_nothing = """
import ctypes
mmap = ctypes.CDLL(None).mmap
mmap.restype, mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
ctypes.string_at(mmap(None, 4096, 0, 0x22, -1, 0), 1)  # private, anonymous, no access
"""
ended = subprocess.run([sys.executable, "-c", touch_nothing]).returncode
print("a process that touches such a place ends with signal", -ended)

# %% [markdown]
# One page, two addresses: what is written at one is read at the other, and it is stored once. That is how two texts
# will share a prefix. And reading a place without a page is a segmentation fault (signal 11) that ends the process. In
# [tutorial 3](03_blocks_and_tables.md) a wrong table gave wrong words; here it takes everything down.
# </details>
#
# ## Attention without a table
#
# Keys in those pages: 2 KV heads of 8 numbers, 4 bytes each, are 64 bytes a token. So a page holds 64 tokens. A text of
# 150 tokens, its keys in pages 5, 0, 3 and its values in 9, 8, 2:

# %%
import torch.nn.functional as F

torch.manual_seed(0)
KH, D, L = 2, 8, 150
k, v, q = torch.randn(L, KH, D), torch.randn(L, KH, D), torch.randn(1, KH, D)


def tokens_from(place):
    """The space from a place on, as tokens: [any number, KH, D]. Only what is mapped may be touched."""
    return space[place * PAGE :].view(torch.float32).view(-1, KH, D)


for place, page in ((500, 9), (501, 8), (502, 2)):
    show_page(place, page)
tokens_from(0)[:L], tokens_from(500)[:L] = k, v


def attention(q, k, v):
    """Torch's own. q: [1, KH, D]; k, v: [L, KH, D]. It knows nothing of blocks."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


same = torch.equal(attention(q, tokens_from(0)[:L], tokens_from(500)[:L]), attention(q, k, v))
print("attention over three scattered pages, the same to the last bit:", same)

# %% [markdown]
# No gather, no table, no kernel of our own. `tokens_from(0)[:150]` is contiguous, as far as anybody can see.
#
# ## The price: granularity
#
# A page is the least that can be mapped. 4 KiB on this machine; on a GPU CUDA gives 2 MiB. How many tokens is that? For
# one layer of Llama-3-8B (8 KV heads of 128 numbers, 2 bytes) a token's key takes 2 KiB.
#
# **Predict.** How many tokens fill a page of 2 MiB? If texts are a few hundred tokens long, what does that remind you
# of?
#
# <details><summary>Then look</summary>

# %%
token_bytes = 8 * 128 * 2
for page_bytes, name in ((2 << 20, "2 MiB"), (64 << 10, "64 KiB"), (4 << 10, "4 KiB")):
    print(
        f"{name:6}: {page_bytes // token_bytes:4} tokens in a page; all 32 layers in one tensor: "
        f"{page_bytes / token_bytes / 32:g}"
    )

# %% [markdown]
# 1,024 tokens: blocks so large that most of the last one is empty, as with the reservations of [tutorial
# 1](01_wasted_memory.md). The paper has two answers. The first is smaller pages, for which NVIDIA's driver had to be
# changed. The second is *tensor slicing*: let all layers lie in one tensor, `[tokens, layers, heads, D]`, of which a
# layer is a slice. Then a page holds the tokens of all layers, 32 times fewer. (On pages of 4 KiB a token of all layers
# would not even fit; several pages make a *page-group* then.)
# </details>
#
# ## The books
#
# Who gets which page? As with blocks: a pool, and for each text as many pages as it has filled. But now mapping costs
# something, a call to the system for each page and tensor. So it pays to leave a page *mapped* when its text has ended
# (*deferred reclamation*): the next text in the same *slot* finds it in place. Only when others need the page is it
# taken away.


# %%
class Slots:
    """Each slot is a range of addresses, long enough for any text. Here only the books are kept."""

    def __init__(self, num_pages, num_slots, deferred=True):
        self.free = list(range(num_pages))  # not used by a text; may still be mapped somewhere
        self.mapped = [[] for _ in range(num_slots)]  # slot -> pages that its places show
        self.used = [0] * num_slots  # slot -> how many of these its text uses
        self.deferred, self.calls = deferred, 0

    def reserve(self, slot, pages):
        """The text in this slot needs so many pages in all."""
        while self.used[slot] < pages:
            place = self.used[slot]
            if place == len(self.mapped[slot]):  # else it shows a page already: no call
                self.mapped[slot].append(self.take())
                self.calls += 1
            self.free.remove(self.mapped[slot][place])
            self.used[slot] += 1

    def take(self):
        """A free page. One that is mapped nowhere is best; else an idle one loses its place."""
        shown = {page for mapped in self.mapped for page in mapped}
        for page in self.free:
            if page not in shown:
                return page
        for slot, mapped in enumerate(self.mapped):
            if len(mapped) > self.used[slot]:
                self.calls += 1
                return mapped.pop()  # from the end: a slot shows its first places without a hole
        raise MemoryError("no free page")

    def end(self, slot):
        self.free += self.mapped[slot][: self.used[slot]]
        self.used[slot] = 0
        if not self.deferred:
            self.calls += len(self.mapped[slot])
            self.mapped[slot] = []


# %% [markdown]
# **Predict.** 8 pages, 2 slots. A text of 5 pages runs in slot 0 and ends; then one of 3 in slot 0, and ends; then one
# of 6 in slot *1*. How many calls does each of them cost, with deferred reclamation and without?
#
# <details><summary>Then look</summary>

# %%
for deferred in (True, False):
    slots, calls = Slots(8, 2, deferred), []
    for slot, pages in ((0, 5), (0, 3), (1, 6)):
        before = slots.calls
        slots.reserve(slot, pages)
        slots.end(slot)
        calls.append(slots.calls - before)
    print(f"{'deferred' if deferred else 'at once '}: calls {calls}, mapped at the end {slots.mapped}")

# %% [markdown]
# Deferred: 5; none at all; and 9, since three pages are mapped nowhere and three others must be taken from slot 0
# first. At once: each text pays for mapping and for unmapping. Texts that come and go are the rule in serving, so the
# second one's price, nothing, is the usual one. And had the third been put into slot 0, it would have cost one call:
# choosing the slot that fits best is worth the trouble (exercise 2).
# </details>
#
# ## In the engine
#
# Your `map_memory` and `show_page` are here:

# %%
from show import source

from minipaged.features.vattention.page_memory import HostMemory

source(HostMemory)

# %% [markdown]
# The books are the block tables of tutorial 3, and beside them what each slot shows. In `allocate` is the deferral: a
# page that the slot still shows, if it is free, before any other.

# %%
from minipaged.features.vattention.virtual_tables import VirtualTables

source(VirtualTables.allocate)

# %%
source(VirtualTables._map)

# %% [markdown]
# Now under the real model: three prompts, one after the other, of 100, 40 and 200 tokens. We count what is mapped.
# `mapping="sync"` means: when it is needed, and not before.
#
# **Predict.** A page-group holds 16 tokens here. Each text generates 8 tokens (the last one's KV is never computed).
# How many page-groups does each of the three map?
#
# <details><summary>Then look</summary>

# %%
from minipaged import LLM, SamplingParams

settings = {"device": "cpu", "num_blocks": 24, "max_num_seqs": 4, "max_model_len": 256}
greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
prompts = [list(range(100, 100 + length)) for length in (100, 40, 200)]


def count_maps(llm):
    """Counts the page-groups that are mapped when a step needs them, and ahead of need."""
    kv_cache, counts = llm.engine.runner.kv_cache, {"needed": 0, "ahead": 0}
    remap = kv_cache.remap

    def counted(maps):
        counts["needed"] += len(maps.maps)
        counts["ahead"] += len(maps.ahead)
        remap(maps)

    kv_cache.remap = counted
    return counts


llm = LLM("tiny", memory="vattention", mapping="sync", enable_prefix_caching=False, **settings)
counts, outputs = count_maps(llm), []
for prompt in prompts:
    before = counts["needed"]
    outputs.append(llm.generate(prompt, greedy)[0].outputs[0].token_ids)
    print(f"prompt of {len(prompt)}: {counts['needed'] - before} page-groups mapped")
paged = LLM("tiny", enable_prefix_caching=False, **settings)
same = outputs == [paged.generate(prompt, greedy)[0].outputs[0].token_ids for prompt in prompts]
print("the same tokens as with block tables:", same)

# %% [markdown]
# 107 tokens fill 7 page-groups. The second text needs 3 and finds them in its slot. The third needs 13 and finds 7.
# </details>
#
# How much of it is there? `reserved` are addresses, for 4 texts of 256 tokens; `physical` is memory.

# %%
print(llm.engine.runner.kv_cache.use)

# %% [markdown]
# And a shared prefix: with the prefix cache on, two texts of one beginning run side by side. Their slots are different
# addresses. Do they show the same pages?

# %%
llm = LLM("tiny", memory="vattention", mapping="sync", block_size=16, **settings)
engine, kv_cache = llm.engine, llm.engine.runner.kv_cache
for name, last in (("a", 7), ("b", 8)):
    engine.add_request(name, [*range(100, 140), last], greedy)
    engine.step()
engine.step()
slot_a, slot_b = engine.memory.slots.values()
print("tables:", engine.block_tables(), " slots:", slot_a, slot_b)
key_a, key_b = kv_cache.k_slots[0][slot_a, 5], kv_cache.k_slots[0][slot_b, 5]
key_b.fill_(42)  # token 5 of b, by b's address
print("different addresses:", key_a.data_ptr() != key_b.data_ptr(), " a sees b's change:", bool((key_a == 42).all()))

# %% [markdown]
# Blocks 0 and 1 hold the 32 common tokens once, and are mapped into both slots. (The third block differs.)
#
# The paper reports 1.97 times vLLM's tokens a second, on GPUs, at the time it was written. minipaged's CUDA path has
# not been run on one. What you have seen is real, though: the operating system's page table in the place of ours.
#
# ## In the visualizer
#
# Start `minipaged visualize --memory vattention` on Linux. It shows block tables as ever, since the books are the same.
# Or run `make demo` and choose **The same requests, paged** (menu *scenario*): its tab *Waste* shows what other
# managers would hold for the same texts.
#
# Source lines: all in [`minipaged/features/vattention/`](../minipaged/features/vattention/):
# [`page_memory.py`](../minipaged/features/vattention/page_memory.py),
# [`virtual_memory.py`](../minipaged/features/vattention/virtual_memory.py),
# [`virtual_tables.py`](../minipaged/features/vattention/virtual_tables.py), and attention without tables in
# [`slot_attention.py`](../minipaged/features/vattention/slot_attention.py).
#
# ## Exercises
#
# **1. How large a page?** 100 texts whose lengths are spread evenly from 1 to 2,000 tokens hold their KV. Which share
# of the memory is empty with 16, 64, 256 and 1,024 tokens in a page-group? Estimate first: half a group for each text.
#
# <details><summary>Answer</summary>

# %%
lengths = range(20, 2001, 20)
for group in (16, 64, 256, 1024):
    held = sum(-(-length // group) * group for length in lengths)
    guess = 50 * group / (50 * group + sum(lengths))
    print(f"{group:4} tokens: {1 - sum(lengths) / held:4.0%} empty, estimated {guess:4.0%}")

# %% [markdown]
# Below a hundred tokens it hardly matters, at 1,024 a third is lost. The paper's batch sizes fall in the same way as
# page-groups grow.
# </details>
#
# **2. Best fit.** Add `best_slot(pages)` to `Slots`: the idle slot (its text uses nothing) where a new text of so many
# pages costs the fewest calls. If two cost the same: the one that shows fewer pages. Then let a text of 6 pages come
# after texts of 5 in slot 0 and 2 in slot 1.
#
# <details><summary>Answer</summary>


# %%
class FittingSlots(Slots):
    def best_slot(self, pages):
        idle = [slot for slot, used in enumerate(self.used) if used == 0]
        return max(idle, key=lambda slot: (min(pages, len(self.mapped[slot])), -len(self.mapped[slot])))


slots = FittingSlots(16, 3)
for slot, pages in ((0, 5), (1, 2)):
    slots.reserve(slot, pages)
    slots.end(slot)
for pages in (6, 2, 1):
    slot, before = slots.best_slot(pages), slots.calls
    slots.reserve(slot, pages)
    print(f"a text of {pages} pages: slot {slot}, {slots.calls - before} call(s)")

# %% [markdown]
# The large one gets the slot with 5 pages and maps one; the small one gets the slot with 2, and maps none; the last
# finds an empty slot. Look for `fit` in `VirtualTables._settle`: it is the same rule.
# </details>
#
# **3. Ahead of need.** A step that must map pages waits for the system. It is known a step earlier that a text is about
# to fill its last page-group. Run the three prompts with `mapping="eager"`, which maps one step ahead, and compare how
# many page-groups are still mapped at the moment of need. Which remain, and why?
#
# <details><summary>Answer</summary>

# %%
long = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
for mapping in ("sync", "eager"):
    llm = LLM("tiny", memory="vattention", mapping=mapping, enable_prefix_caching=False, **settings)
    counts = count_maps(llm)
    for prompt in prompts[:2]:
        llm.generate(prompt, long)
    print(f"{mapping}: {counts}")

# %% [markdown]
# What remains is the first prompt: nobody knew that it would come. All growth is mapped ahead, and an idle slot is kept
# stocked for a prompt like the last. With `mapping="async"`, the default, a thread does that while the model computes.
# </details>
#
# **Next:** [12 · Offline batches](12_offline_batches.md)

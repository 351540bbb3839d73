"""Labs accept every solution that keeps their rules, also if it differs from the reference."""

from __future__ import annotations

import pytest

from minipaged.labs import find
from minipaged.labs.checking import check
from minipaged.labs.verify import quickly

SETS = """
class OutOfBlocks(MemoryError): pass
class BlockError(RuntimeError): pass

class BlockPool:
    def __init__(self, num_blocks):
        self.free, self.owners = set(range(num_blocks)), {}
    @property
    def num_free(self):
        return len(self.free)
    def allocate(self):
        if not self.free:
            raise OutOfBlocks
        block = max(self.free)
        self.free.remove(block)
        self.owners[block] = 1
        return block
    def incref(self, block):
        if block not in self.owners:
            raise BlockError
        self.owners[block] += 1
    def decref(self, block):
        if block not in self.owners:
            raise BlockError
        self.owners[block] -= 1
        if not self.owners[block]:
            del self.owners[block]
            self.free.add(block)
"""

WHOLE_BEGINNINGS = """
class PrefixCache:
    def __init__(self, block_size, hash_bits=32):
        self.size, self.blocks, self.texts, self.unused = block_size, {}, {}, []
    def match(self, tokens):
        found = []
        for end in range(self.size, len(tokens), self.size):
            block = self.blocks.get(tuple(tokens[:end]))
            if block is None:
                break
            found.append(block)
        return found
    def insert(self, tokens, block):
        if tuple(tokens) not in self.blocks:
            self.blocks[tuple(tokens)] = block
            self.texts[block] = tuple(tokens)
    def retire(self, block):
        self.unused.append(block)
    def revive(self, block):
        self.unused.remove(block)
    def evict(self, n):
        gone, self.unused = self.unused[:n], self.unused[n:]
        for block in gone:
            del self.blocks[self.texts.pop(block)]
        return gone
"""

# Spends the token budget while it plans, so that others get a preempted request's share; and keeps a single list.
ONE_LIST = """
class Scheduler:
    def __init__(self, memory, max_num_seqs, max_num_batched_tokens):
        self.memory, self.most, self.budget = memory, max_num_seqs, max_num_batched_tokens
        self.requests = {}
    def add(self, id, num_tokens):
        self.requests[id] = [num_tokens, 0, False]
    def computed(self, id, num_computed, num_tokens):
        self.requests[id][:2] = num_tokens, num_computed
    def finish(self, id):
        self.requests.pop(id, None)
    def ids(self, runs):
        return sorted(id for id, request in self.requests.items() if request[2] == runs)
    def queues(self):
        return self.ids(False), self.ids(True)
    def schedule(self):
        chunks, lost, left = [], [], self.budget
        def wants(id):
            return self.requests[id][0] - self.requests[id][1]
        def place(id, count):
            start = self.requests[id][1]
            self.memory.reserve(id, start + count)
            chunks.append((id, start, count))
            return count
        for id in self.ids(True):
            while self.requests[id][2]:
                decodes = sum(wants(other) == 1 for other in self.ids(True) if other > id)
                count = min(wants(id), left - decodes if wants(id) > 1 else 1)
                if count <= 0:
                    break
                if self.memory.fits(id, self.requests[id][1] + count):
                    left -= place(id, count)
                    break
                victim = self.ids(True)[-1]
                self.memory.free(victim)
                self.requests[victim][1:] = 0, False
                lost.append(victim)
        for id in self.ids(False):
            if lost or not left or len(self.ids(True)) == self.most or not self.memory.fits(id, self.requests[id][0]):
                break
            self.requests[id][2] = True
            left -= place(id, min(wants(id), left))
        return chunks, lost
"""

LOOPS = """
import torch

def slot_mapping(block_table, start, num_tokens, block_size):
    result = []
    for position in range(start, start + num_tokens):
        index, offset = divmod(position, block_size)
        result.append(block_table[index] * block_size + offset)
    return result

def paged_attention(q, k_cache, v_cache, block_tables, context_lens, scale):
    B, H, D = q.shape
    S = k_cache.shape[1]
    out = torch.zeros(B, H, D)
    for b in range(B):
        n = int(context_lens[b])
        for h in range(H):
            kv = h // (H // k_cache.shape[2])
            scores, values = [], []
            for i in range(n):
                block = int(block_tables[b, i // S])
                scores.append(scale * torch.dot(q[b, h], k_cache[block, i % S, kv]))
                values.append(v_cache[block, i % S, kv])
            weights = torch.stack(scores).softmax(-1)
            out[b, h] = (weights[:, None] * torch.stack(values)).sum(0)
    return out
"""

PART_BY_PART = """
import torch

PER_PROCESSOR, LEAST_TOKENS, MAX_SPLITS = 4, 256, 128

def num_splits(longest, programs, processors):
    most = 1
    for splits in range(1, MAX_SPLITS + 1):
        if splits * programs <= PER_PROCESSOR * processors and splits * LEAST_TOKENS <= longest:
            most = splits
    return most

def attend(q, k, v, scale):
    H, D = q.shape
    if k.shape[0] == 0:
        return torch.zeros(H, D), torch.full((H,), float("-inf")), torch.zeros(H)
    scores = (k * q).sum(-1) * scale
    m = scores.max(dim=0).values
    w = (scores - m).exp()
    return (w[..., None] * v).sum(0), m, w.sum(0)

def merge(o, m, l):
    P, H, D = o.shape
    result, biggest, total = torch.zeros(H, D), torch.full((H,), float("-inf")), torch.zeros(H)
    for h in range(H):
        parts = [p for p in range(P) if l[p, h] > 0]
        if not parts:
            continue
        biggest[h] = max(m[p, h] for p in parts)
        for p in parts:
            factor = torch.exp(m[p, h] - biggest[h])
            result[h] += factor * o[p, h]
            total[h] += factor * l[p, h]
    return result, biggest, total

def split_attention(q, k, v, scale, splits):
    size = max(-(-len(k) // splits), LEAST_TOKENS)
    parts = [attend(q, k[i * size:(i + 1) * size], v[i * size:(i + 1) * size], scale) for i in range(splits)]
    o, m, l = merge(*(torch.stack(column) for column in zip(*parts)))
    return o / l[:, None]
"""

# No queues: one dictionary holds all places, without order; and prompts form a tree.
ONE_DICTIONARY = """
class OutOfPages(MemoryError):
    pass

class VirtualMemory:
    def __init__(self, driver, num_pages, page_size, num_slots):
        self.driver, self.size, self.places = driver, page_size, {}
        self.pages, self.length = num_pages, [0] * num_slots

    def count(self, tokens):
        return (tokens + self.size - 1) // self.size

    def ensure(self, slot, num_tokens):
        others = sum(self.count(length) for other, length in enumerate(self.length) if other != slot)
        if others + self.count(num_tokens) > self.pages:
            raise OutOfPages
        self.length[slot] = num_tokens
        for place in range(self.count(num_tokens)):
            if (slot, place) in self.places:
                continue
            page = next((page for page in range(self.pages) if page not in self.places.values()), None)
            if page is None:
                victim = next(key for key in self.places if key[1] >= self.count(self.length[key[0]]))
                self.driver.unmap(*victim)
                page = self.places.pop(victim)
            self.driver.map(slot, place, page)
            self.places[slot, place] = page

    def release(self, slot):
        self.length[slot] = 0

def order_requests(prompts, num_outputs):
    groups = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt[0], []).append(i)

    def ratio(group):
        tree, computed = {}, 0
        for i in group:
            node = tree
            for token in prompts[i]:
                computed += token not in node
                node = node.setdefault(token, {})
        return sum(num_outputs[i] for i in group) / computed

    order = []
    for group in sorted(groups.values(), key=ratio)[::-1]:
        order += sorted(group, key=lambda i: prompts[i], reverse=True)
    return order

class ListeningPolicy:
    def __init__(self):
        self.rows = []  # [block, parent, bit, whether it is given up]

    def add(self, block, parent, bit):
        self.rows.append([block, parent, bit, False])

    def remove(self, block):
        self.rows = [row for row in self.rows if row[0] != block]

    def evict(self):
        ends = [row for row in self.rows if all(other[1] != row[0] for other in self.rows)]
        doomed = [row for row in ends if row[3]]
        if not doomed:
            doomed = [row for row in ends if row[2]]
        if not doomed:
            for row in self.rows:
                row[3] = True
            doomed = ends
        self.remove(doomed[0][0])
        return doomed[0][0]
"""

WAYS = {"A1": SETS, "A2": LOOPS, "A5": ONE_LIST, "A6": WHOLE_BEGINNINGS, "A7": PART_BY_PART, "A8": ONE_DICTIONARY}


@pytest.mark.parametrize(("key", "source"), WAYS.items(), ids=WAYS)
@pytest.mark.parametrize("name", ["", "another student"])
def test_another_way_to_solve_a_lab_passes_too(tmp_path, key, source, name):
    lab = find(key)
    file = tmp_path / lab.file
    file.write_text(source)
    results = check(lab, quickly(lab, file), student=name)
    assert [(result.task, result.cause, result.trace) for result in results if result.status != "pass"] == []

"""Labs accept what keeps their rules, whether or not it looks like the reference."""

from __future__ import annotations

import pytest

from minipaged.labs import find
from minipaged.labs.checking import check

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

# Hands the budget out while it plans, so that what a victim would have used goes to others; and keeps one list.
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


@pytest.mark.parametrize(
    ("key", "source"), [("A1", SETS), ("A5", ONE_LIST), ("A6", WHOLE_BEGINNINGS)], ids=["A1", "A5", "A6"]
)
@pytest.mark.parametrize("name", ["", "another student"])
def test_another_way_to_solve_a_lab_passes_too(tmp_path, key, source, name):
    lab = find(key)
    file = tmp_path / lab.file
    file.write_text(source)
    results = check(lab, file, student=name)
    assert [(result.task, result.cause, result.trace) for result in results if result.status != "pass"] == []

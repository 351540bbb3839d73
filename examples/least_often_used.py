"""An eviction policy: the prefix cache gives up the block that was hit least often.

    minipaged visualize --plugin examples/least_often_used.py
    LLM("tiny", eviction_policy=LeastOftenUsed)

A system prompt that every request starts with is hit again and again; a story that was told once is not. LRU forgets
the system prompt when many stories pass through; counting hits keeps it. Like LRU, the policy evicts leaves only: a
block is of no use without the blocks before it.
"""

from minipaged.core.prefix_cache import LRU


class LeastOftenUsed(LRU):
    """Evicts the leaf with the fewest hits; among equals, the least recently used one."""

    def __init__(self) -> None:
        super().__init__()
        self.hits: dict[int, int] = {}  # block → how often a request found it after its last owner had left

    def remove(self, block: int) -> None:
        """The block was hit, or is about to be evicted (`evict` then forgets its count)."""
        super().remove(block)
        self.hits[block] = self.hits.get(block, 0) + 1

    def evict(self) -> int:
        block = min(self.leaves(), key=lambda leaf: self.hits.get(leaf, 0))  # min keeps the first of equals
        self.reason = f"hit {self.hits.get(block, 0)} times, which is least"
        self.remove(block)
        del self.hits[block]
        return block


SETTINGS = {"eviction_policy": LeastOftenUsed, "num_blocks": 20, "block_size": 16, "max_num_seqs": 4}

SYSTEM = "You answer briefly and kindly. You know about memory, blocks and block tables, and you like to explain them."
QUESTIONS = ("What is a block table?", "What is paging?", "What is a KV cache?", "What is a prefix cache?")
STORIES = ("Once upon a time", "The robot opened the door and", "One day, a fox met an owl.", "It was a cold night and")

SCENARIO = {
    "name": "Least often used",
    "watch": "Questions share a system prompt; stories in between need its blocks. Its hits keep it in the cache.",
    "arrivals": [
        arrival
        for i, (question, story) in enumerate(zip(QUESTIONS, STORIES, strict=True))
        for arrival in (
            {"step": 60 * i, "prompt": question, "system": SYSTEM, "chat": True, "max_tokens": 20},
            {"step": 60 * i + 25, "prompt": story, "min_tokens": 90, "max_tokens": 120},
        )
    ],
}

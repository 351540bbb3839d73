"""Scenarios that the page plays: scripts of requests that arrive at fixed steps, so that every run is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minipaged.config import SamplingParams

# A small pool: the opening scenario must fill it, and a viewer must be able to see all of it at once.
DEMO_SETTINGS: dict[str, Any] = {
    "num_blocks": 56,
    "block_size": 16,
    "max_num_seqs": 12,
    "max_num_batched_tokens": 64,
}

# Overrides the settings that the page was started with and those that a viewer changed: scenarios depend on these.
PAGED: dict[str, Any] = DEMO_SETTINGS | {
    "memory": "paged",
    "batching": "continuous",
    "mapping": None,
    "tensor_slicing": False,
    "speculate": None,
    "num_speculative_tokens": None,
}

UNCACHED: dict[str, Any] = {"enable_prefix_caching": False, "eviction": None, "eviction_policy": None}

NUM_ALTERNATIVES = 5  # the most likely tokens that the page shows for each sampled one


@dataclass(frozen=True)
class Arrival:
    """One request of a scenario: its prompt, its sampling parameters, and the step at which it arrives.

    ``chat`` formats the prompt as a user message, after ``system`` if given; ``messages`` is a whole conversation
    instead. The other fields belong to `SamplingParams`. Scripts set ``min_tokens`` (``ignore_eos`` for beam search),
    so that what they demonstrate does not depend on when the model ends a story.
    """

    at_step: int
    prompt: str
    n: int = 1
    max_tokens: int = 160
    temperature: float = 0.8
    seed: int | None = None
    chat: bool = False
    system: str | None = None
    messages: tuple[dict[str, str], ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    beam_width: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    extra_args: Mapping[str, Any] = field(default_factory=dict)

    def conversation(self) -> list[dict[str, str]] | None:
        """The messages for the chat template, or ``None`` for a prompt that the model simply continues."""
        if self.messages:
            return list(self.messages)
        if not self.chat:
            return None
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt}]

    def params(self) -> SamplingParams:
        """The request's sampling parameters. Raises `InvalidRequest` for invalid values."""
        return SamplingParams(
            n=self.n,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            seed=self.seed,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            beam_width=self.beam_width,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            stop=self.stop,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            extra_args=self.extra_args,
            logprobs=NUM_ALTERNATIVES,
        )


@dataclass(frozen=True)
class Scenario:
    """A named script of arrivals, sorted by step, with the engine settings it needs.

    ``settings`` are fields of `EngineConfig`; missing ones keep the page's values. ``watch`` tells the viewer what to
    look at. ``question`` names a question of `visualizer.questions`, which is asked before its answer is shown;
    ``asks`` says whether it is asked by default. ``tab`` names the chart to open. With ``batch`` all arrivals are
    submitted as one batch, which BatchLLM schedules in groups.
    """

    name: str
    arrivals: tuple[Arrival, ...] = field(default_factory=tuple)
    key: str = ""
    watch: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    question: str | None = None
    asks: bool = True
    tab: str = "memory"
    batch: bool = False


# Eight stories for a pool that holds about six of them. The third request has n=4 and a prompt longer than two blocks:
# the two full blocks stay shared, and the partly filled third block shows copy-on-write.
OPENING = Scenario(
    "Eight stories",
    (
        Arrival(0, "Once upon a time", seed=1, min_tokens=110),
        Arrival(6, "The robot opened the door and", seed=2, min_tokens=110),
        Arrival(
            18,
            "Once upon a time, in a small town by the sea, there lived a girl named Anna. "
            "She had a red boat and a little dog. One morning",
            n=4,
            temperature=1.0,
            seed=3,
            min_tokens=110,
        ),
        Arrival(28, "In a small town by the sea,", seed=4, min_tokens=80),
        Arrival(36, "The old cat sat on the wall and", seed=5, min_tokens=80),
        Arrival(44, "One day, a fox met an owl.", seed=6, min_tokens=80),
        Arrival(52, "Tell me a story about a brave mouse.", seed=7, chat=True, min_tokens=80),
        Arrival(60, "It was a cold night and", seed=8, min_tokens=80),
    ),
    key="opening",
    watch=(
        "A language model is writing all of these texts at once. What it remembers of each, its KV cache, lives in "
        "small blocks that are handed out one at a time; each text's block table says where its own are. C to F start "
        "from one prompt and share its blocks. When the pool is full, the last to come gives its blocks back and waits."
    ),
    settings=PAGED,
    question="victim",
    asks=False,
)

SAMPLES = Scenario(
    "One prompt, four samples",
    (
        Arrival(0, "The old cat sat on the wall and", max_tokens=70, min_tokens=70, seed=5),
        Arrival(
            12,
            "Once upon a time, in a small town by the sea, there lived a girl named Anna. "
            "She had a red boat and a little dog. One morning",
            n=4,
            max_tokens=60,
            min_tokens=60,
            temperature=1.0,
            seed=3,
        ),
    ),
    key="samples",
    watch=(
        "B reads a prompt that C, D and E will continue too. Once it is read they fork: all four tables name the same "
        "blocks, striped and marked ×4, and nothing is copied. Then each writes its own next word, and a block that "
        "others read must not be written to: watch the copies fly. The prompt's full blocks stay shared to the end."
    ),
    settings=PAGED | {"num_blocks": 32},
    question="copies",
)

BEAMS = Scenario(
    "Beam search",
    (
        Arrival(0, "The robot opened the door and", max_tokens=60, min_tokens=60, seed=2),
        Arrival(
            10, "Once upon a time, there was a little", max_tokens=56, temperature=0, beam_width=4, ignore_eos=True
        ),
    ),
    key="beams",
    watch=(
        "A search keeps the four likeliest texts so far. In every step each of them proposes words, and the best four "
        "of all proposals go on: a good beam forks, a hopeless one is given up and its blocks come back at once. "
        "Watch the stripes: what the survivors have in common is stored only once."
    ),
    settings=PAGED | {"num_blocks": 32},
    question="pruned",
)

_SYSTEM = (
    "You are a friendly helper. You answer every question about the memory of language models in one or two short "
    "sentences, with simple words, and you never talk about anything else."
)

PREFIX = Scenario(
    "Shared system prompt",
    tuple(
        Arrival(step, prompt, max_tokens=40, temperature=0.6, seed=step, chat=True, system=_SYSTEM)
        for step, prompt in (
            (0, "What is a block table?"),
            (24, "What is a KV cache?"),
            (36, "What is copy-on-write?"),
            (96, "What is a block?"),
        )
    ),
    key="prefix",
    watch=(
        "Every question here comes with the same long instructions. A computes their keys and values; B and C find the "
        "full blocks in the prefix cache and start with them, so only the question itself is computed. D asks when all "
        "the others have gone: the dotted blocks are free, but they still know what they hold."
    ),
    settings=PAGED | {"num_blocks": 32, "enable_prefix_caching": True},
    question="cached",
    tab="prefix",
)

_PRESSURE = (
    Arrival(0, "Once upon a time", max_tokens=110, min_tokens=110, seed=1),
    Arrival(2, "The robot opened the door and", max_tokens=110, min_tokens=110, seed=2),
    Arrival(4, "In a small town by the sea,", max_tokens=110, min_tokens=110, seed=4),
    Arrival(6, "It was a cold night and", max_tokens=110, min_tokens=110, seed=8),
)

RECOMPUTE = Scenario(
    "Out of memory: recompute",
    _PRESSURE,
    key="recompute",
    watch=(
        "Four texts grow in a pool of twenty blocks, and it cannot hold them all. When nobody finds a free block, the "
        "latest arrival loses all of its own and waits; its text is kept. When there is room again it comes back and "
        "computes the KV of its whole text once more, many tokens in one step: see the step's bar at the bottom."
    ),
    settings=PAGED | UNCACHED | {"num_blocks": 20, "preemption": "recompute", "swap_blocks": None},
    question="victim",
)

SWAP = Scenario(
    "Out of memory: swap",
    _PRESSURE,
    key="swap",
    watch=(
        "The same four texts in the same pool, but this engine does not throw KV away: the latest arrival's blocks are "
        "copied to the CPU's memory, and back into whatever blocks are free when there is room. Nothing is computed "
        "twice, at the price of moving it. Note the new block numbers in its table: only the table has to know."
    ),
    settings=PAGED | UNCACHED | {"num_blocks": 20, "preemption": "swap", "swap_blocks": 20},
    question="moved",
)

_LONG = (
    "Once upon a time there was a farmer who lived on a green hill. Every morning he fed the hens, milked the cow, "
    "and walked down to the river to catch a fish. One day the river was dry. The farmer was very sad. He asked the "
    "hens, but they did not know. He asked the cow, but she only looked at him. So he took his hat and his stick and "
    "walked up the hill, past the old mill, past the tall trees, and past the big stone, until he came to the lake "
    "where the river began. There sat a beaver on a wall of sticks. The farmer said"
)

CHUNKED = Scenario(
    "A long prompt among short ones",
    (
        Arrival(0, "Once upon a time", max_tokens=60, min_tokens=60, seed=1),
        Arrival(1, "The robot opened the door and", max_tokens=60, min_tokens=60, seed=2),
        Arrival(2, "It was a cold night and", max_tokens=60, min_tokens=60, seed=8),
        Arrival(16, _LONG, max_tokens=30, min_tokens=30, seed=9),
    ),
    key="chunked",
    watch=(
        "A step of this engine computes 20 tokens and no more: look at the bar at the bottom. D arrives with a prompt "
        "many times that long. The three who are writing get their one token each first, and D reads its prompt with "
        "what is left, a chunk per step. So nobody's text stands still while a long prompt is read."
    ),
    settings=PAGED | {"num_blocks": 40, "max_num_seqs": 8, "max_num_batched_tokens": 20},
    question="chunk",
)

BURST = Scenario(
    "A burst of arrivals",
    (
        Arrival(0, "Once upon a time", max_tokens=60, min_tokens=60, seed=1),
        *(
            Arrival(10, prompt, max_tokens=24 + 8 * number, min_tokens=24 + 8 * number, seed=number)
            for number, prompt in enumerate(
                (
                    "The old cat sat on the wall and",
                    "One day, a fox met an owl.",
                    "It was a cold night and",
                    "In a small town by the sea,",
                    "The robot opened the door and",
                    "There was a little red boat",
                    "The king had a big secret:",
                    "A mouse found a golden key",
                )
            )
        ),
    ),
    key="burst",
    watch=(
        "Eight requests arrive at once, and this engine runs at most four texts at a time. The others wait in order of "
        "arrival, although half the pool is free. The moment one text ends, the next begins, in the very same step: "
        "nobody waits for the whole batch to be done. That is continuous batching."
    ),
    settings=PAGED | {"num_blocks": 48, "max_num_seqs": 4},
    question="admitted",
    tab="sequences",
)

# Six requests that reserve pieces of eight blocks; every other one ends soon. Then one that needs sixteen blocks.
HOLES = (
    Arrival(
        0,
        "Once upon a time, in a small town by the sea, there lived a girl named Anna. "
        "She had a red boat and a little dog. One morning, when the sun was up,",
        max_tokens=20,
        min_tokens=20,
        seed=1,
    ),
    Arrival(1, "The robot opened the door and", max_tokens=64, min_tokens=64, seed=2),
    Arrival(
        2,
        "One day, a fox met an owl. The owl was old and very wise, and the fox was hungry. "
        "They sat down under a big tree in the forest. The fox said to the owl:",
        max_tokens=20,
        min_tokens=20,
        seed=3,
    ),
    Arrival(3, "It was a cold night and", max_tokens=64, min_tokens=64, seed=4),
    Arrival(
        4,
        "The king had a big secret. At night he went down to the kitchen, and there he baked bread "
        "for all the people of the town. Nobody knew it. But one night",
        max_tokens=20,
        min_tokens=20,
        seed=5,
    ),
    Arrival(5, "In a small town by the sea,", max_tokens=64, min_tokens=64, seed=6),
    Arrival(30, "Tell me a story about a brave mouse.", max_tokens=80, min_tokens=80, seed=9, chat=True),
)

FRAGMENTATION = Scenario(
    "Holes in contiguous memory",
    HOLES,
    key="fragmentation",
    watch=(
        "As before paging: each text gets one piece of neighbouring blocks when it begins, for all it may ever write, "
        "rounded up to a power of two; pale blocks are set aside, and empty. When A, C and E end, they leave three "
        "holes. G needs a piece that is longer than any: it waits, although half of the pool is free. "
        "The next scenario pages the same requests."
    ),
    settings=PAGED
    | UNCACHED
    | {"num_blocks": 48, "memory": "orca-pow2", "preemption": "recompute", "swap_blocks": None},
    question="holes",
    tab="waste",
)

WITHOUT_HOLES = Scenario(
    "The same requests, paged",
    HOLES,
    key="without-holes",
    watch=(
        "The requests of the scenario before, on as many blocks. A text holds the blocks it has filled and the one it "
        "is filling, wherever they are. So there is no hole that is too small: G begins the moment it comes, and half "
        "of the pool is never touched. The tab Waste below the pool shows what each manager would hold."
    ),
    settings=PAGED | {"num_blocks": 48},
    question="first_blocks",
    tab="waste",
)

_WAIT = (
    "Tell me a story about a brave mouse who found a golden key in the garden. I will ask you for another one as soon "
    "as you are done."
)
_BYE = (
    "Tell me a story about a king who bakes bread at night for all the people of the town. This is my last one. "
    "Thanks, bye!"
)
_TALE = (
    "Tell me a story about a fox and an owl who live in a big forest near the sea. The fox is hungry and the owl is "
    "wise."
)

PREDICTIONS = Scenario(
    "Who comes back?",
    (
        Arrival(0, _WAIT, max_tokens=24, min_tokens=24, seed=1, chat=True),
        Arrival(14, _BYE, max_tokens=24, min_tokens=24, seed=2, chat=True),
        Arrival(56, _TALE, max_tokens=66, min_tokens=66, seed=3, chat=True),
        Arrival(
            116,
            _WAIT,
            max_tokens=24,
            min_tokens=24,
            seed=4,
            messages=(
                {"role": "user", "content": _WAIT},
                {"role": "assistant", "content": "Once upon a time there was a brave mouse."},
                {"role": "user", "content": "And now one about a little red boat."},
            ),
        ),
    ),
    key="predictions",
    watch=(
        "When a chat's answer is there, its blocks stay cached. A prediction marks them: 0 for A, whose user will "
        "probably ask again, 1 for B, whose user said goodbye. Then C needs blocks: A's are unused for longer, but B's "
        "are given up, ends before beginnings. So D, the next question of A's user, finds what was said before."
    ),
    settings=PAGED
    | {"num_blocks": 10, "enable_prefix_caching": True, "eviction": "flush-when-all-0", "eviction_policy": None},
    question="given_up",
    tab="prefix",
)

_SLOT = (
    "Divide the position by the block size. The quotient picks an entry of the block table, and the remainder is the "
    "offset in that block."
)
# These differ slightly from what the model generates, so that some draft tokens are rejected.
_PAGES = "PagedAttention splits the memory into blocks of one size and finds them with a map, much like pages in a book"
_TABLE = "A block table maps the logical blocks of a story to physical memory. It works like a list."


def _asked(at_step: int, question: str, before: str = "") -> Arrival:
    """A chat request with ``question``; if ``before`` is given, it was asked before, and ``before`` was the answer."""
    asked = {"role": "user", "content": question}
    messages = (asked, {"role": "assistant", "content": before}, asked) if before else (asked,)
    return Arrival(at_step, question, messages=messages, max_tokens=60, temperature=0)


SPECULATION = Scenario(
    "Speculation: tokens taken back",
    (
        _asked(0, "How do I find the slot of a token?"),
        _asked(2, "How do I find the slot of a token?", _SLOT),
        _asked(16, "What is PagedAttention?", _PAGES),
        _asked(26, "What is a block table?", _TABLE),
    ),
    key="speculation",
    watch=(
        "A and B say the same, but B has said it before and guesses that it will again: what followed its newest words "
        "then is computed along, four tokens at a time. The model checks them all in one step, so B overtakes A. C and "
        "D guess worse: struck words were wrong, and go back with the blocks that they were in."
    ),
    settings=PAGED | {"num_blocks": 64, "block_size": 4, "speculate": "prompt-lookup"},
    question="guessed",
    tab="sequences",
)

_BEGINNINGS = {
    "fox": "One day, a fox met an owl. The owl was old and very wise, and the fox was hungry. They sat down under a "
    "big tree in the forest, and it began to rain. The fox looked up, the owl looked down, and for a long time nobody "
    "said a word. Then",
    "girl": "Once upon a time, in a small town by the sea, there lived a girl named Anna. She had a red boat and a "
    "little dog. Every morning, when the sun was up, they went out on the water together to look for a fish. "
    "One morning",
    "king": "The king had a big secret. At night, when all the others were asleep, he went down to the kitchen, and "
    "there he baked bread for the people of the town. Nobody knew it, and everybody loved the bread. But one night",
}
_WAYS = (
    ("fox", ", the fox", 12), ("king", ", the cook", 28), ("girl", ", the dog", 44), ("king", ", a little boy", 28),
    ("girl", ", the boat", 44), ("fox", ", the owl", 12), ("girl", ", Anna", 44), ("king", ", the oven", 28),
    ("fox", ", a bear", 12), ("girl", ", a big fish", 44),
)  # fmt: skip

BATCH = Scenario(
    "A batch in groups",
    tuple(
        Arrival(0, _BEGINNINGS[story] + way, max_tokens=length, min_tokens=length, seed=number)
        for number, (story, way, length) in enumerate(_WAYS)
    ),
    key="batchllm",
    watch=(
        "Ten prompts are known from the start: three beginnings of stories, each with ways to go on. BatchLLM makes a "
        "group of each beginning; see the tree below the pool. The first of a group computes it, then the others join. "
        "The group keeps it until its last text has ended, so a full pool cannot forget it. Long answers go first."
    ),
    settings=PAGED
    | {"num_blocks": 28, "max_num_seqs": 4, "enable_prefix_caching": True, "eviction_policy": None}
    | {"preemption": "recompute", "swap_blocks": None},
    question="group",
    tab="sequences",
    batch=True,
)

SCENARIOS: dict[str, Scenario] = {
    scenario.key: scenario
    for scenario in (
        OPENING, SAMPLES, BEAMS, PREFIX, PREDICTIONS, RECOMPUTE, SWAP, CHUNKED, BURST, BATCH, FRAGMENTATION,
        WITHOUT_HOLES, SPECULATION,
    )
}  # fmt: skip


def menu() -> list[dict[str, str]]:
    """The scenarios' keys, names, texts and chart tabs for the page's menu."""
    return [
        {"key": key, "name": scenario.name, "watch": scenario.watch, "tab": scenario.tab}
        for key, scenario in SCENARIOS.items()
    ]

"""What lab A8's memory, order and policy must do."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from random import Random

from minipaged.labs.a8.proxy import ShadowMemory
from minipaged.labs.checking import Tape, Trace, Trial
from minipaged.labs.student import Violation


def _run(trial: Trial, trace: Trace, tape: Tape) -> None:
    """Steps: ("sizes", (pages, tokens a page, slots)), ("grow", (slot, tokens more)), ("release", (slot, 0))."""
    sizes = trace[0][1] if trace and trace[0][0] == "sizes" else (4, 2, 3)
    tape.say(f"VirtualMemory(driver, num_pages={sizes[0]}, page_size={sizes[1]}, num_slots={sizes[2]})")
    num_pages, page_size, num_slots = sizes
    memory = ShadowMemory(trial.student, num_pages, page_size, num_slots, tape)
    for action, (slot, more) in [step for step in trace if step[0] != "sizes"]:
        slot %= sizes[2]
        if action == "grow":
            memory.ensure(slot, memory.lengths[slot] + more)
        elif memory.lengths[slot]:
            memory.release(slot)


def _traces(random: Random, number: int, actions: dict[str, int]) -> Iterator[Trace]:
    for index in range(number):
        num_pages, page_size, num_slots = random.randint(2, 4 + index), random.choice((1, 2, 3)), random.randint(1, 4)
        chosen = random.choices(list(actions), list(actions.values()), k=6 + 2 * index)
        steps = [(action, (random.randrange(12), random.choice((1, 1, 2, 2 * page_size)))) for action in chosen]
        yield [("sizes", (num_pages, page_size, num_slots)), *steps]


def a8_1(trial: Trial) -> None:
    """Sequences that grow, and never end, until there are no pages."""
    by_token = [("sizes", (4, 2, 2)), *[("grow", (0, 1))] * 4, *[("grow", (1, 2))] * 3]
    by_token += [("grow", (1, 1)), ("grow", (0, 9))]
    trial.search([by_token], partial(_run, trial))
    trial.search([[("sizes", (4, 2, 2)), ("grow", (0, 3)), ("grow", (1, 6))]], partial(_run, trial))
    trial.search(_traces(trial.random, 12, {"grow": 1}), partial(_run, trial))


def a8_2(trial: Trial) -> None:
    """Sequences that end, and others in their slots, shorter or longer; and slots that lose pages to others."""
    sizes = ("sizes", (4, 2, 2))
    again = [sizes, ("grow", (0, 6)), ("release", (0, 0)), ("grow", (0, 3)), ("grow", (0, 3))]
    shorter = [sizes, ("grow", (0, 8)), ("release", (0, 0)), ("grow", (0, 1)), ("grow", (1, 6)), ("grow", (0, 3))]
    trial.search([again, shorter, *_traces(trial.random, 30, {"grow": 4, "release": 1})], partial(_run, trial))


def shared(one: list[int], other: list[int]) -> int:
    """How many tokens two prompts have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def saved(prompts: list[list[int]], order: list[int]) -> int:
    """Tokens that need not be computed when the cache holds the previous prompt."""
    return sum(shared(prompts[one], prompts[other]) for one, other in pairwise(order))


def greedy(prompts: list[list[int]]) -> list[int]:
    """From the first prompt always to the one that shares most with it."""
    order, left = [0], list(range(1, len(prompts)))
    while left:
        order.append(max(left, key=lambda index: shared(prompts[order[-1]], prompts[index])))
        left.remove(order[-1])
    return order


def _prefixes(prompts: list[list[int]]) -> int:
    """Different beginnings of the prompts: each has to be computed once at least."""
    return len({tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)})


def a8_3(trial: Trial) -> None:
    """Prompts of few different tokens, some of them twice; among them one alone, and none."""
    trial.search([[], [((3, 1), 2)]], partial(_order, trial))
    for _ in range(12):
        random = trial.random
        stems = [tuple(random.choices(range(4), k=random.randint(1, 5))) for _ in range(4)]
        prompts = [random.choice(stems) + tuple(random.choices(range(3), k=random.randrange(4))) for _ in range(10)]
        trial.search([[(prompt, random.randint(1, 20)) for prompt in prompts]], partial(_order, trial))


def _order(trial: Trial, trace: Trace, tape: Tape) -> None:
    """``trace``: (prompt, output tokens) of each request."""
    prompts, outputs = [list(prompt) for prompt, _ in trace], [count for _, count in trace]
    call = f"order_requests({prompts}, {outputs})"
    got = trial.student.function("order_requests", prompts, outputs)
    tape.say(f"{call} → {got}")
    plain = isinstance(got, list) and all(type(index) is int for index in got)
    if not plain or sorted(got) != list(range(len(prompts))):
        raise Violation(f"order_requests of {len(prompts)} prompts returned {got!r}: not each index once", "indices")
    if not got:
        return
    mine, most = saved(prompts, got), sum(map(len, prompts)) - _prefixes(prompts)
    if mine < most:
        also = f"; always taking the nearest next saves {saved(prompts, greedy(prompts))}"
        raise Violation(f"the order {got} of {prompts} saves {mine} tokens, and {most} are possible{also}", "saved")
    _by_ratio(prompts, outputs, got)


def _by_ratio(prompts: list[list[int]], outputs: list[int], order: list[int]) -> None:
    firsts = list(dict.fromkeys(prompts[index][0] for index in order))
    ratios = []
    for first in firsts:
        group = [index for index in order if prompts[index][0] == first]
        ratios.append((sum(outputs[index] for index in group), _prefixes([prompts[index] for index in group]), first))
    for (out, computed, first), (more_out, more_computed, later) in pairwise(ratios):
        if out * more_computed < more_out * computed:
            raise Violation(
                f"in the order {order} of {prompts} with {outputs} output tokens, the group that begins with {first} "
                f"({out} outputs for {computed} computed) comes before the one that begins with {later} "
                f"({more_out} for {more_computed})", "ratio",
            )  # fmt: skip


class _Cache:
    """A cache of blocks that grow on each other, asking the student's policy, and what that must answer."""

    def __init__(self, trial: Trial, tape: Tape) -> None:
        tape.say("policy = ListeningPolicy()")
        self.policy, self.tape = trial.student.new("ListeningPolicy"), tape
        self.parents: dict[int, int | None] = {}  # of all blocks that can be found
        self.unused: dict[int, int] = {}  # block → bit, unused for longest first
        self.given_up: set[int] = set()
        self.next = 0

    def text(self, begins_like: int, more: int, bit: int) -> None:
        """A text that begins like an earlier one, or like none, has ``more`` blocks of its own, and ends at once."""
        known = [None, *self.parents]
        block: int | None = known[begins_like % len(known)]
        path: list[int] = []
        while block is not None:
            path.insert(0, block)
            block = self.parents[block]
        for found in path:
            self._call("remove", found)
            del self.unused[found]
            self.given_up.discard(found)
        for _ in range(more):
            self.parents[self.next] = path[-1] if path else None
            path.append(self.next)
            self.next += 1
        for own in reversed(path):
            self._call("add", own, self.parents[own], bit)
            self.unused[own] = bit

    def evict(self) -> None:
        leaves = [block for block in self.unused if block not in set(self.parents.values())]
        ones = [block for block in leaves if self.unused[block]]
        if not self.given_up and not ones:
            self.given_up = set(self.unused)
        wanted = next(block for block in leaves if block in self.given_up) if self.given_up else ones[0]
        self.tape.say(f"policy.evict() must return {wanted}")
        said = self._call("evict")
        if said != wanted or type(said) is not int:
            raise Violation(f"evict() returned {said!r}, not {wanted}: {self._why(said, leaves, ones)}", "evict")
        del self.unused[wanted], self.parents[wanted]
        self.given_up.discard(wanted)

    def _why(self, said: object, leaves: list[int], ones: list[int]) -> str:
        if said not in self.unused:
            return "that is no block without a user"
        if said not in leaves:
            return f"block {next(b for b, parent in self.parents.items() if parent == said)} continues it"
        if self.given_up:
            return f"blocks {sorted(self.given_up)} have been given up, and of their ends that is unused for longest"
        return f"of the ends, {ones} have bit 1, and the first of these is unused for longest"

    def _call(self, method: str, *args: object) -> object:
        if method != "evict":
            self.tape.say(f"policy.{method}({', '.join(map(str, args))})")
        return self.policy.call(method, *args)


def _listen(trial: Trial, trace: Trace, tape: Tape) -> None:
    """Steps: ("text", (begins like which, blocks of its own, bit)), ("evict", how many)."""
    cache = _Cache(trial, tape)
    for action, value in trace:
        if action == "text":
            cache.text(*value)
        for _ in range(min(value, len(cache.unused)) if action == "evict" else 0):
            cache.evict()


def a8_4(trial: Trial) -> None:
    """Texts with and without a common beginning, told to come back or not, some of them found again."""
    ends_first = [("text", (0, 3, 1)), ("text", (0, 1, 0)), ("text", (1, 1, 1)), ("evict", 3)]
    flush = [("text", (0, 2, 0)), ("text", (0, 2, 0)), ("evict", 1), ("text", (0, 1, 1)), ("evict", 4)]
    rescued = [("text", (0, 1, 0)), ("text", (0, 1, 0)), ("text", (0, 1, 0)), ("evict", 1), ("text", (1, 0, 0))]
    rescued += [("text", (0, 1, 0)), ("evict", 3)]
    trial.search([ends_first, flush, rescued], partial(_listen, trial))
    for _ in range(25):
        random = trial.random
        texts = [("text", (random.randrange(12), random.randint(1, 3), random.randrange(2))) for _ in range(8)]
        evictions = [("evict", random.randint(1, 3)) for _ in range(5)]
        steps = random.sample([*texts, *evictions], 13)
        trial.search([steps], partial(_listen, trial))


CHECKS = {"A8.1": a8_1, "A8.2": a8_2, "A8.3": a8_3, "A8.4": a8_4}

"""Lab A5: the scheduler.

Its reference is a small sibling of `core.scheduler.Scheduler`, without samples, beams, swapping and cached
prefixes. They need not plan alike: there are many fair plans. Instead the tests judge the engine's scheduler by the
same rules, and both give the same tokens.
"""

from __future__ import annotations

from minipaged.labs.lab import Lab, Mutant, Source, Task

MUTANTS = (
    Mutant(
        "the oldest request is preempted, so that it may never end",
        "A5.3",
        "self.preempt(self.running[-1])",
        "self.preempt(self.running[0])",
    ),
    Mutant(
        "prompts come first, and whoever generates waits for them",
        "A5.2",
        "key=lambda r: r.num_tokens - r.num_computed > 1",
        "key=lambda r: r.num_tokens - r.num_computed <= 1",
    ),
    Mutant(
        "a preempted request goes on where it was, though its keys and values are gone",
        "A5.3",
        "        victim.num_computed = 0\n",
        "",
    ),
    Mutant(
        "a preempted request queues behind those that came later",
        "A5.3",
        "self.waiting.insert(0, victim)",
        "self.waiting.append(victim)",
    ),
    Mutant(
        "one request more runs than max_num_seqs allows",
        "A5.1",
        "len(self.running) < self.max_num_seqs",
        "len(self.running) <= self.max_num_seqs",
    ),
    Mutant(
        "a short request overtakes one that does not fit yet",
        "A5.3",
        "            if not self.memory.fits(request.id, request.num_tokens):\n                break\n",
        "            if not self.memory.fits(request.id, request.num_tokens):\n"
        "                self.waiting.append(self.waiting.pop(0))\n                break\n",
    ),
)

LAB = Lab(
    key="A5",
    title="A scheduler",
    minutes=120,
    file="scheduler.py",
    sources=(Source("minipaged.labs.a5.reference"),),
    tasks=(
        Task("A5.1", "Continuous batching", 3),
        Task("A5.2", "Chunks within a budget", 3, needs=("A5.1",)),
        Task("A5.3", "Preempt", 4, needs=("A5.2",)),
        Task("A5.4", "Everything at once", 2, needs=("A5.3",)),
    ),
    mutants=MUTANTS,
)

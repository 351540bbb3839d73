# %% [markdown]
# # 7 · Continuous batching
#
# **Question.** Eight people ask a model at the same time. One wants a word, another a story. Who has to wait for whom?
#
# You will schedule the same requests in the old way and the new one and draw both. Then you will deal with a very long
# prompt among short ones, write a scheduler of 30 lines that does all of it with one counter, and find it in minipaged.
#
# *45 minutes. You need Python, and from [tutorial 2](02_kv_cache.md) the words prefill and decode. "The paper" is
# [PagedAttention](https://arxiv.org/abs/2309.06180) (Kwon et al., SOSP 2023); continuous batching itself is from Orca
# (Yu et al., OSDI 2022), where it is called iteration-level scheduling.*

# %% [markdown]
# ## In batches
#
# A step of the model costs nearly the same for one text as for several, because the weights are read once for all
# ([tutorial 2](02_kv_cache.md)). So texts are computed in batches. Say there is room for three at once: three *seats*.
# Eight requests wait, and this is how many tokens each will write. (Nobody knows these numbers beforehand. The
# simulation does, so that it can stop.)

# %%
OUTPUT = {"A": 6, "B": 14, "C": 3, "D": 9, "E": 12, "F": 4, "G": 8, "H": 2}
SEATS = 3

# %% [markdown]
# The old way, **static batching**: take the first three, run until all of them have ended, take the next three. (The
# paper's FasterTransformer baseline works so.)


# %%
def static(output):
    """A list of (seat, name, first step, end)."""
    plan, step, waiting = [], 0, list(output)
    while waiting:
        batch, waiting = waiting[:SEATS], waiting[SEATS:]
        plan += [(seat, name, step, step + output[name]) for seat, name in enumerate(batch)]
        step += max(output[name] for name in batch)
    return plan


# %% [markdown]
# **Predict.** How many steps does that take for all eight? How many would it take if no seat were ever empty?
#
# <details><summary>Then look</summary>

# %%
from math import ceil

from show import COLOURS, EMPTY, box, drawing, label


def summary(plan):
    steps = max(end for *_, end in plan)
    used = 100 * sum(end - start for _, _, start, end in plan) / steps / SEATS
    mean = sum(end for *_, end in plan) / len(plan)
    return f"{steps} steps; seats in use {used:.0f} % of the time; done after {mean:.1f} steps on average"


def gantt(plan, alt):
    """A row for each seat, time from left to right."""
    steps, seats = max(end for *_, end in plan), 1 + max(seat for seat, *_ in plan)
    width = min(18, 640 / steps)  # pixels of a step
    shapes = [box(60, 10 + 30 * seat, steps * width, 26, EMPTY) for seat in range(seats)]
    shapes += [label(52, 28 + 30 * seat, f"seat {seat}", "end") for seat in range(seats)]
    for seat, name, start, end in plan:
        colour = COLOURS[(ord(name) - ord("A")) % len(COLOURS)]
        shapes.append(box(60 + start * width, 10 + 30 * seat, (end - start) * width, 26, colour, name))
    every = 10 if steps > 40 else 5
    shapes += [label(60 + s * width, 26 + 30 * seats, str(s), "middle") for s in range(0, steps + 1, every)]
    return drawing(720, 40 + 30 * seats, shapes, alt)


print(summary(static(OUTPUT)))
print("if no seat were ever empty:", ceil(sum(OUTPUT.values()) / SEATS), "steps")
gantt(static(OUTPUT), "Static batching: 34 steps. A and C end early and their seats stay empty until B has ended")

# %% [markdown]
# 14 + 12 + 8 = 34 steps: the longest of each batch. C is done after 3 steps, but its seat stays empty until B is done
# after 14. And D, who only came fourth, waits for B, too.
# </details>
#
# ## Continuously
#
# The new way: decide in *every step* who runs. Whoever has ended leaves at once, and the next takes the seat.


# %%
def continuous(output):
    plan, step, waiting = [], 0, list(output)
    seats = [None] * SEATS  # who sits there, and until when
    while waiting or any(seats):
        for seat in range(SEATS):
            if seats[seat] and seats[seat][1] == step:
                seats[seat] = None
            if seats[seat] is None and waiting:
                name = waiting.pop(0)
                seats[seat] = name, step + output[name]
                plan.append((seat, name, step, step + output[name]))
        step += 1
    return plan


# %% [markdown]
# **Predict.** Which request takes the seat of C? Of A? And how many steps will it be, given that 20 is the least?
#
# <details><summary>Then look</summary>

# %%
print(summary(continuous(OUTPUT)))
gantt(continuous(OUTPUT), "Continuous batching: D begins when C ends, E when A ends; no seat is empty before the end")

# %% [markdown]
# The same work, on the same seats. Nobody waits for somebody else's story; only the end is ragged, because no more
# requests come.
# </details>
#
# Why did anybody do it otherwise? Because texts that begin at different times are at different positions, and each
# needs its own context in attention. All products with weights are the same for every row, so rows of different texts
# and different positions can go through them together (Orca calls this *selective batching*). Only attention must know
# who is who, and with block tables it does: see [tutorial 4](04_paged_attention.md).
#
# ## A long prompt
#
# A seat is not the only resource. A *step* has a length, too: it computes rows. A decode brings one row, a prompt of
# 1,000 tokens brings 1,000. With the rough numbers from [tutorial 2](02_kv_cache.md) (OPT-13B; assumed: 1.3 TB/s, 180 ·
# 10¹² operations a second) a step takes

# %%
READ_WEIGHTS = 26e9 / 1.3e12  # seconds
ROW = 2 * 13e9 / 180e12


def seconds(rows):
    return max(READ_WEIGHTS, rows * ROW)


for rows in (1, 3, 100, 138, 1000):
    print(f"{rows:4} rows: {1000 * seconds(rows):5.1f} ms")

# %% [markdown]
# Up to 138 rows are free: the weights must be read anyway. 1,000 rows take 7 times as long.
#
# Three texts are being written, one token in every 20 ms. Somebody comes with a prompt of 1,000 tokens. Compute it in
# one step, and the three stand still for a moment. So compute it in **chunks**: each step has a *budget* of rows; the
# three take theirs first, and the prompt gets the rest (Sarathi, Agrawal et al. 2023, calls it *chunked prefill*).
#
# **Predict.** Which budget is best? Think of both: the pause that the three notice, and the time until the newcomer's
# first token.
#
# <details><summary>Then look</summary>


# %%
def long_prompt(budget, prompt=1000, others=3):
    """Returns the longest step in ms, and the time until the prompt is read in ms."""
    steps = []
    while prompt:
        chunk = min(prompt, budget - others)
        steps.append(seconds(others + chunk))
        prompt -= chunk
    return 1000 * max(steps), 1000 * sum(steps)


for budget in (2048, 512, 138, 35, 8):
    pause, first = long_prompt(budget)
    print(f"budget {budget:4}: the three wait {pause:5.1f} ms for a token; the newcomer's first after {first:6.0f} ms")

# %% [markdown]
# In one step: the shortest wait for the newcomer, and a pause that three people see. With 138 nobody sees anything, and
# the newcomer waits hardly longer. Smaller budgets only hurt the newcomer: the steps do not get shorter. The right
# budget is where computing takes as long as reading.
# </details>
#
# ## A scheduler
#
# Now put it together. A sequence has `tokens` and `num_computed`. Who lacks one token is decoding; who lacks more has a
# prompt to read. That is the only difference. Decodes first, then prompts in order of arrival, then newcomers, as long
# as there are budget and seats.

# %%
from dataclasses import dataclass


@dataclass
class Seq:
    name: str
    num_tokens: int  # prompt, then output too
    max_tokens: int  # it ends at this length
    num_computed: int = 0


class Scheduler:
    def __init__(self, seats, budget):
        self.seats, self.budget = seats, budget
        self.waiting, self.running = [], []

    def schedule(self):
        """Who computes how many rows in this step: {name: rows}."""
        budget, plan = self.budget, {}
        while self.waiting and len(self.running) < self.seats:
            self.running.append(self.waiting.pop(0))
        for seq in sorted(self.running, key=lambda seq: seq.num_tokens - seq.num_computed > 1):  # decodes first
            rows = min(seq.num_tokens - seq.num_computed, budget)
            if rows:
                plan[seq.name] = rows
                budget -= rows
        return plan

    def commit(self, plan):
        """The rows are computed; who has none left gets a token, or ends."""
        for seq in list(self.running):
            seq.num_computed += plan.get(seq.name, 0)
            if seq.num_computed == seq.num_tokens:
                seq.num_tokens += 1
                if seq.num_tokens == seq.max_tokens:
                    self.running.remove(seq)


# %% [markdown]
# **Predict.** A budget of 20 rows. A, B and C have short prompts and are writing when D comes with a prompt of 70. How
# many rows does D get per step, and in how many steps does it write its first token? Who is not slowed down at all?
#
# <details><summary>Then look</summary>

# %%
scheduler = Scheduler(seats=4, budget=20)
for name, prompt in (("A", 5), ("B", 7), ("C", 6)):
    scheduler.waiting.append(Seq(name, prompt, prompt + 12))
for step in range(12):
    if step == 3:
        scheduler.waiting.append(Seq("D", 70, 74))
    plan = scheduler.schedule()
    scheduler.commit(plan)
    print(f"step {step:2}:", "  ".join(f"{name} {rows:2}" for name, rows in plan.items()))

# %% [markdown]
# D gets 17 rows a step, beside 3 decodes: 17 + 17 + 17 + 17 + 2 = 70. Its first token comes in the fifth of these
# steps. A, B and C get their row in every one of them.
# </details>
#
# ## When memory runs out
#
# Seats and rows are not the tightest resource: blocks are. All texts grow, and at some step there is no free block.
# Then somebody must give blocks back: the *latest arrival* loses all of its own (the paper's rules: first come, first
# served; all or nothing, because attention needs all keys of a text or none). It goes back to `waiting`, with
# `num_computed = 0`. Its tokens are kept. When it is admitted again, prompt and output are computed like one long
# prompt.
#
# Your scheduler does that already, if you set that counter to 0. On the real engine, with a pool of 14 blocks, too
# small for its four texts:

# %%
from minipaged import LLM, SamplingParams
from minipaged.events import Preempted, Scheduled

PROMPTS = [
    "Once upon a time",
    "The robot opened the door and",
    "In a small town by the sea,",
    "It was a cold night and",
]
params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


def run(num_blocks):
    llm = LLM("tiny", device="cpu", num_blocks=num_blocks, enable_prefix_caching=False, max_num_batched_tokens=64)
    events = []
    llm.engine.events.subscribe(events.append)
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)], events


roomy, _ = run(num_blocks=64)
tight, events = run(num_blocks=14)
preempted = [event.request_id for event in events if isinstance(event, Preempted)]
print("preempted:", preempted)
print("same tokens as with 64 blocks:", tight == roomy)

# %% [markdown]
# `llm-3` is the fourth of the four: the latest arrival. Same tokens, later: preemption is invisible except for time.
# (The other way, swapping blocks to the CPU's memory and back, keeps the KV; the paper compares both.)
#
# ## In the engine
#
# One step, on one screen:

# %%
from show import source

from minipaged.core.engine import Engine

source(Engine.step)

# %% [markdown]
# `schedule` has a step more than yours: it makes room for the running ones, at the cost of later arrivals, before it
# admits new requests. (Features plug in at `admission`, which sets limits and the order of admission, and at `stages`.
# Without features `admission` is first come, first served, and there are no stages.)

# %%
from minipaged.core import scheduler as engine_scheduler

source(engine_scheduler.Scheduler.schedule)

# %% [markdown]
# Here is your Gantt chart once more, drawn from what the real engine tells. Four seats, and eight requests at once:

# %%
llm = LLM("tiny", device="cpu", max_num_seqs=4, num_blocks=64)
events = []
llm.engine.events.subscribe(events.append)
lengths = [24, 60, 12, 36, 48, 18, 30, 8]
llm.generate(
    [llm.encode(PROMPTS[i % 4]) for i in range(8)],
    [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths],
)
spans, step = {}, -1
for event in events:
    if event.type == "step_started":
        step = event.step
    elif isinstance(event, Scheduled):
        spans.setdefault(event.seq_id, []).append(step)
plan, free_from = [], [0] * 4
for seq_id, steps in spans.items():
    seat = next(seat for seat in range(4) if free_from[seat] <= steps[0])
    free_from[seat] = steps[-1] + 1
    plan.append((seat, chr(ord("A") + seq_id), steps[0], steps[-1] + 1))
print(f"{step + 1} steps for {sum(lengths)} tokens on 4 seats; the least possible: {ceil(sum(lengths) / 4)}")
gantt(plan, "Eight requests on the real engine: each begins in the very step after another one's last")

# %% [markdown]
# ## In the visualizer
#
# Start it with `make demo` (or `minipaged visualize`). Three scenarios of the menu *scenario* belong to this tutorial:
#
# - **A burst of arrivals**: eight requests, four seats; the tab *Sequences* draws the chart from above, live.
# - **A long prompt among short ones**: a budget of 20 rows; watch the step's bar at the bottom.
# - **Out of memory: recompute**: who gives its blocks back, and how it comes back.
#
# Source lines: `Engine.step` in [`minipaged/core/engine.py`](../minipaged/core/engine.py), `Scheduler` in
# [`minipaged/core/scheduler.py`](../minipaged/core/scheduler.py), and what they hand to each other,
# `StepPlan` in [`minipaged/core/plan.py`](../minipaged/core/plan.py).
#
# ## Exercises
#
# **1. The best order.** No schedule can need fewer steps than the longest request, nor fewer than all tokens divided by
# the seats. Find an order of A … H in which `continuous` needs fewer steps than first come, first served does. Why does
# a server not do that?
#
# <details><summary>Answer</summary>

# %%
longest_first = dict(sorted(OUTPUT.items(), key=lambda item: -item[1]))
shortest_first = dict(sorted(OUTPUT.items(), key=lambda item: item[1]))
print("bound:         ", max(max(OUTPUT.values()), ceil(sum(OUTPUT.values()) / SEATS)), "steps")
for name, order in {"first come": OUTPUT, "longest first": longest_first, "shortest first": shortest_first}.items():
    print(f"{name + ':':15}", summary(continuous(order)))

# %% [markdown]
# Longest first fills the ragged end with short ones. Shortest first has the best average. A server can do neither,
# since it does not know the lengths. If it did, shortest first would be unfair: as long as short requests come, a long
# one never begins. First come, first served promises everybody a turn.
# </details>
#
# **2. Prompts first.** Change one line of your `Scheduler` so that prompts come before decodes. Every second step a new
# request with a prompt of 20 arrives, and the budget is 20. What happens to A, who is writing?
#
# <details><summary>Answer</summary>


# %%
class PromptsFirst(Scheduler):
    def schedule(self):
        budget, plan = self.budget, {}
        while self.waiting and len(self.running) < self.seats:
            self.running.append(self.waiting.pop(0))
        for seq in sorted(self.running, key=lambda seq: seq.num_tokens - seq.num_computed == 1):  # the one line
            rows = min(seq.num_tokens - seq.num_computed, budget)
            if rows:
                plan[seq.name] = rows
                budget -= rows
        return plan


for kind in (Scheduler, PromptsFirst):
    scheduler = kind(seats=16, budget=20)
    scheduler.waiting.append(Seq("A", 4, 100))
    steps_of_a = []
    for step in range(21):
        if step % 2 == 1:
            scheduler.waiting.append(Seq(f"R{step}", 20, 30))
        plan = scheduler.schedule()
        scheduler.commit(plan)
        steps_of_a += [step] * ("A" in plan)
    print(f"{kind.__name__:12} A computes in {len(steps_of_a)} of 21 steps: {steps_of_a}")

# %% [markdown]
# A is stopped in every step in which a prompt is read: half its speed, and none at all if prompts came in every step.
# (Computing prompts first has a merit, newcomers see their first token sooner. Engines that do so stop the decodes
# altogether while a prompt is read.)
# </details>
#
# **3. What recomputing costs.** In the run with 14 blocks, count the rows that were computed. How many would it have
# been without preemption? Why is the loss in *time* smaller than the loss in rows?
#
# <details><summary>Answer</summary>

# %%
_, tight_events = run(num_blocks=14)
_, roomy_events = run(num_blocks=64)


def rows_and_steps(events):
    rows = sum(event.num_tokens for event in events if isinstance(event, Scheduled))
    return rows, sum(event.type == "step_finished" for event in events)


for name, what in (("64 blocks", roomy_events), ("14 blocks", tight_events)):
    rows, steps = rows_and_steps(what)
    print(f"{name}: {rows} rows in {steps} steps")
largest = max(event.num_tokens for event in tight_events if isinstance(event, Scheduled))
print("largest chunk of one sequence with 14 blocks:", largest, "rows")

# %% [markdown]
# The rows that were lost are computed again in few large chunks, like a prompt, and not one a step as when they were
# written. Rows that fit under the budget are nearly free. (The steps increase mostly because fewer texts fit at once.)
# </details>
#
# **Next:** [8 · Sharing and copy-on-write](08_copy_on_write.md)

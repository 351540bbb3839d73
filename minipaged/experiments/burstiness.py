"""How burstiness causes preemptions: one mean rate, increasingly uneven arrivals (BurstGPT, arXiv 2401.17644)."""

from __future__ import annotations

from itertools import islice
from statistics import fmean

from minipaged.experiments.figures import bars
from minipaged.experiments.result import Progress, Result, Row
from minipaged.experiments.simulator import OPT_13B, Roofline, Simulation, simulate
from minipaged.workloads import gamma, sharegpt_like, trace

CVS, RATE = (1.0, 1.41, 2.0, 3.0), 2.25


def measure(quick: bool, progress: Progress) -> Result:
    """Preemptions by the arrival gaps' coefficient of variation, from 1 (Poisson) to 3, over several seeds."""
    seeds, duration = (3, 120) if quick else (3, 240)
    counts: dict[float, list[float]] = {}
    latency: dict[float, list[float]] = {}
    for done, cv in enumerate(CVS):
        for seed in range(seeds):
            progress((done + seed / seeds) / len(CVS), f"CV {cv:g}, seed {seed}")
            run = served(cv, RATE, duration, seed)
            counts.setdefault(cv, []).append(run.preemptions)
            latency.setdefault(cv, []).append(run.normalized_latency)
    rows = []
    for what, measured, unit in (
        ("preemptions", counts, f"in {duration} s"),
        ("normalized latency", latency, "s/token"),
    ):
        for cv, values in measured.items():
            rows.append(Row(f"{what} at CV {cv:g}", fmean(values), unit, spread=(min(values), max(values))))
    series = {f"seed {seed}": [counts[cv][seed] for cv in CVS] for seed in range(seeds)}
    figure = bars("Preemptions by burstiness of arrivals", [f"CV {cv:g}" for cv in CVS], series, "preemptions")
    assumed = [OPT_13B.stated(), f"ShareGPT-like lengths, Gamma arrivals, {RATE:g} requests/s for {duration} s."]
    assumed.append("BurstGPT reports that bursts hurt and gives no number for this setting.")
    return Result(rows, figure, assumed, {"preemptions": counts, "normalized_latency": latency})


def served(cv: float, rate: float, duration: float, seed: int, clock: Roofline = OPT_13B) -> Simulation:
    """Simulates ShareGPT-like requests whose gaps have this coefficient of variation, on paged memory.

    The gaps are scaled slightly so that the rate is exact: otherwise the longer tail of bursty arrivals would also
    change the load, not only its distribution over time.
    """
    times = list(islice(gamma(rate, cv, 50 * duration, seed), round(rate * duration)))
    stretch = duration / times[-1]
    return simulate(trace(sharegpt_like(seed), [time * stretch for time in times]), clock)

"""Request rates of a chatbot whose prompts contain the conversation so far (PagedAttention, §6.5, Fig. 17)."""

from __future__ import annotations

from typing import Any

from minipaged.experiments.figures import lines
from minipaged.experiments.rates import LIMIT, Curve, sustained, sweep
from minipaged.experiments.result import READ, Progress, Result, Row
from minipaged.experiments.saturation import SYSTEMS
from minipaged.experiments.simulator import OPT_13B
from minipaged.workloads import TraceRequest, chat, poisson, sharegpt_like

CACHED = "paged, KV kept between turns"
CHATBOTS: dict[str, dict[str, Any]] = {name: SYSTEMS[name] for name in SYSTEMS if name != "FasterTransformer"}
CHATBOTS[CACHED] = {"memory": "paged", "enable_prefix_caching": True}
WHY = "how many turns a conversation has and how many are open is assumed; our clock is a roofline"


def measure(quick: bool, progress: Progress) -> Result:
    """Mean normalized latency by request rate, and the rate at which it crosses the limit."""
    duration = 60 if quick else 240

    def requests(rate: float) -> list[TraceRequest]:
        return chat(sharegpt_like(0), poisson(rate, duration, seed=0), seed=0)

    curves: dict[str, Curve] = {}
    for system, settings in CHATBOTS.items():
        progress(len(curves) / len(CHATBOTS), system)
        curves[system] = sweep(requests, 0.5, **settings)
    rate = {system: sustained(curve) for system, curve in curves.items()}
    rows = [Row(f"sustained rate, {system}", rate[system], "requests/s") for system in CHATBOTS]
    for system in ("Orca (Max)", "Orca (Pow2)", "Orca (Oracle)"):
        rows.append(Row(f"paged / {system}", rate["paged"] / rate[system], "×", "2", READ, why=WHY))
    axes = "requests/s", "normalized latency, s/token"
    figure = lines("Latency by request rate, chats", curves, *axes, threshold=LIMIT, y_max=1.0)
    assumed = [
        OPT_13B.stated(),
        f"Poisson arrivals for {duration} s at every rate; sustained means below {LIMIT:g} s/token. Prompts are the "
        "last 1024 tokens of a conversation, answers at most 1024; 20 conversations of 5 turns are open at a time.",
        "As in the paper, KV is dropped between the turns; keeping it in the prefix cache is shown beside.",
    ]
    return Result(rows, figure, assumed, {"curves": curves, "sustained": rate})

"""Requests to serve: generators and traces, as plain data. This package does not import torch.

requests = trace(sharegpt_like(seed=0), poisson(rate=2.0, duration=600, seed=0))
"""

from minipaged.workloads.arrivals import at_once, gamma, poisson
from minipaged.workloads.burstgpt import load_burstgpt
from minipaged.workloads.lengths import alpaca_like, sharegpt_like, translation_like
from minipaged.workloads.trace import TraceRequest, chat, shared_prefix, trace

__all__ = [
    "TraceRequest",
    "alpaca_like",
    "at_once",
    "chat",
    "gamma",
    "load_burstgpt",
    "poisson",
    "shared_prefix",
    "sharegpt_like",
    "trace",
    "translation_like",
]

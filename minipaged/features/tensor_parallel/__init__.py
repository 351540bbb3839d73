"""Tensor parallelism: one scheduler and one block table, many workers (PagedAttention paper, §4.6).

Each process, a *rank*, computes with its shard of the model and stores the keys and values of its own heads. Block 7 of
every rank's pool holds the same tokens but other heads, so a single block table serves all of them. Rank 0 has the
engine, with an ordinary scheduler; it sends each plan to the other ranks and then executes the plan, too.

Start it with ``torchrun --nproc-per-node 2 -m minipaged …``, or call `launch.run`. On the runner's side it adds
`LeadingRunner`. Read `ranks` first, then `shard` (which rank has which part of a weight). The page does not show it.
"""

"""Attention over paged KV. `reference` is plain torch: readable, correct on any device, and the oracle of the others.

Of the Triton kernels, read `store_kv`, `tiles`, `paged_decode`, `paged_prefill` in this order; `backend` chooses among
the implementations, and `report` shows what the compiler makes of the kernels.
"""

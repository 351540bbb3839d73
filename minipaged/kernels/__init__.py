"""Kernels for attention over paged KV. `reference` is plain torch: readable, correct on any device, and their oracle.

Read the Triton kernels in the order `store_kv`, `tiles`, `paged_decode`, `paged_prefill`. `backend` chooses among
the implementations, and `report` shows how the Triton kernels were compiled.
"""

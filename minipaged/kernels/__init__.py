"""Attention over paged KV. `reference` is plain torch: readable, correct on any device."""

"""Executes a step's plan on tensors: batch, KV cache, runner, sampler."""

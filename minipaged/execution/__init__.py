"""The plan, on tensors: batch, KV cache, runner, sampler."""

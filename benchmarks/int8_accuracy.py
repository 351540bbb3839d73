"""Accuracy of an int8 KV cache: the embedded model on held-out sequences, compared with a float32 cache.

    python -m benchmarks.int8_accuracy

It prints the numbers and writes benchmarks/results/int8_accuracy.json.

The logits of each token are computed from a cache with its whole context in int8, so errors are those of decoding at
this position. Greedy outputs are compared token by token.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from benchmarks.result_files import write
from minipaged import LLM, SamplingParams
from minipaged.execution.batch import Batch
from minipaged.tiny.train import held_out_batches

PROMPT, OUTPUT = 24, 64  # tokens of the greedy generations


def logits_of(llm: LLM, tokens: Tensor) -> Tensor:
    """Logits [L, V] of a sequence [L] in one prefill, which reads keys and values from the cache as decoding does."""
    runner, length = llm.engine.runner, len(tokens)
    cache = runner.kv_cache
    blocks = torch.arange(-(-length // cache.block_size))
    batch = Batch(
        token_ids=tokens,
        positions=torch.arange(length),
        slot_mapping=torch.arange(length),
        block_tables=blocks[None],
        context_lens=torch.tensor([length]),
        logit_rows=torch.arange(length),
        query_lens=[length],
        context_lens_list=[length],
        num_decodes=0,
    )
    with torch.inference_mode():
        return runner.model(batch, cache)


def measure(llms: dict[str, LLM], texts: list[Tensor]) -> dict:
    """Perplexity, logit errors and agreement over all positions of all sequences."""
    loss: dict[str, list[Tensor]] = {name: [] for name in llms}
    error, divergence, agree = [], [], []
    for text in texts:
        exact, rough = (logits_of(llm, text[:-1]) for llm in llms.values())
        for name, logits in zip(llms, (exact, rough), strict=True):
            loss[name].append(torch.nn.functional.cross_entropy(logits, text[1:], reduction="none"))
        error.append((rough - exact).abs().mean(-1) / exact.std(-1))
        divergence.append((exact.softmax(-1) * (exact.log_softmax(-1) - rough.log_softmax(-1))).sum(-1))
        agree.append((exact.argmax(-1) == rough.argmax(-1)).float())
    return {
        "positions": sum(map(len, agree)),
        "perplexity": {name: round(torch.cat(values).mean().exp().item(), 4) for name, values in loss.items()},
        "mean_logit_error_in_standard_deviations": round(torch.cat(error).mean().item(), 5),
        "largest_logit_error_in_standard_deviations": round(torch.cat(error).max().item(), 5),
        "mean_kl_divergence": round(torch.cat(divergence).mean().item(), 7),
        "same_likeliest_token": round(torch.cat(agree).mean().item(), 5),
    }


def compare_greedy(llms: dict[str, LLM], texts: list[Tensor]) -> dict:
    """How many greedy outputs are identical, and how many tokens the others share before they differ."""
    params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    prompts = [text[:PROMPT].tolist() for text in texts]
    exact, rough = ([out.outputs[0].token_ids for out in llm.generate(prompts, params)] for llm in llms.values())
    same = [next((i for i in range(OUTPUT) if a[i] != b[i]), OUTPUT) for a, b in zip(exact, rough, strict=True)]
    return {
        "continuations": len(same),
        "tokens_each": OUTPUT,
        "identical": sum(n == OUTPUT for n in same),
        "mean_tokens_before_the_first_difference": round(sum(same) / len(same), 1),
    }


def main() -> None:
    settings = {"device": "cpu", "dtype": "float32", "num_blocks": 1024, "enable_prefix_caching": False}
    llms = {name: LLM("tiny", kv_dtype=kv, **settings) for name, kv in (("float32", "auto"), ("int8", "int8"))}
    texts = [row for batch in held_out_batches(llms["int8"].tokenizer, 8).values() for row in batch]
    sizes = {name: llm.engine.bytes_per_block for name, llm in llms.items()}
    report = {"model": "tiny", "kv_bytes_per_block": sizes} | measure(llms, texts)
    report["greedy"] = compare_greedy(llms, texts)
    print(json.dumps(report, indent=2))
    write("int8_accuracy", report, "python -m benchmarks.int8_accuracy")


if __name__ == "__main__":
    main()

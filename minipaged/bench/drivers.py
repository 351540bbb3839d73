"""Runs one engine in its own process: ``python drivers.py ENGINE MODEL DTYPE``, with JSON lines on stdin and stdout.

It prints a line when the engine is ready. Then it answers each line {"prompts": [[…], …], "outputs": […]} when all
outputs are generated, greedily and past every end-of-text token. It imports minipaged only if that is the engine,
because it runs in the Python in which the other engine is installed.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any

Run = Callable[[list[list[int]], list[int]], list[int]]  # prompts, wanted lengths → lengths that were generated
LONGEST = 1024  # tokens per sequence; every engine gets this limit, so that all reserve the same memory


def minipaged(model: str, dtype: str) -> Run:
    from minipaged import LLM, SamplingParams

    llm = LLM(model, device="cpu", dtype=dtype, max_model_len=LONGEST, enable_prefix_caching=False)

    def run(prompts: list[list[int]], outputs: list[int]) -> list[int]:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in outputs]
        return [len(out.outputs[0].token_ids) for out in llm.generate(prompts, params)]  # type: ignore[arg-type]

    return run


def transformers(model: str, dtype: str) -> Run:
    """Uses `generate` for a batch of equal lengths, and continuous batching for a mixed one."""
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def together(prompts: list[list[int]], length: int) -> list[int]:
        ids = torch.tensor(prompts)
        config = GenerationConfig(
            max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0, use_cache=True
        )
        with torch.inference_mode():
            out = network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return [out.shape[1] - ids.shape[1]] * len(prompts)

    @cache
    def manager() -> Any:
        # By default the manager reserves all free memory, which takes minutes on a CPU, so we set the sizes.
        sizes = ContinuousBatchingConfig(block_size=16, num_blocks=64 * LONGEST // 16, max_batch_tokens=LONGEST)
        config = GenerationConfig(max_new_tokens=LONGEST, do_sample=False, pad_token_id=0, eos_token_id=-1)
        started = network.init_continuous_batching(generation_config=config, continuous_batching_config=sizes)
        started.start()
        return started

    def continuously(prompts: list[list[int]], outputs: list[int]) -> list[int]:
        requests = zip(prompts, outputs, strict=True)
        ids = [manager().add_request(prompt, max_new_tokens=n, eos_token_id=-1) for prompt, n in requests]
        done: dict[str, int] = {}
        while len(done) < len(ids):
            result = manager().get_result(timeout=1)
            if result is not None and result.is_finished():
                done[result.request_id] = len(result.generated_tokens)
            elif result is None and not manager().is_running():
                raise RuntimeError("transformers' continuous batching stopped before it finished all requests")
        return [done[i] for i in ids]

    def run(prompts: list[list[int]], outputs: list[int]) -> list[int]:
        alike = len(set(outputs)) == 1 and len(set(map(len, prompts))) == 1
        return together(prompts, outputs[0]) if alike else continuously(prompts, outputs)

    return run


def vllm(model: str, dtype: str) -> Run:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, like the other engines
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, dtype=dtype, max_model_len=LONGEST, max_num_seqs=64, skip_tokenizer_init=True,
        enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip

    def run(prompts: list[list[int]], outputs: list[int]) -> list[int]:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in outputs]
        made = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [len(out.outputs[0].token_ids) for out in made]

    return run


def llama_cpp(model: str, dtype: str) -> Run:
    """Fills its batches as llama.cpp's server does: one token of each running sequence, then prompt tokens."""
    import llama_cpp as lib
    import numpy
    from gguf_file import write_gguf  # beside this file

    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max, settings.n_batch = 64 * LONGEST, 64, LONGEST
    settings.n_threads = settings.n_threads_batch = int(os.environ["OMP_NUM_THREADS"])
    network = lib.llama_model_load_from_file(write_gguf(model, dtype).encode(), lib.llama_model_default_params())
    context = lib.llama_init_from_model(network, settings)
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(network))
    batch = lib.llama_batch_init(LONGEST, 0, 1)

    def decode(entries: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Computes (sequence, position, token, whether its logits are wanted); returns sequence → next token."""
        batch.n_tokens = len(entries)
        for i, (seq, position, token, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        rows = [(seq, lib.llama_get_logits_ith(context, i)) for i, (seq, _, _, wanted) in enumerate(entries) if wanted]
        return {seq: int(numpy.ctypeslib.as_array(row, (vocab,)).argmax()) for seq, row in rows}

    def run(prompts: list[list[int]], outputs: list[int]) -> list[int]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        prompt_tokens = [
            (seq, i, token, i + 1 == len(prompt))
            for seq, prompt in enumerate(prompts)
            for i, token in enumerate(prompt)
        ]
        made = [0] * len(prompts)
        running: dict[int, int] = {}  # sequence → its newest token
        while prompt_tokens or running:
            entries = [(seq, len(prompts[seq]) + made[seq] - 1, token, True) for seq, token in running.items()]
            room = LONGEST - len(entries)
            entries, prompt_tokens = entries + prompt_tokens[:room], prompt_tokens[room:]
            running |= decode(entries)
            for seq in {seq for seq, _, _, wanted in entries if wanted}:
                made[seq] += 1
                if made[seq] == outputs[seq]:
                    del running[seq]
        return made

    return run


# name → function that starts the engine, package that must be installed
ENGINES: dict[str, tuple[Callable[[str, str], Run], str]] = {
    "minipaged": (minipaged, "minipaged"),
    "transformers": (transformers, "transformers"),
    "vllm": (vllm, "vllm-cpu"),
    "llama.cpp": (llama_cpp, "llama-cpp-python"),
}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def main() -> None:
    name, model, dtype = sys.argv[1:]
    # Engines may print to stdout: file descriptor 1 now goes to stderr, and only our answers use the real stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**answer: object) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    start, package = ENGINES[name]
    started = time.perf_counter()
    run = start(model, dtype)
    run([[1, 2, 3, 4]], [1])
    say(ready=round(time.perf_counter() - started, 2), version=_version(package))
    for line in sys.stdin:
        work = json.loads(line)
        started = time.perf_counter()
        lengths = run(work["prompts"], work["outputs"])
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        say(seconds=seconds, lengths=lengths, peak_mib=round(peak))
    os._exit(0)  # a normal exit would wait for other engines' threads


if __name__ == "__main__":
    main()

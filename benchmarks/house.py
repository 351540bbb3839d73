"""Counts lines: the reading list, the budgets, the files that an import loads, the files that a request runs through.

    python -m benchmarks.house            # prints everything
    python -m benchmarks.house --write    # puts the reading list between the markers in README.md

Lines count everything in a file: code, docstrings, comments, blank lines.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from minipaged.experiments.readme import with_table

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


class Budget(NamedTuple):
    """A limit on the total lines of some files."""

    what: str
    files: tuple[str, ...]
    most: int


# In reading order.
READING_LIST = {
    "minipaged/core/request.py": "a request and its sequences: `tokens`, `num_computed`, nothing else drives them",
    "minipaged/core/plan.py": "what one step does, as plain data: the contract between scheduler and runner",
    "minipaged/core/engine.py": "`Engine.step`: schedule, execute, sample, commit; leave the constructor for later",
    "minipaged/execution/runner.py": "a plan becomes logits: copy blocks, build the batch, run the model",
    "minipaged/core/pool.py": "physical blocks: free, cached or used, with reference counts",
    "minipaged/core/prefix_cache.py": "full blocks found again by their content, and which of them is evicted first",
    "minipaged/core/block_table.py": "block tables: grow, share, copy on write, free",
    "minipaged/core/seams.py": "where features plug in: four Protocols, a base class, and the heart's own defaults",
    "minipaged/core/scheduler.py": "continuous batching, chunked prefill, preemption by recomputation",
    "minipaged/core/params.py": "what users set; look things up here",
    "minipaged/execution/batch.py": "the plan of a step, as tensors",
    "minipaged/execution/kv_cache.py": "the tensors that the blocks live in, and attention over them",
    "minipaged/execution/sampler.py": "logits become tokens: greedy, or with a temperature",
    "minipaged/models/layers.py": "what models share: norm, rotary positions, attention over blocks",
    "minipaged/kernels/reference.py": "attention that follows a block table, in plain torch: the kernels' oracle",
    "minipaged/kernels/tiles.py": "how a Triton kernel walks a block table, drawn",
    "minipaged/kernels/paged_decode.py": "the decode kernel, with a picture of who computes what",
    "minipaged/models/llama.py": "the model, in one scroll",
}
CORE = tuple(sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "minipaged/core").glob("*.py")))
BUDGETS = (
    Budget("core", CORE, 1700),
    Budget("pool and block table", ("minipaged/core/pool.py", "minipaged/core/block_table.py"), 360),
    Budget("scheduler", ("minipaged/core/scheduler.py",), 370),
    Budget("engine", ("minipaged/core/engine.py",), 330),
    Budget("reading list", (*READING_LIST, "minipaged/core/__init__.py"), 2850),
)

# Counts the package's Python files that a request runs through, and how often execution changes files.
TRACE = """
import sys
from pathlib import Path
from minipaged import LLM, SamplingParams
llm = LLM("tiny", num_blocks=64, device="cpu", **SETTINGS)
files, changes = {}, 0
def profile(frame, event, arg):
    global changes
    if event == "call" and "/minipaged/" in frame.f_code.co_filename:
        name = frame.f_code.co_filename
        if name != files.get("now"):
            changes += 1
            files["now"] = name
        files[name] = True
params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
sys.setprofile(profile)
llm.generate([[5, 6, 7]], params)
sys.setprofile(None)
print(len(files) - 1, changes)
"""

IMPORTED = """
import sys
from pathlib import Path
import MODULE
files = {m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "minipaged" and getattr(m, "__file__", None)}
print(len(files), sum(len(Path(f).read_text(encoding="utf-8").splitlines()) for f in files))
"""


def lines(file: str) -> int:
    return len((ROOT / file).read_text(encoding="utf-8").splitlines())


def reading_list() -> str:
    """The reading list as a Markdown table, with the lines of each file."""
    rows = [
        f"| [`{file.removeprefix('minipaged/')}`]({file}) | {lines(file)} | {what} |"
        for file, what in READING_LIST.items()
    ]
    whole = sum(map(lines, READING_LIST))
    heart = sum(map(lines, READING_LIST.keys() & CORE))
    about = (
        f"{len(READING_LIST)} files, {whole:,} lines, docstrings included; the heart, `core/`, has {heart:,} of them."
    )
    return "\n".join([about, "", "| file in `minipaged/` | lines | what it shows |", "| --- | --- | --- |", *rows])


def run(code: str) -> tuple[int, int]:
    """Runs Python code in a new process and returns the two numbers that it prints."""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    first, second = said.split()
    return int(first), int(second)


def imported(module: str) -> tuple[int, int]:
    """Files and lines of the package that ``import module`` loads, including the module itself."""
    return run(IMPORTED.replace("MODULE", module))


def traced(**settings: str) -> tuple[int, int]:
    """Files that a request of three tokens runs through, and how often execution changes files."""
    return run(TRACE.replace("SETTINGS", repr(settings)))


def main() -> None:
    if "--write" in sys.argv:
        readme = with_table(README.read_text(encoding="utf-8"), reading_list(), "reading-list")
        README.write_text(readme, encoding="utf-8")
        return
    print(reading_list())
    print()
    for what, files, most in BUDGETS:
        print(f"{what}: {sum(map(lines, files))} lines of {most}")
    for module in ("minipaged.core.engine", "minipaged.core.scheduler"):
        print("import {}: {} files, {} lines".format(module, *imported(module)))
    for attention in ("torch", "auto"):
        print(
            "a request of three tokens, attention={!r}: {} files, {} changes of file".format(
                attention, *traced(attention=attention)
            )
        )


if __name__ == "__main__":
    main()

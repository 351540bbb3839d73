"""How the house is laid out: the heart runs alone, imports go one way, budgets hold, and a name leads to one file."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import house
from minipaged import LLM, SamplingParams
from minipaged.core.scheduler import Scheduler
from minipaged.experiments.readme import with_table
from visualizer.scenarios import SCENARIOS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CODE = ("minipaged", "visualizer", "benchmarks", "tutorials")
ROOMS = ("core", "events", "execution", "models", "kernels", "text", "features")
OFTEN = ("__init__.py", "__main__.py", "conftest.py")  # Python and pytest ask for these names
KNOWN = {("minipaged/build.py", "tutorials/build.py")}  # one puts engines together, the other makes pages


# --- names --------------------------------------------------------------------------------------------------------


def shared_names(*folders: str) -> set[tuple[str, ...]]:
    """The paths of the files that share a name. The labs' folders are left out: all of them have the same files."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for folder in folders:
        for file in (ROOT / folder).rglob("*.py"):
            path = file.relative_to(ROOT)
            if path.name not in OFTEN and not path.match("minipaged/labs/a[0-9]/*"):
                by_name[path.name].append(path.as_posix())
    return {tuple(sorted(paths)) for paths in by_name.values() if len(paths) > 1}


def test_no_two_files_share_a_name():
    assert sorted((shared_names(*CODE) | shared_names("tests")) - KNOWN) == []


# --- imports ------------------------------------------------------------------------------------------------------


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(file): file for folder in CODE[:2] for file in (ROOT / folder).rglob("*.py")}


def imports(module: str) -> Iterator[str]:
    """The project's modules that a file names in an import, wherever it stands, typing-only ones included."""
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in FILES else str(node.module)


GRAPH = {module: set(imports(module)) - {module} for module in FILES}


def test_no_imports_go_in_a_circle():
    left = {module: set(named) for module, named in GRAPH.items()}
    while free := {module for module, named in left.items() if not named}:  # takes away what names nothing
        left = {module: named - free for module, named in left.items() if module not in free}
    assert not left, f"among these files imports go in a circle: {sorted(left)}"


def test_the_heart_imports_nothing_but_events_outputs_and_errors():
    allowed = re.compile(r"minipaged\.(core|events)(\.|$)|minipaged\.(outputs|errors)$")
    wrong = {
        m: named for m in GRAPH if m.startswith("minipaged.core") for named in GRAPH[m] if not allowed.match(named)
    }
    assert not wrong
    events = re.compile(r"minipaged\.events(\.|$)")
    assert not {m: n for m in GRAPH if m.startswith("minipaged.events") for n in GRAPH[m] if not events.match(n)}


def test_only_two_files_of_the_engine_name_wings():
    """The others are what is built on top of it: commands, server, labs, experiments, page."""
    named = {
        module
        for module, others in GRAPH.items()
        if module.startswith("minipaged.") and (module.count(".") == 1 or module.split(".")[1] in ROOMS[:-1])
        if any(other.startswith("minipaged.features.") for other in others)
    }
    assert named == {"minipaged.build", "minipaged.config"}


def test_checks_of_settings_import_errors_alone():
    for wing in ("swap", "speculative", "batchllm", "eviction", "contiguous", "vattention"):
        assert GRAPH[f"minipaged.features.{wing}"] == {"minipaged.errors"}, wing


def test_nobody_subclasses_the_scheduler_but_the_labs():
    pattern = re.compile(r"^class (\w+)\([^)]*\bScheduler\b", re.M)
    found = {m for m, file in FILES.items() if pattern.search(file.read_text("utf-8"))}
    assert found == {"minipaged.labs.a5.proxy"}


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", house.BUDGETS, ids=lambda budget: budget.what)
def test_budgets(budget):
    count = sum(map(house.lines, budget.files))
    print(f"{budget.what}: {count} lines of {budget.most}")
    assert count <= budget.most


def test_the_reading_list_of_the_readme_is_fresh():
    text = README.read_text(encoding="utf-8")
    assert text == with_table(text, house.reading_list(), "reading-list"), "run python -m benchmarks.house --write"


def test_every_class_that_the_reading_list_names_is_on_it_or_explained():
    """An import of a class from another file has a comment that says what it is."""
    defined = {ROOT / file for file in house.READING_LIST}
    for file in house.READING_LIST:
        text = (ROOT / file).read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ImportFrom) or node.module not in FILES or FILES[node.module] in defined:
                continue
            classes = [alias.name for alias in node.names if re.match(r"[A-Z][a-z]", alias.name)]
            if classes:
                said = "  # " in lines[node.lineno - 1] or lines[node.lineno - 2].startswith("# ")
                assert said, f"{file}, line {node.lineno}: what are {', '.join(classes)}?"


def test_each_wing_says_what_it_is_in_a_few_lines():
    features = ROOT / "minipaged" / "features"
    wings = [file for file in features.glob("*.py") if file.name != "__init__.py"] + [*features.glob("*/__init__.py")]
    assert len(wings) > 12
    for file in wings:
        said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        name = file.relative_to(features)
        assert 0 < len(said.splitlines()) <= 25, name
        titles = re.findall(r'scenario\s+"([^"]+)"', said)
        assert {" ".join(title.split()) for title in titles} <= {one.name for one in SCENARIOS.values()}, name
        for word in ("read", "page"):
            assert word in said.lower(), f"{name}: which file to read first, and which scenario of the page shows it?"


# --- the heart alone ----------------------------------------------------------------------------------------------

ALONE = re.compile(
    r"minipaged(\.(core|events|execution|text|tiny)(\.\w+)*|\.errors|\.outputs|\.models"
    r"|\.models\.(llama|layers|rope|config_json|loader|diagnosis|sampling_defaults)"
    r"|\.kernels|\.kernels\.(reference|backend))?"
)
# Runs the script in a process in which every other room of the project cannot be imported; tells tokens and events.
HARNESS = """
import json, re, sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("minipaged", "visualizer") and not re.fullmatch(ALONE, name):
            raise ImportError(f"{name} is not part of the heart")
ALONE = sys.argv[1]
sys.meta_path.insert(0, Wall())
from minipaged.events import EventLog
told, emit = [], EventLog.emit
def tell(self, cls, *args):
    event = cls(*args)
    told.append(event.to_dict())
    emit(self, cls, *args)
EventLog.emit, EventLog.active = tell, True
scope = {}
exec(compile(sys.stdin.read(), "script", "exec"), scope)
tokens = {name: [one.token_ids for one in outputs] for name, outputs in scope["done"].items()}
from minipaged.core.params import CoreConfig, SamplingParams
from minipaged.errors import InvalidRequest
def refusal(**params):
    try:
        scope["engine"].check_request("x", [1, 2], SamplingParams(**params))
    except InvalidRequest as error:
        return str(error)
wishes = [{"beam_width": 2, "temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"min_tokens": 3},
          {"presence_penalty": 1}, {"frequency_penalty": 1}, {"repetition_penalty": 1.5}, {"logit_bias": {3: 1.0}},
          {"logprobs": 0}, {"prompt_logprobs": 1}]
refused = [refusal(**wish) for wish in wishes] + [refusal()]
print("\\n" + json.dumps({"tokens": tokens, "told": told, "refused": refused}))
"""


def script() -> str:
    """The script in the README."""
    found = re.search(r"<!-- heart:begin -->\n```python\n(.*?)```\n<!-- heart:end -->", README.read_text("utf-8"), re.S)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def alone():
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, ALONE.pattern], input=script(), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    *printed, result = done.stdout.splitlines()
    return printed, json.loads(result)


def test_the_script_is_short_and_prints_tables(alone):
    assert len(script().splitlines()) <= 40
    printed, _ = alone
    assert sum(line.startswith("after step ") for line in printed) > 10
    assert "after step 3: {0: [0, 1, 5], 2: [0, 1, 3, 4], 1: [0, 1, 2], 3: [6]}" in printed  # as the text says


def test_the_heart_alone_does_all_that_it_is_for(alone):
    told = alone[1]["told"]
    kinds = {event["type"] for event in told}
    assert {"forked", "copied", "shared", "cached", "evicted", "preempted", "freed"} <= kinds
    scheduled = [event for event in told if event["type"] == "scheduled"]
    assert len({event["seq_id"] for event in scheduled if event["num_tokens"] == 1}) > 3, "continuous batching"
    assert any(event["num_tokens"] > 1 and event["start"] > 0 for event in scheduled), "chunked prefill"
    admitted = [event for event in told if event["type"] == "admitted"]
    assert any(event["num_cached"] for event in admitted), "a prefix cache hit"
    assert len(admitted) > len({event["request_id"] for event in admitted}), "a request comes back from preemption"


def test_its_tokens_are_those_of_the_whole_engine(alone):
    scope: dict = {}
    head = script()[: script().index("loaded =")]
    exec(script()[script().index("story =") : script().index("done =")], scope)
    assert "minipaged.llm" not in head
    llm = LLM("tiny", attention="torch", device="cpu")
    for name, (prompt, n, max_tokens) in scope["asked"].items():
        temperature = 0.8 if n > 1 else 0
        params = SamplingParams(n=n, temperature=temperature, seed=7, max_tokens=max_tokens, ignore_eos=True)
        (output,) = llm.generate([prompt], params)
        assert [one.token_ids for one in output.outputs] == alone[1]["tokens"][name], name


def test_what_the_heart_cannot_do_it_refuses(alone):
    *refused, plain = alone[1]["refused"]
    assert all(refused) and plain is None, refused
    assert "beam_width" in refused[0] and "top_k" in refused[1]


def test_settings_of_features_are_refused_by_an_engine_without_them():
    from minipaged import EngineConfig
    from minipaged.core.engine import Engine
    from minipaged.core.params import CoreConfig
    from minipaged.errors import InvalidConfig, InvalidRequest

    sizes = {"num_blocks": 8, "max_model_len": 32}
    with pytest.raises(InvalidConfig, match=r"minipaged\.build"):
        Engine(EngineConfig(**sizes, preemption="swap"), runner=None, sampler=None, vocab_size=9)  # type: ignore[arg-type]
    engine = Engine(CoreConfig(**sizes), runner=None, sampler=None, vocab_size=9)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="fork_by_hand"):
        engine.fork("a")


def test_what_one_reads_is_what_runs(monkeypatch):
    llm = LLM("tiny", num_blocks=8, device="cpu", attention="torch")
    assert type(llm.engine.scheduler) is Scheduler
    from minipaged.models.llama import Attention

    called, forward = [], Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, *args: called.append(1) or forward(self, *args))
    llm.generate("Hello", SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    assert len(called) == 2 * llm._loaded.spec.num_layers, "a breakpoint in models/llama.py is hit in every step"

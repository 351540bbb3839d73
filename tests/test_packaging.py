"""Packaging: installed files, dependencies, and which packages may import which."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.checkpoints import save_llama

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TORCH_FREE = ["config.py", "errors.py", "core", "events"]
SCHEDULERS_SIDE = [  # of the wings in features/
    "batchllm", "beam_search.py", "contiguous", "eviction", "fork_by_hand.py", "speculative/drafts.py",
    "static_batching.py", "swap/swap_stage.py", "swap/swap_tables.py", "vattention/virtual_tables.py",
]  # fmt: skip

BLOCKER = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"gradio", "plotly", "triton"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def python(code: str) -> str:
    """The output of ``code`` in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    slow = {"torch", "transformers", "gradio", "plotly", "triton"}
    assert python(f"import sys, minipaged; print({slow!r} & set(sys.modules) or 'none')").strip() == "none"


def test_the_engine_runs_without_gradio_plotly_and_triton(tmp_path):
    save_llama(tmp_path)
    code = f"""
from minipaged import LLM, SamplingParams
params = SamplingParams(max_tokens=3, ignore_eos=True)
out = LLM({str(tmp_path)!r}, device="cpu", num_blocks=16).generate([[5, 6, 7]], params)
print(len(out[0].outputs[0].token_ids))
"""
    assert python(BLOCKER + code).strip() == "3"


def module_file(name: str) -> Path | None:
    """The file of a module of this package; None if ``name`` is not a module, for example an attribute."""
    path = ROOT.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def imports_at_import_time(file: Path) -> set[str]:
    """Dotted names that ``file`` imports when it is imported: not those inside functions or under TYPE_CHECKING."""
    found: set[str] = set()
    todo: list[ast.AST] = list(ast.parse(file.read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            todo += ast.iter_child_nodes(node)
    return found


def reachable(start: Path) -> dict[str, Path]:
    """All modules that importing ``start`` imports, directly or indirectly, with the importing file."""
    seen: dict[str, Path] = {}
    todo = [start]
    while todo:
        file = todo.pop()
        for name in imports_at_import_time(file):
            parts = name.split(".")
            for length in range(1, len(parts) + 1):  # importing a.b.c also runs a and a.b
                prefix = ".".join(parts[:length])
                if prefix not in seen:
                    seen[prefix] = file
                    own = module_file(prefix) if parts[0] == "minipaged" else None
                    todo += [own] if own else []
    return seen


def torch_free_files() -> list[Path]:
    paths = [ROOT / "minipaged" / name for name in TORCH_FREE + [f"features/{name}" for name in SCHEDULERS_SIDE]]
    files = {path: [path] if path.is_file() else sorted(path.rglob("*.py")) for path in paths}
    assert all(files.values()), "a name in the lists is no file or folder"
    return [file for found in files.values() for file in found]


@pytest.mark.parametrize("file", torch_free_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_torch_in_the_heart_events_and_the_schedulers_side_of_wings(file):
    """Without torch, the scheduler can be fuzzed at thousands of traces per second."""
    culprits = {name: by for name, by in reachable(file).items() if name in ("torch", "numpy", "transformers")}
    assert not culprits
    everywhere = {name for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) for name in names(node)}
    assert "torch" not in everywhere, "torch is imported inside a function"


def names(node: ast.AST) -> set[str]:
    """Top-level names of the modules that an import statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()


def test_the_import_walk_sees_torch_where_there_is_some():
    assert "torch" in reachable(ROOT / "minipaged" / "llm.py")
    assert "torch" in reachable(ROOT / "minipaged" / "execution" / "runner.py")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[set[str], set[str]]:
    """Names of the files in the wheel and in the sdist, built from a copy because building leaves files behind."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("source")
    for name in ("minipaged", "visualizer"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    code = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
    (copy / "dist").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = (copy / "dist").glob("*.whl"), (copy / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive, tarfile.open(sdist) as source:
        return set(archive.namelist()), {name.partition("/")[2] for name in source.getnames()}


def test_wheel_and_sdist_hold_every_file_of_the_packages(built):
    """Both contain weights, tokenizer, JavaScript and style sheets; a missing file is noticed only after installing."""
    on_disk = {
        str(file.relative_to(ROOT))
        for package in ("minipaged", "visualizer")
        for file in (ROOT / package).rglob("*")
        if file.is_file() and not {"__pycache__", "screenshots"} & set(file.parts)  # pictures for the README only
    }
    for archive in built:
        assert on_disk - archive == set()


def test_the_embedded_model_is_part_of_the_package(built):
    for archive in built:
        assert {"minipaged/tiny/weights/config.json", "minipaged/tiny/weights/tokenizer.json"} <= archive
        assert any(name.startswith("minipaged/tiny/weights/") and name.endswith(".safetensors") for name in archive)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    split = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert len({name for name, _ in split}) == len(split), "a package is pinned twice"
    return {canonicalize_name(name): version for name, version in split}


EXTRAS = PYPROJECT["optional-dependencies"]
REQUIREMENTS = list(dict.fromkeys(PYPROJECT["dependencies"] + EXTRAS["dev"] + EXTRAS["serve"] + EXTRAS["ray"]))


@pytest.mark.parametrize("text", REQUIREMENTS)
def test_each_dependency_has_a_range_and_a_pin_inside_it(text):
    requirement = Requirement(text)
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators == {">=", "<"}, "a dependency needs a lower and an upper bound"
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_version_is_the_same_everywhere():
    import minipaged

    assert PYPROJECT["version"] == minipaged.__version__

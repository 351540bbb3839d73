"""Packaging: installed files, dependencies, and which packages may import which."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from minipaged.shipped import RESULTS
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


# Not part of the repository: what tools and tests leave behind.
LEFT_BEHIND = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "build", "dist", "*.checkpoint.pt"
)


class Built(NamedTuple):
    """The archives, and the names of the files in each."""

    wheel: Path
    in_wheel: set[str]
    in_sdist: set[str]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """Wheel and sdist, built from a copy because building leaves files behind."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("source") / "minipaged"
    shutil.copytree(ROOT, copy, ignore=LEFT_BEHIND, symlinks=True)
    code = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
    (copy / "dist").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = (copy / "dist").glob("*.whl"), (copy / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive, tarfile.open(sdist) as source:
        return Built(wheel, {*archive.namelist()}, {name.partition("/")[2] for name in source.getnames()})


def test_wheel_and_sdist_hold_every_file_of_the_packages(built):
    """Both contain weights, tokenizer, JavaScript and style sheets; a missing file is noticed only after installing."""
    on_disk = {
        str(file.relative_to(ROOT))
        for package in ("minipaged", "visualizer")
        for file in (ROOT / package).rglob("*")
        if file.is_file() and not {"__pycache__", "screenshots"} & set(file.parts)  # pictures for the README only
    }
    for archive in (built.in_wheel, built.in_sdist):
        assert on_disk - archive == set()


def test_the_wheel_holds_tutorials_results_recordings_and_licences(built):
    data = {name.partition(".data/data/")[2] for name in built.in_wheel}
    for folder, pattern in (
        ("tutorials", "*.*"),
        ("tutorials/pictures", "*"),
        ("examples", "*.*"),
        (RESULTS, "*.json"),
    ):
        files = [file for file in (ROOT / folder).glob(pattern) if file.is_file()]
        assert files and {f"share/minipaged/{file.relative_to(ROOT).as_posix()}" for file in files} <= data
    assert any(name.startswith("visualizer/recordings/") for name in built.in_wheel)
    licences = {name.partition("/licenses/")[2] for name in built.in_wheel}
    assert {"LICENSE", "NOTICE", "visualizer/static/fonts/OFL.txt"} <= licences


def test_the_sdist_is_the_whole_repository(built):
    if not (ROOT / ".git").exists():
        pytest.skip("NO GIT REPOSITORY HERE: what belongs to it is unknown")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {name for name in listed.splitlines() if (ROOT / name).exists()} - built.in_sdist == set()


def test_the_wheel_works_where_there_is_no_repository(built, tmp_path):
    """Installed with the dependencies of this environment, but before it on the path, and away from the repository."""
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path), "platbase": str(tmp_path)}))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*pip, "--prefix", tmp_path, built.wheel], check=True)

    def run(code: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    results = "from visualizer.experiments import EARLIER; print(EARLIER, len([*EARLIER.glob('*.json')]))"
    where, count = run(results).split()
    assert Path(where).is_relative_to(tmp_path) and int(count) >= 16
    assert "README.md" in run("import sys; sys.argv[1:] = ['tutorials']; from minipaged.cli import main; main()")
    copied = tmp_path / "minipaged-tutorials"
    assert {file.name for file in (ROOT / "tutorials").glob("[0-9]*")} <= {file.name for file in copied.iterdir()}
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", (copied / "03_blocks_and_tables.md").read_text(encoding="utf-8"))
    assert len(links) > 5 and all((copied / link).exists() for link in links)
    assert any(Path(link).is_relative_to(site) for link in links), "links to the engine's files"
    printed = subprocess.run(
        [sys.executable, copied / "03_blocks_and_tables.py"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip
    assert printed.returncode == 0 and "block" in printed.stdout, printed.stderr


@pytest.mark.parametrize("address", ["", "https://example.org/team/minipaged"])
def test_the_packages_page_has_no_relative_links(address):
    spec = importlib.util.spec_from_file_location("setup_of_minipaged", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    setup.ADDRESS = address
    text = setup.absolute((ROOT / "README.md").read_text(encoding="utf-8"))
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    assert targets and all(re.match(r"https?:|#", target) for target in targets)
    assert ("(https://example.org/team/minipaged/blob/main/CONTRIBUTING.md)" in text) == bool(address)
    assert "visualizer/screenshots" not in text or address


def test_citation_and_version_agree():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {PYPROJECT['version']}\n" in citation and "10.1145/3600006.3613165" in citation


def test_the_embedded_model_is_part_of_the_package(built):
    for archive in (built.in_wheel, built.in_sdist):
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

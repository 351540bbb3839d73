"""Every tutorial runs; its page equals its current output, has the required parts, and has no broken links."""

from __future__ import annotations

import ast
import importlib.util
import mmap
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

from visualizer.scenarios import SCENARIOS

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "tutorials"
SCRIPTS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
PAGES = [script.with_suffix(".md") for script in SCRIPTS]
README = FOLDER / "README.md"

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


def python(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def builder() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("build_tutorials", FOLDER / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])  # it adds the tutorials' folder
        spec.loader.exec_module(module)
        yield module


def test_there_are_thirteen_tutorials():
    assert [script.name[:2] for script in SCRIPTS] == [f"{number:02}" for number in range(1, 14)]


def test_pages_and_pictures_are_up_to_date(tmp_path):
    """Runs every tutorial in one process with separate namespaces, so that torch is imported only once."""
    done = python(FOLDER / "build.py", "--check", cwd=tmp_path)
    assert "stale" not in done.stdout, done.stdout
    refused = re.findall(r"(?m)^(\d\d)_\w+\.py: not checked\. \S", done.stderr)
    without_triton = [] if find_spec("triton") else ["05", "06"]
    without_mmap = [] if sys.platform == "linux" and mmap.PAGESIZE == 4096 else ["11"]
    assert refused == without_triton + without_mmap
    assert done.returncode == bool(refused), done.stdout + done.stderr
    assert not list(tmp_path.iterdir()), "the builder left files behind"


def test_a_tutorial_runs_as_a_plain_script_from_anywhere(tmp_path):
    """A tutorial without torch is enough here, because the test above runs all others."""
    done = python(FOLDER / "12_offline_batches.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not list(tmp_path.iterdir()), "the tutorial left files behind"


@each_script
def test_a_script_is_its_cells_and_nothing_else(builder, script):
    """The script and its cells must give the same results."""
    text = script.read_text(encoding="utf-8")
    code = [cell for cell in builder.cells(text) if cell.is_code]
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse("\n".join(cell.text for cell in code)))


@pytest.mark.parametrize("name, lacks", [("05", "triton"), ("06", "triton"), ("11", "linux")])
def test_where_a_tutorial_cannot_run_it_says_so_in_a_line_and_no_page_is_made(
    builder, monkeypatch, capsys, name, lacks
):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the tutorials and the builder set it; monkeypatch restores it
    monkeypatch.setattr(sys, "argv", ["build.py", name])
    if lacks == "triton":
        monkeypatch.setitem(sys.modules, "triton", None)
    else:
        monkeypatch.setattr(sys, "platform", "darwin")
    page = next(page for page in PAGES if page.name.startswith(name))
    before = page.stat().st_mtime_ns
    assert builder.main() == 1
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(rf"{name}_\w+\.py: not made\. .+ read the page instead\n", err)
    assert page.stat().st_mtime_ns == before
    script = page.with_suffix(".py")
    with pytest.raises(SystemExit) as ended:  # as a plain script: success
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith("read the page instead")


@pytest.mark.skipif(not find_spec("triton"), reason="the engine's function is in a module of Triton kernels")
def test_the_number_of_splits_in_tutorial_10_is_the_engines():
    from minipaged.kernels.paged_decode import splits_of

    tree = ast.parse((FOLDER / "10_speed.py").read_text(encoding="utf-8"))
    (node,) = (node for node in tree.body if getattr(node, "name", None) == "num_splits")
    names: dict = {}
    exec(compile(ast.Module([node], []), "10_speed.py", "exec"), names)
    for case in product((1, 63, 500, 4000, 131_072), (16, 64, 128), (1, 7, 64, 5000), (1, 108, 132)):
        assert names["num_splits"](*case) == splits_of(*case)


def test_no_picture_is_left_over():
    shown = {name for page in PAGES for name in re.findall(r"\(pictures/(.+?)\)", page.read_text(encoding="utf-8"))}
    assert {path.name for path in (FOLDER / "pictures").iterdir()} == shown


# --- required parts of a page ---------------------------------------------------------------------------------


@each_page
def test_opens_with_a_question(page):
    title, _, rest = page.read_text(encoding="utf-8").partition("\n# ")[2].partition("\n")
    assert title.startswith(f"{int(page.name[:2])} · ")
    assert rest.lstrip().startswith("**Question.** ") and "?" in rest[:400]


@each_page
def test_asks_for_predictions_and_folds_what_follows(page):
    text = page.read_text(encoding="utf-8").partition("\n## Exercises\n")[0]
    predictions = text.split("**Predict.** ")[1:]
    assert len(predictions) >= 2
    for prediction in predictions:
        assert re.match(r"(?s)[^<]*\?[^<]*<details><summary>Then look</summary>\n\n", prediction), prediction[:80]


@each_page
def test_folds_are_closed_before_the_next_opens(page):
    marks = re.findall(r"^</?details>", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert marks and marks == ["<details>", "</details>"] * (len(marks) // 2)


@each_page
def test_ends_with_three_exercises_and_their_answers(page):
    exercises = page.read_text(encoding="utf-8").partition("\n## Exercises\n")[2]
    assert re.findall(r"^\*\*(\d)\. ", exercises, re.MULTILINE) == ["1", "2", "3"]
    for exercise in re.split(r"(?m)^\*\*\d\. ", exercises)[1:]:
        question, fold, answer = exercise.partition("<details><summary>Answer</summary>\n\n")
        assert fold and len(question) > 100
        assert "```text" in answer, "an answer needs the output of its code"


@each_page
def test_names_scenarios_of_the_visualizer(page):
    section = re.search(r"(?s)\n## In the visualizer\n(.+?)\n## ", page.read_text(encoding="utf-8"))
    assert section
    named = re.findall(r"\*\*(.+?)\*\*", section[1])
    assert named and set(named) <= {scenario.name for scenario in SCENARIOS.values()}
    assert "minipaged visualize" in section[1]


@each_page
def test_shows_and_names_the_engines_own_lines(page):
    text = page.read_text(encoding="utf-8")
    assert re.search(r"\n`[\w.]+` in \[`minipaged/[\w/.]+`\]\(\.\./minipaged/[\w/.]+\):\n\n```python\n", text)
    assert "\nSource lines: " in text


@pytest.mark.parametrize("page", [*PAGES, README, FOLDER / "INSTRUCTORS.md"], ids=lambda path: path.stem)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))  # kernel[grid](x) is not a link
    links = re.findall(r"\]\(([^)]+)\)", text)
    relative = [link for link in links if not link.startswith("https://")]
    assert relative
    assert [link for link in relative if not (FOLDER / link).exists()] == []


def test_the_guide_outlines_every_tutorial_and_calls_questions_by_options_that_exist():
    guide = (FOLDER / "INSTRUCTORS.md").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^\*\*(\d+) · ", guide) == [str(number) for number in range(1, 14)]
    options = {
        option for call in re.findall(r"question_sheets\.py (.+)", guide) for option in re.findall(r"--[\w-]+", call)
    }
    assert options == set(re.findall(r'"(--[\w-]+)"', (FOLDER / "question_sheets.py").read_text(encoding="utf-8")))


def test_the_readme_lists_every_tutorial_and_no_other():
    linked = re.findall(r"\]\((\d\d_\w+\.md)\)", README.read_text(encoding="utf-8"))
    assert set(linked) == {page.name for page in PAGES}


# --- the builder ----------------------------------------------------------------------------------------------

SMALL = """# %% [markdown]
# # Title
#
# Text.

# %%
x = 2
print("printed")
x + 1

# %%
class Drawing:
    alt = "what it shows"

    def _repr_svg_(self):
        return "<svg/>"


Drawing()
"""


@pytest.fixture
def small(tmp_path) -> Path:
    path = tmp_path / "01_small.py"
    path.write_text(SMALL)
    return path


def test_a_page_has_texts_code_what_was_printed_the_last_value_and_pictures(builder, small):
    made = builder.build(small)
    picture = small.parent / "pictures" / "01_small-1.svg"
    assert set(made) == {small.with_suffix(".md"), picture}
    page = made[small.with_suffix(".md")]
    assert "# Title\n\nText.\n\n```python\nx = 2\n" in page
    assert "```text\nprinted\n```\n\n```text\n3\n```\n" in page
    assert page.endswith("![what it shows](pictures/01_small-1.svg)\n")
    assert made[picture] == "<svg/>\n"


def test_a_page_that_differs_or_is_missing_is_stale(builder, small, capsys):
    page, content = next(iter(builder.build(small).items()))
    assert builder.is_stale(page, content)
    page.write_text(content)
    assert not builder.is_stale(page, content)
    assert builder.is_stale(page, content.replace("printed", "changed"))
    assert "+changed" in capsys.readouterr().out


def test_an_error_names_the_line_of_the_tutorial(builder, small):
    small.write_text(SMALL + "\n# %%\nx = 1\n1 / 0\n")
    with pytest.raises(ZeroDivisionError) as caught:
        builder.build(small)
    last = caught.traceback[-1]
    assert (Path(last.path).name, last.lineno + 1) == ("01_small.py", len(SMALL.splitlines()) + 4)


@pytest.mark.parametrize("head", ["print(1)", "# %% [raw]", "#%%"])
def test_what_is_no_cell_is_refused(builder, small, head):
    small.write_text(head + "\n" + SMALL)
    with pytest.raises(ValueError, match="line 1: a cell begins with"):
        builder.build(small)

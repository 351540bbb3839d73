"""Every tutorial runs, and its page is what it gives today, says what a page must say, and links to what exists."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
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
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_tutorials", FOLDER / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_tutorials():
    assert len(SCRIPTS) >= 7


@each_script
def test_runs_as_a_plain_script_from_anywhere(script, tmp_path):
    done = python(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not list(tmp_path.iterdir()), "leaves nothing behind"


def test_pages_and_pictures_are_up_to_date(tmp_path):
    done = python(FOLDER / "build.py", "--check", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_picture_is_left_over():
    shown = {name for page in PAGES for name in re.findall(r"\(pictures/(.+?)\)", page.read_text(encoding="utf-8"))}
    assert {path.name for path in (FOLDER / "pictures").iterdir()} == shown


# --- what a page must have ------------------------------------------------------------------------------------


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
        assert "```text" in answer, "what the answer's code printed"


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


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda path: path.stem)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    relative = [link for link in links if not link.startswith("https://")]
    assert relative
    assert [link for link in relative if not (FOLDER / link).exists()] == []


def test_the_readme_lists_every_tutorial_and_no_other():
    linked = re.findall(r"\]\((\d\d_\w+\.md)\)", README.read_text(encoding="utf-8"))
    assert set(linked) == {page.name for page in PAGES}


# --- the builder ----------------------------------------------------------------------------------------------

SMALL = '''# %% [markdown]
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
'''


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

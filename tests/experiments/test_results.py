"""Results of experiments, their files, the command line, and the README's table."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from minipaged import cli, experiments
from minipaged.bench import peers_readme
from minipaged.errors import InvalidRequest
from minipaged.experiments import Entry, Result, Row, catalogue, kernel_overhead, readme
from minipaged.experiments.figures import lines
from minipaged.experiments.result import READ, SECONDARY
from minipaged.experiments.result_text import number_text, paper_text
from minipaged.experiments.timing import ratio

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / readme.RESULTS


@pytest.fixture
def small(monkeypatch):
    """Shortens the quickest experiment."""
    monkeypatch.setattr(kernel_overhead, "BATCHES", (2,))
    monkeypatch.setattr(kernel_overhead, "CONTEXTS", (16, 32))


@pytest.fixture
def command(monkeypatch, capsys):
    """``command(*args)`` -> (exit code, stdout, stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["minipaged", "experiments", *args])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        captured = capsys.readouterr()
        return leaving.value.code, captured.out, captured.err

    return run


def test_every_entry_has_a_module():
    names = [entry.name for entry in catalogue()]
    assert len(set(names)) == len(names) >= 14
    for entry in catalogue():
        assert callable(import_module(experiments._module(entry.name)).measure)
        assert entry.title and entry.figure and 0 < entry.minutes <= 60


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(InvalidRequest, match="kernel-overhead"):
        experiments.run("kernel_overhead")


def test_a_run_tells_where_it_is_and_comes_back_whole(small):
    heard = []
    result = experiments.run("kernel-overhead", quick=True, progress=lambda done, text: heard.append((done, text)))
    assert [done for done, _ in heard] == [0, 0.5] and "context 32" in heard[1][1]
    assert result.quick and result.name == "kernel-overhead" and result.machine["torch"] and result.seconds >= 0
    assert all(row.spread and row.spread[0] <= row.ours <= row.spread[1] for row in result.rows)
    assert Result.from_json(result.to_json()) == json_twin(result)
    assert set(result.figure) == {"data", "layout"} and result.figure["data"]


def json_twin(result):
    """The result after a round trip through JSON: keys become strings, tuples lists."""
    twin = Result(result.rows, **{k: v for k, v in vars(result).items() if k != "rows"})
    twin.data, twin.figure = (json.loads(json.dumps(part)) for part in (result.data, result.figure))
    return twin


def test_progress_may_end_a_run(small):
    def stop(done, text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiments.run("kernel-overhead", quick=True, progress=stop)


def test_figures_are_what_plotly_takes(small):
    go = pytest.importorskip("plotly.graph_objects", reason="plotly is not installed")
    figure = go.Figure(experiments.run("kernel-overhead", quick=True).figure)
    assert len(figure.data) >= 2 and figure.layout.title.text


def test_a_figure_shows_every_series_in_a_style_of_its_own():
    figure = lines("", {str(i): ([1], [i]) for i in range(10)}, "x", "y")
    assert [one["name"] for one in figure["data"]] == [str(i) for i in range(10)]
    assert len({str(one["line"]) for one in figure["data"]}) == 10
    saved = Result.from_json((RESULTS / "kernel-overhead.json").read_text(encoding="utf-8"))
    measured = {f"{name}, {case.partition(',')[0]}" for case, seconds in saved.data.items() for name in seconds}
    assert {one["name"] for one in saved.figure["data"]} == measured


def test_rows_say_where_the_papers_numbers_are_from():
    assert paper_text(Row("x", 1.0)) == "–"
    assert paper_text(Row("x", 1.0, paper="7", source=READ)) == "7"
    assert paper_text(Row("x", 1.0, paper="7", source=SECONDARY)) == "7\\*"
    assert number_text(Row("x", 1234.5, "ms", spread=(0.01234, 2000))) == "1,234 (0.0123 to 2,000) ms"
    with pytest.raises(KeyError):
        Result([], {}).row("x")


def test_ratios_are_taken_round_by_round():
    assert ratio([2, 4, 6, 80], [1, 2, 3, 8]) == (2, (2, 2))


# --- the command ----------------------------------------------------------------------------------------------


def test_list(command):
    code, out, _ = command("list")
    assert code == 0 and all(entry.name in out and entry.figure in out for entry in catalogue())


def test_run_prints_the_paper_beside_ours_and_writes_both_files(command, small, tmp_path):
    pytest.importorskip("plotly", reason="plotly is not installed")
    code, out, _ = command("run", "kernel-overhead", "--quick", "--out", str(tmp_path / "new"))
    assert code == 0
    assert "20–26" in out and "Why they differ" in out and "quick run" in out and "torch" in out
    saved = Result.from_json((tmp_path / "new" / "kernel-overhead.json").read_text())
    assert saved.rows and saved.machine["cores"]
    page = (tmp_path / "new" / "kernel-overhead.html").read_text()
    assert "Attention of one decode step" in page and "https://cdn" not in page
    assert (tmp_path / "new" / "plotly.min.js").is_file()


def test_the_figures_page_has_its_fonts_inside_and_no_text_ends_its_script(tmp_path):
    pytest.importorskip("plotly", reason="plotly is not installed")
    figure = {"data": [{"type": "bar", "name": "</script><b>", "x": ["2"], "y": [3.0]}], "layout": {}}
    Result([], figure, name="one", title="a < b").write(tmp_path)
    page = (tmp_path / "one.html").read_text(encoding="utf-8")
    assert page.count('src: url("data:font/woff2;base64,') == 3 and "<title>a &lt; b</title>" in page
    assert page.count("</script>") == 2 and len(page) < 150_000
    assert figure["layout"] == {}, "the JSON's figure is as it was"


def test_without_plotly_there_is_the_json_and_a_word_about_it(command, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    code, out, _ = command("run", "kernel-overhead", "--quick", "--out", str(tmp_path))
    assert code == 0 and "plotly is not installed" in out
    assert [path.name for path in tmp_path.iterdir()] == ["kernel-overhead.json"]


def test_all_runs_all(command, small, tmp_path, monkeypatch):
    entry = next(entry for entry in catalogue() if entry.name == "kernel-overhead")
    monkeypatch.setattr(experiments, "_ENTRIES", (entry,))
    assert command("run", "all", "--quick", "--out", str(tmp_path))[0] == 0
    assert (tmp_path / "kernel-overhead.json").is_file()


def test_a_wrong_name_and_a_folder_that_is_a_file(command, small, tmp_path):
    code, _, errors = command("run", "nothing")
    assert code == 2 and "waste" in errors and "Traceback" not in errors
    (tmp_path / "file").write_text("")
    code, _, errors = command("run", "kernel-overhead", "--quick", "--out", str(tmp_path / "file"))
    assert code == 2 and "file" in errors and "Traceback" not in errors


# --- committed results ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", catalogue(), ids=lambda entry: entry.name)
def test_a_full_run_is_committed(entry: Entry):
    result = Result.from_json((RESULTS / f"{entry.name}.json").read_text(encoding="utf-8"))
    assert result.name == entry.name and not result.quick
    assert {"cpu", "cores", "python", "torch", "date"} <= set(result.machine)
    assert result.rows and result.figure["data"]


def test_the_readmes_tables_are_those_of_the_committed_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    again = readme.with_table(text, readme.table(RESULTS), "experiments")
    assert again == text, "python -m minipaged.experiments.readme --write"
    again = readme.with_table(text, peers_readme.table(ROOT / peers_readme.RESULT), "peers")
    assert again == text, "python -m minipaged.bench.peers_readme --write"


def test_a_text_without_markers_is_refused():
    with pytest.raises(ValueError, match="experiments:begin"):
        readme.with_table("nothing", "table", "experiments")


def test_a_simulation_needs_neither_torch_nor_plotly():
    code = """
import subprocess
import sys
from minipaged.cli import experiments_commands
from minipaged.experiments import catalogue, latency, saturation
from minipaged.workloads import alpaca_like, at_once, trace
saturation.saturate(trace(alpaca_like(0), at_once(12)), num_blocks=40, memory="orca-pow2")
print({"torch", "plotly", "numpy"} & set(sys.modules) or "none")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "none", done.stderr

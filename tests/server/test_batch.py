"""Batches from a file: each request is answered exactly once, even if the process is killed and restarted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import minipaged

pytest.importorskip("pydantic", reason="the server's extra is not installed: pip install fastapi uvicorn")
from minipaged import SamplingParams  # noqa: E402
from minipaged.cli import app  # noqa: E402
from minipaged.core.plan import SampledToken  # noqa: E402
from minipaged.errors import InvalidConfig, InvalidRequest, RequestFailed  # noqa: E402
from minipaged.offline_batch import ANSWER, Task, open_batch, partition, run  # noqa: E402
from tests.fake import fake_engine, unbatched  # noqa: E402

ROOT = Path(__file__).parents[2]


def fake_llm(**settings: Any) -> Any:
    return SimpleNamespace(engine=fake_engine(**settings), tokenizer=None, default_params=SamplingParams())


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    body = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 5, "temperature": 0} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def answers(out: Path) -> dict[str, dict[str, Any]]:
    read = [json.loads(one) for one in out.read_text().splitlines()]
    assert len({one["custom_id"] for one in read}) == len(read), "a request was answered twice"
    return {one["custom_id"]: one["response"] for one in read}


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    lines = [line(f"r{i}", prompt=[i % 7, 2, i], max_tokens=3 + i % 9) for i in range(50)]
    return written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"


def check(out: Path) -> None:
    """Checks that each request has one answer, with the number of tokens of an unbatched loop."""
    got = answers(out)
    assert set(got) == {f"r{i}" for i in range(50)}
    for i in range(50):
        params = SamplingParams(max_tokens=3 + i % 9)
        tokens = unbatched([i % 7, 2, i], params, 0, 200)
        assert got[f"r{i}"]["status_code"] == 200
        assert got[f"r{i}"]["body"]["usage"]["completion_tokens"] == len(tokens)


def test_a_batch_is_answered_whole(files) -> None:
    done: list[int] = []
    llm = fake_llm()
    run(llm, open_batch(*files), files[1], done.append)
    check(files[1])
    assert done == sorted(done) and done[-1] == 50
    assert not llm.engine.has_unfinished() and not llm.engine.block_tables()
    assert open_batch(*files) == []


def test_in_groups_the_answers_are_the_same_and_what_is_refused_is_refused_alone(tmp_path) -> None:
    stem = list(range(20))
    lines = [line(f"r{i}", prompt=[*stem[: 8 + i % 12], 30 + i], max_tokens=2 + i % 5) for i in range(20)]
    lines.insert(3, line("bad", prompt=[1] * 500))
    lines.insert(7, line("two", prompt=[[*stem, 1], [*stem, 2]]))
    path = written(tmp_path / "in.jsonl", lines)
    bodies = []
    for schedule in ("fcfs", "batchllm"):
        llm, out = fake_llm(max_num_seqs=2), tmp_path / f"{schedule}.jsonl"
        groups = []
        llm.engine.events.subscribe(lambda e, groups=groups: groups.append(e) if e.type == "group_started" else None)
        run(llm, open_batch(path, out), out, schedule=schedule)
        bodies.append({key: (one["status_code"], one["body"].get("usage")) for key, one in answers(out).items()})
        assert bool(groups) == (schedule == "batchllm")
    assert bodies[0] == bodies[1] and len(bodies[0]) == 22
    assert [key for key, (status, _) in bodies[0].items() if status != 200] == ["bad"]


def test_a_request_that_fails_has_a_line_of_its_own_and_the_others_are_answered(tmp_path) -> None:
    lines = [line(f"r{i}", prompt=[i % 7, 2, i], max_tokens=6, seed=i, ignore_eos=True) for i in range(6)]
    lines.append(line("two", prompt=[[1, 2], [3, 4]], max_tokens=6, seed=3))
    path = written(tmp_path / "in.jsonl", lines)
    llm, out = fake_llm(), tmp_path / "out.jsonl"
    sample = llm.engine.sampler

    def sampler(contexts, plan):
        tokens = zip(sample(contexts, plan), plan.samples, strict=True)
        failed = SampledToken(-1, error=RequestFailed("no token can be drawn"))
        return [
            failed if request.params.seed == 3 and seq.num_output == 2 else token for token, (request, seq) in tokens
        ]

    llm.engine.sampler = sampler
    run(llm, open_batch(path, out), out)
    got = answers(out)
    assert [key for key, one in sorted(got.items()) if one["status_code"] != 200] == ["r3", "two"]
    assert got["r3"]["body"]["error"]["message"] == "no token can be drawn"
    assert [got[f"r{i}"]["body"]["usage"]["completion_tokens"] for i in (0, 1, 2, 4, 5)] == [6] * 5
    assert not llm.engine.has_unfinished()


def test_a_line_with_half_of_a_surrogate_pair_is_refused_by_its_number(tmp_path) -> None:
    path = written(tmp_path / "in.jsonl", [line("fine"), line("half", prompt="\ud800")])
    with pytest.raises(InvalidRequest, match="line 2: a text in it has half of a surrogate pair"):
        open_batch(path, tmp_path / "out.jsonl")


def test_an_engine_without_a_prefix_cache_has_no_groups(files) -> None:
    with pytest.raises(InvalidConfig, match="enable_prefix_caching"):
        run(fake_llm(enable_prefix_caching=False), open_batch(*files), files[1], schedule="batchllm")
    assert not files[1].exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from minipaged import offline_batch
from tests.server.test_batch import fake_llm
path, out, lines = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
def killed_while_writing(file, pieces):
    global lines
    for piece in pieces:
        lines -= 1
        if lines < 0:
            file.write(piece[: len(piece) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        file.write(piece)
        file.flush()
offline_batch._append = killed_while_writing
offline_batch.run(fake_llm(), offline_batch.open_batch(path, out), out)
"""


def test_killed_in_the_midst_of_a_line_it_goes_on_without_losing_or_repeating_one(files) -> None:
    path, out = files
    for lines in (7, 20):
        done = subprocess.run([sys.executable, "-c", KILLED, path, out, str(lines)], cwd=ROOT)
        assert done.returncode == -9
        assert not out.read_bytes().endswith(b"\n"), "the last line should be incomplete"
    assert len(open_batch(*files)) == 50 - 27
    run(fake_llm(), open_batch(*files), out)
    check(out)


def test_what_begins_alike_is_done_together(tmp_path) -> None:
    prompts = [[9, 9, 9, 9, i] if i % 2 else [4, 4, 4, 4, i] for i in range(20)]
    path = written(tmp_path / "in", [line(f"r{i}", prompt=prompt) for i, prompt in enumerate(prompts)])
    first = [task.body["prompt"][0] for task in open_batch(path, tmp_path / "out")]
    assert first == [4] * 10 + [9] * 10


def tasks_of(prompts: list[str]) -> list[Task]:
    return [Task(f"r{i}", "/v1/completions", {"prompt": prompt}) for i, prompt in enumerate(sorted(prompts))]


STEMS = st.sampled_from(["", "a" * 50, "a" * 40 + "b" * 900, "c" * 3000])
PROMPTS = st.lists(st.builds("{}{}".format, STEMS, st.integers(0, 999)), max_size=60)


@given(PROMPTS, st.integers(1, 8))
def test_workers_share_the_tasks_each_once_in_order_and_about_evenly(prompts, workers) -> None:
    tasks = tasks_of(prompts)
    parts = partition(tasks, workers)
    assert [task for part in parts for task in part] == tasks
    assert len(parts) <= workers and all(parts)
    work = [[len(task.beginning) + ANSWER for task in part] for part in parts]
    share = sum(map(sum, work)) / workers
    assert all(sum(part) <= 1.5 * share + max(part) for part in work)


@given(st.lists(st.integers(10, 12), min_size=4, max_size=4), st.sampled_from([2, 4]))
def test_what_begins_alike_goes_to_one_worker(sizes, workers) -> None:
    groups = zip("abcd", sizes, strict=True)
    parts = partition(tasks_of([f"{stem * 100}{i}" for stem, size in groups for i in range(size)]), workers)
    stems = [{task.body["prompt"][0] for task in part} for part in parts]
    assert [len(part) for part in stems] == [4 // workers] * workers
    assert set.union(*stems) == set("abcd"), "each group is on one worker"


def test_a_task_larger_than_a_share_leaves_the_others_to_other_workers() -> None:
    tasks = tasks_of(["a" * 90_000, *"bcdefgh"])
    assert [len(part) for part in partition(tasks, 3)] == [1, 7]
    assert [len(part) for part in partition(tasks[1:], 20)] == [1] * 7
    assert partition([], 2) == []


def test_the_command_says_what_ray_needs(files, monkeypatch) -> None:
    command = ["batch", str(files[0]), "-o", str(files[1])]
    alone = CliRunner().invoke(app, [*command, "--workers", "2"])
    assert alone.exit_code == 2 and "--workers is for --ray" in alone.output
    monkeypatch.delattr(minipaged, "offline_batch_ray", raising=False)
    monkeypatch.delitem(sys.modules, "minipaged.offline_batch_ray", raising=False)
    for name in ("ray", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    missing = CliRunner().invoke(app, [*command, "--ray"])
    assert missing.exit_code == 2 and "pip install 'ray[data]'" in missing.output
    assert not files[1].exists()


def test_one_bad_request_is_answered_with_its_error_and_the_others_well(tmp_path) -> None:
    bad = [
        line("model", model="gpt"),
        line("type", max_tokens="many"),
        line("unknown", tools=[]),
        line("stream", stream=True),
        line("long", prompt=[1] * 500),
        line("second prompt", prompt=[[1], [10**6]]),
        line("template") | {"url": "/v1/chat/completions", "body": {"model": "fake", "messages": []}},
    ]
    path, out = written(tmp_path / "in", [*bad, line("good"), line("two", prompt=[[1], [2]], n=2)]), tmp_path / "out"
    llm = fake_llm()
    run(llm, open_batch(path, out), out)
    got = answers(out)
    status = {key: response["status_code"] for key, response in got.items()}
    assert status == dict.fromkeys([one["custom_id"] for one in bad], 400) | {"model": 404, "good": 200, "two": 200}
    assert all(got[one["custom_id"]]["body"]["error"]["message"] for one in bad)
    assert [choice["index"] for choice in got["two"]["body"]["choices"]] == [0, 1, 2, 3]
    assert not llm.engine.block_tables()


def test_a_failed_step_fails_its_requests_only(files) -> None:
    llm = fake_llm()
    real, steps = llm.engine.runner.execute, iter(range(1000))

    def execute(plan: Any) -> Any:
        if next(steps) == 3:
            raise RuntimeError("out of memory")
        return real(plan)

    llm.engine.runner.execute = execute
    run(llm, open_batch(*files), files[1])
    status = [response["status_code"] for response in answers(files[1]).values()]
    assert len(status) == 50 and set(status) == {200, 500} and status.count(500) <= 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 2: this is not valid JSON"),
        ("[]", "line 2: a request is an object"),
        ('{"custom_id": "x", "method": "POST", "url": "/v1/completions"}', "custom_id, method, url and body"),
        (json.dumps(line("")), "must be a non-empty string"),
        (json.dumps(line("r0")), "'r0' is used twice"),
        (json.dumps(line("x") | {"method": "GET"}), "method must be POST"),
        (json.dumps(line("x") | {"url": "/v1/embeddings"}), "url one of /v1/chat/completions"),
        (json.dumps(line("x") | {"priority": 1}), "unknown keys: priority"),
    ],
)
def test_a_file_that_is_no_batch_is_refused_before_anything_runs(tmp_path, text, words) -> None:
    path = tmp_path / "in"
    path.write_text(json.dumps(line("r0")) + "\n" + text + "\n")
    with pytest.raises(InvalidRequest, match=words):
        open_batch(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_of_something_else_is_left_alone(files) -> None:
    path, out = files
    out.write_text("my diary\n")
    with pytest.raises(InvalidRequest, match="line 1: not an answer of a batch"):
        open_batch(path, out)
    out.write_text('{"custom_id": "stranger"}\nhalf')
    with pytest.raises(InvalidRequest, match="'stranger'"):
        open_batch(path, out)


def test_two_processes_do_not_write_to_one_output(files) -> None:
    pytest.importorskip("fcntl")
    path, out = files
    tasks = open_batch(path, out)
    with open(out, "ab") as other:
        import fcntl

        fcntl.flock(other, fcntl.LOCK_EX)
        for begin in (lambda: run(fake_llm(), tasks, out), lambda: open_batch(path, out)):
            with pytest.raises(InvalidRequest, match="another process"):
                begin()

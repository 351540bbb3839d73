"""Question sheets: reproducible for each student, different between students, with answers from the engine."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parents[2] / "tutorials" / "question_sheets.py"
SECRET = b"a secret of a test, long enough"
STUDENTS = [f"student-{number}" for number in range(12)]


@pytest.fixture(scope="module")
def sheets() -> ModuleType:
    spec = importlib.util.spec_from_file_location("question_sheets", PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def asked(sheets) -> dict[str, list[tuple]]:
    """Name of a question → each student's (text, answer)."""
    all_of_them = [sheets.questions(student, SECRET) for student in STUDENTS]
    return {
        name: [(q.text, q.answer) for made in all_of_them for q in made if q.name == name] for name in sheets.QUESTIONS
    }


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def blocks_for(tokens: int, size: int) -> int:
    return -(-tokens // size)


def test_a_student_gets_the_same_sheet_each_time_and_another_than_the_others(sheets, asked):
    assert sheets.questions("ada", SECRET) == sheets.questions("ada", SECRET)
    for name, made in asked.items():
        assert len(made) == len(STUDENTS)
        assert len({text for text, _ in made}) > len(STUDENTS) // 2, name
    assert sheets.questions("ada", SECRET) != sheets.questions("ada", SECRET + b"!")


def test_a_question_does_not_change_when_others_are_added(sheets, monkeypatch):
    before = sheets.questions("ada", SECRET)
    monkeypatch.setitem(sheets.QUESTIONS, "more", (1, lambda rng: ("?", "!")))
    assert sheets.questions("ada", SECRET)[:-1] == before


# The engine computes the answers. These tests compute them by hand where possible, so that text and answer agree.


def test_rows_are_what_arithmetic_says(asked):
    for text, answer in asked["rows"]:
        prompt, output = numbers(text)
        assert numbers(answer) == [prompt + output - 1, sum(prompt + i for i in range(output))]


def test_tables_are_as_long_as_they_must_be_and_name_each_block_once(asked):
    for text, answer in asked["table"]:
        size, _, _, _, first, second, more = numbers(text)
        tables = [numbers(table) for table in re.findall(r"\[(.*?)\]", answer)]
        empty = [int(number) for number in re.findall(r"(\d+) empty", answer)]
        for table, prompt, left in zip(tables, (first, second), empty, strict=True):
            assert len(table) == blocks_for(prompt + more, size) and left == len(table) * size - prompt - more
        assert sorted(sum(tables, [])) == list(range(len(sum(tables, []))))


def test_freed_blocks_are_handed_out_in_the_order_that_the_question_tells(asked):
    for text, answer in asked["reuse"]:
        _, size, first, second, third = numbers(text)
        queue = list(range(8))
        a, b = ([queue.pop(0) for _ in range(blocks_for(prompt, size))] for prompt in (first, second))
        for table, prompt in ((a, first), (b, second)):  # one step of decoding
            table += [queue.pop(0)] if blocks_for(prompt + 1, size) > len(table) else []
        queue += a[::-1]
        b += [queue.pop(0)] if blocks_for(second + 2, size) > len(b) else []
        c = [queue.pop(0) for _ in range(blocks_for(third, size))]
        assert answer == f"B {b}, C {c}"


def test_slots_follow_the_table(asked):
    for text, answer in asked["slot"]:
        size, other, _, *_, position, _ = numbers(text)
        assert numbers(answer)[0] == blocks_for(other, size) * size + position


def test_chunks_fill_what_decodes_leave(asked):
    for text, answer in asked["chunks"]:
        budget, writers, prompt = numbers(text)
        count, *chunks = numbers(answer)
        assert len(chunks) == count and sum(chunks) == prompt
        assert all(chunk == budget - writers for chunk in chunks[:-1])


def test_somebody_is_preempted_when_the_pool_is_full(asked):
    for text, answer in asked["victim"]:
        blocks, size, _, *prompts = numbers(text)[:6]
        step, freed = numbers(answer)
        # In step s, a sequence computes the KV of its token number prompt + s - 1.
        before, needed = ([blocks_for(prompt + s - 1, size) for prompt in prompts] for s in (step - 1, step))
        assert sum(before) <= blocks < sum(needed)
        assert ", C, " in answer and freed == before[2]


def test_all_samples_but_one_copy_a_block_that_is_not_full(asked):
    for text, answer in asked["copies"]:
        size, n, prompt, more = numbers(text)
        shared, own = prompt // size, blocks_for(prompt + more, size) - prompt // size
        assert numbers(answer) == [(n - 1) * bool(prompt % size), shared + n * own]


def test_whole_blocks_of_the_common_beginning_are_found_but_never_the_last_token(asked):
    for text, answer in asked["cached"]:
        size, _, second, *common = numbers(text)
        alike = common[0] if common else second
        assert numbers(answer) == [min(alike, second - 1) // size * size]


def test_page_groups_that_are_mapped_need_not_be_mapped_again(asked):
    for text, answer in asked["pages"]:
        size, first, second = numbers(text)
        groups = [blocks_for(tokens, size) for tokens in (first, second)]
        assert numbers(answer) == [groups[0], max(0, groups[1] - groups[0])]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def secret_file(tmp_path) -> Path:
    path = tmp_path / "secret.txt"
    path.write_bytes(SECRET + b"\n")
    return path


def test_the_sheet_has_every_question_and_only_the_key_has_answers(sheets, secret_file, capsys):
    printed = []
    for more in ([], ["--key"]):
        assert sheets.main(["--student", "ada", "--secret-file", str(secret_file), *more]) == 0
        printed.append(capsys.readouterr().out)
    for question in sheets.questions("ada", SECRET):
        assert question.text in printed[0] and question.text in printed[1]
        assert f"→ {question.answer}" in printed[1] and f"→ {question.answer}" not in printed[0]


@pytest.mark.parametrize(
    "content, student, message",
    [
        (None, "ada", "No such file"),
        (b"short", "ada", "at least 16"),
        (b"", "ada", "at least 16"),
        (SECRET, " ", "name"),
    ],
)
def test_what_cannot_be_is_refused_with_exit_code_2(sheets, tmp_path, capsys, content, student, message):
    path = tmp_path / "secret.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        sheets.main(["--student", student, "--secret-file", str(path)])
    assert ended.value.code == 2 and message in capsys.readouterr().err

"""The BurstGPT trace loader: both layouts, failed requests, rates, and files that are no traces."""

import pytest

from minipaged.errors import InvalidTrace
from minipaged.workloads import load_burstgpt

SIX = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
EIGHT = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"
ROWS_OF_SIX = ["5,ChatGPT,472,18,490,Conversation log", "45,ChatGPT,100,0,100,API log", "25,GPT-4,7,9,16,API log"]
ROWS_OF_EIGHT = [
    "5.0,a-b,2,ChatGPT,472,18,490,Conversation log",
    "45.0,,0,ChatGPT,100,0,100,API log",
    "25.0,c,3,GPT-4,7,9,16,API log",
]


@pytest.fixture
def file(tmp_path):
    def write(*lines: str, encoding: str = "utf-8"):
        path = tmp_path / "trace.csv"
        path.write_text("\n".join(lines) + "\n", encoding=encoding)
        return path

    return write


@pytest.mark.parametrize("header, rows", [(SIX, ROWS_OF_SIX), (EIGHT, ROWS_OF_EIGHT)], ids=["6", "8"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_both_layouts_are_read_by_name_in_order_of_arrival(file, header, rows, encoding):
    requests = load_burstgpt(file(header, *rows, encoding=encoding))
    assert [(r.arrival, r.num_prompt, r.num_output, r.failed) for r in requests] == [
        (0.0, 472, 18, False),
        (20.0, 7, 9, False),
        (40.0, 100, 0, True),
    ]


def test_columns_may_come_in_any_order_and_others_be_missing(file):
    requests = load_burstgpt(file("Response tokens,Request tokens,Timestamp", "3,2,1"))
    assert [(r.arrival, r.num_prompt, r.num_output) for r in requests] == [(0.0, 2, 3)]


def test_a_rate_stretches_the_time_and_nothing_else(file):
    requests = load_burstgpt(file(SIX, *ROWS_OF_SIX), rate=4.0)
    assert [r.arrival for r in requests] == [0.0, 0.25, 0.5]
    assert [r.num_prompt for r in requests] == [472, 7, 100]


def test_a_limit_takes_the_first_rows(file):
    assert len(load_burstgpt(file(SIX, *ROWS_OF_SIX), limit=2)) == 2


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "no column Timestamp, Request tokens, Response tokens"),
        (["a,b,c", "1,2,3"], "no column Timestamp"),
        (["Timestamp,Request tokens", "1,2"], "no column Response tokens"),
        ([SIX], "no rows"),
        ([SIX, "x,ChatGPT,1,2,3,API log"], "line 2"),
        ([SIX, ROWS_OF_SIX[0], "9,ChatGPT,1,-2,3,API log"], "line 3: -2"),
        ([SIX, "9,ChatGPT,1.5,2,3,API log"], "1.5"),
        ([SIX, "9,ChatGPT,nan,2,3,API log"], "line 2"),
        ([SIX, "inf,ChatGPT,1,2,3,API log"], "no time"),
        ([SIX, "9,ChatGPT,1"], "ends too early"),
        ([SIX, "9,ChatGPT,inf,2,3,API log"], "line 2"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(file, lines, message):
    with pytest.raises(InvalidTrace, match=message):
        load_burstgpt(file(*lines))


def test_a_missing_file_a_directory_and_bytes_that_are_no_text(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00\x01" * 20)
    for path in (tmp_path / "nowhere.csv", tmp_path, tmp_path / "weights.bin"):
        with pytest.raises(InvalidTrace, match="cannot be read"):
            load_burstgpt(path)


def test_rates_that_make_no_sense(file):
    path = file(SIX, ROWS_OF_SIX[0])
    with pytest.raises(InvalidTrace, match="no rate to scale"):
        load_burstgpt(path, rate=1.0)
    for rate in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="positive"):
            load_burstgpt(path, rate=rate)

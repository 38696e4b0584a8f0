"""What is written of rows: whole lines whatever happens, the last word on each, and no more than that."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from bench.campaign.rows import (
    DIED,
    TIME,
    Row,
    append,
    collect_rows,
    count_rows,
    environment,
    one_line,
    pytest_command,
    read_lines,
    read_rows,
    read_stopped,
    trim,
)
from bench.rows_plugin import CUDA_IS_LOST, loses_cuda
from decovae.errors import InputError, RunError

SUITE = """
import pytest

def test_timed(benchmark):
    benchmark.pedantic(lambda: None, rounds=3)
    benchmark.extra_info |= {"subject": "nothing", "gpu": {"power_w": 300}}

def test_untimed(benchmark):
    benchmark.extra_info |= {"subject": "nothing"}

def test_skipped(benchmark):
    benchmark.extra_info |= {"subject": "nothing"}
    pytest.skip("does not fit: 2 GB")

def test_wrong(benchmark):
    benchmark.pedantic(lambda: None, rounds=3)
    raise ValueError("/home/somebody/file.py is wrong\\nand this is why")

def test_lost():
    try:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nand more")
    except RuntimeError as error:
        raise ValueError("cannot go on") from error
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("suite")
    (root / "pytest.ini").write_text("[pytest]\n")
    (root / "rows").mkdir()
    (root / "rows" / "test_some.py").write_text(SUITE)
    return root


def run(suite: Path, out: Path, *options: str, count: bool = False) -> tuple[int, dict[str, Row], list[str]]:
    """Exit code, last words, and the order of the rows that began."""
    environ = environment("tiny", count=count)
    process = subprocess.run(
        pytest_command(["rows"], out, *options), cwd=suite, env=environ, capture_output=True, text=True
    )
    began = [row.id.partition("::")[2] for row in read_lines(out) if row.outcome == "started"]
    return process.returncode, {row.id.partition("::")[2]: row for row in read_rows(out)}, began


def test_rows_run_in_the_given_order_and_a_lost_gpu_ends_the_process(suite: Path, tmp_path: Path) -> None:
    wanted = ["test_wrong", "test_skipped", "test_timed", "test_untimed", "test_gone", "test_lost"]
    (tmp_path / "wanted").write_text("".join(f"rows/test_some.py::{name}\n" for name in wanted))
    code, rows, began = run(suite, tmp_path / "rows.jsonl", "--rows", str(tmp_path / "wanted"))
    assert code == CUDA_IS_LOST
    assert began == [name for name in wanted if name != "test_gone"]
    assert {name: row.outcome for name, row in rows.items()} == {
        "test_wrong": "failed",
        "test_skipped": "skipped",
        "test_timed": "measured",
        "test_untimed": "ran",
        "test_gone": "failed",
        "test_lost": "failed",
    }
    timed = rows["test_timed"]
    assert timed.stats is not None
    assert set(timed.stats) == {"median", "iqr", "min", "max", "rounds"}
    assert timed.stats["rounds"] == 3
    assert timed.extra_info == rows["test_skipped"].extra_info == {"subject": "nothing"}
    assert timed.seconds > 0
    assert abs(timed.finished - time.time()) < 600
    assert timed.gpu == {"power_w": 300}  # as the row read it behind its rounds
    assert rows["test_skipped"].reason == "does not fit: 2 GB"
    assert rows["test_wrong"].reason == "ValueError: file.py is wrong"
    assert rows["test_wrong"].stats is None
    assert rows["test_lost"].reason == "ValueError: cannot go on"


def test_unwanted_rows_do_not_run(suite: Path, tmp_path: Path) -> None:
    names = ("test_wrong", "test_skipped", "test_lost")
    (tmp_path / "unwanted").write_text("".join(f"rows/test_some.py::{name}\n" for name in names))
    code, _, began = run(suite, tmp_path / "rows.jsonl", "--without", str(tmp_path / "unwanted"))
    assert (code, began) == (0, ["test_timed", "test_untimed"])


def test_no_row_begins_after_the_deadline(suite: Path, tmp_path: Path) -> None:
    code, rows, _ = run(suite, tmp_path / "rows.jsonl", "--deadline", str(time.time() - 1))
    assert (code, rows) == (0, {})


def test_rows_can_be_collected_and_counted(suite: Path) -> None:
    names = ["test_timed", "test_untimed", "test_skipped", "test_wrong", "test_lost"]
    assert collect_rows("tiny", root=suite, suites="rows") == [f"rows/test_some.py::{name}" for name in names]
    (suite / "counted").mkdir()
    (suite / "counted" / "test_one.py").write_text("def test_one(benchmark):\n    benchmark.extra_info['n'] = 3\n")
    (suite / "counted" / "test_two.py").write_text("import nothing_of_this_name\n")
    [row] = count_rows("tiny", root=suite, suites="counted")
    assert (row.id, row.outcome, row.extra_info) == ("counted/test_one.py::test_one", "counted", {"n": 3})


def test_collecting_does_not_hang(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.campaign.rows.COLLECT_SECONDS", 0.01)
    with pytest.raises(RunError, match="took longer than"):
        collect_rows("tiny", root=suite, suites="rows")


def test_a_folder_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no rows"):
        collect_rows("tiny", root=tmp_path, suites=".")


def test_the_last_word_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for row, outcome in [("a", "started"), ("a", "failed"), ("b", "started"), ("c", "started"), ("c", "stopped")]:
        append(path, Row(row, outcome))  # type: ignore[arg-type]
    append(path, Row("a", "started"))
    append(path, Row("a", "measured", stats={"median": 1.0}, extra_info={"subject": "Σ"}))
    rows = read_rows(path)
    assert [(row.id, row.outcome, row.reason) for row in rows] == [("a", "measured", None), ("b", "failed", DIED)]
    assert rows[0].extra_info == {"subject": "Σ"}
    assert Row.from_dict(rows[0].as_dict()) == rows[0]


def test_a_row_that_time_stopped_twice_has_failed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def stop(row: str, reason: str | None, seconds: float) -> None:
        append(path, Row(row, "started"))
        append(path, Row(row, "stopped", reason, seconds=seconds))

    stop("a", TIME, 60)
    stop("b", None, 60)  # by a signal
    stop("b", None, 60)
    assert read_rows(path) == []
    assert read_stopped(path) == {"a"}
    stop("a", TIME, 90)
    [row] = read_rows(path)
    assert (row.outcome, row.reason) == ("failed", "did not end within 90 s; stopped twice")
    append(path, Row("a", "measured"))
    assert [row.outcome for row in read_rows(path)] == ["measured"]
    assert read_stopped(path) == set()


def test_a_torn_last_line_is_neither_read_nor_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append(path, Row("a", "skipped", "why"))
    whole = path.read_bytes()
    path.write_bytes(whole + '{"row": "b", "reason": "µ'.encode()[:-1])
    assert [row.id for row in read_rows(path)] == ["a"]
    trim(path)
    assert path.read_bytes() == whole
    append(path, Row("b", "measured"))
    assert [row.id for row in read_rows(path)] == ["a", "b"]
    assert read_rows(tmp_path / "nothing") == []


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(Row("a", "skipped").as_dict()) + "\nnonsense\n")
    with pytest.raises(InputError, match=r"rows\.jsonl: line 2 is damaged"):
        read_rows(path)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (type("AcceleratorError", (RuntimeError,), {})("unknown"), True),
        (type("AcceleratorError", (RuntimeError,), {})("CUDA error: out of memory"), False),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (ValueError("3 channels cannot be split"), False),
    ],
)
def test_what_loses_the_gpu(error: Exception, lost: bool) -> None:
    assert loses_cuda(error) == lost


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\n  first \nsecond", "first"),
        ("cannot read /home/me/a b.py and '/tmp/x.so'", "cannot read a b.py and 'x.so'"),
        ("2 GB/s, 3/4, see https://example.org/a/b", "2 GB/s, 3/4, see https://example.org/a/b"),
        ("", ""),
    ],
)
def test_reasons_are_one_line_without_folders(text: str, line: str) -> None:
    assert one_line(text) == line


def test_reasons_are_short() -> None:
    assert len(one_line("word " * 1000)) <= 300

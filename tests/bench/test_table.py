"""The tables say what the file holds, and a wrong file is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import table


def row(implementation: str, median: float, direction: str = "forward", operators: int | None = 7) -> dict[str, Any]:
    info = {
        "implementation": implementation,
        "loss": "VAD",
        "shape": "2x4x8",
        "dtype": "float32",
        "direction": direction,
        "bytes_moved_floor": 2_000_000,
        "copy_bytes_per_second": 4e9,
        "launches": None,
        "operators": operators,
        "peak_extra_bytes": 512,
    }
    return {"extra_info": info, "stats": {"median": median, "iqr": median / 10}}


def block_row(implementation: str, median: float, layout: str = "contiguous", **changes: Any) -> dict[str, Any]:
    info = {
        "implementation": implementation,
        "block": "norm + act",
        "shape": "2x16x8",
        "dtype": "float32",
        "layout": layout,
        "direction": "forward",
        "bytes_moved_floor": 2_000_000,
        "flops_floor": 0,
        "copy_bytes_per_second": 4e9,
        "matrix_flops_per_second": None,
        "peak_extra_bytes": 512,
        "saved_bytes": 3_000_000,
        "flops": 0,
    }
    return {"extra_info": {**info, **changes}, "stats": {"median": median, "iqr": median / 10}}


@pytest.fixture
def result() -> dict[str, Any]:
    machine = {"processor": "Abacus", "torch_threads": 2, "torch": "2", "triton": None, "python": "3", "system": "OS"}
    rows = [
        row("ours", 2e-3),
        row("channel-rows-compiled", 5e-3, operators=None),
        row("ours", 4e-6, "forward+backward"),
        row("lightly", 2e-6, "forward+backward"),
    ]
    return {"machine_info": machine, "commit_info": {"id": "0123456789", "dirty": True}, "benchmarks": rows}


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_ratio_and_share_follow_from_the_file(result: dict[str, Any]) -> None:
    header, _, *lines = cells(table.markdown(result))
    columns = [dict(zip(header, line, strict=True)) for line in lines]
    assert [line["of ours"] for line in columns] == ["1.00×", "2.50×", "1.00×", "0.50×"]
    assert [line["share"] for line in columns[:2]] == ["25.0%", "10.0%"]  # 2 MB in 2 ms is 1 GB/s, of 4 GB/s
    assert [line["median"] for line in columns] == ["2.00 ms", "5.00 ms", "4.00 µs", "2.00 µs"]
    assert [line["operators"] for line in columns] == ["7", "–", "7", "7"]
    assert columns[0]["floor"] == "2.00 MB"
    assert columns[0]["extra memory"] == "512 B"


def test_no_ratio_without_our_row(result: dict[str, Any]) -> None:
    del result["benchmarks"][0]
    assert cells(table.markdown(result))[2][4] == "–"


def test_blocks_show_memory_and_arithmetic(result: dict[str, Any]) -> None:
    products = {"flops_floor": 5_000_000, "matrix_flops_per_second": 1e9}
    result["benchmarks"] = [
        block_row("ours-balanced", 1e-2, **products, flops=6_000_000),
        block_row("ours-tight", 2e-2, **products, flops=7_000_000),
        block_row("plain-compiled", 1e-3, "channels-last", saved_bytes=None, flops=None),
    ]
    text = table.markdown(result)
    header, _, *lines = cells(text)
    columns = [dict(zip(header, line, strict=True)) for line in lines]
    assert "**norm + act, 2×16×8**" in text
    assert [line["floor"] for line in columns] == ["5.00 MFLOP", "5.00 MFLOP", "2.00 MB"]
    assert [line["share"] for line in columns] == ["50.0%", "25.0%", "50.0%"]  # 5 ms of products, 0.5 ms of bytes
    assert [line["of ours"] for line in columns] == ["1.00×", "2.00×", "–"]  # the first of ours; another layout
    assert [line["arithmetic"] for line in columns] == ["6.00 MFLOP", "7.00 MFLOP", "–"]
    assert [line["saved"] for line in columns] == ["3.00 MB", "3.00 MB", "–"]
    assert [line[""] for line in columns] == ["float32 contiguous forward", "", "float32 channels-last forward"]


def test_a_file_of_both_suites_shows_each_with_its_columns(result: dict[str, Any]) -> None:
    result["benchmarks"].append(block_row("ours", 1e-3))
    text = table.markdown(result)
    assert text.index("**VAD, 2×4×8**") < text.index("lightly's terms") < text.index("**norm + act, 2×16×8**")
    assert "operators" in cells(text)[0]
    assert "saved" in cells(text)[6]
    assert text.endswith("it cannot be counted.")


def test_machine_and_commit_are_named(result: dict[str, Any]) -> None:
    first = table.markdown(result).splitlines()[0]
    assert first == "Abacus with 2 threads; torch 2, Python 3; OS; commit 0123456 with uncommitted changes."


def test_a_gpu_is_named_and_its_launches_are_shown(result: dict[str, Any]) -> None:
    result["machine_info"] |= {"gpu": "H", "gpu_driver": "1", "cuda": "13"}
    result["benchmarks"][0]["extra_info"]["launches"] = 3
    text = table.markdown(result)
    assert text.startswith("H, driver 1, CUDA 13; ")
    assert cells(text)[0][7] == "launches"
    assert cells(text)[2][7] == "3"


def test_command_prints_the_tables(result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    assert table.main([str(file)]) == 0
    assert "**VAD, 2×4×8**" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no such file"),
        ("text", "not a result"),
        ('{"runs": []}', "not a result"),
        ("[]", "not a result"),
        ('{"benchmarks": [{"extra_info": {"copy_bytes_per_second": 1}}]}', "not a result"),
    ],
)
def test_another_file_is_named_in_one_sentence(
    content: str | None, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.json"
    if content is not None:
        file.write_text(content)
    assert table.main([str(file)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith(f"{file}: {complaint}")

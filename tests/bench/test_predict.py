"""Predictions are the floor over published figures, and are called predictions wherever they are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.campaign import cases, predict, table
from bench.campaign.predict import CARDS, FOLDER, H200, RTX_3090, least_seconds, sweep_shapes
from bench.campaign.rows import Row
from bench.memory import SWEEP, VARIANTS
from tests.bench.made_up import counted


def info(**changes: Any) -> dict[str, Any]:
    return {"bytes_moved_floor": 936_000_000, "flops_floor": 0, "matrix_dtype": None, **changes}


def test_bytes_or_operations_whichever_take_longer() -> None:
    assert least_seconds(info(), RTX_3090) == (pytest.approx(1e-3), "bytes")
    few = info(flops_floor=71 * 10**9 // 2, matrix_dtype="bfloat16")
    assert least_seconds(few, RTX_3090) == (pytest.approx(1e-3), "bytes")
    many = info(flops_floor=71 * 10**9 * 2, matrix_dtype="bfloat16")
    assert least_seconds(many, RTX_3090) == (pytest.approx(2e-3), "operations")
    assert least_seconds({**many, "matrix_dtype": "float32"}, RTX_3090)[0] > least_seconds(many, RTX_3090)[0]
    assert least_seconds(many, H200)[0] < least_seconds(many, RTX_3090)[0]


def test_every_card_has_every_rate_and_a_source() -> None:
    for card in CARDS:
        assert {"bfloat16", "float16", "tf32", "float32"} <= card.flops_per_second.keys()
        assert card.source


def test_the_sweep_s_shapes_come_from_its_rows() -> None:
    rows = [counted("ours", suite="sweep", shape=shape) for shape in ("2x1x8x8x8", "1x1x16x16x16", "1x1x8x8x8")]
    assert sweep_shapes([*rows, *rows, counted("ours")]) == [(1, 1, 8, 8, 8), (1, 1, 16, 16, 16), (2, 1, 8, 8, 8)]


def test_the_sweep_s_networks_are_counted_ones() -> None:
    assert all(variant in VARIANTS.values() for variant in SWEEP.values())


def test_the_command_writes_a_file_a_table_and_two_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    products = {"suite": "blocks", "subject": "residual block", "flops_floor": 10**12, "matrix_dtype": "bfloat16"}
    rows = [
        counted("ours"),
        counted("ours", **products),
        counted("ours-tight", **{**products, "suite": "sweep", "subject": "sweep", "shape": "1x1x8x8x8"}),
        Row("bench/test_x.py::test_skipped", "skipped", "needs something"),
    ]
    memory = [{"implementation": "ours-tight", "shape": [1, 1, 8, 8, 8], "saved": 10**9, "peak": 2 * 10**9}]
    monkeypatch.setattr(predict, "count_rows", lambda scale: rows if scale == "gpu" else [])
    monkeypatch.setattr(predict, "counted_memory", lambda shapes: memory if shapes == [(1, 1, 8, 8, 8)] else [])
    step = {"shape": [2, 1, 96, 96, 96], "peak": {"balanced": 4 * 10**9}}
    monkeypatch.setattr(predict, "count_full_step", lambda *_: step)
    assert predict.main(["--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / predict.FILE).read_text(encoding="utf-8"))
    assert [row["row"] for row in found["rows"]] == [row.id for row in rows]
    assert found["rows"][1]["least"]["H200"]["by"] == "operations"
    assert found["memory"] == memory
    page = (tmp_path / table.FILE).read_text(encoding="utf-8")
    assert "Nothing here was measured." in page
    assert "predicted" in page
    assert "2.00 GB" in page
    for picture in ("roofline.png", "memory.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(predict, "counted_memory", lambda _: pytest.fail("counted again"))
    assert predict.main(["--out", str(tmp_path), "--keep-memory"]) == 0
    assert predict.load(tmp_path) == found


@pytest.mark.skipif(not (FOLDER / predict.FILE).exists(), reason="nothing was predicted yet")
def test_what_is_stored_follows_from_its_own_floors() -> None:
    found = predict.load()
    assert found is not None
    for content in found["rows"]:
        row = Row.from_dict(content)
        assert row.stats is None
        if cases.of(row) is None:
            continue
        for card in CARDS:
            seconds, by = least_seconds(row.extra_info or {}, card)
            assert content["least"][card.name] == {"seconds": pytest.approx(seconds), "by": by}
    counted_shapes = {(tuple(entry["shape"]), entry["implementation"]) for entry in found["memory"]}
    rows = [Row.from_dict(content) for content in found["rows"]]
    assert counted_shapes == {(shape, name) for shape in sweep_shapes(rows) for name in SWEEP}

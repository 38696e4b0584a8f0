"""Plots are drawn of whatever there is, and of nothing that was not measured without saying so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from bench.campaign import plots, predict
from bench.campaign.rows import Row
from tests.bench.made_up import GPU, campaign, counted, measured, without_time

PRODUCTS = {"suite": "blocks", "subject": "residual block", "flops_floor": 5_000_000, "matrix_dtype": "float32"}
SWEPT = {"suite": "sweep", "subject": "sweep", "shape": "1x1x16x16x16", "peak_bytes": 2**31}
ROWS = (
    measured("ours", 1e-3),
    measured("plain-eager", 2e-3),
    measured("ours", 1e-3, **PRODUCTS),
    measured("plain-compiled", 3e-3, **PRODUCTS),
    measured("monai-eager", 4e-3, **PRODUCTS),
    without_time(counted("liger", **PRODUCTS), "failed", "why"),
    measured("ours-tight", 1.0, **SWEPT),
    without_time(counted("monai-eager", **SWEPT), "skipped", "does not fit: 1 GB is free"),
)
CEILINGS = {"copy_bytes_per_second": 4e9, "matrix_flops_per_second": {"bfloat16": 2e9, "float32": 1e9}}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures, by the names of their files."""
    found: dict[str, Figure] = {}
    save = plots._save

    def kept(figure: Figure, path: Path) -> None:
        found[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(plots, "_save", kept)
    monkeypatch.setattr(predict, "load", lambda *_: None)
    return found


def texts(figure: Figure) -> str:
    """All that is written in a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def points(figure: Figure) -> int:
    return sum(len(collection.get_offsets()) for axes in figure.axes for collection in axes.collections)


def test_three_pictures_of_a_campaign(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    plots.write(tmp_path, campaign(*ROWS, scale="gpu", machine=GPU, ceilings=CEILINGS))
    assert set(drawn) == {"roofline.png", "speed.png", "memory.png"}
    for name, figure in drawn.items():
        assert imread(tmp_path / name).shape[1] == 1200
        assert "Card, 2031-05-06" in texts(figure) or "Card, 20" in texts(figure), "machine and date"
    assert points(drawn["roofline.png"]) == 5, "all but the row that failed and the sweep"
    assert "measured, bfloat16" in texts(drawn["roofline.png"])
    speed = texts(drawn["speed.png"])
    assert all(factor in speed for factor in ("2.00×", "3.00×", "4.00×"))
    assert "residual block, 2×4×8\nours" in speed
    memory = texts(drawn["memory.png"])
    assert "which a smaller card would not grant" in memory
    assert all(words in memory for words in ("24 GiB", "this card, 80 GiB", "does not fit", "16³"))
    assert "predicted" not in memory


def test_the_same_rows_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plots.draw_speed(ROWS, tmp_path / name, where="here")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("rows", [(), (counted("ours", **PRODUCTS), counted("ours", **SWEPT))])
def test_nothing_measured_is_drawn_as_nothing(tmp_path: Path, drawn: dict[str, Figure], rows: tuple[Row, ...]) -> None:
    plots.write(tmp_path, campaign(*rows))
    assert points(drawn["roofline.png"]) == points(drawn["memory.png"]) == 0
    assert "no row was measured" in texts(drawn["roofline.png"])
    assert "no peer was measured" in texts(drawn["speed.png"])
    assert "nothing measured" in texts(drawn["memory.png"])


def test_predictions_are_called_so(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    entry: dict[str, Any] = {"implementation": "ours-tight", "shape": [1, 1, 16, 16, 16], "peak": 2**31}
    rows = [counted("ours").as_dict(), counted("ours", **PRODUCTS).as_dict()]
    plots.write_predicted(tmp_path, {"date": "2031-05-06", "rows": rows, "memory": [entry]})
    assert set(drawn) == {"roofline.png", "memory.png"}
    for figure in drawn.values():
        assert "predicted" in texts(figure)
        assert "2031-05-06" in texts(figure)
    assert points(drawn["roofline.png"]) == 4, "two rows under two roofs"
    assert "H200, 140 GiB" in texts(drawn["memory.png"])

"""Volumes as the page packs them, and charts as it draws them."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from decovae.data.frame import Frame
from decovae.data.template import cohort_affine
from decovae.data.volumes import Shape, affine_rows
from decovae.report import viewer
from decovae.report.charts import Line, Spread, line_chart, spread_chart
from decovae.report.collect import collect
from decovae.report.curves import curve
from decovae.report.images import Scan, difference_picture, grey_picture, read_scan
from decovae.report.viewer import build_viewer, pack, shrink
from tests.report.fake_study import SHAPE, blob, write_study, write_volume


def scan(shape: Shape) -> Scan:
    return Scan(blob(1, shape), Frame(shape, affine_rows(cohort_affine(shape))))


def picture(address: str) -> np.ndarray:
    head, content = address.split(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def unpacked(entry: dict[str, object]) -> np.ndarray:
    """What the page's script makes of a packed volume, `(D, H, W)`, uint8."""
    depth, height, width = entry["shape"]
    mosaic = picture(str(entry["data"]))[..., 0]
    volume = np.empty((depth, height, width), dtype=np.uint8)
    for z in range(width):
        top, left = z // entry["columns"] * height, z % entry["columns"] * depth
        volume[:, :, z] = mosaic[top : top + height, left : left + depth].T
    return volume


@pytest.mark.parametrize("shape", [(16, 18, 16), (5, 9, 7), (1, 1, 1), (3, 2, 31)])
def test_a_packed_volume_is_the_volume_in_8_bits(shape: Shape) -> None:
    original = scan(shape)
    entry = pack(original, exact=True)
    assert np.array_equal(unpacked(entry), np.round(255 * original.voxels).astype(np.uint8))
    assert np.allclose(entry["size"], np.divide((182, 218, 182), shape), atol=1e-3)


def test_samples_lose_little() -> None:
    original = scan((32, 36, 32))
    error = np.abs(unpacked(pack(original, exact=False)).astype(float) - 255 * original.voxels)
    assert error.mean() < 4


@pytest.mark.parametrize("shape", [(64, 72, 64), (40, 80, 40), (128, 20, 64)])
@pytest.mark.parametrize("most", [20_000, 90_000])
def test_a_shrunken_volume_has_the_same_box_and_hardly_fewer_voxels_than_allowed(shape: Shape, most: int) -> None:
    original = scan(shape)
    smaller = shrink(original, most)
    count = math.prod(smaller.frame.shape)
    assert 0.85 * most < count <= most
    assert smaller.voxels.shape == smaller.frame.shape
    assert all(after <= before for after, before in zip(smaller.frame.shape, shape, strict=True))
    corner = np.array([-0.5, -0.5, -0.5, 1])
    assert np.allclose(smaller.frame.matrix @ corner, original.frame.matrix @ corner)
    assert smaller.voxels.mean() == pytest.approx(original.voxels.mean(), rel=0.02)


def test_a_volume_that_fits_stays_as_it_is() -> None:
    original = scan(SHAPE)
    assert shrink(original, math.prod(SHAPE)) is original


def test_the_viewer_offers_originals_reconstructions_and_samples(tmp_path: Path) -> None:
    built = build_viewer(collect([write_study(tmp_path, decos=("none", "vad"), samples=3)]))
    assert built is not None
    volumes = built.content["volumes"]
    assert [len(places) for places in built.groups.values()] == [1, 2, 2, 6, 6]
    assert sorted(place for places in built.groups.values() for place in places) == list(range(len(volumes)))
    assert volumes[built.content["left"]]["label"] == "sub-0007, original"
    assert volumes[built.content["right"]]["label"] == "VAD, sub-0007, after fine-tuning"
    assert volumes[-1]["label"] == "VAD, sample 2, seed 42, after fine-tuning"


def test_many_and_large_volumes_are_limited_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "MOST_SAMPLES", 4)
    monkeypatch.setattr(viewer, "EXACT_VOXELS", 3 * 2000)
    built = build_viewer(collect([write_study(tmp_path, decos=("vad",), samples=3)]))
    assert built is not None
    assert "Of 3 samples a set the first 2 are here." in built.notes
    assert any(
        note.startswith("Originals and reconstructions of 16×18×16 voxels are shown with ") for note in built.notes
    )
    assert sum(math.prod(volume["shape"]) for volume in built.content["volumes"][:3]) <= 3 * 2000


def test_nothing_to_look_at(tmp_path: Path) -> None:
    models = collect([write_study(tmp_path, decos=("vad",), samples=0, measured=False)])
    assert build_viewer(models) is None


def test_pictures_show_the_volume_and_its_difference(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.nii.gz", blob(1))
    first = read_scan(tmp_path / "a.nii.gz")
    second = Scan((first.voxels + 0.1).clip(0, 1), first.frame)
    grey = picture(grey_picture(first))
    assert grey.shape[:2] == (218, 182 + 182 + 218)
    assert grey.max() > 100
    assert picture(difference_picture(first, first)).max() < 10
    assert picture(difference_picture(first, second)).max() > 100
    with pytest.raises(ValueError, match="no difference"):
        difference_picture(first, scan((4, 4, 4)))


def test_a_line_chart_leaves_out_what_is_not_finite_and_says_the_last_values() -> None:
    points = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 4.0)]
    svg = line_chart([Line("<none>", "#000000", 0, points)], name="PSNR", x_label="steps")
    assert "Line chart of PSNR. Last values: &lt;none&gt;: 4." in svg
    assert "nan" not in svg
    assert svg.count("<circle") == 2


@pytest.mark.parametrize("value", [0.0, 7.0, -3e-9, 4e12])
def test_charts_of_one_value(value: float) -> None:
    assert "<polyline" in line_chart([Line("a", "#000000", 0, [(0, value)])], name="x", x_label="y")
    assert "median" in spread_chart([Spread("a", "#000000", [value])], name="x", x_label="y")


def test_a_spread_says_median_and_quartiles() -> None:
    svg = spread_chart([Spread("real", "#000000", [1, 2, 3, 4, 5])], name="volumes", x_label="ml")
    assert "Distribution of volumes. real: median 3, quartiles 2 to 4, 5 volumes." in svg


def test_long_curves_are_thinned_to_their_means() -> None:
    metrics = [{"step": step, "l1": float(step)} for step in range(1000)] + [{"step": 1000, "psnr": 1.0}]
    points = curve(metrics, "l1")
    assert len(points) == 60
    assert all(x == pytest.approx(y) for x, y in points)
    assert curve(metrics, "psnr") == [(1000.0, 1.0)]

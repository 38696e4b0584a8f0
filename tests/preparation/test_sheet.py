"""Contact sheets: the same volumes give the same picture, and nothing that can be in a volume stops one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from decovae.errors import InputError
from decovae.preparation import pictures
from decovae.preparation.rules import Rules
from decovae.preparation.run import prepare
from decovae.preparation.sheet import Small, Tile, save_sheet, small_rejected, spread
from decovae.preparation.survey import SurveyOptions, survey
from decovae.preparation.volume import Preparation
from tests.data.files import write
from tests.preparation.sources import brain, config, make_mixed, make_volumes


def tile(volume: np.ndarray, affine: np.ndarray | None = None) -> Tile:
    matrix = np.eye(4) if affine is None else affine
    return Tile("sub-01", "", Small(volume.astype(np.float32), tuple(map(tuple, matrix.tolist()))))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("L"))


def test_spread_takes_the_first_the_last_and_what_lies_between() -> None:
    assert spread(range(5), 24) == [0, 1, 2, 3, 4]
    assert spread(range(100), 5) == [0, 25, 50, 74, 99]
    assert len(set(spread(range(25)))) == 24


def test_the_same_tiles_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_sheet(
            [tile(brain(0) / 2000), Tile("ü $x_1$ 脳", "grey, for a reason " * 20, None)], tmp_path / name, title="t"
        )
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_volume_is_seen_and_a_missing_one_is_grey(tmp_path: Path) -> None:
    save_sheet([tile(np.ones((20, 20, 20)))], tmp_path / "white.png", title="")
    save_sheet([tile(np.zeros((20, 20, 20)))], tmp_path / "black.png", title="")
    save_sheet([Tile("", "", None)], tmp_path / "grey.png", title="")
    white, black, grey = (pixels(tmp_path / f"{name}.png") for name in ("white", "black", "grey"))
    assert white.shape == black.shape == grey.shape
    half = slice(white.shape[0] // 2, -5), slice(5, white.shape[1] // 4 - 5)  # of the first tile
    assert (white[half] == 255).mean() > 0.3
    assert (black[half] == 0).mean() > 0.9
    assert (np.abs(grey[half].astype(int) - 89) < 3).mean() > 0.9


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 9), (64, 3, 2)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 200.0])
def test_odd_volumes_are_drawn(tmp_path: Path, shape: tuple[int, int, int], size: float) -> None:
    turned = np.array([[0.8, -0.6, 0, 5], [0.6, 0.8, 0, -900], [0, 0, 1, 0], [0, 0, 0, 1]]) * [size, size, size, 1]
    save_sheet([tile(np.ones(shape), turned)], tmp_path / "odd.png", title="odd")
    assert (tmp_path / "odd.png").exists()


@pytest.mark.parametrize(
    "volume",
    [np.full((9, 9, 9), 3.0), np.full((9, 9, 9), np.nan), np.where(brain(0) > 0, np.inf, 1.0), brain(0, (150, 9, 9))],
    ids=["constant", "nan", "infinite", "long"],
)
def test_rejected_volumes_are_shown_as_far_as_they_can_be(tmp_path: Path, volume: np.ndarray) -> None:
    write(tmp_path / "volume.nii", volume)
    (candidate,) = survey(tmp_path, SurveyOptions()).candidates
    small = small_rejected(candidate, limit=1 << 30)
    if np.isnan(volume).all():
        assert small is None
        return
    assert small is not None
    assert max(small.voxels.shape) <= 100
    assert np.isfinite(small.voxels).all()
    assert 0 <= small.voxels.min() <= small.voxels.max() <= 1
    with pytest.raises(InputError):
        small_rejected(candidate, limit=10)


def test_a_preparation_draws_both_and_draws_them_alike(tmp_path: Path) -> None:
    make_mixed(tmp_path / "source", 4)
    for out, workers in (("a", 0), ("b", 1)):
        outcome = prepare(config(tmp_path / "source", tmp_path / out, pictures=True, workers=workers))
        assert not any("picture" in note for note in outcome.notes)
    for name in ("accepted.png", "rejected.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for bad in ("cut off.nii.gz", "constant.nii", "empty.nii", "copy.nii"):
        (tmp_path / "source" / bad).unlink()
    resampled = Preparation(grid=(16, 16, 16), fit="resample", spacing=(2.0, 2.0, 2.0))
    prepare(config(tmp_path / "source", tmp_path / "c", pictures=True, volume=resampled))
    assert (tmp_path / "c" / "accepted.png").exists()
    assert not (tmp_path / "c" / "rejected.png").exists()


@pytest.mark.parametrize("package", ["matplotlib.figure", "nilearn"])
def test_without_the_packages_there_is_a_store_and_a_note(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_volumes(tmp_path / "source", 2)
    monkeypatch.setitem(sys.modules, package, None)
    outcome = prepare(config(tmp_path / "source", tmp_path / "out", pictures=True))
    assert len(outcome.entries) == 2
    (note,) = outcome.notes
    assert f"no pictures were drawn: {package} is not installed" in note


def test_whoever_a_rule_leaves_out_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_mixed(tmp_path / "source", 4)
    (tmp_path / "list.txt").write_text("sub-02\nsub-03\n")
    shown: list[Tile] = []
    monkeypatch.setattr(pictures, "save_sheet", lambda tiles, *_, **__: shown.extend(tiles))
    prepare(config(tmp_path / "source", tmp_path / "out", pictures=True, exclude=Rules(subjects=tmp_path / "list.txt")))
    by_title = {tile.title: tile for tile in shown}
    assert by_title["constant"].volume is not None
    assert by_title["sub-02"].volume is None
    assert "on the list" in by_title["sub-02"].text

"""What is remembered of a volume spares a reading and is never trusted more than the file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from decovae.data import nifti
from decovae.data.cache import recall, remember
from decovae.data.nifti import Stored, open_nifti
from decovae.files import write_atomically
from tests.data.files import noise, write

PATCH = (4, 4, 4)
UNIT = np.eye(4).tolist()


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, in order."""
    seen: list[Path] = []
    original = nifti.read_nifti

    def counting(path: Path) -> Stored:
        seen.append(path)
        return original(path)

    monkeypatch.setattr(nifti, "read_nifti", counting)
    return seen


def test_a_second_opening_reads_nothing(tmp_path: Path, readings: list[Path]) -> None:
    path = write(tmp_path / "scan.nii.gz", noise())
    first = open_nifti(tmp_path, patch=PATCH).records
    assert open_nifti(tmp_path, patch=PATCH).records == first
    assert readings == [path]


def test_a_changed_file_is_read_again(tmp_path: Path, readings: list[Path]) -> None:
    path = write(tmp_path / "scan.nii", noise(seed=1))
    before = open_nifti(tmp_path, patch=PATCH).records[0]
    write(path, noise(seed=2))
    os.utime(path, ns=(1, 1))  # the same size; only the time tells
    after = open_nifti(tmp_path, patch=PATCH).records[0]
    assert len(readings) == 2
    assert after.high == pytest.approx(np.percentile(noise(seed=2), 99.5), rel=1e-6) != before.high


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b'{"key": "another", "value": {}}'])
def test_a_damaged_entry_is_ignored_and_replaced(
    tmp_path: Path, cache: Path, readings: list[Path], damage: bytes
) -> None:
    write(tmp_path / "scan.nii", noise())
    first = open_nifti(tmp_path, patch=PATCH).records
    (entry,) = cache.rglob("*.json")
    entry.write_bytes(damage)
    assert open_nifti(tmp_path, patch=PATCH).records == first
    assert open_nifti(tmp_path, patch=PATCH).records == first
    assert len(readings) == 2


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"shape": [1, 2], "low": 0, "high": 1, "affine": UNIT},
        {"shape": [1, 2, 3], "low": 0, "high": 1},
        {"shape": [1, 2, 3], "low": 0, "high": 1, "affine": UNIT[:3]},
        {"shape": 3},
        [],
    ],
)
def test_an_entry_of_another_form_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readings: list[Path], value: object
) -> None:
    write(tmp_path / "scan.nii", noise())
    monkeypatch.setattr("decovae.data.inspection.recall", lambda key: value)
    assert open_nifti(tmp_path, patch=PATCH).records[0].shape == noise().shape
    assert len(readings) == 1


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readings: list[Path]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DECOVAE_CACHE", str(tmp_path / "file" / "cache"))
    write(tmp_path / "scan.nii", noise())
    assert open_nifti(tmp_path, patch=PATCH).records == open_nifti(tmp_path, patch=PATCH).records
    assert len(readings) == 2


def test_numbers_come_back_exactly() -> None:
    value = {"shape": [1, 2, 3], "low": 0.1, "high": float(np.float32(1) / 3)}
    remember("some key", value)
    assert recall("some key") == value
    assert recall("another key") is None


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def fail(file: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "entry", fail)
    assert list(tmp_path.iterdir()) == []

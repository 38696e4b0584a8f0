"""Whatever volumes are kept in gives back what was put there, and a crop that is called cold comes from the disk."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import numpy as np
import pytest

from bench.page_cache import PAGE, bytes_on_disk, drop, resident
from bench.readme import BLOCKS, Results
from bench.store_formats import KINDS, NAME, QUICK, main, markdown, volumes
from bench.volume_formats import Format, formats

GRID = (64, 128, 64)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder whose files the page cache lets go of, which those of a file system in memory cannot be."""
    probe = tmp_path / "probe"
    probe.write_bytes(b"0")
    try:
        drop(probe)
    except RuntimeError:
        pytest.skip(f"{tmp_path} is a file system in memory: nothing there is cold")
    probe.unlink()
    return tmp_path


@pytest.mark.parametrize("way", formats(GRID), ids=lambda way: way.name)
def test_every_format_gives_back_any_crop(way: Format, tmp_path: Path) -> None:
    volume = np.random.default_rng(0).integers(-(2**15), 2**15, GRID, dtype=np.int16)
    way.write(tmp_path / "volume", volume)
    for corner, sides in (((0, 0, 0), GRID), ((31, 1, 33), (2, 127, 31)), ((32, 32, 0), (32, 64, 64))):
        first, second, third = (slice(at, at + side) for at, side in zip(corner, sides, strict=True))
        found = way.read(tmp_path / "volume", (first, second, third))
        assert found.dtype == np.int16
        assert np.array_equal(found, volume[first, second, third])


def test_dropped_files_are_not_in_memory_and_mapped_ones_are_refused(disk: Path) -> None:
    file = disk / "some" / "file"
    file.parent.mkdir()
    file.write_bytes(bytes(5 * PAGE + 1))
    (file.parent / "empty").touch()
    file.read_bytes()
    assert resident(file.parent) == 6
    drop(file.parent)
    assert resident(file.parent) == 0
    assert bytes_on_disk(file.parent) >= 5 * PAGE
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[0] == 0
        with pytest.raises(RuntimeError, match="stays in the page cache"):
            drop(file)


def test_noise_is_in_every_voxel_of_one_kind_and_nothing_around_the_brain_in_the_other() -> None:
    for noisy in KINDS.values():
        [volume] = volumes(QUICK, noisy=noisy)
        _, counts = np.unique(volume, return_counts=True)
        assert volume.shape == QUICK.grid
        assert (counts.max() < volume.size / 100) == noisy
        assert (int(volume.min()), int(volume.max())) == (-32768, 32767)


def test_the_file_and_its_block(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--out", str(disk / NAME), "--folder", str(disk)])
    found = json.loads((disk / NAME).read_text(encoding="utf-8"))
    names = [way.name for way in formats(QUICK.grid)]
    for rows in found["kinds"].values():
        assert [row["format"] for row in rows] == names
        for row in rows:
            assert row["warm_crops_per_second"] > 0
            assert row["cold_crops_per_second"] > 0
            assert 0 < row["cold_bytes_read"] <= row["bytes_per_volume"]
    assert markdown(found) in capsys.readouterr().out
    assert markdown(found) in BLOCKS["store-formats"](Results(disk, disk / "README.md"))
    assert [path.name for path in disk.iterdir()] == [NAME]

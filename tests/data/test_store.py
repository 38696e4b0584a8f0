"""A store opens as what was written, everywhere, or says in one sentence why not."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decovae.data.store import is_store, npy_header, open_store, store_checksum
from decovae.data.store_check import verify_store
from decovae.preparation.volume import Prepared
from decovae.preparation.writer import finish_store, write_volume
from tests.data.stores import GRID, prepared, write_store

COUNT = 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", COUNT)


def test_what_is_read_is_what_was_written(folder: Path) -> None:
    store = open_store(folder)
    assert is_store(folder)
    assert store.grid == GRID
    assert store.settings == {"fit": "resize"}
    assert len(store.records) == COUNT
    for index, record in enumerate(store.records):
        volume = store.read(index)
        expected = prepared(int(record.subject.removeprefix("sub-")))
        assert np.array_equal(volume, expected.voxels)
        assert volume.dtype == expected.voxels.dtype
        assert isinstance(volume, np.memmap)
        assert not volume.flags.writeable
        assert (record.low, record.high) == (expected.entry["low"], expected.entry["high"])
        assert record.columns == expected.entry["columns"]
        assert record.foreground == bytes.fromhex(expected.entry["foreground"])


def test_any_program_reads_the_volumes(folder: Path) -> None:
    store, description = open_store(folder), json.loads((folder / "store.json").read_text())
    for index in range(COUNT):
        file = folder / store.entry(index)["file"]
        assert file == store.file(index)
        in_file = np.load(file, allow_pickle=False)
        assert np.array_equal(in_file, store.read(index).transpose(description["axes"]))
        assert in_file.shape == tuple(sorted(store.grid, reverse=True)), "the longest axis first"


@pytest.mark.parametrize("shape", [(1, 1, 1), (128, 256, 128), (10**6, 10**6, 10**6)])
def test_voxels_start_on_a_whole_cache_line(shape: Any) -> None:
    assert len(npy_header(shape, "int16")) % 64 == 0


def test_records_are_in_order_and_behave_as_a_sequence(folder: Path) -> None:
    records = open_store(folder).records
    assert [record.subject for record in records] == sorted(f"sub-{index}" for index in range(COUNT))
    assert records[-1] == records[COUNT - 1] == list(records)[-1]
    assert records[1:3] == [records[1], records[2]]
    with pytest.raises(IndexError):
        records[COUNT]


def test_the_same_volumes_give_the_same_bytes_in_any_order(tmp_path: Path, folder: Path) -> None:
    again = write_store(tmp_path / "elsewhere" / "again", COUNT, order=(3, 1, 4, 0, 2))
    assert store_checksum(again) == store_checksum(folder) == open_store(folder).checksum
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        assert file.read_bytes() == (again / file.relative_to(folder)).read_bytes()


def test_the_checksum_tells_stores_apart(tmp_path: Path, folder: Path) -> None:
    others = [
        write_store(tmp_path / "fewer", COUNT - 1),
        write_store(tmp_path / "settings", COUNT, settings={"fit": "resample"}),
        write_store(tmp_path / "voxels", COUNT, seed=1),
    ]
    assert len({store_checksum(path) for path in (folder, *others)}) == 4


def test_another_process_opens_it_for_itself(folder: Path) -> None:
    store = open_store(folder)
    content = pickle.dumps(store)
    assert len(content) < 10_000  # neither the index nor a volume travels
    again = pickle.loads(content)
    assert again.records[2] == store.records[2]
    assert np.array_equal(again.read(2), store.read(2))
    assert again.checksum == store.checksum


def test_a_whole_store_is_in_order(folder: Path) -> None:
    (folder / "report.json").write_text("{}")  # beside the volumes lies what it likes
    assert verify_store(folder, workers=2) == []


def test_odd_names_survive(tmp_path: Path) -> None:
    names = ["ünï cödé/☃.nii.gz", 'quo"te\n.nii', "\udcff.nii"]
    entries = []
    for number, name in enumerate(names):
        volume = prepared(number)
        entry = volume.entry | {"source": name}
        write_volume(tmp_path, Prepared(volume.voxels, entry))
        entries.append(entry)
    finish_store(tmp_path, entries, {}, grid=GRID)
    store = open_store(tmp_path)
    assert sorted(record.source for record in store.records) == sorted(names)
    assert verify_store(tmp_path) == []

"""What is damaged or foreign in a store is said in one sentence, and the rest of it still read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decovae.data.store import open_store, store_checksum
from decovae.data.store_check import verify_store
from decovae.errors import InputError
from decovae.preparation.writer import finish_store
from tests.data.stores import GRID, prepared, write_store

COUNT = 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", COUNT)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


READ_DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut off": half,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "another type": lambda path: np.save(path, np.zeros(GRID, np.float32)),
    "another shape": lambda path: np.save(path, np.zeros((2, 3, 4), np.int16)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", READ_DAMAGE)
def test_a_damaged_volume_is_named_by_reading_and_by_checking(folder: Path, damage: str) -> None:
    store = open_store(folder)
    path = folder / store.entry(1)["file"]
    READ_DAMAGE[damage](path)
    with pytest.raises(InputError, match=path.name):
        store.read(1)
    assert np.array_equal(store.read(2), prepared(2).voxels)
    (sentence,) = verify_store(folder, workers=1)
    assert str(path) in sentence


def test_checking_sees_a_single_bit_and_what_does_not_belong(folder: Path) -> None:
    store = open_store(folder)
    changed = folder / store.entry(3)["file"]
    flip(changed, -1)
    foreign = [folder / "volumes" / "ab" / "other.npy", folder / "volumes" / ".x.npy.1.2.partial"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    sentences = verify_store(folder, workers=2)
    assert len(sentences) == 3
    assert all(any(str(path) in sentence for sentence in sentences) for path in (changed, *foreign))


def rewritten(folder: Path, **changes: Any) -> None:
    path = folder / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


STORE_DAMAGE: dict[str, Callable[[Path], object]] = {
    "no such folder": shutil.rmtree,
    "unfinished": lambda folder: (folder / "store.json").unlink(),
    "no JSON": lambda folder: (folder / "store.json").write_bytes(b"\xff{"),
    "foreign JSON": lambda folder: (folder / "store.json").write_text("[1]"),
    "nested JSON": lambda folder: (folder / "store.json").write_text("[" * 100_000),
    "another version": lambda folder: rewritten(folder, version=99),
    "no grid": lambda folder: rewritten(folder, grid=None),
    "an absurd grid": lambda folder: rewritten(folder, grid=[1, 2]),
    "a negative grid": lambda folder: rewritten(folder, grid=[1, -2, 3]),
    "no settings": lambda folder: rewritten(folder, settings=None),
    "no index": lambda folder: (folder / "index.jsonl").unlink(),
    "an empty index": lambda folder: (folder / "index.jsonl").write_bytes(b""),
    "half an index": lambda folder: half(folder / "index.jsonl"),
    "another index": lambda folder: flip(folder / "index.jsonl", 20),
    "a folder for an index": lambda folder: ((folder / "index.jsonl").unlink(), (folder / "index.jsonl").mkdir()),
}


@pytest.mark.parametrize("damage", STORE_DAMAGE)
def test_what_is_no_whole_store_is_one_sentence(folder: Path, damage: str) -> None:
    STORE_DAMAGE[damage](folder)
    for action in (open_store, store_checksum, verify_store):
        with pytest.raises(InputError, match=r"store.*\.$") as caught:
            action(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["{}", "[]", "no", '{"shape": [1, 2, 3]}', '"' + "x" * 100])
def test_an_entry_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    folder = write_store(tmp_path / "store", 2)
    index = folder / "index.jsonl"
    index.write_text(index.read_text().splitlines()[0] + f"\n{line}\n")
    rewritten(folder, index_sha256=hashlib.sha256(index.read_bytes()).hexdigest())
    store = open_store(folder)
    with pytest.raises(InputError, match="line 2"):
        store.records[1]
    with pytest.raises(InputError):
        store.read(1)
    assert store.records[0].subject == "sub-0"
    assert len(verify_store(folder)) == 2  # the line, and the volume that nobody claims


def test_a_volume_outside_the_store_is_not_read(tmp_path: Path) -> None:
    """An index from elsewhere must not make a program open files elsewhere."""
    outside = tmp_path / "outside.npy"
    np.save(outside, np.zeros(GRID, np.int16))
    volume = prepared(0)
    folder = tmp_path / "store"
    finish_store(folder, [volume.entry | {"file": "../outside.npy"}], {}, grid=GRID)
    with pytest.raises(InputError):
        open_store(folder).read(0)

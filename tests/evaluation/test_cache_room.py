"""The cache grows to its bound and not beyond, whoever fills it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from decovae.data.cache import cache_folder
from decovae.evaluation import cache_room
from decovae.evaluation.cache_room import HEADER_BYTES, CacheRoom
from decovae.evaluation.slices import Slicing, digest_of
from decovae.metrics.slice_features import random_network


def bound(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(cache_room, "MOST_BYTES", size)


def test_features_are_kept_as_long_as_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECOVAE_CACHE", str(tmp_path))
    network = random_network()
    volumes = [torch.rand(1, 16, 20, 18, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    entry = (16 + 20 + 18) * network.features * 4
    most = int(2.5 * entry)
    bound(monkeypatch, most)
    for _ in range(2):  # the second process finds the folder as the first left it
        slicing = Slicing([network])
        for volume in volumes:
            features = slicing.measure(volume)
            slicing.remember(digest_of(volume), features, known=slicing.recall(digest_of(volume)))
        files = list((cache_folder() / "features").rglob("*.safetensors"))
        assert len(files) == 2
        assert 2 * entry < sum(path.stat().st_size for path in files) <= most
    known = [slicing.recall(digest_of(volume)) for volume in volumes]
    assert [list(found) for found in known] == [["random"], ["random"], [], []]


def test_what_is_counted_is_at_least_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECOVAE_CACHE", str(tmp_path))
    slicing, volume = Slicing([random_network()]), torch.rand(1, 16, 20, 18)
    features = slicing.measure(volume)
    slicing.remember(digest_of(volume), features, known={})
    (path,) = (tmp_path / "features").rglob("*.safetensors")
    size = sum(tensor.nbytes for tensor in features["random"].values())
    assert size < path.stat().st_size <= size + HEADER_BYTES


def test_processes_and_threads_share_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound(monkeypatch, 40 * (1000 + HEADER_BYTES))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    room, taken = CacheRoom(), []

    def work() -> None:
        taken.extend(room.take(tmp_path, 1000) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), sum(taken)) == (60, 10)


def test_no_more_than_a_share_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_room.shutil, "disk_usage", lambda _: cache_room.shutil._ntuple_diskusage(0, 0, 7000))
    (tmp_path / "kept").write_bytes(bytes(3000))  # of 10,000 bytes that would be free without it: too many already
    assert not CacheRoom().take(tmp_path, 1)
    assert not CacheRoom().take(tmp_path / "not" / "made", 700)
    assert CacheRoom().take(tmp_path / "not" / "made", 100)

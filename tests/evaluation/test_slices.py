"""Features of slices are those of their network, and kept for a volume of the same content and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from decovae.data.cache import cache_folder
from decovae.errors import InputError
from decovae.evaluation.slices import Slicing, build_networks, digest_of
from decovae.metrics.slice_features import PLANES, SliceNetwork, random_network, volume_slices

CPU = torch.device("cpu")
GRID = (16, 20, 18)


@pytest.fixture(scope="module")
def network() -> SliceNetwork:
    return random_network()


def volume(seed: int = 0) -> Tensor:
    return torch.rand(1, *GRID, generator=torch.Generator().manual_seed(seed))


def test_features_are_those_of_the_slices(network: SliceNetwork) -> None:
    slicing = Slicing([network], every=3)
    found = slicing.measure(volume())
    assert list(found) == ["random"]
    for plane in PLANES:
        expected = network(volume_slices(volume(), plane, every=3))
        assert torch.equal(found["random"][plane], expected)
        assert len(expected) == slicing.per_volume(GRID)[plane]


def test_what_was_measured_is_kept(network: SliceNetwork) -> None:
    slicing, digest = Slicing([network]), digest_of(volume(1))
    assert slicing.recall(digest) == {}
    measured = slicing.measure(volume(1))
    slicing.remember(digest, measured, known={})
    known = slicing.recall(digest)
    assert all(torch.equal(known["random"][plane], measured["random"][plane]) for plane in PLANES)
    # What is known is not computed again: other numbers come back as they are.
    changed = {"random": {plane: known["random"][plane] + 1 for plane in PLANES}}
    again = slicing.measure(volume(1), known=changed)
    assert all(torch.equal(again["random"][plane], changed["random"][plane]) for plane in PLANES)


def test_nothing_else_is_taken_for_it(network: SliceNetwork) -> None:
    slicing, digest = Slicing([network]), digest_of(volume(2))
    slicing.remember(digest, slicing.measure(volume(2)), known={})
    assert Slicing([network], every=2).recall(digest) == {}
    assert slicing.recall(digest_of(volume(3))) == {}
    assert Slicing([network], cache=False).recall(digest) == {}
    other = random_network()
    other.fingerprint = "of other weights"
    assert Slicing([other]).recall(digest) == {}
    assert slicing.recall(digest) != {}


def test_no_cache_writes_nothing(network: SliceNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECOVAE_CACHE", str(tmp_path / "cache"))
    slicing = Slicing([network], cache=False)
    slicing.remember("0" * 64, slicing.measure(volume()), known={})
    assert not (tmp_path / "cache").exists()


def test_a_damaged_entry_is_none(network: SliceNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECOVAE_CACHE", str(tmp_path / "cache"))
    slicing, digest = Slicing([network]), digest_of(volume())
    slicing.remember(digest, slicing.measure(volume()), known={})
    (entry,) = (cache_folder() / "features").rglob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:100])
    assert slicing.recall(digest) == {}


def test_a_cache_that_cannot_be_written_is_no_cache(
    network: SliceNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DECOVAE_CACHE", str(tmp_path / "file"))
    slicing = Slicing([network])
    slicing.remember("0" * 64, slicing.measure(volume()), known={})
    assert slicing.recall("0" * 64) == {}


def test_a_digest_tells_content_and_shape_apart() -> None:
    digests = {digest_of(each) for each in (volume(0), volume(1), volume(0).reshape(1, 20, 16, 18), volume(0).double())}
    assert len(digests) == 4
    assert digest_of(volume(0)) == digest_of(volume(0).permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1))


def test_networks_by_name() -> None:
    (network,) = build_networks(["random", "random"], CPU, radimagenet=None, inception=None)
    assert network.name == "random"
    with pytest.raises(InputError, match=r"--features radimagenet: .* name it with --radimagenet FILE"):
        build_networks(["radimagenet"], CPU, radimagenet=None, inception=None)
    with pytest.raises(InputError, match="--features resnet: no such network"):
        build_networks(["resnet"], CPU, radimagenet=None, inception=None)

"""The store of latents: read as written, and every damage named."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from decovae.errors import InputError
from decovae.generation.latent_space import LatentSpace
from decovae.generation.latents import LatentStore, open_latents
from decovae.generation.shards import shard_path
from decovae.models.weights import encoder_fingerprint, load_autoencoder
from tests.generation.cohort import COUNT, encode


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    return encode(tmp_path / "latents")


def test_a_store_opens_as_it_was_written(store: LatentStore) -> None:
    again = open_latents(store.folder)
    assert again == store
    assert torch.equal(again.moments.packed, store.moments.packed)
    assert again.moments.count == store.moments.count
    assert len({again.read(index)[0].sum().item() for index in range(COUNT)}) == COUNT
    with pytest.raises(IndexError):
        store.read(COUNT)


def test_a_store_goes_to_loader_processes(store: LatentStore) -> None:
    copy = pickle.loads(pickle.dumps(store))
    for mine, theirs in zip(store.read(5), copy.read(5), strict=True):
        assert torch.equal(mine, theirs)


def test_the_autoencoder_lies_beside_its_latents(store: LatentStore) -> None:
    assert encoder_fingerprint(load_autoencoder(store.autoencoder_path)) == store.space.encoder


def test_a_space_survives_json_exactly(store: LatentStore) -> None:
    entry = json.loads(json.dumps(store.space.as_dict()))
    assert LatentSpace.from_dict(entry) == store.space
    for name in entry:
        with pytest.raises(KeyError, match=name):
            LatentSpace.from_dict({key: value for key, value in entry.items() if key != name})
    for change in ({"std": 0.0}, {"mean": float("nan")}, {"shape": [1, 2]}):
        with pytest.raises(ValueError, match=r"std|unpack"):
            LatentSpace.from_dict({**entry, **change})


@pytest.mark.parametrize("place", [-5, -3000])
def test_one_wrong_bit_is_found_where_it_is(store: LatentStore, place: int) -> None:
    path = shard_path(store.folder, 2)
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    again = open_latents(store.folder)
    sound = [index for index in range(COUNT) if not refusal(again, index)]
    (damaged,) = set(range(COUNT)) - set(sound)
    assert refusal(again, damaged) == (
        f"{path}: the latent of s{damaged} is missing or damaged (its checksum is another); "
        "remove the file and run decovae encode again."
    )


def refusal(store: LatentStore, index: int) -> str:
    """What reading says, empty if it works."""
    try:
        store.read(index)
    except InputError as error:
        return str(error)
    return ""


def test_a_shard_that_vanishes_later_is_named_when_read(store: LatentStore) -> None:
    path = shard_path(store.folder, 1)
    path.unlink()
    store.read(0)
    with pytest.raises(InputError, match=rf"{path}: the latent of s16 is missing or damaged \(.*\); remove the file"):
        store.read(16)


def rewritten(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        content = json.loads((folder / "index.json").read_text())
        change(content)
        (folder / "index.json").write_text(json.dumps(content))

    return rewrite


def unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7]) and None


AGAIN = "run decovae encode again"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (unlink("index.json"), f"latents is not finished: {AGAIN}"),
        (cut("index.json"), rf"index\.json is damaged \(.*\): remove it and {AGAIN}"),
        (lambda folder: (folder / "index.json").write_text("[]"), rf"index\.json is damaged .*{AGAIN}"),
        (lambda folder: (folder / "index.json").write_text("{}"), rf"index\.json is damaged .*{AGAIN}"),
        (
            rewritten(lambda content: content["space"].update(std=2.0)),
            rf"index\.json is damaged \(its digest .*{AGAIN}",
        ),
        (rewritten(lambda content: content.pop("rows")), rf"index\.json is damaged .*{AGAIN}"),
        (rewritten(lambda content: content.update(version=2)), r"version 2, and this decovae reads version 1: run"),
        (unlink("latents-00001.safetensors"), rf"latents-00001\.safetensors is missing \(.*\): {AGAIN}"),
        (cut("latents-00002.safetensors"), rf"latents-00002\.safetensors is damaged: \d+ bytes, not \d+; .*{AGAIN}"),
        (unlink("autoencoder.safetensors"), rf"autoencoder\.safetensors is missing: {AGAIN}"),
    ],
)
def test_a_damaged_folder_is_one_sentence(store: LatentStore, damage: Callable[[Path], None], sentence: str) -> None:
    damage(store.folder)
    with pytest.raises(InputError, match=sentence) as caught:
        open_latents(store.folder)
    assert "\n" not in str(caught.value)
    assert str(store.folder) in str(caught.value)


def test_a_folder_without_latents_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(InputError, match=f"{folder} holds no latents: make them with decovae encode RUN --out"):
            open_latents(folder)

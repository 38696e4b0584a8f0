"""The store of latents that `decovae encode` fills: μ and σ of every volume, never a sample of them.

A folder of shards (`decovae.generation.shards`), a copy of the autoencoder, and, once all is there, `index.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from decovae.data.volumes import LeftOut
from decovae.errors import InputError
from decovae.files import write_text
from decovae.generation.latent_space import LatentSpace
from decovae.generation.shards import SHARD, found_shards, read_header, read_row, shard_path
from decovae.losses.moments import ChannelMoments
from decovae.models.weights import WEIGHTS_FILE

VERSION = 1
"""Of the folder's format."""

INDEX = "index.json"

Split = Literal["training", "validation"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class LatentRecord:
    """Whose latent it is, the volume's file, its side of the split, and the other columns of the manifest."""

    subject: str
    source: str
    split: Split
    columns: Mapping[str, str]


@dataclass(frozen=True)
class LatentStore:
    """A finished folder of latents; cheap to pickle and to hold, latents are read when asked for.

    Attributes:
        folder: where it is.
        space: what the latents are.
        records: one a latent.
        checksums: one a latent, which `read` compares.
        moments: of the channels of μ over the training split.
        left_out: volumes that could not be encoded.
    """

    folder: Path
    space: LatentSpace
    records: Sequence[LatentRecord]
    checksums: Sequence[int]
    moments: ChannelMoments = field(compare=False)
    left_out: Sequence[LeftOut]

    @property
    def training(self) -> list[int]:
        """Indices of the training split's latents."""
        return [index for index, record in enumerate(self.records) if record.split == "training"]

    @property
    def validation(self) -> list[int]:
        """Indices of the validation split's latents."""
        return [index for index, record in enumerate(self.records) if record.split == "validation"]

    @property
    def autoencoder_path(self) -> Path:
        """The autoencoder that made the latents; `decovae.load_autoencoder` reads it."""
        return self.folder / WEIGHTS_FILE

    @property
    def precision(self) -> Precision:
        """Of the encoder when it made the latents: float32, or bfloat16 by autocast.

        Raises:
            InputError: no shard can be read any more.
        """
        precision = kept_precision(self.folder)
        if precision is None:
            raise InputError(f"{self.folder}: no file of latents can be read: run decovae encode again.")
        return precision

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """μ and σ of latent `index`, each `(C, d, h, w)`, float32, on the CPU; not standardised.

        Raises:
            InputError: the file is damaged; names it and the subject.
            IndexError: there is no latent `index`.
        """
        number, row = divmod(range(len(self.records))[index], SHARD)
        path = shard_path(self.folder, number)
        subject = self.records[index].subject
        mu, sigma = read_row(path, row, subject=subject, crc32=self.checksums[index])
        if mu.shape != (self.space.channels, *self.space.shape) or sigma.shape != mu.shape:
            raise InputError(
                f"{path}: the latent of {subject} has shape {tuple(mu.shape)}, not what {INDEX} says; "
                "remove the file and run decovae encode again."
            )
        return mu.float(), sigma.float()


def kept_precision(folder: Path) -> Precision | None:
    """The precision of the latents in a folder, finished or not; None where there are none that can be read."""
    for number in found_shards(folder):
        try:
            found = read_header(shard_path(folder, number)).settings.get("precision")
        except InputError:
            continue
        if found in get_args(Precision):
            return cast(Precision, found)
    return None


def write_index(store: LatentStore) -> None:
    """Write the folder's `index.json`, the last of its files; its bytes depend on the store alone.

    Raises:
        OSError: it cannot be written.
    """
    content = {
        "version": VERSION,
        "space": store.space.as_dict(),
        "moments": store.moments.packed.tolist(),
        "shards": [shard_path(store.folder, number).stat().st_size for number in _numbers(len(store.records))],
        "rows": [{**asdict(row), "crc32": crc} for row, crc in zip(store.records, store.checksums, strict=True)],
        "left_out": [asdict(entry) for entry in store.left_out],
    }
    write_text(store.folder / INDEX, json.dumps({**content, "digest": _digest(content)}, indent=1) + "\n")


def open_latents(folder: Path) -> LatentStore:
    """The latents of a folder. Sizes of its files are checked now, what is in them when it is read.

    Raises:
        InputError: no latents there, not all of them yet, a damaged file, or of another version; one sentence that
            names the file.
    """
    path = folder / INDEX
    try:
        content = json.loads(path.read_bytes())
        version, digest = content["version"], content.pop("digest")
    except (FileNotFoundError, NotADirectoryError) as error:
        if found_shards(folder):
            raise InputError(f"{folder} is not finished: run decovae encode again.") from error
        raise InputError(f"{folder} holds no latents: make them with decovae encode RUN --out {folder}.") from error
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, " ".join(str(error).split())) from error
    if version != VERSION:
        raise InputError(
            f"{path} is of version {version}, and this decovae reads version {VERSION}: "
            "run decovae encode again with another --out."
        )
    if digest != _digest(content):
        raise _damaged(path, "its digest is another")
    try:
        store = _parsed(folder, content)
        sizes = [int(size) for size in content["shards"]]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    for number, size in zip(_numbers(len(store.records)), sizes, strict=True):
        _check_size(shard_path(folder, number), size)
    if not store.autoencoder_path.is_file():
        raise InputError(f"{store.autoencoder_path} is missing: run decovae encode again.")
    return store


def _parsed(folder: Path, content: Mapping[str, Any]) -> LatentStore:
    rows = content["rows"]
    return LatentStore(
        folder,
        LatentSpace.from_dict(content["space"]),
        [LatentRecord(row["subject"], row["source"], cast(Split, row["split"]), dict(row["columns"])) for row in rows],
        [int(row["crc32"]) for row in rows],
        ChannelMoments(torch.tensor(content["moments"], dtype=torch.float64), int(content["moments"][0])),
        [LeftOut(**entry) for entry in content["left_out"]],
    )


def _numbers(count: int) -> range:
    """The shards that hold `count` latents."""
    return range(-(-count // SHARD))


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path} is missing ({error.strerror}): run decovae encode again.") from error
    if found != size:
        raise InputError(f"{path} is damaged: {found} bytes, not {size}; remove it and run decovae encode again.")


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is damaged ({reason}): remove it and run decovae encode again.")

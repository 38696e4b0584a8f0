"""Files of a few latents each, written in one step, read row by row where they lie, every row with its checksum."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decovae.errors import InputError
from decovae.files import write_atomically

SHARD = 16
"""Most latents in a file."""

_METADATA_KEY = "latents"  # the only one: safetensors does not keep the order of several


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says of its latents, in JSON's types.

    Attributes:
        settings: how they were made; the same in all shards of a folder.
        rows: one object a latent, with at least `subject` and `crc32`.
    """

    settings: dict[str, Any]
    rows: list[dict[str, Any]]


def shard_path(folder: Path, number: int) -> Path:
    """Where shard `number` of a folder lies."""
    return folder / f"latents-{number:05d}.safetensors"


def found_shards(folder: Path) -> list[int]:
    """Numbers of the shards that are in `folder`, ascending; none where it does not exist."""
    names = (path.name.removeprefix("latents-").removesuffix(".safetensors") for path in _shard_files(folder))
    return sorted(int(name) for name in names if name.isdecimal())


def _shard_files(folder: Path) -> Iterable[Path]:
    return folder.glob("latents-*.safetensors")


def checksum(mu: Tensor, sigma: Tensor) -> int:
    """CRC-32 of the bytes of μ and then σ of one latent, contiguous tensors on the CPU."""
    return zlib.crc32(sigma.numpy().data, zlib.crc32(mu.numpy().data))


def write_shard(path: Path, header: ShardHeader, mu: Sequence[Tensor], sigma: Sequence[Tensor]) -> None:
    """Write latents as one file, which appears whole or not at all; its bytes depend on the arguments alone.

    Args:
        path: as `shard_path` says.
        header: a row each latent.
        mu, sigma: as many tensors `(C, d, h, w)`, float16, on the CPU.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save

    metadata = {_METADATA_KEY: json.dumps({"settings": header.settings, "rows": header.rows})}
    content = save({"mu": torch.stack(list(mu)), "sigma": torch.stack(list(sigma))}, metadata=metadata)
    write_atomically(path, lambda file: file.write(content))


def read_header(path: Path) -> ShardHeader:
    """The header of a shard.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {})[_METADATA_KEY])
            header = ShardHeader(dict(found["settings"]), [dict(row) for row in found["rows"]])
            for name in ("mu", "sigma"):
                part = file.get_slice(name)
                shape = part.get_shape()
                if part.get_dtype() != "F16" or len(shape) != 5 or shape[0] != len(header.rows):
                    raise ValueError(f"{name} is {part.get_dtype()} of shape {shape}")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, "the file", error) from error
    return header


def read_row(path: Path, row: int, *, subject: str, crc32: int) -> tuple[Tensor, Tensor]:
    """μ and σ of row `row` of a shard, each `(C, d, h, w)`, float16, on the CPU; nothing else of the file is read.

    Args:
        path: the shard.
        row: the latent's place in it.
        subject: whose it is, to be named in an error.
        crc32: what `checksum` gave when it was written.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            mu, sigma = (file.get_slice(name)[row : row + 1][0].contiguous() for name in ("mu", "sigma"))
        found = checksum(mu, sigma)
    except (SafetensorError, OSError, LookupError, ValueError, RuntimeError) as error:
        raise _damaged(path, f"the latent of {subject}", error) from error
    if found != crc32:
        raise _damaged(path, f"the latent of {subject}", "its checksum is another")
    return mu, sigma


def _damaged(path: Path, what: str, reason: object) -> InputError:
    said = " ".join(str(reason).split())
    return InputError(f"{path}: {what} is missing or damaged ({said}); remove the file and run decovae encode again.")

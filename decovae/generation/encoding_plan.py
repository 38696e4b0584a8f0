"""Which latents a folder is to hold, in which shards, and which of them it holds already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decovae.data.volumes import VolumeRecord
from decovae.errors import InputError
from decovae.generation.latents import INDEX, Split
from decovae.generation.shards import (
    SHARD,
    ShardHeader,
    checksum,
    found_shards,
    read_header,
    read_row,
    shard_path,
    write_shard,
)
from decovae.losses.moments import channel_moments
from decovae.models.autoencoder import Autoencoder
from decovae.models.weights import WEIGHTS_FILE, encoder_fingerprint, load_autoencoder, save_autoencoder
from decovae.runtime import Runtime

ADVICE = "give another folder, or remove this one"


@dataclass(frozen=True)
class Encoded:
    """One latent: μ and σ, `(C, d, h, w)`, float16, on the CPU."""

    mu: Tensor
    sigma: Tensor

    def measures(self) -> dict[str, Any]:
        """What is kept beside the latent, of its 16-bit numbers: checksum, packed moments of μ, mean of σ²."""
        return {
            "crc32": checksum(self.mu, self.sigma),
            "moments": channel_moments(self.mu[None].double()).packed.tolist(),
            "noise": float(self.sigma.double().square().mean()),
        }


def planned_row(record: VolumeRecord, split: Split) -> dict[str, Any]:
    """What a latent depends on, in JSON's types; tells when a volume has changed."""
    digest = {"sha256": record.sha256} if record.sha256 else {}  # only a store knows it
    return {
        "subject": record.subject,
        "source": record.source,
        "split": split,
        "volume": {
            "shape": list(record.shape),
            "low": record.low,
            "high": record.high,
            "affine": [list(row) for row in record.affine],
            **digest,
        },
    }


@dataclass(frozen=True)
class Plan:
    """The contents of a folder of latents.

    Attributes:
        folder: where they go.
        settings: what they are made with, in JSON's types.
        rows: a `planned_row` each latent.
        columns: of the manifest, for each latent; nothing in the shards depends on them.
    """

    folder: Path
    settings: dict[str, Any]
    rows: Sequence[dict[str, Any]]
    columns: Sequence[Mapping[str, str]]

    @property
    def numbers(self) -> range:
        """The shards' numbers."""
        return range(-(-len(self.rows) // SHARD))

    def places(self, number: int) -> range:
        """The rows in shard `number`."""
        return range(number * SHARD, min((number + 1) * SHARD, len(self.rows)))

    def prepare_folder(self, autoencoder: Autoencoder) -> None:
        """Make the folder with its copy of the autoencoder, and clear away what a killed process left half-written.

        Raises:
            InputError: the folder holds other files or another autoencoder, or cannot be written.
        """
        path = self.folder / WEIGHTS_FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for entry in sorted(self.folder.iterdir()):
                if entry.name.startswith(".") and entry.suffix == ".partial":
                    entry.unlink()
                elif entry.name not in (WEIGHTS_FILE, INDEX) and not entry.match("latents-*.safetensors"):
                    raise InputError(f"{self.folder}: holds other files than latents, {entry.name} for one; {ADVICE}.")
            if path.exists():
                self._compare(path, autoencoder)
            else:
                save_autoencoder(autoencoder.state_dict(), autoencoder.config, path)
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def _compare(self, path: Path, autoencoder: Autoencoder) -> None:
        try:
            kept = load_autoencoder(path)
        except InputError as error:
            raise InputError(f"{path} is damaged: remove it and run decovae encode again.") from error
        fingerprints = encoder_fingerprint(kept), self.settings["encoder"]
        if fingerprints[0] != fingerprints[1]:
            raise InputError(
                f"{self.folder}: holds latents of the encoder {fingerprints[0]}, not {fingerprints[1]}; {ADVICE}."
            )
        mine = autoencoder.state_dict()
        if any(not torch.equal(tensor, mine[name].cpu()) for name, tensor in kept.state_dict().items()):
            raise InputError(f"{self.folder}: holds latents for another decoder of the same encoder; {ADVICE}.")

    def pending(self, runtime: Runtime) -> list[int]:
        """Shards that are missing or damaged, the same list on all processes, which share the checking.

        Raises:
            InputError: on all processes, if a shard in the folder is not of this plan; names the difference.
        """
        found = runtime.on_main(lambda: found_shards(self.folder))
        sound: list[int] = []
        refusal: InputError | None = None
        try:
            sound = [number for number in found[runtime.rank :: runtime.world] if self._is_sound(number)]
        except InputError as error:
            refusal = error
        outcomes = runtime.gather((sound, refusal))
        for _, refused in outcomes:
            if refused is not None:
                refused.on_all_processes = True
                raise refused
        kept = {number for numbers, _ in outcomes for number in numbers}
        return [number for number in self.numbers if number not in kept]

    def _is_sound(self, number: int) -> bool:
        """Whether a shard is undamaged.

        Raises:
            InputError: it is of another plan.
        """
        path = shard_path(self.folder, number)
        try:
            header = read_header(path)
        except InputError:
            return False
        for name in sorted(header.settings.keys() | self.settings.keys()):
            kept, wanted = header.settings.get(name), self.settings.get(name)
            if kept != wanted:
                raise InputError(f"{path}: holds latents of the {name} {kept}, not {wanted}; {ADVICE}.")
        planned = [self.rows[place] for place in self.places(number)]
        for kept, wanted in zip(header.rows, planned, strict=False):
            for name in wanted:
                if kept.get(name) != wanted[name]:
                    whose = f"{name} of {kept.get('subject')} ({kept.get('source')})"
                    change = "is another" if name == "volume" else f"is {kept.get(name)}, not {wanted[name]}"
                    raise InputError(f"{path}: was made of other volumes, {whose} {change}; {ADVICE}.")
        if len(header.rows) != len(planned):
            raise InputError(f"{path}: holds {len(header.rows)} latents, not {len(planned)}; {ADVICE}.")
        try:
            for row, entry in enumerate(header.rows):
                read_row(path, row, subject=entry["subject"], crc32=entry["crc32"])
        except (InputError, KeyError):
            return False
        return True

    def write(self, number: int, latents: Sequence[Encoded]) -> None:
        """Write shard `number`, of the latents of its rows.

        Raises:
            InputError: the folder cannot be written.
        """
        rows = [
            {**self.rows[place], **latent.measures()}
            for place, latent in zip(self.places(number), latents, strict=True)
        ]
        path = shard_path(self.folder, number)
        try:
            header = ShardHeader(self.settings, rows)
            write_shard(path, header, [each.mu for each in latents], [each.sigma for each in latents])
        except OSError as error:
            raise unwritable(self.folder, error) from error


def unwritable(folder: Path, error: OSError) -> InputError:
    """The sentence about a folder that cannot be written."""
    return InputError(f"{folder}: cannot be written ({error.strerror or error}); give another folder, or make room.")

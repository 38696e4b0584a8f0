"""``decovae export``: the weights of a run, of one of its checkpoints or of a file, for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from decovae.errors import InputError

SUFFIX = {"safetensors": ".safetensors", "monai": ".pt"}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Weights as a file for other programs, without a GPU: those that a run ended with, or those of a checkpoint, their
    moving average where the run keeps one.

    safetensors is what this project reads itself, architecture included. monai is a .pt that loads strictly into
    MONAI's AutoencoderKlMaisi, and for a flow into DiffusionModelUNetMaisi, with a .json beside it that takes the place
    of MAISI's network file. With a flow goes FILE-autoencoder.pt: the run's autoencoder, its latents moved to mean 0,
    since MAISI's scripts know a scale_factor and no mean.
    """

    source: tyro.conf.Positional[Path]
    """Folder of a run, or a file of weights: an export, the authors' model.pt, or MAISI's."""
    out: Path
    """File to write, ending with .safetensors or, for monai, .pt."""
    format: Literal["safetensors", "monai"] = "safetensors"
    """What for."""
    checkpoint: str | None = None
    """Of a run: best, newest, or the step of one of its checkpoints; by default what the finished run ended with."""
    condition: tuple[str, ...] = ()
    """NAME=VALUE that a flow with conditions is to follow in MONAI, which gives it none; what is missing is unknown."""


def main(arguments: Sequence[str]) -> int:
    """The command, from its options to its exit code: 0, 1 if it could not go on, 2 for a wrong input."""
    from decovae.training.command_line import exit_code, parse_options

    def export() -> None:
        config = parse_options(ExportConfig, arguments, program="decovae export")
        check(config)
        from decovae.commands.export_run import run  # networks, which a wrong option can do without

        for line in run(config):
            print(line, flush=True)

    return exit_code(export, stopped="stopped; the same command begins again.")


def check(config: ExportConfig) -> None:
    """Refuse options that cannot be used together or at all, before anything is read.

    Raises:
        InputError: naming the option.
    """
    suffix = SUFFIX[config.format]
    if config.out.suffix != suffix:
        raise InputError(f"--out {config.out}: a file for {config.format} ends with {suffix}; name it so.")
    if not config.source.exists():
        raise InputError(f"{config.source}: no such run or file; give a run's folder, or a file of weights.")
    if config.source.resolve() == config.out.resolve():
        raise InputError(f"--out {config.out}: is what is to be exported; give another file.")
    if config.checkpoint is not None and not config.source.is_dir():
        raise InputError(f"--checkpoint {config.checkpoint}: {config.source} is a file; give the folder of a run.")
    if config.checkpoint not in (None, "best", "newest") and not str(config.checkpoint).isdecimal():
        raise InputError(f"--checkpoint {config.checkpoint}: give best, newest, or the number of a step.")
    if config.condition and config.format != "monai":
        raise InputError(f"--condition {config.condition[0]}: is for --format monai; leave it out.")

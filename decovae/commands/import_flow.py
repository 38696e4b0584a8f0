"""``decovae import``: a flow of MAISI's or of the authors', as a run that ``decovae sample`` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from decovae.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """A run for `decovae sample` from weights of MAISI's diffusion U-Net that were trained by rectified flow: NVIDIA's
    diff_unet_3d_rflow-*.pt, or the authors' model.pt of a U-Net.

    What such a U-Net is told beside the time, spacing and modality, becomes part of the weights, one value for all
    samples. An autoencoder alone needs no import: `decovae export` and `train/vae.py --init` read its file.
    """

    unet: tyro.conf.Positional[Path]
    """File of the U-Net, with its scale_factor."""
    autoencoder: Path
    """File of the autoencoder whose latents it was trained on."""
    grid: tuple[int, int, int]
    """Voxels of the volumes to make, in RAS axes."""
    spacing: tuple[float, float, float]
    """Millimetres of a voxel."""
    out: Path
    """Folder for the run."""
    modality: int | None = None
    """Number of the kind of image, for a U-Net that is told one: 9 is T1, 29 T1 without a skull in NVIDIA's list."""
    meta: float | None = None
    """Number that one of the authors' U-Nets is told, such as an age."""
    head_channels: int | None = None
    """Channels of an attention head, which weights do not show; by default those in MAISI's network file of the U-Net's
    name, ending with .json, and 32 where there is none."""
    time_scale: float = 1.0
    """Shift of sampling times towards noise. MONAI's scheduler trains with 1 whatever the `scale` of its configuration
    says, which is that of another distribution of times."""


def main(arguments: Sequence[str]) -> int:
    """The command, from its options to its exit code: 0, 1 if it could not go on, 2 for a wrong input."""
    from decovae.training.command_line import exit_code, parse_options

    def import_() -> None:
        config = parse_options(ImportConfig, arguments, program="decovae import")
        check(config)
        from decovae.commands.import_run import run  # networks, which a wrong option can do without

        for line in run(config):
            print(line, flush=True)

    return exit_code(import_, stopped="stopped; remove what was written, the same command begins again.")


def check(config: ImportConfig) -> None:
    """Refuse options that cannot be used, before anything is read.

    Raises:
        InputError: naming the option.
    """
    for option, values in (("--grid", config.grid), ("--spacing", config.spacing)):
        if min(values) <= 0:
            raise InputError(f"{option} {' '.join(map(str, values))}: has to be above 0 along every axis.")
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise InputError(f"--out {config.out}: holds something; give a new or an empty folder.")
    if config.head_channels is not None and config.head_channels < 1:
        raise InputError(f"--head-channels {config.head_channels}: must be at least 1.")
    if not config.time_scale > 0:
        raise InputError(f"--time-scale {config.time_scale:g}: must be above 0.")

"""``decovae evaluate``: reconstructions of an autoencoder, or samples of a flow, measured like the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from decovae.errors import InputError

Network = Literal["random", "radimagenet", "inception"]
Split = Literal["training", "validation", "all"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a finished run, on the grid it was trained on, intensities clipped to [0, 1].

    A run of train/vae.py or train/decoder.py: PSNR, SSIM, MS-SSIM and LPIPS of every reconstructed volume, and rFID. A
    run of train/flow.py: gFID, precision and recall, density and coverage, kernel distance, and whether samples are
    copies. Both: volumes of tissue. With several processes: torchrun --nproc_per_node 4 -m decovae.cli evaluate RUN …
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Folder of a finished run."""
    samples: Path | None = None
    """Folder of decovae sample, for a flow; by default the only one in RUN/samples."""
    number: Annotated[int | None, tyro.conf.arg(aliases=["-n"])] = None
    """How many of the samples to measure: those with the numbers 0 to N − 1, all of which must be there; by default all
    that are."""
    features: tuple[Network, ...] | None = None
    """Networks for the features of slices: random, a proxy that needs no download; radimagenet, the paper's; inception,
    torchvision's. By default random, and those whose weights are given."""
    radimagenet: Path | None = None
    """RadImageNet's ResNet-50, a PyTorch weights file."""
    inception: Path | None = None
    """torchvision's Inception v3, a weights file; by default torchvision downloads it."""
    real: Split = "all"
    """Which of the run's volumes a flow's samples are compared with. They take the samples' way: to the voxels that
    samples are written in, and back to the grid, so that both are equally smoothed."""
    split: Split = "validation"
    """Which of the run's volumes an autoencoder reconstructs."""
    limit: int | None = None
    """Take no more than so many volumes, and of samples too, the first of them; the result says how partial it is."""
    lpips: str | None = None
    """Features of LPIPS: pretrained, the path of a squeezenet1_1 weights file, or none; by default what the run was
    trained with, unless that was random."""
    keep_volumes: int = 1
    """Originals and reconstructions to write as NIfTI, the first of the split."""
    slice_every: int = 1
    """Distance between slices whose features are taken."""
    cache: bool = True
    """Keep what is measured of real volumes and of samples in the cache folder, and use what is kept there. Features
    fill at most 20 GB, or a tenth of the free space if that is less; what does not fit is measured each time."""
    out: Path | None = None
    """Folder for evaluation.json and volumes.csv; by default `evaluation` in RUN, or in the folder of samples."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the autoencoder: auto is bf16 autocast on CUDA and fp32 on the CPU; measures are fp32 or wider."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute: auto is CUDA where there is a GPU."""

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the feature networks."""
        if self.features is not None:
            return self.features
        given = {"radimagenet": self.radimagenet, "inception": self.inception}
        return ("random", *(name for name, path in given.items() if path is not None))


def main(arguments: Sequence[str]) -> int:
    """The command, from its options to its exit code: 0, 1 if it could not go on, 2 for a wrong input."""
    from decovae.runtime import start_runtime
    from decovae.training.command_line import exit_code, parse_options

    def evaluate() -> None:
        config = parse_options(EvaluateConfig, arguments, program="decovae evaluate")
        check(config)
        from decovae.commands.evaluate_run import run  # networks, which a wrong option can do without

        with start_runtime(config.device) as runtime:
            run(config, runtime)

    return exit_code(evaluate, stopped="stopped; features that were measured are kept, so the same command is quicker.")


def check(config: EvaluateConfig) -> None:
    """Refuse options that mean nothing, before anything is read.

    Raises:
        InputError: naming the option.
    """
    if config.features is not None and not config.features:
        raise InputError("--features: give at least one of random, radimagenet and inception.")
    if config.limit is not None and config.limit < 2:
        raise InputError(f"--limit {config.limit}: a covariance needs at least 2 volumes; give 2 or more.")
    if config.number is not None and config.number < 2:
        raise InputError(f"--number {config.number}: a covariance needs at least 2 samples; give 2 or more.")
    if config.slice_every < 1:
        raise InputError(f"--slice-every {config.slice_every}: give 1 or more.")
    if config.keep_volumes < 0:
        raise InputError(f"--keep-volumes {config.keep_volumes}: give 0 or more.")

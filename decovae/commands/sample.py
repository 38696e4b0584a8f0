"""``decovae sample``: new volumes from a flow, or a path between two."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from decovae.errors import InputError

DEFAULT_STEPS, DEFAULT_FRAMES = 30, 9

LONGEST_NAME = 100
"""Bytes that a default folder's name may take: file systems allow 255, and files in it are named too."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """New volumes from a finished flow run, as NIfTI files in the place of the volumes it was trained on.

    Sample i of a seed is the same volume whatever is made with it. The same command with the same --out goes on where
    it was. Every volume is labelled as synthetic, in its header and in a sidecar.
    """

    run: tyro.conf.Positional[Path]
    """Folder of a finished run of train/flow.py."""
    number: Annotated[int | None, tyro.conf.arg(aliases=["-n"])] = None
    """How many samples: those with the numbers 0 to N − 1."""
    seed: int = 42
    """Seed of the noise that samples start from."""
    solver: str = "euler"
    """euler, heun, midpoint, or dopri5, which chooses its own steps."""
    steps: int | None = None
    """Steps of the solver, 30 by default; not for dopri5."""
    tolerance: float | None = None
    """Error of a step that dopri5 tolerates, 0.0001 by default; for no other solver."""
    condition: tuple[str, ...] = ()
    """NAME=VALUE for columns that the flow is conditioned on, such as age=63 sex=F; a column left out is unknown."""
    guidance: float = 1.0
    """Weight of the condition: 1 follows it as trained, more exaggerates it."""
    interpolate: tuple[str, str] | None = None
    """Make a path instead, between sample 0 of two seeds, or between two subjects that were encoded."""
    frames: int | None = None
    """Volumes on the path, its ends among them; 9 by default."""
    latents: Path | None = None
    """Folder of `decovae encode` with the subjects to interpolate between; by default what the flow was trained on."""
    out: Path | None = None
    """Folder for the samples; by default one in the run's, named after solver, seed and what else is not default."""
    decoder: Path | None = None
    """Finished run of train/vae.py or train/decoder.py to decode with; by default the autoencoder in the flow's run."""
    batch_size: int | None = None
    """Samples made at once; by default 1 on a GPU, and on the CPU one a core, at most 8 and what memory allows."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the networks; auto is bf16 on a GPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the flow, with CUDA graphs; auto does on a GPU for 3,000 evaluations and more."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""

    @property
    def solver_tolerance(self) -> float:
        """Tolerance of dopri5."""
        from decovae.generation.solvers import TOLERANCE  # torch, which a wrong option can do without

        return TOLERANCE if self.tolerance is None else self.tolerance

    @property
    def solver_steps(self) -> int:
        """Steps of the solver."""
        return DEFAULT_STEPS if self.steps is None else self.steps

    @property
    def path_frames(self) -> int:
        """Volumes on a path."""
        return DEFAULT_FRAMES if self.frames is None else self.frames

    @property
    def between_seeds(self) -> bool:
        """Whether the ends of a path can be seeds: both are numbers, and no latents are named."""
        ends = self.interpolate or ()
        return self.latents is None and all(re.fullmatch(r"[0-9]+", end) for end in ends)

    @property
    def folder(self) -> Path:
        """Where the samples go.

        The default is named after all options that a sample depends on and that are not at their defaults, so that
        those of other options have a folder of their own: ``euler30-seed42-age=63-sex=F-guidance2``.
        """
        if self.out is not None:
            return self.out
        name = "-".join(self._differences())
        safe = re.sub(r"[^A-Za-z0-9_.=-]", "_", name)
        if safe != name or len(safe) > LONGEST_NAME:  # what was replaced or cut still tells two names apart
            safe = f"{safe[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return self.run / "samples" / safe

    def _differences(self) -> Iterator[str]:
        from decovae.generation.solvers import TOLERANCE

        yield self.solver if self.solver == "dopri5" else f"{self.solver}{self.solver_steps}"
        if self.tolerance not in (None, TOLERANCE):
            yield f"tolerance{self.tolerance}"
        yield f"seed{self.seed}" if self.interpolate is None else "-to-".join(self.interpolate)
        if self.path_frames != DEFAULT_FRAMES:
            yield f"frames{self.path_frames}"
        if self.latents is not None:
            yield f"latents-{self.latents.resolve().name}"
        yield from sorted("=".join(part.strip() for part in option.split("=")) for option in self.condition)
        if self.guidance != 1:
            yield f"guidance{str(self.guidance).removesuffix('.0')}"
        if self.decoder is not None:
            yield f"decoder-{self.decoder.resolve().name}"
        if self.precision != "auto":
            yield self.precision


def main(arguments: Sequence[str]) -> int:
    """The command, from its options to its exit code: 0, 1 if it could not go on, 2 for a wrong input."""
    from decovae.runtime import start_runtime
    from decovae.training.command_line import exit_code, parse_options

    def sample() -> None:
        config = parse_options(SampleConfig, arguments, program="decovae sample")
        check(config)
        from decovae.commands.sample_run import run  # networks and pictures, which a wrong option can do without

        with start_runtime(config.device) as runtime:
            run(config, runtime)

    return exit_code(sample, stopped="stopped; the same command makes the samples that are missing.")


def check(config: SampleConfig) -> None:
    """Refuse options that cannot be used together or at all, before anything is read.

    Raises:
        InputError: naming the option.
    """
    from decovae.generation.solvers import evaluations

    if config.interpolate is None:
        if config.number is None or config.number < 1:
            given = "is not given" if config.number is None else f"{config.number}: too few"
            raise InputError(f"-n {given}; say how many samples to make, at least 1.")
        for option, value in (("--frames", config.frames), ("--latents", config.latents)):
            if value is not None:
                raise InputError(f"{option} {value}: is for --interpolate A B; leave it out.")
    elif config.number is not None:
        raise InputError(f"-n {config.number}: --interpolate makes --frames volumes; leave one of the two out.")
    evaluations(config.solver, config.solver_steps)
    if config.solver == "dopri5" and config.steps is not None:
        raise InputError(
            f"--steps {config.steps}: dopri5 chooses its own steps; give --tolerance, or another --solver."
        )
    if config.solver != "dopri5" and config.tolerance is not None:
        raise InputError(f"--tolerance {config.tolerance:g}: is for --solver dopri5; give --steps.")
    if config.tolerance is not None and not 0 < config.tolerance < math.inf:
        raise InputError(f"--tolerance {config.tolerance:g}: must be above 0.")
    if not math.isfinite(config.guidance):
        raise InputError(f"--guidance {config.guidance:g}: must be a number.")
    if config.guidance != 1 and not config.condition:
        raise InputError(f"--guidance {config.guidance:g}: there is no --condition to weigh; give one.")
    least = {
        "--steps": (config.steps, 1),
        "--seed": (config.seed, 0),
        "--frames": (config.frames, 2),
        "--batch-size": (config.batch_size, 1),
    }
    for option, (value, smallest) in least.items():
        if value is not None and value < smallest:
            raise InputError(f"{option} {value}: must be at least {smallest}.")

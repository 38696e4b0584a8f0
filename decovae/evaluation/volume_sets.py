"""Sets of volumes to measure: a run's own, and folders of samples, all on the run's grid."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from decovae.data.frame import Frame
from decovae.data.nifti import read_nifti
from decovae.data.patches import load_volume
from decovae.data.resample import resample_crop
from decovae.data.volumes import Shape, Volumes, times
from decovae.errors import InputError
from decovae.generation.latent_space import LatentSpace
from decovae.generation.sample_folder import SETTINGS
from decovae.generation.volumes_out import SIDECAR_SUFFIX, VOLUME_SUFFIX, is_written, to_frame

ALIKE = 1e-2
"""Millimetres between affines of the same place, as files round them."""

_SIDECAR = re.compile(rf"sample-(\d{{5,}}){re.escape(SIDECAR_SUFFIX)}")


class VolumeSet(Protocol):
    """Volumes in an order, read when asked for."""

    @property
    def names(self) -> Sequence[str]:
        """Of each volume, for people."""
        ...

    def load(self, place: int) -> Tensor:
        """Volume `place` on the grid, (1, D, H, W), float32, not clipped; in any thread."""
        ...

    def frame(self, place: int) -> Frame:
        """Where its voxels on the grid lie."""
        ...


@dataclass(frozen=True)
class RealVolumes:
    """Some of a run's volumes: resized to `grid` and scaled, as in training.

    Attributes:
        volumes: all of the run's.
        indices: which of them.
        grid: voxels of a volume that is measured.
        through: where samples are written that these are compared with. A sample goes from the grid to those voxels,
            into its file, and back to the grid, which smooths it; a real volume that had been resized only once would
            differ from it even if both showed the same brain. So it takes the same way. None where nothing is compared
            with samples.
    """

    volumes: Volumes
    indices: Sequence[int]
    grid: Shape
    through: Frame | None = None

    @property
    def names(self) -> list[str]:
        """Their subjects."""
        return [self.volumes.records[index].subject for index in self.indices]

    @property
    def sources(self) -> list[str]:
        """Names of their files; where those lie is nobody's business who reads a result."""
        return [PurePath(self.volumes.records[index].source).name for index in self.indices]

    def load(self, place: int) -> Tensor:
        """See `VolumeSet`."""
        volume = load_volume(self.volumes, self.indices[place], self.grid)
        if self.through is None or self.through.shape == self.grid:
            return volume
        return _to_grid(to_frame(volume, self.through), self.grid)

    def frame(self, place: int) -> Frame:
        """See `VolumeSet`."""
        record = self.volumes.records[self.indices[place]]
        return Frame(record.shape, record.affine).on_grid(self.grid)


@dataclass(frozen=True)
class SampleVolumes:
    """The samples of a folder, resized to the grid as source volumes are; they are scaled already.

    Real volumes that they are compared with have to take the same way: see `RealVolumes.through`.
    """

    folder: Path
    names: Sequence[str]
    space: LatentSpace

    def load(self, place: int) -> Tensor:
        """See `VolumeSet`.

        Raises:
            InputError: the file is damaged, lies elsewhere than the flow's volumes, or holds NaN; names it.
        """
        path = self.folder / (self.names[place] + VOLUME_SUFFIX)
        voxels, _, affine, _, _ = read_nifti(path)
        wanted = self.space.frame
        if voxels.shape != wanted.shape or not np.allclose(affine, wanted.matrix, atol=ALIKE):
            raise InputError(
                f"{path}: is {times(voxels.shape)} voxels, and the real volumes are {times(wanted.shape)}, or they lie "
                "elsewhere: only volumes of one grid can be compared; sample again from this run."
            )
        volume = _to_grid(voxels, self.space.grid)
        if not torch.isfinite(volume).all():
            raise InputError(f"{path}: holds NaN or infinite intensities; remove it and sample again.")
        return volume

    def frame(self, place: int) -> Frame:
        """See `VolumeSet`."""
        return self.space.frame.on_grid(self.space.grid)


def choose_samples(run: Path, given: Path | None) -> Path:
    """The folder of samples that is meant: the given one, or the only one in the run.

    Raises:
        InputError: there is none, or there are several; lists them.
    """
    if given is not None:
        if not given.is_dir():
            raise InputError(f"--samples {given}: no such folder; make it with decovae sample {run} --out {given}.")
        return given
    found = sorted(path.parent for path in (run / "samples").glob(f"*/{SETTINGS}") if "between" not in _read(path))
    if not found:
        raise InputError(f"{run}: holds no samples; make some with decovae sample {run} -n 16, or give --samples.")
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise InputError(f"{run}: holds several folders of samples; give one of them as --samples: {names}.")
    return found[0]


def open_samples(folder: Path, *, flow_sha256: str, number: int | None = None) -> tuple[list[str], dict[str, Any]]:
    """Names of the samples in a folder, from number 0 on without a gap, and what they were made with.

    Args:
        folder: of `decovae sample`.
        flow_sha256: of the flow whose samples they have to be.
        number: how many of them, N: those with the numbers 0 to N − 1; without it all that are there.

    Raises:
        InputError: the folder holds no samples, or another flow's, or one of them is missing or not finished.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise InputError(f"--samples {folder}: holds no samples (no {SETTINGS}); give a folder of decovae sample.")
    settings = _read(path)
    if "between" in settings:
        raise InputError(f"--samples {folder}: holds a path between two volumes, not samples; give another folder.")
    if settings.get("flow_sha256") != flow_sha256:
        raise InputError(
            f"--samples {folder}: was made by another flow, {settings.get('run')}; give that run, or samples of this."
        )
    if number is None:
        matches = (_SIDECAR.fullmatch(path.name) for path in folder.iterdir())
        number = max((int(match[1]) + 1 for match in matches if match), default=0)
    names = [f"sample-{place:05d}" for place in range(number)]
    for name in names:
        if not is_written(folder, name):
            raise InputError(
                f"--samples {folder}: {name} is missing: run decovae sample … -n {number} again, with the options that "
                "the others were made with."
            )
    return names, settings


def _to_grid(voxels: np.ndarray, grid: Shape) -> Tensor:
    return resample_crop(voxels, grid=grid, corner=(0, 0, 0), size=grid)[None]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give another --samples, or sample again.") from error
    return content

"""The template cohort: brains made by warping the MNI-152 template, a stand-in for data that cannot be shipped."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from decovae.data.cache import cache_folder
from decovae.data.deformation import centres, exponential, sample, smooth_field
from decovae.data.foreground import foreground_places
from decovae.data.inspection import Measurement, accepted, for_all, measured
from decovae.data.resample import resample_crop
from decovae.data.template import BOX_SIZE, FULL_SHAPE, cohort_affine, tissue_maps
from decovae.data.volumes import Shape, VolumeRecord, Volumes, affine_rows, intensity_range
from decovae.errors import InputError
from decovae.files import write_atomically

__all__ = ["FULL_SHAPE", "cohort_affine", "cohort_subject", "open_cohort"]

COHORT_VERSION = 4  # raise it when a subject's voxels change: it names the cache folder
FLOW_SHAPE: Shape = (46, 55, 46)  # about 4 mm, fine enough for the finest octave of velocity
VELOCITY_OCTAVES = ((48.0, 2.8), (24.0, 1.8), (12.0, 0.8))  # (spacing, root mean square), millimetres


def cohort_subject(index: int, *, seed: int, shape: Shape) -> np.ndarray:
    """The T1-weighted brain of subject `index`, skull-stripped, 0 outside the brain, in RAS axes over MNI space.

    A function of its arguments alone. `shape` changes the sampling, and with it the noise in a voxel, but not the
    brain: anatomy, contrast, texture and bias field are drawn in millimetres.

    Returns:
        `shape`, float32, raw intensities: of the order of 1000, with a gain that differs between subjects.
    """
    streams = np.random.SeedSequence(seed, spawn_key=(index,)).spawn(3)
    anatomy, contrast, noise = (np.random.Generator(np.random.Philox(stream)) for stream in streams)
    csf, grey, white, texture = sample(tissue_maps(shape), _warp(anatomy, shape), extent=BOX_SIZE, outside="zeros")
    brain = csf + grey + white
    fraction = contrast.uniform  # of the intensity of white matter; CSF < GM < WM, as T1 weighting has it
    image = fraction(0.18, 0.34) * csf + fraction(0.62, 0.78) * grey + white + fraction(0.6, 1.2) * texture
    image += 0.025 * brain * _field(contrast, 6.0, shape)  # tissue is not uniform
    image *= torch.exp(0.06 * _field(contrast, 90.0, shape))  # the coil's sensitivity
    voxel = float(np.prod(np.divide(BOX_SIZE, shape)))
    sigma = fraction(0.015, 0.03) / voxel**0.5  # a voxel's noise falls with its volume
    real, imaginary = (torch.from_numpy(noise.standard_normal(shape, dtype=np.float32)) for _ in range(2))
    image = torch.hypot(image + sigma * real, sigma * imaginary)  # Rician, as magnitudes are
    gain = 1000 * np.exp(0.15 * contrast.standard_normal())
    return (image * brain.clamp(max=1) * gain).numpy()


def _warp(generator: np.random.Generator, shape: Shape) -> torch.Tensor:
    """Where in the template each voxel of a subject lies, `(3, *shape)`, millimetres from the box's corner."""
    velocity = sum(
        (
            rms * smooth_field(generator, channels=3, spacing=spacing, extent=BOX_SIZE, shape=FLOW_SHAPE)
            for spacing, rms in VELOCITY_OCTAVES
        ),
        start=torch.zeros(3, *FLOW_SHAPE),
    )
    coarse = exponential(velocity, extent=BOX_SIZE)
    displacement = torch.stack(
        [resample_crop(axis.numpy(), grid=shape, corner=(0, 0, 0), size=shape) for axis in coarse]
    )
    # What is left of head size and pose after a linear registration.
    linear = np.diag(np.exp(generator.normal(0.0, 0.03, 3))) + generator.normal(0.0, 0.015, (3, 3))
    middle = torch.tensor(BOX_SIZE).view(3, 1, 1, 1) / 2
    places = centres(shape, BOX_SIZE) + displacement - middle
    return torch.tensordot(torch.from_numpy(linear.astype(np.float32)), places, dims=1) + middle


def _field(generator: np.random.Generator, spacing: float, shape: Shape) -> torch.Tensor:
    return smooth_field(generator, channels=1, spacing=spacing, extent=BOX_SIZE, shape=shape)[0]


@dataclass(frozen=True)
class CohortVolumes:
    """Subjects of the template cohort, kept as `.npy` files that all processes of a machine map into memory."""

    records: Sequence[VolumeRecord]
    files: Sequence[Path]

    def read(self, index: int) -> np.ndarray:
        """Subject `index`, `(D, H, W)` in RAS axes, float32, a read-only memory map."""
        return np.load(self.files[index], mmap_mode="r")


def open_cohort(size: int, *, seed: int, shape: Shape) -> Volumes:
    """The first `size` subjects of the cohort of `seed`, named `sub-0000`, `sub-0001`, ….

    They are made once and kept in the cache folder, or, where that cannot be written, in a temporary folder until the
    process ends. Several processes may open the same cohort at once.

    Raises:
        InputError: there is no room for the subjects, or `size` is below 1 or above 10,000, beyond which names would
            no longer sort as numbers.
    """
    if not 1 <= size <= 10_000:
        raise InputError(f"A template cohort has 1 to 10,000 subjects, not {size}.")
    name = f"cohort-v{COHORT_VERSION}-seed{seed}-{'x'.join(map(str, shape))}"
    files = _files(cache_folder() / name, size)
    missing = [index for index, file in enumerate(files) if not _holds_subject(file, shape)]
    if missing:
        if not _is_writable(files[0].parent):
            files, missing = _files(_temporary_folder(), size), list(range(size))
        tissue_maps(shape)  # before several threads ask for them at once and each makes its own

        def make(index: int) -> None:
            subject = cohort_subject(index, seed=seed, shape=shape)
            try:
                write_atomically(files[index], lambda stream: np.save(stream, subject))
            except OSError as error:
                raise InputError(
                    f"The template cohort cannot be kept in {files[index].parent} ({error.strerror}): "
                    "make room, or set DECOVAE_CACHE to another folder."
                ) from error

        accepted(for_all(make, missing, description="Making the template cohort"))
    records = accepted(for_all(_record, list(enumerate(files)), description="Measuring the template cohort"))
    return CohortVolumes(records, files)


def _files(folder: Path, size: int) -> list[Path]:
    return [folder / f"{_name(index)}.npy" for index in range(size)]


def _name(index: int) -> str:
    return f"sub-{index:04d}"


def _record(item: tuple[int, Path]) -> VolumeRecord:
    index, file = item
    shape, low, high, affine, foreground = measured(file, _measure)
    return VolumeRecord(_name(index), f"template:{index}", shape, low, high, affine, foreground=foreground)


def _measure(file: Path) -> Measurement:
    volume = np.load(file, mmap_mode="r")
    depth, height, width = volume.shape
    shape = depth, height, width
    low, high = intensity_range(volume)
    affine = affine_rows(cohort_affine(shape))
    return Measurement(shape, low, high, affine, foreground_places(volume, low=low, high=high))


def _holds_subject(file: Path, shape: Shape) -> bool:
    try:
        kept = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return bool(kept.shape == shape and kept.dtype == np.float32)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="decovae-"))
    # Not a TemporaryDirectory: that would delete the files when a forked worker drops its copy of the object.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder

"""How well an autoencoder reconstructs whole volumes: per volume, and as a set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decovae.data.frame import Frame
from decovae.errors import RunError
from decovae.evaluation.slice_sets import SliceSet, SliceStatistics
from decovae.evaluation.slices import Features
from decovae.evaluation.tools import Loaded, Tissue, Tools, added, load, share, tissue_of
from decovae.evaluation.volume_sets import RealVolumes
from decovae.files import write_atomically
from decovae.generation.volumes_out import nifti_bytes
from decovae.losses.perceptual import PerceptualLoss
from decovae.metrics.reconstruction import lpips, psnr, ssim_and_ms_ssim
from decovae.models.autoencoder import Autoencoder

MEASURES = ("psnr", "ssim", "ms_ssim", "lpips")


@dataclass(frozen=True)
class Reconstructor:
    """An autoencoder on the device, in evaluation mode, the arithmetic it works in, and LPIPS's network or None."""

    autoencoder: Autoencoder
    bf16: bool
    perceptual: PerceptualLoss | None

    @torch.no_grad()
    def reconstruct(self, volume: Tensor) -> Tensor:
        """The decoded latent mean of a volume (1, D, H, W) on the device, float32, not clipped."""
        with torch.autocast(volume.device.type, torch.bfloat16, enabled=self.bf16):
            mean, _ = self.autoencoder.encode(volume[None])
            return self.autoencoder.decode(mean)[0].float()

    @torch.no_grad()
    def measure(self, reconstruction: Tensor, volume: Tensor) -> dict[str, float | None]:
        """`MEASURES` of a pair (1, D, H, W) on the device."""
        ssim, ms_ssim = ssim_and_ms_ssim(reconstruction, volume)
        return {
            "psnr": psnr(reconstruction, volume),
            "ssim": ssim,
            "ms_ssim": ms_ssim,
            "lpips": None if self.perceptual is None else lpips(reconstruction, volume, self.perceptual),
        }


class Row(NamedTuple):
    """Of a volume: `MEASURES`, tissue of the original and of the reconstruction, and seconds by part."""

    measures: dict[str, float | None]
    real: Tissue
    reconstructed: Tissue
    seconds: dict[str, float]


class Reconstructions(NamedTuple):
    """Rows in order, and the slices of both sets."""

    rows: list[Row]
    real: SliceSet
    reconstructed: SliceSet
    seconds: dict[str, float]


class _Computed(NamedTuple):
    loaded: Loaded
    original: Tensor
    reconstruction: Tensor
    features: tuple[Features, Features]
    measures: dict[str, float | None]


def measure_reconstructions(
    volumes: RealVolumes, reconstructor: Reconstructor, tools: Tools, *, keep: Callable[[int, Tensor, Tensor], None]
) -> Reconstructions:
    """Reconstruct and measure volumes, on all processes, which get the same.

    Args:
        volumes: at least one.
        reconstructor: what is measured.
        tools: what to measure with.
        keep: gets each place with its original and reconstruction, (1, D, H, W) on the CPU, clipped to [0, 1]; called
            in any thread, on the process that made them.

    Raises:
        InputError: a volume cannot be read.
        RunError: a reconstruction is not finite; names the subject.
    """
    runtime, count = tools.runtime, len(volumes.names)
    real, reconstructed = (SliceStatistics(tools.slicing, tools.grid, count, runtime, subset=0) for _ in range(2))

    def compute(place: int, loaded: Loaded) -> _Computed:
        with loaded.watch.time("reconstruct", on=runtime.device):
            volume = loaded.volume.to(runtime.device)
            reconstruction = reconstructor.reconstruct(volume)
            if not torch.isfinite(reconstruction).all():
                raise RunError(
                    f"The reconstruction of {volumes.names[place]} is not finite; try --precision fp32, or train again."
                )
        with loaded.watch.time("measure", on=runtime.device):
            volume, reconstruction = volume.clamp(0, 1), reconstruction.clamp(0, 1)
            measures = reconstructor.measure(reconstruction, volume)
        with loaded.watch.time("features", on=runtime.device):
            features = tools.slicing.measure(volume, known=loaded.known), tools.slicing.measure(reconstruction)
        return _Computed(loaded, volume.cpu(), reconstruction.cpu(), features, measures)

    def finish(place: int, computed: _Computed) -> tuple[tuple[Features, Features], Row]:
        _, digest, known, watch = computed.loaded
        with watch.time("features"):
            tools.slicing.remember(digest, computed.features[0], known=known)
        with watch.time("tissue"):
            frame = volumes.frame(place)
            before = tissue_of(computed.original, frame, digest=digest if tools.slicing.cache else None)
            after = tissue_of(computed.reconstruction, frame, digest=None)
        keep(place, computed.original, computed.reconstruction)
        return computed.features, Row(computed.measures, before, after, watch.seconds)

    def take(place: int, features: tuple[Features, Features]) -> None:
        real.add(place, features[0])
        reconstructed.add(place, features[1])

    rows = share(
        tools,
        count,
        title="Reconstructing",
        load=lambda place: load(volumes, place, tools),
        compute=compute,
        finish=finish,
        take=take,
    )
    return Reconstructions(rows, real.collect(), reconstructed.collect(), added(rows))


def keep_pair(folder: Path, place: int, frame: Frame, subject: str, original: Tensor, reconstruction: Tensor) -> None:
    """Write ``original-<place>.nii.gz`` and ``reconstruction-<place>.nii.gz``; each header says which it is.

    Args:
        folder: is made where there is none.
        place: of the volume in its set.
        frame: of the voxels.
        subject: whose brain it is.
        original, reconstruction: (1, D, H, W), on the CPU, clipped to [0, 1].

    Raises:
        OSError: a file cannot be written.
    """
    for kind, image in (("original", original), ("reconstruction", reconstruction)):
        content = nifti_bytes(image[0].numpy(), frame, label=f"of {subject}", kind=kind)
        write_atomically(folder / kept_name(kind, place), lambda file, content=content: file.write(content))  # type: ignore[misc]


def kept_name(kind: str, place: int) -> str:
    """Of a kept volume's file."""
    return f"{kind}-{place}.nii.gz"


def kept_entries(volumes: RealVolumes, rows: Sequence[Row], number: int) -> list[dict[str, Any]]:
    """What `evaluation.json` says of the kept volumes."""
    return [
        {
            "subject": volumes.names[place],
            "original": kept_name("original", place),
            "reconstruction": kept_name("reconstruction", place),
            "psnr": rows[place].measures["psnr"],
        }
        for place in range(min(number, len(rows)))
    ]

"""The volumes of a run: opened, split, cut into patches, and reconstructed for validation."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from decovae.data.cohort import open_cohort
from decovae.data.nifti import open_nifti
from decovae.data.patches import PatchDataset, load_volume, split_subjects
from decovae.data.volumes import Volumes
from decovae.files import writing
from decovae.losses.moments import ChannelMoments
from decovae.losses.perceptual import PerceptualLoss
from decovae.metrics.latents import analyze_latents
from decovae.metrics.reconstruction import lpips, psnr, ssim
from decovae.runtime import Runtime
from decovae.training.config import AdversarialConfig, DataConfig
from decovae.training.interruption import REQUESTS
from decovae.training.previews import save_preview
from decovae.training.sampling import Batches
from decovae.training.stage import Batch

COHORT = "template cohort (simulated from the MNI-152 template; no subject is real)"

Reconstruct = Callable[[Tensor], tuple[Tensor, ChannelMoments]]
"""From a volume, (1, 1, D, H, W), to its reconstruction and its latent's moments."""


def describe(data: DataConfig) -> str:
    """What the volumes are, for whoever reads a result: their folder's name, for its path is nobody else's business."""
    return COHORT if data.root is None else data.root.name


def open_volumes(data: DataConfig) -> Volumes:
    """The volumes that ``--data.root`` names, or the template cohort, all of them checked.

    Raises:
        InputError: if there are none, or one cannot be used.
    """
    if data.root is None:
        return open_cohort(data.cohort_size, seed=data.seed, shape=data.cohort_shape)
    return open_nifti(data.root, patch=data.patch)


def split(volumes: Volumes, data: DataConfig) -> tuple[list[int], list[int]]:
    """Indices of the training and of the validation volumes.

    Raises:
        InputError: if no subject would be left for training.
    """
    subjects = len({record.subject for record in volumes.records})
    held_out = min(data.validation_limit, max(1, round(data.validation_fraction * subjects)))
    return split_subjects(volumes.records, validation=held_out, seed=data.seed)


class Patches:
    """Training patches and validation volumes of an autoencoder's run.

    Raises:
        InputError: if the volumes cannot be had.
    """

    def __init__(self, config: AdversarialConfig, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.volumes = open_volumes(config.data)
        self.training, self.validation = split(self.volumes, config.data)

    def batches(self, position: int, *, steps: int) -> Iterable[Batch]:
        """This process's patches, from a position in the order of samples on."""
        data = self.config.data
        dataset = PatchDataset(
            self.volumes,
            self.training,
            grid=data.grid,
            patch=data.patch,
            seed=self.config.seed,
            augmentation=data.augmentation if data.augment else None,
        )
        order = Batches(
            position,
            count=steps * self.config.optimizer.accumulation,
            size=data.batch_size,
            rank=self.runtime.rank,
            world=self.runtime.world,
        )
        return DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=data.workers,
            pin_memory=self.runtime.device.type == "cuda",
            worker_init_fn=leave_signals_to_the_parent,
        )

    def validate(
        self,
        reconstruct: Reconstruct,
        *,
        step: int,
        folder: Path,
        autocast: AbstractContextManager[Any],
        perceptual: PerceptualLoss | None,
    ) -> dict[str, Any]:
        """Quality of the reconstructed validation volumes, and the latent's use of its channels."""
        world, rank = self.runtime.world, self.runtime.rank
        rounds = -(-len(self.validation) // world)
        figures: list[dict[str, float]] = []
        moments: list[ChannelMoments] = []
        pictured: tuple[Tensor, Tensor, str] | None = None
        for turn in range(rounds):
            # Sharded weights are gathered by all processes together: one without a volume repeats the last.
            place = turn * world + rank
            index = self.validation[min(place, len(self.validation) - 1)]
            volume = load_volume(self.volumes, index, self.config.data.grid)[None].to(self.runtime.device)
            with autocast:
                reconstruction, latent = reconstruct(volume)
            if place >= len(self.validation):
                continue
            # On the CPU: what another process gathers would come back on this process's device.
            moments.append(latent.cpu())
            figures.append(_quality(reconstruction, volume, perceptual))
            if place == 0:
                subject = self.volumes.records[index].subject
                title = f"{subject}, step {step}: PSNR {figures[-1]['psnr']:.2f} dB, SSIM {figures[-1]['ssim']:.3f}"
                pictured = volume[0].cpu(), reconstruction[0].cpu(), title

        def save() -> None:
            assert pictured is not None  # the first volume is the main process's
            original, rebuilt, title = pictured
            with writing(folder):
                save_preview(original, rebuilt, folder / "previews" / f"step-{step:08d}.png", title=title)

        self.runtime.on_main(save)
        gathered = list(chain.from_iterable(self.runtime.gather(figures)))
        analysis = analyze_latents(reduce(ChannelMoments.merge, chain.from_iterable(self.runtime.gather(moments))))
        return {
            **{name: sum(f[name] for f in gathered) / len(gathered) for name in gathered[0]},
            "cosine_similarity": analysis.cosine_similarity,
            "pearson": analysis.pearson,
            "effective_rank": analysis.effective_rank,
            "explained_variance": analysis.explained_variance.tolist(),
        }


def _quality(reconstruction: Tensor, volume: Tensor, perceptual: PerceptualLoss | None) -> dict[str, float]:
    figures = {"psnr": psnr(reconstruction, volume), "ssim": ssim(reconstruction, volume)}
    if perceptual is not None and perceptual.calibrated:
        figures["lpips"] = lpips(reconstruction, volume, perceptual)
    return figures


def leave_signals_to_the_parent(_: int) -> None:
    """Ctrl-C and schedulers reach loader processes too: the training process ends them when it is done."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)

"""Stage 1: the autoencoder with decorrelated latent channels, against its discriminators."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from decovae.data.cohort import open_cohort
from decovae.data.nifti import open_nifti
from decovae.data.patches import PatchDataset, load_volume, split_subjects
from decovae.data.volumes import Volumes
from decovae.losses.moments import ChannelMoments
from decovae.losses.objective import Loss, VAEObjective
from decovae.metrics.latents import analyze_latents
from decovae.metrics.reconstruction import lpips, psnr, ssim
from decovae.models.autoencoder import Autoencoder
from decovae.models.weights import save_autoencoder
from decovae.runtime import Runtime
from decovae.training.config import VAEConfig
from decovae.training.parallel import frozen, prepare_module
from decovae.training.previews import save_preview
from decovae.training.sampling import Batches
from decovae.training.stage import Batch


class VAENetworks:
    """The networks that train together, and their losses on a batch.

    Args:
        config: the run's.
        runtime: where they are.
        objective: the autoencoder's loss.
    """

    def __init__(self, config: VAEConfig, runtime: Runtime, objective: VAEObjective) -> None:
        self.config = config
        self.runtime = runtime
        self.objective = runtime.place(objective)
        self.networks: dict[str, nn.Module] = {}
        self.learning_rates = {"autoencoder": config.optimizer.learning_rate}
        compiled = config.compile == "on" or (config.compile == "auto" and runtime.device.type == "cuda")
        torch.manual_seed(config.seed)
        self.autoencoder = Autoencoder(config.model, memory=None if config.memory == "none" else config.memory)
        self.autoencoder.start_latent(log_variance=config.initial_log_variance, orthogonal=config.initial_orthogonal)
        if self.objective.decorrelation is not None:
            self.autoencoder.latent_head.group = runtime.group
        prepare_module(self.autoencoder, runtime, compiled=compiled)
        self.networks["autoencoder"] = self.autoencoder
        self.discriminators: nn.Module | None = None
        if config.loss.adversarial:
            from decovae.models.discriminators import Discriminators

            self.discriminators = Discriminators(
                volume=config.loss.adversarial_volume > 0, slices=config.loss.adversarial_slices > 0
            )
            prepare_module(self.discriminators, runtime, compiled=compiled)
            self.networks["discriminators"] = self.discriminators
            self.learning_rates["discriminators"] = config.optimizer.discriminator_learning_rate

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Loss]]:
        """The autoencoder's loss, then the discriminators' on the same reconstruction."""
        image = batch["image"].to(self.runtime.device, non_blocking=True)
        with frozen(self.discriminators):
            reconstruction, latent = self.autoencoder(image)
            planes = self.objective.slices(image, reconstruction, step)
            yield (
                "autoencoder",
                self.objective.generator(
                    image,
                    reconstruction,
                    latent,
                    planes=planes,
                    discriminators=self.discriminators,
                    step=step,
                ),
            )
        if self.discriminators is not None and self.objective.adversarial_at(step):
            yield (
                "discriminators",
                self.objective.discriminator(image, reconstruction, planes=planes, discriminators=self.discriminators),
            )


class VAEStage(VAENetworks):
    """Networks, losses and validation of the autoencoder's training.

    Raises:
        InputError: if the volumes or the perceptual weights cannot be had.
    """

    def __init__(self, config: VAEConfig, runtime: Runtime) -> None:
        runtime.fill_caches(lambda: (split(open_volumes(config), config), VAEObjective(config.loss)))
        self.volumes = open_volumes(config)
        self.training, self.validation = split(self.volumes, config)
        super().__init__(config, runtime, VAEObjective(config.loss, deco=config.deco))

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

    def validate(self, step: int, folder: Path, autocast: AbstractContextManager[Any]) -> dict[str, Any]:
        """Reconstruction of whole validation volumes from μ, and the latent's use of its channels."""
        world, rank = self.runtime.world, self.runtime.rank
        rounds = -(-len(self.validation) // world)
        figures: list[dict[str, float]] = []
        moments: list[ChannelMoments] = []
        for turn in range(rounds):
            # Sharded weights are gathered by all processes together: one without a volume repeats the last.
            place = turn * world + rank
            index = self.validation[min(place, len(self.validation) - 1)]
            volume = load_volume(self.volumes, index, self.config.data.grid)[None].to(self.runtime.device)
            with autocast:
                reconstruction, latent = self.autoencoder(volume, sample=False)
            if place >= len(self.validation):
                continue
            # On the CPU: what another process gathers would come back on this process's device.
            moments.append(latent.moments.cpu())
            figures.append(self._quality(reconstruction, volume))
            if place == 0:
                subject = self.volumes.records[index].subject
                title = f"{subject}, step {step}: PSNR {figures[-1]['psnr']:.2f} dB, SSIM {figures[-1]['ssim']:.3f}"
                picture = folder / "previews" / f"step-{step:08d}.png"
                save_preview(volume[0], reconstruction[0], picture, title=title)
        gathered = list(chain.from_iterable(self.runtime.gather(figures)))
        analysis = analyze_latents(reduce(ChannelMoments.merge, chain.from_iterable(self.runtime.gather(moments))))
        return {
            **{name: sum(f[name] for f in gathered) / len(gathered) for name in gathered[0]},
            "cosine_similarity": analysis.cosine_similarity,
            "pearson": analysis.pearson,
            "effective_rank": analysis.effective_rank,
            "explained_variance": analysis.explained_variance.tolist(),
        }

    def _quality(self, reconstruction: Tensor, volume: Tensor) -> dict[str, float]:
        figures = {"psnr": psnr(reconstruction, volume), "ssim": ssim(reconstruction, volume)}
        if self.objective.perceptual is not None and self.objective.perceptual.calibrated:
            figures["lpips"] = lpips(reconstruction, volume, self.objective.perceptual)
        return figures

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """``autoencoder.safetensors``."""
        save_autoencoder(weights, self.config.model, folder / "autoencoder.safetensors")


def open_volumes(config: VAEConfig) -> Volumes:
    """The volumes that ``--data.root`` names, or the template cohort, all of them checked."""
    data = config.data
    if data.root is None:
        return open_cohort(data.cohort_size, seed=data.seed, shape=data.cohort_shape)
    return open_nifti(data.root, patch=data.patch)


def split(volumes: Volumes, config: VAEConfig) -> tuple[list[int], list[int]]:
    """Indices of the training and of the validation volumes."""
    data = config.data
    subjects = len({record.subject for record in volumes.records})
    held_out = min(data.validation_limit, max(1, round(data.validation_fraction * subjects)))
    return split_subjects(volumes.records, validation=held_out, seed=data.seed)


def leave_signals_to_the_parent(_: int) -> None:
    """Ctrl-C and schedulers reach loader processes too: the training process ends them when it is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

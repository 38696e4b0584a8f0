"""The patches that an autoencoder is trained on, and the volumes that it is validated on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from decovae.data.augmentation import Augmentation
from decovae.data.loading import patch_loader
from decovae.data.patches import PatchDataset, load_volume
from decovae.data.splits import key_of, ranked_subjects
from decovae.files import writing
from decovae.losses.moments import ChannelMoments
from decovae.losses.perceptual import PerceptualLoss
from decovae.metrics.latents import analyze_latents
from decovae.metrics.reconstruction import lpips, psnr, ssim
from decovae.runtime import Runtime
from decovae.training.config import AdversarialConfig
from decovae.training.interruption import leave_signals_to_the_parent
from decovae.training.previews import save_preview
from decovae.training.sampling import Batches
from decovae.training.stage import Batch
from decovae.training.volumes import inputs_of, open_volumes, remarks, split

Reconstruct = Callable[[Tensor], tuple[Tensor, ChannelMoments]]
"""From a volume, (1, 1, D, H, W), to its reconstruction and its latent's moments."""


class Patches:
    """Training patches and validation volumes of an autoencoder's run.

    Attributes:
        volumes: all of them.
        training: indices of those that patches are cut from.
        validation: indices of those that validations reconstruct: of at most ``--data.validation-limit`` subjects.
        notes: what a person might not expect of them.
        inputs: a hash of the volumes, where there is one; see `Stage`.

    Raises:
        InputError: if the volumes cannot be had, or no augmentation can be as asked for.
    """

    def __init__(self, config: AdversarialConfig, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.augmentation = Augmentation(config.data.augmentation, config.data.patch) if config.data.augment else None
        self.volumes = open_volumes(config.data)
        self.training, held_out = split(self.volumes, config.data)
        whose = [self.volumes.records[index].subject for index in held_out]
        ranked = ranked_subjects(whose, seed=config.data.seed)
        looked_at = set(ranked[: config.data.validation_limit])
        self.validation = [index for index, name in zip(held_out, whose, strict=True) if key_of(name) in looked_at]
        self.inputs = inputs_of(self.volumes)
        self.notes = remarks(self.volumes, config.data)
        if others := len(ranked) - len(looked_at):
            self.notes.append(
                f"note: {others} more subjects are for validation than --data.validation-limit "
                f"{config.data.validation_limit} lets validations reconstruct."
            )
        if config.data.foreground:
            unknown = sum(not self.volumes.records[index].foreground for index in self.training)
            if unknown:
                self.notes.append(
                    f"note: of {unknown} training volumes no place in the brain is known: their patches may lie "
                    f"anywhere, whatever --data.foreground {config.data.foreground:g} asks for."
                )

    def batches(self, position: int, *, steps: int) -> Iterable[Batch]:
        """This process's patches, from a position in the order of samples on."""
        data = self.config.data
        dataset = PatchDataset(
            self.volumes,
            self.training,
            grid=data.grid,
            patch=data.patch,
            seed=self.config.seed,
            foreground=data.foreground,
        )
        order = Batches(
            position,
            count=steps * self.config.optimizer.accumulation,
            size=data.batch_size,
            rank=self.runtime.rank,
            world=self.runtime.world,
        )
        return patch_loader(
            dataset,
            order,
            augmentation=self.augmentation,
            workers=data.workers,
            prefetch=data.prefetch,
            device=self.runtime.device,
            at_start=leave_signals_to_the_parent,
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

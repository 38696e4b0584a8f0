"""Stage 1: the autoencoder with decorrelated latent channels, against its discriminators."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from decovae.data import streams
from decovae.generation.flow_file import sha256
from decovae.losses.latent_head import Latent
from decovae.losses.moments import ChannelMoments
from decovae.losses.objective import VAEObjective
from decovae.models.autoencoder import Autoencoder
from decovae.models.weights import WEIGHTS_FILE, load_initial, save_autoencoder, weights_file
from decovae.runtime import Runtime
from decovae.training.adversarial import AdversarialNetworks
from decovae.training.checkpoints import Best
from decovae.training.config import VAEConfig
from decovae.training.parallel import prepare_module
from decovae.training.patches import Patches
from decovae.training.stage import Batch
from decovae.training.summary import reconstruction_summary
from decovae.training.volumes import announce


class VAENetworks(AdversarialNetworks):
    """The networks that train together, and their losses on a batch.

    Args:
        config: the run's.
        runtime: where they are.
        objective: the autoencoder's loss.
    """

    def __init__(self, config: VAEConfig, runtime: Runtime, objective: VAEObjective) -> None:
        self.config = config
        super().__init__(config, runtime, objective, name="autoencoder")

    def build(self) -> nn.Module:
        """The autoencoder."""
        config = self.config
        self.autoencoder = Autoencoder(config.model, memory=None if config.memory == "none" else config.memory)
        if config.init is None:
            self.autoencoder.start_latent(
                log_variance=config.initial_log_variance, orthogonal=config.initial_orthogonal
            )
        else:
            load_initial(self.autoencoder, config.init)
        if self.objective.decorrelation is not None:
            self.autoencoder.latent_head.group = self.runtime.group
        prepare_module(self.autoencoder, self.runtime, config)
        return self.autoencoder

    def reconstruct(self, image: Tensor, *, first: int = 0) -> tuple[Tensor, Latent | None]:
        """From a draw of the posterior."""
        seed = streams.stream_seed(self.config.seed, streams.POSTERIOR)
        reconstruction, latent = self.autoencoder(image, sample=True, seed=seed, first=first)
        return reconstruction, latent


class VAEStage(VAENetworks):
    """Networks, losses and validation of the autoencoder's training.

    Raises:
        InputError: if the volumes or the perceptual weights cannot be had.
    """

    best = Best("psnr", higher=True)

    def __init__(self, config: VAEConfig, runtime: Runtime) -> None:
        runtime.fill_caches(lambda: (Patches(config, runtime), VAEObjective(config.loss)))
        self.patches = Patches(config, runtime)
        announce(self.patches.notes, runtime)
        initial = {} if config.init is None else {"init": sha256(weights_file(config.init))}
        self.inputs = {**self.patches.inputs, **initial}
        super().__init__(config, runtime, VAEObjective(config.loss, deco=config.deco))

    def begin(self, folder: Path) -> None:
        """Nothing has to be there before training."""

    def batches(self, position: int, *, steps: int) -> Iterable[Batch]:
        """This process's patches, from a position in the order of samples on."""
        return self.patches.batches(position, steps=steps)

    def validate(self, step: int, folder: Path, autocast: AbstractContextManager[Any]) -> dict[str, Any]:
        """Reconstruction of whole validation volumes from μ, and the latent's use of its channels."""

        def reconstruct(volume: Tensor) -> tuple[Tensor, ChannelMoments]:
            reconstruction, latent = self.autoencoder(volume, sample=False)
            return reconstruction, latent.moments

        return self.patches.validate(
            reconstruct, step=step, folder=folder, autocast=autocast, perceptual=self.objective.perceptual
        )

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """``autoencoder.safetensors``."""
        save_autoencoder(weights, self.config.model, folder / WEIGHTS_FILE)

    def summary(self, validations: list[dict[str, Any]]) -> dict[str, Any]:
        """The last validation, and what was trained."""
        return {**reconstruction_summary(self.config, validations), "deco": self.config.deco}

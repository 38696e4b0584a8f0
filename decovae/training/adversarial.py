"""What the autoencoder's training and its decoder's have in common: a reconstruction judged against discriminators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from decovae.data import streams
from decovae.losses.latent_head import Latent
from decovae.losses.objective import Loss, VAEObjective
from decovae.runtime import Runtime
from decovae.training.config import AdversarialConfig
from decovae.training.noise import positions_of
from decovae.training.parallel import frozen, prepare_module
from decovae.training.stage import Batch


class AdversarialNetworks(ABC):
    """A network that reconstructs, its discriminators, and their losses on a batch.

    Args:
        config: the run's.
        runtime: where they are.
        objective: the reconstructing network's loss.
        name: of that network.
    """

    def __init__(self, config: AdversarialConfig, runtime: Runtime, objective: VAEObjective, *, name: str) -> None:
        self.runtime = runtime
        self.slice_seed = streams.stream_seed(config.seed, streams.SLICES)
        self.objective = runtime.place(objective)
        torch.manual_seed(config.seed)
        self.name = name
        self.networks: dict[str, nn.Module] = {name: self.build()}
        self.learning_rates = {name: config.optimizer.learning_rate}
        self.discriminators: nn.Module | None = None
        if config.loss.adversarial:
            from decovae.models.discriminators import Discriminators

            self.discriminators = Discriminators(
                volume=config.loss.adversarial_volume > 0, slices=config.loss.adversarial_slices > 0
            )
            prepare_module(self.discriminators, runtime, config)
            self.networks["discriminators"] = self.discriminators
            self.learning_rates["discriminators"] = config.optimizer.discriminator_learning_rate

    @abstractmethod
    def build(self) -> nn.Module:
        """The network that is trained and exported, on its device; called once."""

    @abstractmethod
    def reconstruct(self, image: Tensor, *, first: int = 0) -> tuple[Tensor, Latent | None]:
        """Reconstruction of a training batch (N, 1, D, H, W), and its latent where the objective asks for it.

        ``first`` is the position of its first sample, by which noise is drawn.
        """

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Loss]]:
        """The reconstructing network's loss, then the discriminators' on the same reconstruction."""
        image = batch["image"].to(self.runtime.device, non_blocking=True)
        positions = positions_of(batch, len(image))
        with frozen(self.discriminators):
            reconstruction, latent = self.reconstruct(image, first=positions[0])
            planes = self.objective.slices(image, reconstruction, step, seed=self.slice_seed, positions=positions)
            yield (
                self.name,
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

"""The VAE's training objective (Eq. 1 and 7) and that of its discriminators, term by term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from decovae.losses.adversarial import discriminator_loss, generator_loss
from decovae.losses.decorrelation import CovarianceLoss, SIDLoss, VADLoss
from decovae.losses.latent_head import Latent
from decovae.losses.perceptual import NONE, PRETRAINED, RANDOM, PerceptualLoss
from decovae.losses.slices import random_slices

Decorrelation = Literal["none", "cov", "sid", "vad"]

PAPER_WEIGHT: dict[Decorrelation, float] = {"none": 0.0, "cov": 1.0, "sid": 10.0, "vad": 1.0}
"""λ_DeCo of the paper's runs."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the objective's terms; 0 turns a term off, and with it everything computed only for it."""

    l1: float = 1.0
    """Weight of the mean absolute error."""
    kl: float = 5e-4
    """Weight of the KL divergence from N(0, I), a mean over latent elements."""
    deco: float | None = None
    """Weight of the decorrelation loss; None is the paper's: 10 for sid, 1 for vad and cov."""
    gamma: float = 1.0
    """Standard deviation to which vad anchors every channel (γ of Eq. 5)."""
    perceptual: float = 0.3
    """Weight of the perceptual distance."""
    perceptual_network: str = PRETRAINED
    """Features behind it: pretrained, random (frozen random features), none, or a weights file's path."""
    slice_fraction: float = 0.2
    """Share of each patch's slices, plane by plane, that the perceptual loss and the 2D discriminator see in a step;
    at least one of each plane."""
    adversarial_slices: float = 0.1
    """Weight of the adversarial loss from the 2D PatchGAN on slices."""
    adversarial_volume: float = 0.1
    """Weight of the adversarial loss from the 3D PatchGAN on patches."""
    adversarial_warmup: int = 0
    """Steps before the adversarial terms begin; until then the discriminators are neither run nor trained."""
    discriminator: float = 0.5
    """Weight of the discriminators' own loss."""

    @property
    def adversarial(self) -> bool:
        """Whether there is any discriminator."""
        return self.adversarial_slices > 0 or self.adversarial_volume > 0

    @property
    def perceives(self) -> bool:
        """Whether there is a perceptual term."""
        return self.perceptual > 0 and self.perceptual_network != NONE


@dataclass(frozen=True)
class Loss:
    """A loss to minimise and the unweighted terms behind it, detached, for the log."""

    total: Tensor
    terms: dict[str, Tensor]


class VAEObjective(nn.Module):
    """L1 + λ_KL·KL + λ_perc·perceptual + λ_adv·(adversarial 2D + adversarial 3D) + λ_DeCo·DeCo.

    Args:
        config: weights.
        deco: which decorrelation loss acts on the latent mean.
        load: False leaves the perceptual features random, for who asks only what they would cost.

    Raises:
        InputError: if the perceptual weights cannot be had.
    """

    def __init__(self, config: LossConfig, *, deco: Decorrelation = "vad", load: bool = True) -> None:
        super().__init__()
        self.config = config
        self.deco_weight = PAPER_WEIGHT[deco] if config.deco is None else config.deco
        self.decorrelation: nn.Module | None = None
        if deco != "none" and self.deco_weight > 0:
            self.decorrelation = _decorrelation_loss(deco, config.gamma)
        self.perceptual: PerceptualLoss | None = None
        if config.perceives:
            self.perceptual = PerceptualLoss(config.perceptual_network, load=load)
        self.perceptual_name = "perceptual_random" if config.perceptual_network == RANDOM else "perceptual"

    def adversarial_at(self, step: int) -> bool:
        """Whether the discriminators take part in this step."""
        return self.config.adversarial and step >= self.config.adversarial_warmup

    def slices(
        self,
        image: Tensor,
        reconstruction: Tensor,
        step: int,
        *,
        seed: int,
        positions: Sequence[int] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Paired random slices of the three planes, or none if no term looks at slices.

        ``seed`` and ``positions`` are what :func:`random_slices` draws by.
        """
        looked_at = self.config.adversarial_slices > 0 and self.adversarial_at(step)
        if self.perceptual is None and not looked_at:
            return []
        planes = random_slices(self.config.slice_fraction, image, reconstruction, seed=seed, positions=positions)
        return [(plane[0], plane[1]) for plane in planes]

    def generator(
        self,
        image: Tensor,
        reconstruction: Tensor,
        latent: Latent | None,
        *,
        planes: list[tuple[Tensor, Tensor]],
        discriminators: nn.Module | None,
        step: int,
    ) -> Loss:
        """The autoencoder's loss.

        Args:
            image: (N, 1, D, H, W), intensities mostly in [0, 1].
            reconstruction: like ``image``.
            latent: what the autoencoder's latent head returned for ``image``; None where neither KL nor decorrelation
                asks for it.
            planes: what :meth:`slices` returned for this step.
            discriminators: frozen by the caller, so that this loss leaves no gradient in them.
            step: 0-based training step.

        Raises:
            ValueError: if no term has a weight, or one asks for a latent that is not given.
        """
        config = self.config
        if latent is None and (config.kl > 0 or self.decorrelation is not None):
            raise ValueError("the KL and decorrelation terms need a latent: give it, or set their weights to 0")
        weighted: dict[str, tuple[float, Tensor]] = {}
        if config.l1 > 0:
            weighted["l1"] = config.l1, (reconstruction.float() - image.float()).abs().mean()
        if latent is not None and config.kl > 0:
            weighted["kl"] = config.kl, latent.kl
        if latent is not None and self.decorrelation is not None:
            weighted["deco"] = self.deco_weight, self.decorrelation(latent.moments)
        if self.perceptual is not None:
            weighted[self.perceptual_name] = config.perceptual, self.perceptual(planes)
        if discriminators is not None and self.adversarial_at(step):
            on_volume, on_slices = discriminators(reconstruction, [fake for _, fake in planes])
            if on_volume:
                weighted["adversarial_volume"] = config.adversarial_volume, generator_loss(on_volume)
            if on_slices:
                weighted["adversarial_slices"] = config.adversarial_slices, generator_loss(on_slices)
        if not weighted:
            raise ValueError("every term of the objective has weight 0: there is nothing to train")
        total = torch.stack([weight * term for weight, term in weighted.values()]).sum()
        terms = {name: term.detach() for name, (_, term) in weighted.items()}
        return Loss(total, {"generator": total.detach(), **terms})

    def discriminator(
        self, image: Tensor, reconstruction: Tensor, *, planes: list[tuple[Tensor, Tensor]], discriminators: nn.Module
    ) -> Loss:
        """The discriminators' loss on the same patches and slices; nothing of it reaches the autoencoder."""
        # Instance norm looks at one sample at a time, so real and fake go through in one batch.
        on_volume, on_slices = discriminators(
            torch.cat([image, reconstruction.detach()]), [torch.cat([real, fake.detach()]) for real, fake in planes]
        )
        terms = {}
        for name, logits in (("discriminator_volume", on_volume), ("discriminator_slices", on_slices)):
            if logits:
                real, fake = zip(*(batch.chunk(2) for batch in logits), strict=True)
                terms[name] = discriminator_loss(real, fake)
        total = self.config.discriminator * torch.stack(list(terms.values())).sum()
        return Loss(total, {name: term.detach() for name, term in terms.items()})


def _decorrelation_loss(deco: Decorrelation, gamma: float) -> nn.Module:
    if deco == "vad":
        return VADLoss(gamma=gamma)
    return SIDLoss() if deco == "sid" else CovarianceLoss()

"""Stage 2: the decoder alone, tuned for how reconstructions look; the encoder and with it every latent stay."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decovae.data import streams
from decovae.generation.flow_file import sha256
from decovae.losses.latent_head import Latent
from decovae.losses.moments import ChannelMoments, channel_moments
from decovae.losses.objective import VAEObjective
from decovae.models.autoencoder import Autoencoder
from decovae.models.fuse import fuse, unfuse
from decovae.models.weights import WEIGHTS_FILE, encoder_fingerprint, load_autoencoder, save_autoencoder
from decovae.runtime import Runtime
from decovae.training.adversarial import AdversarialNetworks
from decovae.training.checkpoints import Best
from decovae.training.checks import check_compression
from decovae.training.config import DecoderConfig
from decovae.training.finished import open_vae
from decovae.training.noise import normal_noise
from decovae.training.parallel import prepare_module
from decovae.training.patches import Patches
from decovae.training.stage import Batch
from decovae.training.summary import reconstruction_summary
from decovae.training.volumes import announce, check_unchanged


class DecoderHalf(nn.Module):
    """The part of an autoencoder that turns a latent into an image; it shares the autoencoder's own modules.

    Shapes as in :meth:`Autoencoder.decode`; the keys of its ``state_dict`` are the autoencoder's.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.decoder = autoencoder.decoder
        self.post_quant_conv = autoencoder.post_quant_conv

    def forward(self, latent: Tensor) -> Tensor:
        """(N, c, d, h, w) to (N, image_channels, D, H, W)."""
        image: Tensor = self.decoder(self.post_quant_conv(latent))
        return image


class DecoderNetworks(AdversarialNetworks):
    """A trained autoencoder whose encoder is frozen, its discriminators, and their losses on a batch.

    Args:
        config: the run's.
        runtime: where they are.
        objective: the decoder's loss.
        autoencoder: on the CPU; its modules are used, not copied.
    """

    def __init__(
        self, config: DecoderConfig, runtime: Runtime, objective: VAEObjective, autoencoder: Autoencoder
    ) -> None:
        self.config = config
        self.autoencoder = autoencoder
        super().__init__(config, runtime, objective, name="decoder")

    def build(self) -> nn.Module:
        """The decoder; every process has the whole encoder."""
        unfuse(self.autoencoder)
        if self.config.memory != "none":
            fuse(self.autoencoder, memory=self.config.memory, report=True)
        self.half = DecoderHalf(self.autoencoder)
        self.autoencoder.requires_grad_(False)
        self.half.requires_grad_(True)
        rest = nn.ModuleDict(
            {name: child for name, child in self.autoencoder.named_children() if not hasattr(self.half, name)}
        )
        alone = replace(self.runtime, rank=0, world=1, group=None)
        prepare_module(rest, alone, self.config)
        prepare_module(self.half, self.runtime, self.config)
        return self.half

    def reconstruct(self, image: Tensor, *, first: int = 0) -> tuple[Tensor, Latent | None]:
        """From μ + scale·σ·ε; nothing asks for the latent, which cannot change."""
        with torch.no_grad():
            mean, log_variance = self.autoencoder.encode(image)
            latent = mean
            if self.config.noise_scale:
                noise = normal_noise(mean, seed=self.config.seed, stream=streams.POSTERIOR, first=first)
                latent = mean + self.config.noise_scale * (0.5 * log_variance.float()).exp() * noise
        return self.half(latent), None


class DecoderStage(DecoderNetworks):
    """Networks, losses and validation of the decoder's fine-tuning.

    Raises:
        InputError: if the autoencoder, the volumes or the perceptual weights cannot be had, or the volumes lie where
            the autoencoder's were and are others.
    """

    best = Best("psnr", higher=True)

    def __init__(self, config: DecoderConfig, runtime: Runtime) -> None:
        source = runtime.on_main(lambda: open_vae(config.vae))
        autoencoder = load_autoencoder(source.weights)
        check_compression(config, autoencoder.config.compression)
        runtime.fill_caches(lambda: (Patches(config, runtime), VAEObjective(config.loss)))
        self.source = source
        self.patches = Patches(config, runtime)
        runtime.on_main(lambda: check_unchanged(self.patches.volumes, config.data, source))
        announce(self.patches.notes, runtime)
        self.fingerprint = encoder_fingerprint(autoencoder)
        self.inputs = {**self.patches.inputs, "autoencoder": sha256(source.weights)}
        super().__init__(config, runtime, VAEObjective(config.loss, deco="none"), autoencoder)

    def begin(self, folder: Path) -> None:
        """Nothing has to be there before training."""

    def batches(self, position: int, *, steps: int) -> Iterable[Batch]:
        """This process's patches, from a position in the order of samples on."""
        return self.patches.batches(position, steps=steps)

    def validate(self, step: int, folder: Path, autocast: AbstractContextManager[Any]) -> dict[str, Any]:
        """Reconstruction of whole validation volumes from μ; the latent's figures stay what they were."""

        def reconstruct(volume: Tensor) -> tuple[Tensor, ChannelMoments]:
            mean, _ = self.autoencoder.encode(volume)
            return self.half(mean), channel_moments(mean)

        return self.patches.validate(
            reconstruct, step=step, folder=folder, autocast=autocast, perceptual=self.objective.perceptual
        )

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """``autoencoder.safetensors``: the encoder as it was, and the tuned decoder."""
        whole = load_autoencoder(self.source.weights)
        whole.load_state_dict({**whole.state_dict(), **weights})
        save_autoencoder(whole.state_dict(), whole.config, folder / WEIGHTS_FILE)

    def summary(self, validations: list[dict[str, Any]]) -> dict[str, Any]:
        """The last validation, and what was tuned."""
        return {
            **reconstruction_summary(self.config, validations),
            "vae": str(self.source.folder),
            "encoder": self.fingerprint,
        }

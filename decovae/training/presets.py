"""The presets: `quickstart` runs on a laptop, `paper` is the paper's."""

from __future__ import annotations

from dataclasses import replace

from decovae.losses.objective import LossConfig
from decovae.models.autoencoder import AutoencoderConfig
from decovae.models.flow_unet import FlowUNetConfig
from decovae.training.config import (
    AdversarialOptimizerConfig,
    DataConfig,
    DecoderConfig,
    FlowConfig,
    LoaderConfig,
    OptimizerConfig,
    PreviewConfig,
    VAEConfig,
)

PAPER = VAEConfig(preset="paper")

QUICKSTART = VAEConfig(
    preset="quickstart",
    steps=700,
    data=DataConfig(
        grid=(64, 72, 64),
        patch=(32, 40, 32),
        cohort_size=24,
        cohort_shape=(64, 72, 64),
        validation_fraction=0.125,
        augment=False,
        workers=0,
    ),
    optimizer=AdversarialOptimizerConfig(
        learning_rate=2e-3, discriminator_learning_rate=2e-4, warmup_steps=20, ema_decay=0.98
    ),
    model=AutoencoderConfig(channels=(8, 16, 32), residual_blocks=1, groups=4),
    initial_log_variance=-6.0,
    initial_orthogonal=True,
    # In so few steps L1 has to do most of the work: random features count little, the adversaries join late.
    loss=LossConfig(
        perceptual=0.02,
        perceptual_network="random",
        slice_fraction=0.1,
        adversarial_slices=0.01,
        adversarial_volume=0.01,
        adversarial_warmup=500,
    ),
    validate_every=100,
    checkpoint_every=100,
)

VAE_PRESETS: dict[str, tuple[str, VAEConfig]] = {
    "quickstart": ("A small autoencoder on the template cohort: minutes on a laptop, no network.", QUICKSTART),
    "paper": ("The paper's run: MAISI's autoencoder, 96³ patches, 100,000 steps.", PAPER),
}

DECODER_PRESETS: dict[str, tuple[str, DecoderConfig]] = {
    "quickstart": (
        "A minute for the autoencoder of train/vae.py quickstart.",
        DecoderConfig(
            preset="quickstart",
            steps=150,
            data=QUICKSTART.data,
            optimizer=replace(QUICKSTART.optimizer, learning_rate=5e-4, ema_decay=0.95),
            # Random features know nothing of brains: their weight stays small. The adversaries join once the decoder
            # has got over the start of a new optimiser.
            loss=replace(QUICKSTART.loss, kl=0.0, perceptual=0.04, adversarial_warmup=60),
            validate_every=50,
            checkpoint_every=50,
        ),
    ),
    "paper": (
        "The paper's decoder fine-tuning: 10,000 steps, perceptual weight 60.",
        DecoderConfig(
            preset="paper",
            steps=10_000,
            optimizer=AdversarialOptimizerConfig(learning_rate=1e-5, discriminator_learning_rate=1e-5),
            loss=LossConfig(kl=0.0, perceptual=60.0, adversarial_slices=1.0, adversarial_volume=1.0, discriminator=5.0),
        ),
    ),
}

FLOW_PRESETS: dict[str, tuple[str, FlowConfig]] = {
    "quickstart": (
        "A small flow on the latents of train/vae.py quickstart: minutes on a laptop.",
        FlowConfig(
            preset="quickstart",
            steps=1_200,
            data=LoaderConfig(batch_size=4, workers=0),
            optimizer=OptimizerConfig(
                learning_rate=4e-3, schedule="polynomial", weight_decay=0.0, eps=1e-8, warmup_steps=50, ema_decay=0.99
            ),
            model=FlowUNetConfig(
                channels=(16, 32, 64), attention=(False, False, True), residual_blocks=1, head_channels=16, groups=8
            ),
            preview=PreviewConfig(every=600),
            validate_every=300,
            checkpoint_every=300,
        ),
    ),
    "paper": ("The paper's flow: 100,000 steps of batch 4 on 4×32×64×32 latents.", FlowConfig(preset="paper")),
}

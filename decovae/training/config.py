"""Typed configuration of a run: every option, its default, and the presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from decovae.data.augmentation import AugmentationConfig
from decovae.errors import InputError
from decovae.losses.objective import Decorrelation, LossConfig
from decovae.models.autoencoder import AutoencoderConfig

Switch = Literal["auto", "on", "off"]

SMALLEST_PATCH = 24
"""Voxels an axis below which the discriminators' last instance norm, or SqueezeNet, has nothing left to look at."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Volumes, and how patches are cut from them."""

    root: Path | None = None
    """Folder with .nii or .nii.gz anywhere below it, or a CSV manifest with a `path` column; none is the template
    cohort."""
    grid: tuple[int, int, int] = (128, 256, 128)
    """Voxels of a volume after resizing, in RAS axes."""
    patch: tuple[int, int, int] = (96, 96, 96)
    """Voxels of a training patch."""
    batch_size: int = 2
    """Patches a process sees at once."""
    seed: int = 0
    """Seed of the template cohort and of the split into training and validation; apart from the run's, so that runs of
    different seeds see the same data."""
    cohort_size: int = 64
    """Subjects of the template cohort."""
    cohort_shape: tuple[int, int, int] = (182, 218, 182)
    """Voxels of its volumes before resizing; by default 1 mm, as in UK Biobank."""
    validation_fraction: float = 0.1
    """Share of the subjects held out for validation, at least one."""
    validation_limit: int = 32
    """Most subjects to hold out."""
    augment: bool = True
    """Augment training patches."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """What augmentation does."""
    workers: int = 4
    """Loader processes a training process; 0 loads in the training process."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a cosine schedule to 0, for each network."""

    learning_rate: float = 1e-4
    """Learning rate of the autoencoder."""
    discriminator_learning_rate: float = 1e-4
    """Learning rate of the discriminators."""
    weight_decay: float = 1e-5
    """Decoupled weight decay."""
    eps: float = 1e-6
    """AdamW's epsilon."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its value."""
    clip_norm: float = 1.0
    """Largest gradient norm of a network; 0 leaves gradients as they are."""
    accumulation: int = 1
    """Batches whose gradients are averaged in a step."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights that is validated and exported; 0 keeps none."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every kind of training has."""

    out: Path | None = None
    """The run's folder; the same command with the same folder resumes. Default: runs/ and the preset's name."""
    steps: int = 100_000
    """Training steps."""
    seed: int = 42
    """Seed of weights, order of samples, crops, augmentation and noise."""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validate_every: int = 1_000
    """Steps between validations; there is one before the first step and one after the last."""
    checkpoint_every: int = 1_000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the networks: auto is bf16 autocast on CUDA and fp32 on the CPU; weights stay fp32."""
    compile: Switch = "auto"
    """torch.compile of the networks' blocks: auto is on with CUDA."""
    memory: Literal["balanced", "tight", "none"] = "balanced"
    """What the autoencoder's blocks keep for backward: balanced, the input and the inner features of a residual block;
    tight, its input alone, and one of its two convolutions runs again; none, what torch's own operators keep."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train: auto is CUDA where there is a GPU."""


@dataclass(frozen=True, kw_only=True)
class VAEConfig(RunConfig):
    """Training of the autoencoder."""

    preset: tyro.conf.Suppress[Literal["quickstart", "paper"]] = "paper"
    deco: Decorrelation = "vad"
    """Decorrelation loss on the latent mean: none, cov (Eq. 4), sid (Eq. 3), vad (Eq. 6)."""
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    initial_log_variance: float = 0.0
    """Bias that log σ² starts from. MAISI's 0 starts with noise as large as the signal, which costs a short run most of
    its steps to unlearn."""
    initial_orthogonal: bool = False
    """Start the channel mixing behind μ from an orthogonal matrix: MAISI's start is nearly singular for unlucky seeds,
    and a short run would not find the channel that it hides."""
    loss: LossConfig = field(default_factory=LossConfig)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.out if self.out is not None else Path("runs") / f"vae-{self.preset}-{self.deco}-seed{self.seed}"


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
    optimizer=OptimizerConfig(learning_rate=2e-3, discriminator_learning_rate=2e-4, warmup_steps=20, ema_decay=0.98),
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


def check(config: VAEConfig) -> None:
    """Refuse values that cannot be trained with.

    Raises:
        InputError: naming the option and its value.
    """
    factor = config.model.compression
    positive: dict[str, float] = {
        "--data.batch-size": config.data.batch_size,
        "--data.cohort-size": config.data.cohort_size,
        "--steps": config.steps,
        "--validate-every": config.validate_every,
        "--checkpoint-every": config.checkpoint_every,
        "--keep-checkpoints": config.keep_checkpoints,
        "--log-every": config.log_every,
        "--optimizer.accumulation": config.optimizer.accumulation,
        "--data.validation-limit": config.data.validation_limit,
        "--model.residual-blocks": config.model.residual_blocks,
        "--model.latent-channels": config.model.latent_channels,
        "--model.groups": config.model.groups,
    }
    not_negative: dict[str, float] = {
        "--seed": config.seed,
        "--data.seed": config.data.seed,
        "--data.workers": config.data.workers,
        "--optimizer.learning-rate": config.optimizer.learning_rate,
        "--optimizer.discriminator-learning-rate": config.optimizer.discriminator_learning_rate,
        "--optimizer.weight-decay": config.optimizer.weight_decay,
        "--optimizer.eps": config.optimizer.eps,
        "--optimizer.warmup-steps": config.optimizer.warmup_steps,
        "--loss.adversarial-warmup": config.loss.adversarial_warmup,
        "--optimizer.clip-norm": config.optimizer.clip_norm,
        "--loss.l1": config.loss.l1,
        "--loss.kl": config.loss.kl,
        "--loss.deco": config.loss.deco or 0,
        "--loss.perceptual": config.loss.perceptual,
        "--loss.adversarial-slices": config.loss.adversarial_slices,
        "--loss.adversarial-volume": config.loss.adversarial_volume,
        "--loss.discriminator": config.loss.discriminator,
    }
    for option, value in positive.items():
        if value < 1:
            raise InputError(f"{option} {value}: must be at least 1.")
    for option, value in not_negative.items():
        if not value >= 0:
            raise InputError(f"{option} {value}: must not be negative.")
    too_small = any(room < size for room, size in zip(config.data.cohort_shape, config.data.patch, strict=True))
    if config.data.root is None and too_small:
        raise InputError(
            f"--data.cohort-shape {_spaced(config.data.cohort_shape)}: smaller than --data.patch "
            f"{_spaced(config.data.patch)}."
        )
    for option, shape in {"--data.grid": config.data.grid, "--data.patch": config.data.patch}.items():
        if any(size < factor or size % factor for size in shape):
            raise InputError(f"{option} {_spaced(shape)}: every axis must be a positive multiple of {factor}.")
    if any(p > g for p, g in zip(config.data.patch, config.data.grid, strict=True)):
        raise InputError(
            f"--data.patch {_spaced(config.data.patch)}: does not fit --data.grid {_spaced(config.data.grid)}."
        )
    if not 0 < config.data.validation_fraction < 1:
        raise InputError(f"--data.validation-fraction {config.data.validation_fraction}: must be between 0 and 1.")
    if not 0 <= config.optimizer.ema_decay < 1:
        raise InputError(f"--optimizer.ema-decay {config.optimizer.ema_decay}: must be at least 0 and below 1.")
    if not config.loss.gamma > 0:
        raise InputError(f"--loss.gamma {config.loss.gamma}: must be above 0.")
    if not 0 < config.loss.slice_fraction <= 1:
        raise InputError(f"--loss.slice-fraction {config.loss.slice_fraction}: must be above 0 and at most 1.")
    if not config.model.channels or min(config.model.channels) < 1:
        raise InputError(f"--model.channels {_spaced(config.model.channels)}: give a positive number for each level.")
    if config.model.image_channels != 1:
        raise InputError(f"--model.image-channels {config.model.image_channels}: volumes have 1.")
    if any(width % config.model.groups for width in config.model.channels):
        raise InputError(
            f"--model.groups {config.model.groups}: must divide every one of --model.channels "
            f"{_spaced(config.model.channels)}."
        )
    if config.loss.l1 == 0 and not config.loss.perceives and not config.loss.adversarial:
        raise InputError(
            "--loss.l1 0: with the perceptual and adversarial terms off nothing asks for a reconstruction."
        )
    if min(config.data.patch) < SMALLEST_PATCH and (config.loss.adversarial or config.loss.perceives):
        raise InputError(
            f"--data.patch {_spaced(config.data.patch)}: discriminators and perceptual features need {SMALLEST_PATCH} "
            "voxels an axis; enlarge it, or set their weights (--loss.adversarial-*, --loss.perceptual) to 0."
        )


def _spaced(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values))

"""Typed configuration of a run: every option and its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from decovae.data.augmentation import AugmentationConfig
from decovae.losses.objective import Decorrelation, LossConfig
from decovae.models.autoencoder import AutoencoderConfig
from decovae.models.flow_unet import FlowUNetConfig

Switch = Literal["auto", "on", "off"]
Preset = Literal["quickstart", "paper"]
Strategy = Literal["auto", "ddp", "fsdp", "hsdp"]


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How samples reach a training process."""

    batch_size: int = 2
    """Samples a process sees at once."""
    workers: int = 4
    """Loader processes a training process; 0 loads in the training process."""
    prefetch: int = 2
    """Batches that each of them works ahead."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(LoaderConfig):
    """Volumes, and how patches are cut from them."""

    root: Path | None = None
    """A store of `decovae prepare`, a folder with .nii or .nii.gz anywhere below it, or a CSV manifest with a `path`
    column; none is the template cohort."""
    grid: tuple[int, int, int] = (128, 256, 128)
    """Voxels of a volume after resizing, in RAS axes."""
    patch: tuple[int, int, int] = (96, 96, 96)
    """Voxels of a training patch."""
    foreground: float = 0.0
    """Share of the training patches that must contain some of the brain, or of the head where the skull is left on; the
    others may lie anywhere."""
    seed: int = 0
    """Seed of the template cohort and of the split into training and validation; apart from the run's, so that runs of
    different seeds see the same data."""
    cohort_size: int = 64
    """Subjects of the template cohort."""
    cohort_shape: tuple[int, int, int] = (182, 218, 182)
    """Voxels of its volumes before resizing; by default 1 mm, as in UK Biobank."""
    validation_fraction: float = 0.1
    """Share of the subjects held out for validation, at least one. A column `split` of the volumes goes before."""
    validation_limit: int = 32
    """Most subjects to hold out, or to reconstruct at a validation where that column holds out more."""
    augment: bool = True
    """Augment training patches."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """What augmentation does."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, for each network, with a learning rate that falls to 0."""

    learning_rate: float = 1e-4
    """Learning rate of the network that is exported."""
    schedule: Literal["cosine", "polynomial"] = "cosine"
    """How it falls to 0: along half a cosine, or as the square of the share of steps that are left."""
    weight_decay: float = 1e-5
    """Decoupled weight decay; with 0 AdamW is Adam."""
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
class AdversarialOptimizerConfig(OptimizerConfig):
    """The same, with discriminators."""

    discriminator_learning_rate: float = 1e-4
    """Learning rate of the discriminators."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How several processes share a run; a run may be resumed with other values."""

    strategy: Strategy = "auto"
    """What is divided: ddp, the samples alone; fsdp, weights, gradients and moments over all processes; hsdp, the same
    over those of a node, each node with a copy. auto picks by processes and nodes, and says what and why."""
    shard: int | None = None
    """Processes that divide one copy between them with hsdp; by default those of a node."""
    timeout: float = 600.0
    """Seconds without progress after which a process that hangs is named and the run ends. The first step, which
    compiles, has two hours, validations and checkpoints half an hour if this is less."""


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """What a run tells about its speed beside its losses."""

    utilization: Switch = "auto"
    """Share of the device's measured peak that the arithmetic of a step takes (MFU), which needs seconds at the start:
    auto counts it on CUDA only."""
    profile_at: int | None = None
    """Step to begin a torch.profiler trace at, written below profile/ of the run's folder."""
    profile_steps: int = 3
    """Steps in the trace."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well; needs `pip install wandb`."""
    mlflow: str | None = None
    """Experiment of MLflow to log to as well, at MLFLOW_TRACKING_URI; needs `pip install mlflow`."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every kind of training has."""

    preset: tyro.conf.Suppress[Preset] = "paper"
    out: Path | None = None
    """The run's folder; the same command with the same folder resumes. Default: in runs/, named after what is
    trained."""
    steps: int = 100_000
    """Training steps."""
    seed: int = 42
    """Seed of weights, order of samples, crops, augmentation and noise."""
    data: LoaderConfig = field(default_factory=LoaderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validate_every: int = 1_000
    """Steps between validations; there is one before the first step and one after the last."""
    checkpoint_every: int = 1_000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    keep_best: int = 1
    """Checkpoints of the best validations to keep beside them; with any, a validation that is the best so far is
    followed by a checkpoint."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the networks: auto is bf16 autocast on CUDA and fp32 on the CPU; weights stay fp32."""
    compile: Switch = "auto"
    """torch.compile of the networks: auto is on with CUDA."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train: auto is CUDA where there is a GPU."""
    skip_limit: int = 10
    """Steps to leave out, for a loss or a gradient that is not finite, before the run stops; 0 stops at the first."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    @property
    def name(self) -> str:
        """Name of the run's folder where none is given."""
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.out if self.out is not None else Path("runs") / self.name


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig(RunConfig):
    """What the training of the autoencoder and that of its decoder alone have in common."""

    data: DataConfig = field(default_factory=DataConfig)
    optimizer: AdversarialOptimizerConfig = field(default_factory=AdversarialOptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    memory: Literal["balanced", "tight", "none"] = "balanced"
    """What the autoencoder's blocks keep for backward: balanced, the input and the inner features of a residual block;
    tight, its input alone, and one of its two convolutions runs again; none, what torch's own operators keep."""


@dataclass(frozen=True, kw_only=True)
class VAEConfig(AdversarialConfig):
    """Training of the autoencoder."""

    stage: tyro.conf.Suppress[Literal["vae"]] = "vae"
    deco: Decorrelation = "vad"
    """Decorrelation loss on the latent mean: none, cov (Eq. 4), sid (Eq. 3), vad (Eq. 6)."""
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    init: Path | None = None
    """Weights to start from instead of random ones: a run, an export, the authors' model.pt, or MAISI's weights. The
    two options below then have no effect."""
    initial_log_variance: float = 0.0
    """Bias that log σ² starts from. MAISI's 0 starts with noise as large as the signal, which costs a short run most of
    its steps to unlearn."""
    initial_orthogonal: bool = False
    """Start the channel mixing behind μ from an orthogonal matrix: MAISI's start is nearly singular for unlucky seeds,
    and a short run would not find the channel that it hides."""

    @property
    def name(self) -> str:
        """For example vae-quickstart-vad-seed42."""
        return f"vae-{self.preset}-{self.deco}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(AdversarialConfig):
    """Fine-tuning of a trained autoencoder's decoder; the encoder keeps its bits, so latents stay valid."""

    stage: tyro.conf.Suppress[Literal["decoder"]] = "decoder"
    vae: Path | None = None
    """Folder of the finished run whose decoder is tuned. Its data is used again unless --data says otherwise."""
    noise_scale: float = 1.0
    """The decoder sees μ + scale·σ·ε: 1 draws from the posterior, 0 takes its mean."""

    @property
    def name(self) -> str:
        """For example decoder-vae-quickstart-vad-seed42-seed42: the autoencoder's run, and this one's seed."""
        return f"decoder-{self.vae.name if self.vae else self.preset}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Volumes sampled while the flow trains."""

    samples: int = 2
    """Volumes to sample, from the same noise every time; 0 for none."""
    every: int = 5_000
    """Steps between them, a multiple of --validate-every; they are made after the last step in any case."""
    steps: int = 30
    """Euler steps."""


@dataclass(frozen=True, kw_only=True)
class FlowConfig(RunConfig):
    """Training of the flow from noise to latents (Eq. 2)."""

    stage: tyro.conf.Suppress[Literal["flow"]] = "flow"
    vae: Path | None = None
    """Folder of a finished autoencoder's or decoder's run. Its latents are used if they are there, else encoded
    first."""
    latents: Path | None = None
    """Folder of latents that `decovae encode` wrote; with --vae too, they must be of that run's encoder."""
    data: LoaderConfig = field(default_factory=lambda: LoaderConfig(batch_size=4, workers=2))
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(schedule="polynomial", weight_decay=0.0, eps=1e-8, ema_decay=0.999)
    )
    model: FlowUNetConfig = field(default_factory=FlowUNetConfig)
    train_on: Literal["draws", "mean"] = "draws"
    """What a latent is in training: μ + σε with a fresh ε at every visit, or μ."""
    norm: Literal["l2", "l1"] = "l2"
    """Distance of velocities: squared (Eq. 2), or absolute as in the authors' code."""
    time_scale: float = 1.4
    """Shift of training and sampling times towards noise, times that of the resolution (MONAI's timestep transform)."""
    conditions: tuple[str, ...] = ()
    """Columns of the data's manifest to generate for, for example age sex: numbers, or categories where most values are
    none; codes that look like numbers are written sex:category."""
    condition_dropout: float = 0.1
    """Share of the samples that are trained without their conditions, for guidance, and of single conditions that are
    left out of the others."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)

    @property
    def name(self) -> str:
        """For example flow-decoder-draws-seed42: the autoencoder's run, what it is trained on, and this one's seed."""
        source = self.vae or (self.latents.parent if self.latents else None)
        return f"flow-{source.name if source else self.preset}-{self.train_on}-seed{self.seed}"


TrainingConfig = VAEConfig | DecoderConfig | FlowConfig

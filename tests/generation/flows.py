"""A finished flow run with random weights, small enough to sample in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from decovae.data.frame import Frame
from decovae.data.template import cohort_affine
from decovae.data.volumes import Shape, affine_rows
from decovae.generation.flow_file import FLOW, FlowDescription, save_flow
from decovae.generation.flow_matching import TimeSchedule
from decovae.generation.latent_space import LatentSpace
from decovae.generation.sampling import Sampler
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.conditions import CategoricalCondition, Condition, ScalarCondition
from decovae.models.flow_unet import FlowUNet, FlowUNetConfig
from decovae.models.weights import WEIGHTS_FILE, encoder_fingerprint, save_autoencoder

SOURCE: Shape = (18, 22, 20)
GRID: Shape = (16, 20, 16)
LATENT: Shape = (8, 10, 8)
CHANNELS = 4

NETWORK = FlowUNetConfig(
    channels=(8, 16), attention=(False, True), residual_blocks=1, head_channels=8, groups=4, eps=1e-6
)
AUTOENCODER = AutoencoderConfig(channels=(4, 8), residual_blocks=1, groups=2, latent_channels=CHANNELS)
AGE_AND_SEX: tuple[Condition, ...] = (ScalarCondition("age", 60.0, 8.0), CategoricalCondition("sex", ("F", "M")))


def tiny_autoencoder(seed: int = 0, config: AutoencoderConfig = AUTOENCODER) -> Autoencoder:
    """With random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return Autoencoder(config).eval()


def tiny_flow(conditions: Sequence[Condition] = (), seed: int = 1) -> FlowUNet:
    """With random weights: the layers that start at zero, which would make the velocity zero, are drawn too."""
    torch.manual_seed(seed)
    flow = FlowUNet(NETWORK, CHANNELS, conditions).eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return flow


def describe(autoencoder: Autoencoder, conditions: Sequence[Condition] = ()) -> FlowDescription:
    """Of a flow on this autoencoder's latents, trained with condition dropout where there are conditions."""
    frame = Frame(SOURCE, affine_rows(cohort_affine(SOURCE)))
    space = LatentSpace(
        encoder=encoder_fingerprint(autoencoder),
        channels=CHANNELS,
        shape=LATENT,
        grid=GRID,
        frame=frame,
        mean=0.1,
        std=1.7,
        noise=0.2,
        data="random numbers",
    )
    dropout = 0.1 if conditions else 0.0
    return FlowDescription(space, NETWORK, tuple(conditions), TimeSchedule(), "mean", 100, 42, dropout)


def tiny_sampler(conditions: Sequence[Condition] = (), **options: object) -> Sampler:
    """On the CPU; its options are those of `Sampler`."""
    autoencoder = tiny_autoencoder()
    return Sampler(tiny_flow(conditions), describe(autoencoder, conditions), autoencoder, **options)  # type: ignore[arg-type]


def write_run(folder: Path, conditions: Sequence[Condition] = ()) -> Path:
    """The folder of a finished flow run."""
    autoencoder = tiny_autoencoder()
    save_flow(tiny_flow(conditions).state_dict(), describe(autoencoder, conditions), folder / FLOW)
    return write_vae(folder, autoencoder, stage="flow")


def write_vae(folder: Path, autoencoder: Autoencoder, *, stage: str = "vae") -> Path:
    """The folder of a finished run that holds an autoencoder."""
    save_autoencoder(autoencoder.state_dict(), autoencoder.config, folder / WEIGHTS_FILE)
    (folder / "config.yaml").write_text(f"stage: {stage}\n")
    (folder / "summary.json").write_text("{}\n")
    return folder

"""What ``decovae import`` does once its options are known to be usable."""

from __future__ import annotations

import json
from collections.abc import Iterator

from decovae.commands.import_flow import ImportConfig
from decovae.data.frame import Frame
from decovae.data.volumes import Shape, affine_rows, times
from decovae.errors import InputError
from decovae.files import write_text, writing
from decovae.generation.flow_file import FLOW, FlowDescription, save_flow, sha256
from decovae.generation.flow_matching import TimeSchedule
from decovae.generation.latent_space import LatentSpace
from decovae.models.autoencoder import Autoencoder
from decovae.models.maisi import MaisiFlow, UNetInputs, load_maisi_flow
from decovae.models.weights import WEIGHTS_FILE, encoder_fingerprint, load_autoencoder, save_autoencoder
from decovae.training.config import FlowConfig
from decovae.training.run_folder import create_folder


def run(config: ImportConfig) -> Iterator[str]:
    """Read both networks and write the run; a line on what it is.

    Raises:
        InputError: a file is no such network, or the two do not fit each other or the grid.
        RunError: the folder cannot be written.
    """
    autoencoder = load_autoencoder(config.autoencoder)
    inputs = UNetInputs(spacing=config.spacing, modality=config.modality, meta=config.meta)
    flow = load_maisi_flow(config.unet, inputs, head_channels=config.head_channels)
    description = _description(config, autoencoder, flow)
    out = config.out
    source = {
        "flow": str(config.unet.resolve()),
        "flow_sha256": sha256(config.unet),
        "autoencoder": str(config.autoencoder.resolve()),
        "spacing": config.spacing,
        "modality": config.modality,
        "meta": config.meta,
    }
    with writing(out):
        create_folder(out, FlowConfig(out=out, model=description.network, time_scale=config.time_scale))
        save_autoencoder(autoencoder.state_dict(), autoencoder.config, out / WEIGHTS_FILE)
        save_flow(flow.network.state_dict(), description, out / FLOW)
        # Last: what makes it a finished run.
        write_text(out / "summary.json", json.dumps({"stage": "flow", "imported": source}, indent=2) + "\n")
    latents = f"{description.space.channels}×{times(description.space.shape)}"
    yield (
        f"{out}: a flow of latents {latents}, mean {flow.mean:.4g}, std {flow.std:.4g}; decovae sample {out} -n 1 "
        f"makes a volume of {times(config.grid)} voxels."
    )


def _description(config: ImportConfig, autoencoder: Autoencoder, flow: MaisiFlow) -> FlowDescription:
    f, channels = autoencoder.config.compression, autoencoder.config.latent_channels
    if any(size % f for size in config.grid):
        raise InputError(
            f"--grid {times(config.grid)}: has to be multiples of {f}, by which the autoencoder divides it."
        )
    if flow.network.latent_channels != channels:
        raise InputError(
            f"{config.unet}: is a flow of {flow.network.latent_channels} channels, and {config.autoencoder} makes "
            f"latents of {channels}; give the autoencoder that it was trained on."
        )
    depth, height, width = (size // f for size in config.grid)
    space = LatentSpace(
        encoder=encoder_fingerprint(autoencoder),
        channels=channels,
        shape=(depth, height, width),
        grid=config.grid,
        frame=_frame(config.grid, config.spacing),
        mean=flow.mean,
        std=flow.std,
        noise=0.0,  # is not known, and no sample depends on it
        data=f"what {config.unet.name} was trained on",
    )
    return FlowDescription(
        space=space,
        network=flow.network.config,
        conditions=(),
        schedule=TimeSchedule(scale=config.time_scale),
        trained_on="draws",
        steps=0,
        seed=0,
    )


def _frame(grid: Shape, spacing: tuple[float, float, float]) -> Frame:
    """Voxels of this size around the world's origin."""
    rows = [[0.0] * 4 for _ in range(4)]
    for axis, (size, length) in enumerate(zip(grid, spacing, strict=True)):
        rows[axis][axis], rows[axis][3] = length, -length * (size - 1) / 2
    rows[3][3] = 1.0
    return Frame(grid, affine_rows(rows))

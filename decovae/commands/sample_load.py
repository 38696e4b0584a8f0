"""What ``decovae sample`` reads before it makes anything: the flow, the decoder, and the ends of a path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import decovae
from decovae.commands.sample import SampleConfig
from decovae.errors import InputError
from decovae.generation.conditioning import parse_condition_options
from decovae.generation.flow_file import FlowDescription, FlowRun, load_flow, sha256
from decovae.generation.interpolation import encoded_subject
from decovae.generation.latents import open_latents
from decovae.generation.sampling import Precision, check_decoder
from decovae.models.autoencoder import Autoencoder
from decovae.models.flow_unet import FlowUNet
from decovae.models.weights import load_autoencoder
from decovae.training.finished import open_vae
from decovae.training.run_folder import read_summary

Ends = tuple[Tensor, Tensor]
"""Of a path: two noises or two latents, each (C, d, h, w), float32."""


@dataclass(frozen=True)
class Loaded:
    """All that a command line names, read and found to go together. `subjects` holds the μ of two, or None."""

    flow: FlowUNet
    description: FlowDescription
    autoencoder: Autoencoder
    row: dict[str, str]
    subjects: Ends | None
    settings: dict[str, Any]


def decoder_of(config: SampleConfig, files: FlowRun) -> Path:
    """The weights to decode with.

    Raises:
        InputError: --decoder is no finished run of an autoencoder.
    """
    return files.autoencoder if config.decoder is None else open_vae(config.decoder, option="--decoder").weights


def latents_of(config: SampleConfig, files: FlowRun) -> Path | None:
    """The latents that hold the ends of a path: --latents, or those that the flow was trained on; None for seeds.

    Raises:
        InputError: the ends are not seeds, and there are no such latents.
    """
    if config.latents is not None or config.interpolate is None or config.between_seeds:
        return config.latents
    named = (read_summary(files.folder) or {}).get("latents")
    if named is not None and Path(named).is_dir():
        return Path(named)
    where = "the run does not name the latents it was trained on" if named is None else f"there are no latents {named}"
    raise InputError(
        f"--interpolate {' '.join(config.interpolate)}: not two seeds, and {where}; give numbers, or the folder of the "
        "subjects' latents as --latents."
    )


def load(config: SampleConfig, files: FlowRun, *, weights: Path, latents: Path | None, precision: Precision) -> Loaded:
    """Read a flow, a decoder and the subjects of a path.

    Args:
        config: the options.
        files: of the flow's run.
        weights: see `decoder_of`.
        latents: see `latents_of`.
        precision: of the networks.

    Raises:
        InputError: a file is damaged, or does not go with the flow or with an option.
        OSError: a file cannot be read.
    """
    flow, description = load_flow(files.flow)
    autoencoder = load_autoencoder(weights)
    check_decoder(autoencoder, description, str(weights))
    row = parse_condition_options(config.condition, description.conditions)
    if config.guidance != 1 and not description.condition_dropout:
        raise InputError(
            f"--guidance {config.guidance:g}: the flow was trained without condition dropout, so it never learned what "
            "guidance compares with; leave the option out, or train with --condition-dropout 0.1."
        )
    settings: dict[str, Any] = {
        "run": files.folder.resolve().name,
        "flow_sha256": sha256(files.flow),
        "decoder": weights.resolve().parent.name,
        "autoencoder_sha256": sha256(weights),
    }
    subjects = None
    if config.interpolate is None:
        settings["seed"] = config.seed
    else:
        settings |= {"between": list(config.interpolate), "frames": config.path_frames}
    if config.interpolate is not None and latents is not None:
        store = open_latents(latents)
        first, second = (encoded_subject(store, description.space, subject) for subject in config.interpolate)
        subjects = first, second
        settings["latents"] = latents.resolve().name
    solver = {"tolerance": config.solver_tolerance} if config.solver == "dopri5" else {"steps": config.solver_steps}
    settings |= {"solver": config.solver, **solver, "condition": row, "guidance": config.guidance}
    settings |= {"precision": precision, "version": decovae.__version__}
    return Loaded(flow, description, autoencoder, row, subjects, settings)

"""A flow on disk: its weights, and all that has to be known to sample from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from decovae.errors import InputError
from decovae.files import load_safetensors, save_safetensors
from decovae.generation.flow_matching import TimeSchedule
from decovae.generation.latent_space import LatentSpace
from decovae.models.conditions import Condition, condition_from_dict
from decovae.models.flow_unet import FlowUNet, FlowUNetConfig
from decovae.models.weights import WEIGHTS_FILE

FLOW = "flow.safetensors"
"""The flow's file in a run's folder, beside that of the autoencoder whose latents it makes."""

_METADATA_KEY = "flow"
_VERSION = 1


@dataclass(frozen=True)
class FlowDescription:
    """What a flow was trained on, and how its weights are to be used.

    Attributes:
        space: of the latents, with their standardisation and the place of the volumes.
        network: shape of the U-Net.
        conditions: what it can be conditioned on, in the order of its inputs.
        schedule: of the times it was trained at, and is solved at.
        trained_on: "mean", μ, or "draws", fresh μ + σ·ε at each step.
        steps: of training.
        seed: of training.
        condition_dropout: how often training left a row of conditions out, which guidance needs; files from before
            that was noted have 0.
    """

    space: LatentSpace
    network: FlowUNetConfig
    conditions: tuple[Condition, ...]
    schedule: TimeSchedule
    trained_on: Literal["mean", "draws"]
    steps: int
    seed: int
    condition_dropout: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The description in JSON's types."""
        return {
            "version": _VERSION,
            "space": self.space.as_dict(),
            "network": asdict(self.network),
            "conditions": [condition.as_dict() for condition in self.conditions],
            "schedule": asdict(self.schedule),
            "trained_on": self.trained_on,
            "steps": self.steps,
            "seed": self.seed,
            "condition_dropout": self.condition_dropout,
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> FlowDescription:
        """The description that `as_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: `entry` is no such thing, or another version's.
        """
        if entry["version"] != _VERSION or entry["trained_on"] not in ("mean", "draws"):
            raise ValueError(f"version {entry['version']}, trained on {entry['trained_on']}")
        network: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in entry["network"].items()
        }
        return cls(
            space=LatentSpace.from_dict(entry["space"]),
            network=FlowUNetConfig(**network),
            conditions=tuple(condition_from_dict(condition) for condition in entry["conditions"]),
            schedule=TimeSchedule(**entry["schedule"]),
            trained_on=entry["trained_on"],
            steps=int(entry["steps"]),
            seed=int(entry["seed"]),
            condition_dropout=float(entry.get("condition_dropout", 0.0)),
        )


def save_flow(state: Mapping[str, Tensor], description: FlowDescription, path: Path) -> None:
    """Write a flow as safetensors with its description; the file appears whole or not at all.

    Args:
        state: the `state_dict` of a `FlowUNet`.
        description: of that flow.
        path: the file, usually ``flow.safetensors``.

    Raises:
        OSError: the file cannot be written.
    """
    save_safetensors(state, {_METADATA_KEY: json.dumps(description.as_dict())}, path)


def load_flow(path: Path) -> tuple[FlowUNet, FlowDescription]:
    """The network, on the CPU and in evaluation mode, and its description.

    Args:
        path: a ``flow.safetensors``, or the folder of a run that holds one.

    Raises:
        InputError: the file is missing, unreadable or of another version, or holds no flow.
    """
    if path.is_dir():
        path = path / FLOW
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the folder of a finished run of train/flow.py.")
    state, metadata = load_safetensors(path, advice="export the flow again")
    try:
        description = FlowDescription.from_dict(json.loads(metadata[_METADATA_KEY]))
        flow = FlowUNet(description.network, description.space.channels, description.conditions)
        flow.load_state_dict(state, strict=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a flow that this version of decovae can read: {reason}.") from error
    return flow.eval(), description


@dataclass(frozen=True)
class FlowRun:
    """Files of a finished run of ``train/flow.py``."""

    folder: Path
    flow: Path
    autoencoder: Path


def open_flow_run(folder: Path) -> FlowRun:
    """The files to sample from.

    Raises:
        InputError: there is no run of a flow there, or it is not finished.
    """
    advice = "give the folder of a finished run of train/flow.py"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; {advice}.")
    run = FlowRun(folder, folder / FLOW, folder / WEIGHTS_FILE)
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: holds no run (no config.yaml); {advice}.")
    if not (folder / "summary.json").is_file():
        raise InputError(f"{folder}: is not finished (no summary.json); run the command that began it again.")
    for file in (run.flow, run.autoencoder):
        if not file.is_file():
            raise InputError(f"{folder}: is no run of a flow (no {file.name}); {advice}.")
    return run


def sha256(path: Path) -> str:
    """64 hexadecimal digits that name a file's content.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()

"""A run's ``config.yaml``: a configuration as YAML's own types, and back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from decovae.errors import InputError
from decovae.training.config import DecoderConfig, FlowConfig, RunConfig, TrainingConfig, VAEConfig

NAME = "config.yaml"

STAGES: dict[str, type[TrainingConfig]] = {"vae": VAEConfig, "decoder": DecoderConfig, "flow": FlowConfig}

RETIRED = ("recompute",)
"""Options that stand in the folders of older runs and say nothing about what was trained."""


def as_plain(config: RunConfig) -> dict[str, Any]:
    """The configuration in YAML's own types: paths become text, tuples lists."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return plain


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each option with its dotted name, for example ``data.patch``."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def read_plain(folder: Path) -> dict[str, Any]:
    """What ``config.yaml`` holds.

    Raises:
        FileNotFoundError: if there is none.
        InputError: if it cannot be read.
    """
    path = folder / NAME
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give another folder.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not readable YAML; remove the run or give another folder.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no options; remove the run or give another folder.")
    return found


def read_config(folder: Path) -> TrainingConfig:
    """The configuration of a run. Options that are newer than the run have their defaults.

    Raises:
        FileNotFoundError: if the folder has no ``config.yaml``.
        InputError: if it is damaged, or of another version of this program.
    """
    plain = {key: value for key, value in read_plain(folder).items() if key not in RETIRED}
    kind = STAGES.get(plain.get("stage", "vae"))
    if kind is None:
        raise InputError(f"{folder / NAME}: stage {plain['stage']} is none of {', '.join(STAGES)}.")
    try:
        config: TrainingConfig = TypeAdapter(kind).validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(map(str, first["loc"]))
        raise InputError(f"{folder / NAME}: {option} cannot be read ({first['msg']}); restore the file.") from error
    known = dict(leaves(as_plain(config)))
    if unknown := [option for option, _ in leaves(plain) if option not in known]:
        raise InputError(f"{folder / NAME}: has the option {unknown[0]}, which this version does not know; update it.")
    return config

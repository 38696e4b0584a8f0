"""Autoencoder weights on disk: our safetensors exports, the authors' ``model.pt``, MONAI's MAISI weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decovae.errors import InputError
from decovae.files import load_safetensors, load_tensors, save_safetensors
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig

WEIGHTS_FILE = "autoencoder.safetensors"
"""The autoencoder's file in whatever folder holds one: a run's, or one of latents."""

_ANCHOR = "encoder.blocks.0.conv.conv.weight"
_METADATA_KEY = "autoencoder"
_ENCODER = ("encoder.", "quant_conv_mu.", "quant_conv_log_sigma.")


def save_autoencoder(model_state: Mapping[str, Tensor], config: AutoencoderConfig, path: Path) -> None:
    """Write weights and architecture as safetensors; the file appears whole or not at all."""
    save_safetensors(model_state, {_METADATA_KEY: json.dumps(asdict(config))}, path)


def encoder_fingerprint(model: Autoencoder) -> str:
    """32 hexadecimal digits that name the encoder: equal for equal bits of all that latents depend on.

    A hash of names, shapes, dtypes and values of the tensors behind μ and log σ². Device, memory layout, fusing and
    compilation do not show in it, nor does the decoder.
    """
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
    digest = hashlib.sha256()
    for name in sorted(state):
        if name.startswith(_ENCODER):
            tensor = state[name].detach().cpu().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def load_autoencoder(path: str | Path) -> Autoencoder:
    """Autoencoder, on the CPU and in evaluation mode, from a weights file.

    Reads this project's ``autoencoder.safetensors`` (or a run's folder that holds one), and ``.pt`` files with the
    weights of MONAI's ``AutoencoderKlMaisi``: NVIDIA's ``autoencoder_v1.pt`` (bare) and ``autoencoder_v2.pt`` (below
    ``unet_state_dict``), the authors' ``model.pt`` (below ``autoencoder``, beside discriminator and optimisers), or
    nested otherwise, with or without ``module.`` or ``_orig_mod.`` before the names. Groups and epsilon of the norms,
    which shapes do not show, are MAISI's, or those of a MAISI network file of the same name that ends with ``.json``.
    Nothing but tensors and plain containers is unpickled.

    Raises:
        InputError: if the file is missing, unreadable, or holds no such autoencoder.
    """
    path = weights_file(path)
    state, config = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_pickle(path), None)
    try:
        model = Autoencoder(
            config or infer_config(state, **norm_arguments(network_definition(path, "autoencoder_def")))
        )
        model.load_state_dict(state, strict=True)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not the weights of a MAISI autoencoder without attention: {reason}") from error
    return model.eval()


def weights_file(path: str | Path) -> Path:
    """The file itself, where a folder that holds an autoencoder's is given.

    Raises:
        InputError: if there is none.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such weights file; give an {WEIGHTS_FILE} or a .pt of MAISI weights.")
    return path


def load_initial(model: Autoencoder, path: Path) -> None:
    """Give an autoencoder, wherever it is, the weights of a file to start training from.

    Raises:
        InputError: if the file cannot be read, or is of an autoencoder of another shape.
    """
    source = load_autoencoder(path)
    for option, wanted in asdict(model.config).items():
        there = getattr(source.config, option)
        if there != wanted:
            raise InputError(
                f"--init {path}: is an autoencoder with {option}={_option(there)}, not {_option(wanted)}; give "
                f"--model.{option.replace('_', '-')} {_option(there)}, or other weights."
            )
    model.load_state_dict(source.state_dict())


def _option(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], AutoencoderConfig | None]:
    state, metadata = load_safetensors(path, advice="export it again")
    if _METADATA_KEY not in metadata:
        return find_state_dict(state, path), None
    fields = json.loads(metadata[_METADATA_KEY])
    return state, AutoencoderConfig(**{**fields, "channels": tuple(fields["channels"])})


def _read_pickle(path: Path) -> dict[str, Tensor]:
    return find_state_dict(load_tensors(path, advice="save the autoencoder's state_dict alone"), path)


def find_state_dict(
    content: Any, path: Path, *, anchor: str = _ANCHOR, network: str = "autoencoder"
) -> dict[str, Tensor]:
    """A network's ``state_dict`` somewhere inside a loaded checkpoint, name prefixes removed.

    Args:
        content: what the file holds; where it holds several such networks, the first of those that lie least deep.
        path: the file's, for the message.
        anchor: name of a tensor that every such network has.
        network: what the message calls it.

    Raises:
        InputError: if it is nowhere.
    """
    pending = [content]
    for candidate in pending:
        if not isinstance(candidate, Mapping):
            continue
        for key in candidate:
            if isinstance(key, str) and key.replace("_orig_mod.", "").endswith(anchor):
                prefix = key.replace("_orig_mod.", "")[: -len(anchor)]
                names = {name: name.replace("_orig_mod.", "") for name in candidate}
                return {
                    clean.removeprefix(prefix): candidate[name]
                    for name, clean in names.items()
                    if clean.startswith(prefix)
                }
        pending.extend(candidate.values())
    raise InputError(f"{path}: holds no MAISI {network} (no tensor called {anchor}); give the {network}'s weights.")


def network_definition(path: Path, name: str) -> dict[str, Any]:
    """What a MAISI network file beside a weights file says of a network; empty where there is none.

    Args:
        path: of the weights; the network file ends with ``.json`` instead.
        name: ``autoencoder_def`` or ``diffusion_unet_def``.

    Raises:
        InputError: if the file is there and cannot be read.
    """
    file = path.with_suffix(".json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error}); restore it, or take it away from {path.name}.") from error
    definition = content.get(name, {}) if isinstance(content, dict) else {}
    return definition if isinstance(definition, dict) else {}


def norm_arguments(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Groups and epsilon of the norms in a definition; what it does not say is MAISI's."""
    return {"groups": int(definition.get("norm_num_groups", 32)), "eps": float(definition.get("norm_eps", 1e-6))}


def infer_config(state: Mapping[str, Tensor], *, groups: int = 32, eps: float = 1e-6) -> AutoencoderConfig:
    """Architecture behind a ``state_dict``, read off its shapes.

    Args:
        state: the weights.
        groups, eps: of the norms, which shapes do not show.

    Raises:
        ValueError: if the levels do not all have the same number of residual blocks.
    """
    widths: list[int] = []
    counts = [0]
    index = 1
    while (residual := state.get(f"encoder.blocks.{index}.conv1.conv.conv.weight")) is not None or (
        f"encoder.blocks.{index}.conv.conv.conv.weight" in state
    ):
        if residual is not None:
            counts[-1] += 1
            if counts[-1] == 1:
                widths.append(residual.shape[0])
        else:
            counts.append(0)
        index += 1
    if len(set(counts)) != 1 or counts[0] == 0:
        raise ValueError(f"levels with {counts} residual blocks, where every level must have as many")
    return AutoencoderConfig(
        channels=tuple(widths),
        residual_blocks=counts[0],
        latent_channels=state["quant_conv_mu.conv.weight"].shape[0],
        groups=groups,
        eps=eps,
        image_channels=state[_ANCHOR].shape[1],
    )

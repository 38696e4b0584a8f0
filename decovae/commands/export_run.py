"""What ``decovae export`` does once its options are known to be usable."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from decovae.commands.export import ExportConfig
from decovae.data.volumes import times
from decovae.errors import InputError
from decovae.files import load_safetensors, write_atomically, write_text, writing
from decovae.generation.conditioning import encode_conditions, parse_condition_options
from decovae.generation.flow_file import FLOW, FlowDescription, load_flow, save_flow
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.flow_unet import TIMESTEPS, FlowUNet
from decovae.models.maisi import autoencoder_definition, scheduler_definition, unet_definition
from decovae.models.weights import WEIGHTS_FILE, load_autoencoder, save_autoencoder
from decovae.runtime import Runtime
from decovae.training.checkpoint_files import Damaged, check_files, entries, entry_of, read_manifest
from decovae.training.checkpoint_storage import read_tensors
from decovae.training.checkpoints import Best
from decovae.training.config import DecoderConfig, FlowConfig, ParallelConfig, TrainingConfig, VAEConfig
from decovae.training.config_file import read_config
from decovae.training.finished import open_vae
from decovae.training.flow import FlowStage
from decovae.training.run_folder import read_summary
from decovae.training.vae import VAEStage

_SHIFT, _MIX, _BACK = "quant_conv_mu.conv.bias", "post_quant_conv.conv.weight", "post_quant_conv.conv.bias"


@dataclass(frozen=True)
class AutoencoderWeights:
    """An autoencoder to write."""

    state: Mapping[str, Tensor]
    config: AutoencoderConfig


@dataclass(frozen=True)
class FlowWeights:
    """A flow to write; `autoencoder` is the file of the one that its latents are of."""

    network: FlowUNet
    description: FlowDescription
    autoencoder: Path


def run(config: ExportConfig) -> Iterator[str]:
    """Write the files; a line on each.

    Raises:
        InputError: there is nothing to export, or it is damaged, or a condition is none of the flow's.
        RunError: a file cannot be written.
    """
    weights = _read(config)
    if config.condition and not isinstance(weights, FlowWeights):
        raise InputError(f"--condition {config.condition[0]}: {config.source} is no flow; leave the option out.")
    with writing(config.out):
        if isinstance(weights, FlowWeights):
            yield from (_flow_for_monai if config.format == "monai" else _flow)(weights, config)
        else:
            yield from (_autoencoder_for_monai if config.format == "monai" else _autoencoder)(weights, config.out)


def _autoencoder(weights: AutoencoderWeights, out: Path) -> Iterator[str]:
    save_autoencoder(weights.state, weights.config, out)
    yield f"{out}: autoencoder, {_size(weights.state)}"


def _flow(weights: FlowWeights, config: ExportConfig) -> Iterator[str]:
    save_flow(weights.network.state_dict(), weights.description, config.out)
    yield f"{config.out}: flow, {_size(weights.network.state_dict())}"


def _autoencoder_for_monai(weights: AutoencoderWeights, out: Path) -> Iterator[str]:
    _save(weights.state, out)
    yield f"{out}: AutoencoderKlMaisi, {_size(weights.state)}"
    yield _network_file(out.with_suffix(".json"), weights.config, {})


def _flow_for_monai(weights: FlowWeights, config: ExportConfig) -> Iterator[str]:
    description, out = weights.description, config.out
    space, multiple = description.space, description.network.multiple
    row = parse_condition_options(config.condition, description.conditions)
    state = without_conditions(weights.network, encode_conditions(description.conditions, row))
    autoencoder = load_autoencoder(weights.autoencoder)
    centred = centre_latents(autoencoder.state_dict(), space.mean)
    beside = out.with_name(f"{out.stem}-autoencoder.pt")
    _save(
        {
            "unet_state_dict": _plain(state),
            "scale_factor": torch.tensor(1 / space.std),
            "global_mean": torch.tensor(0.0),
            "num_train_timesteps": TIMESTEPS,
        },
        out,
    )
    yield f"{out}: DiffusionModelUNetMaisi, {_size(state)}, with scale_factor {1 / space.std:.6g}"
    _save(centred, beside)
    yield f"{beside}: AutoencoderKlMaisi, {_size(centred)}, its latents moved by {-space.mean:.4g} to mean 0"
    schedule = description.schedule
    definitions = {
        "diffusion_unet_def": unet_definition(description.network, space.channels),
        "noise_scheduler": scheduler_definition(scale=schedule.scale, base_voxels=schedule.base_voxels),
    }
    yield _network_file(out.with_suffix(".json"), autoencoder.config, definitions)
    if description.conditions:
        told = " ".join(
            f"{condition.name}={row.get(condition.name, 'unknown')}" for condition in description.conditions
        )
        yield f"The U-Net follows {told} and takes no condition."
    if any(size % multiple for size in space.shape):
        yield (
            f"Latents of {times(space.shape)} voxels are padded to multiples of {multiple} here; MONAI's U-Net needs "
            "that done for it."
        )


def without_conditions(network: FlowUNet, row: Tensor) -> dict[str, Tensor]:
    """The weights of the same network that knows nothing but this row (K,) of conditions; NaN is absent."""
    with torch.no_grad():
        state = {name: t for name, t in network.state_dict().items() if not name.startswith("condition_embeddings.")}
        for place, embedding in enumerate(network.condition_embeddings):
            state["time_embed.2.bias"] = state["time_embed.2.bias"] + embedding(row[place : place + 1])[0]
    return state


def centre_latents(state: Mapping[str, Tensor], mean: float) -> dict[str, Tensor]:
    """The weights of the same autoencoder with latents that are less by `mean`; its reconstructions do not change."""
    moved = dict(state)
    moved[_SHIFT] = state[_SHIFT] - mean
    mixed = state[_MIX].double().flatten(1).sum(1) * mean
    moved[_BACK] = (state[_BACK].double() + mixed).to(state[_BACK].dtype)
    return moved


def _network_file(path: Path, autoencoder: AutoencoderConfig, definitions: Mapping[str, Any]) -> str:
    content = {
        "spatial_dims": 3,
        "image_channels": autoencoder.image_channels,
        "latent_channels": autoencoder.latent_channels,
        "include_body_region": False,
        "autoencoder_def": autoencoder_definition(autoencoder),
        **definitions,
    }
    write_text(path, json.dumps(content, indent=4) + "\n")
    return f"{path}: how MONAI builds it"


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _save(content: Mapping[str, Any], path: Path) -> None:
    plain = _plain(content) if all(isinstance(value, Tensor) for value in content.values()) else dict(content)
    write_atomically(path, lambda file: torch.save(plain, file))


def _size(state: Mapping[str, Tensor]) -> str:
    return f"{sum(tensor.numel() for tensor in state.values()) / 1e6:.2f} M parameters"


# What to export ---------------------------------------------------------------------------------------------------


def _read(config: ExportConfig) -> AutoencoderWeights | FlowWeights:
    source = config.source
    if not source.is_dir():
        return _of_file(source)
    try:
        trained = read_config(source)
    except FileNotFoundError:
        if config.checkpoint is None and (source / WEIGHTS_FILE).is_file():
            return _of_file(source / WEIGHTS_FILE)
        raise InputError(f"{source}: holds no run (no config.yaml); give a run's folder, or a file.") from None
    if config.checkpoint is not None:
        return _of_checkpoint(source, trained, config.checkpoint)
    if read_summary(source) is None:
        raise InputError(
            f"{source}: is not finished; give --checkpoint newest, or run the command that began it again."
        )
    return _of_file(source / (FLOW if isinstance(trained, FlowConfig) else WEIGHTS_FILE))


def _of_file(path: Path) -> AutoencoderWeights | FlowWeights:
    if path.suffix == ".safetensors" and path.is_file() and "flow" in load_safetensors(path, advice="see to it")[1]:
        network, description = load_flow(path)
        return FlowWeights(network, description, path.with_name(WEIGHTS_FILE))
    autoencoder = load_autoencoder(path)
    return AutoencoderWeights(autoencoder.state_dict(), autoencoder.config)


def _of_checkpoint(folder: Path, trained: TrainingConfig, wanted: str) -> AutoencoderWeights | FlowWeights:
    entry = _entry(folder, trained, wanted)
    network = {VAEConfig: "autoencoder", DecoderConfig: "decoder", FlowConfig: "flow"}[type(trained)]
    try:
        check_files(entry, read_manifest(entry)["files"])
        state = read_tensors(entry, f"{network}.weights.") | read_tensors(entry, f"{network}.average.")
    except Damaged as error:
        raise InputError(f"{entry}: cannot be read ({error}); give --checkpoint another one.") from error
    try:
        if isinstance(trained, FlowConfig):
            return _flow_of(folder, trained, state)
        if isinstance(trained, DecoderConfig):
            whole = load_autoencoder(open_vae(trained.vae).weights)
            whole.load_state_dict({**whole.state_dict(), **state})
        else:
            whole = Autoencoder(trained.model)
            whole.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{entry}: is not of the network in {folder / 'config.yaml'}: {reason}") from error
    return AutoencoderWeights(whole.state_dict(), whole.config)


def _flow_of(folder: Path, trained: FlowConfig, state: dict[str, Tensor]) -> FlowWeights:
    """A flow in the making: what has to be known of its latents comes from the latents themselves."""
    alone = replace(trained, compile="off", parallel=ParallelConfig(), preview=replace(trained.preview, samples=0))
    with TemporaryDirectory() as temporary:
        FlowStage(alone, Runtime(torch.device("cpu"))).export(state, Path(temporary))
        network, description = load_flow(Path(temporary))
    return FlowWeights(network, description, folder / WEIGHTS_FILE)


def _entry(folder: Path, trained: TrainingConfig, wanted: str) -> Path:
    """The checkpoint that is asked for.

    Raises:
        InputError: there is none, or not this one.
    """
    checkpoints = folder / "checkpoints"
    found = entries(checkpoints)
    if not found:
        raise InputError(f"--checkpoint {wanted}: {checkpoints} holds no checkpoint; leave the option out.")
    if wanted == "newest":
        return found[-1]
    if wanted == "best":
        return _best(found, (FlowStage if isinstance(trained, FlowConfig) else VAEStage).best)
    entry = entry_of(checkpoints, int(wanted))
    if entry not in found:
        steps = ", ".join(str(int(path.name.removeprefix("step-"))) for path in found)
        raise InputError(f"--checkpoint {wanted}: there is none of that step; choose {steps}, best or newest.")
    return entry


def _best(found: list[Path], best: Best) -> Path:
    figures: dict[Path, float] = {}
    for entry in found:
        try:
            figure = read_manifest(entry).get("figure")
        except Damaged:
            continue
        if figure is not None and figure["metric"] == best.metric:
            figures[entry] = figure["value"] if best.higher else -figure["value"]
    if not figures:
        raise InputError(f"--checkpoint best: no checkpoint in {found[-1].parent} was validated; give newest.")
    return max(figures, key=lambda entry: figures[entry])

"""MAISI's networks outside this project: how MONAI is told to build them, and its U-Net's weights made a flow's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from decovae.errors import InputError
from decovae.files import load_safetensors, load_tensors
from decovae.models.autoencoder import AutoencoderConfig
from decovae.models.flow_unet import TIMESTEPS, FlowUNet, FlowUNetConfig
from decovae.models.weights import find_state_dict, network_definition, norm_arguments

NETWORKS = "monai.apps.generation.maisi.networks"
SCHEDULER = "monai.networks.schedulers.rectified_flow.RFlowScheduler"
UNIT = 100.0
"""MAISI's scripts give the U-Net hundreds of a millimetre."""

_ANCHOR = "time_embed.0.weight"


def autoencoder_definition(config: AutoencoderConfig) -> dict[str, Any]:
    """``autoencoder_def`` of a MAISI network file: the class and its arguments, in JSON's types."""
    levels = len(config.channels)
    return {
        "_target_": f"{NETWORKS}.autoencoderkl_maisi.AutoencoderKlMaisi",
        "spatial_dims": 3,
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "num_channels": list(config.channels),
        "num_res_blocks": [config.residual_blocks] * levels,
        "norm_num_groups": config.groups,
        "norm_eps": config.eps,
        "attention_levels": [False] * levels,
        "with_encoder_nonlocal_attn": False,
        "with_decoder_nonlocal_attn": False,
        "use_checkpointing": False,
        "use_convtranspose": False,
        # MAISI's own file rounds norms to float16 and cuts volumes; whoever lacks memory may do so again.
        "norm_float16": False,
        "num_splits": 1,
        "dim_split": 1,
        "save_mem": False,
    }


def unet_definition(config: FlowUNetConfig, latent_channels: int) -> dict[str, Any]:
    """``diffusion_unet_def`` of a MAISI network file, in JSON's types."""
    return {
        "_target_": f"{NETWORKS}.diffusion_model_unet_maisi.DiffusionModelUNetMaisi",
        "spatial_dims": 3,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "num_channels": list(config.channels),
        "attention_levels": list(config.attention),
        # The last level's is the middle's too, where there always is attention.
        "num_head_channels": [config.head_channels] * len(config.channels),
        "num_res_blocks": config.residual_blocks,
        "norm_num_groups": config.groups,
        "norm_eps": config.eps,
        "use_flash_attention": False,
        "include_top_region_index_input": False,
        "include_bottom_region_index_input": False,
        "include_spacing_input": False,
        "resblock_updown": True,
        "include_fc": True,
    }


def scheduler_definition(*, scale: float, base_voxels: int) -> dict[str, Any]:
    """``noise_scheduler`` of a MAISI network file with the times of a `TimeSchedule`.

    MONAI's scheduler passes no scale on to its time transform, which knows r = scale · (voxels / base)^⅓ only as a
    whole: a smaller base gives the same r.
    """
    return {
        "_target_": SCHEDULER,
        "num_train_timesteps": TIMESTEPS,
        "use_discrete_timesteps": False,
        "use_timestep_transform": True,
        "sample_method": "uniform",
        "base_img_size_numel": round(base_voxels / scale**3),
    }


@dataclass(frozen=True, kw_only=True)
class UNetInputs:
    """What a MAISI U-Net is told beside the time, set once and for all; None is for a network that is not told.

    Attributes:
        spacing: of the volumes' voxels in millimetres; a network that is not told has no use for it.
        modality: number of the kind of image, for example 9 for T1 in NVIDIA's list.
        meta: the one number that the authors' U-Nets may be told, such as an age, as their files hold it.
    """

    spacing: tuple[float, float, float] | None = None
    modality: int | None = None
    meta: float | None = None


@dataclass(frozen=True)
class MaisiFlow:
    """A foreign flow.

    Attributes:
        network: on the CPU and in evaluation mode, told nothing but the time.
        mean: of the latents it was trained on; MAISI takes none away.
        std: what they were divided by, 1 / ``scale_factor``.
    """

    network: FlowUNet
    mean: float
    std: float


def load_maisi_flow(path: Path, inputs: UNetInputs | None = None, *, head_channels: int | None = None) -> MaisiFlow:
    """A flow from the weights of MONAI's ``DiffusionModelUNetMaisi``, trained by rectified flow.

    Reads NVIDIA's ``diff_unet_3d_rflow-*.pt`` (below ``unet_state_dict``, beside ``scale_factor``), the authors'
    ``model.pt`` of a U-Net (below ``unet``, beside ``scale_factor`` and ``global_mean``), and bare weights. Where such
    a network is told spacing, modality or a number, a fixed value of each becomes part of its weights, exactly: what
    is concatenated to the time's embedding is a constant to every layer that reads it. Nothing but tensors and plain
    containers is unpickled.

    Args:
        path: the file.
        inputs: those fixed values.
        head_channels: channels of an attention head, which cannot be read off weights, as groups and epsilon of the
            norms cannot; by default what a MAISI network file of the same name, ending with ``.json``, says, and
            MAISI's 32 where there is none.

    Raises:
        InputError: if the file is unreadable, holds no such network, or one that is told what `inputs` has not, or the
            other way round.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such weights file; give a .pt of MAISI's diffusion U-Net.")
    if path.suffix == ".safetensors":
        content: Any = load_safetensors(path, advice="convert it again")[0]
    else:
        content = load_tensors(path, advice="save the U-Net's state_dict with its scale_factor alone")
    state = find_state_dict(content, path, anchor=_ANCHOR, network="diffusion U-Net")
    state = {name: tensor.float() for name, tensor in state.items()}
    definition = network_definition(path, "diffusion_unet_def")
    try:
        _fix_inputs(state, inputs or UNetInputs())
        heads = head_channels or _last(definition.get("num_head_channels", 32))
        shape = infer_unet_config(state, head_channels=heads, **norm_arguments(definition))
        network = FlowUNet(shape, state["conv_in.conv.weight"].shape[1])
        network.load_state_dict(state, strict=True)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a flow's U-Net that can be read here: {reason}.") from error
    mean, factor = (_number(content, name, default) for name, default in (("global_mean", 0.0), ("scale_factor", 1.0)))
    if not factor > 0:
        raise InputError(f"{path}: its scale_factor is {factor}; it has to be above 0.")
    return MaisiFlow(network.eval(), mean, 1 / factor)


def infer_unet_config(
    state: Mapping[str, Tensor], *, head_channels: int = 32, groups: int = 32, eps: float = 1e-6
) -> FlowUNetConfig:
    """Architecture behind a U-Net's ``state_dict``, read off its shapes.

    Args:
        state: the weights.
        head_channels, groups, eps: what shapes do not show.

    Raises:
        ValueError: if it is none of a flow's.
    """
    levels = _count(state, "down_blocks.{}.resnets.0.conv2.conv.weight")
    if levels > 1 and "down_blocks.0.downsampler.conv1.conv.weight" not in state:
        raise ValueError("it resamples by plain convolutions, as MAISI's older DDPM networks do, which are no flows")
    counts = {_count(state, f"down_blocks.{level}.resnets.{{}}.conv2.conv.weight") for level in range(levels)}
    if len(counts) != 1:
        raise ValueError(f"levels with {sorted(counts)} residual blocks, where every level must have as many")
    return FlowUNetConfig(
        channels=tuple(state[f"down_blocks.{level}.resnets.0.conv2.conv.weight"].shape[0] for level in range(levels)),
        attention=tuple(f"down_blocks.{level}.attentions.0.norm.weight" in state for level in range(levels)),
        residual_blocks=counts.pop(),
        head_channels=head_channels,
        groups=groups,
        eps=eps,
    )


def _count(state: Mapping[str, Tensor], name: str) -> int:
    """How many of the names ``name.format(0)``, ``name.format(1)``, … there are."""
    count = 0
    while name.format(count) in state:
        count += 1
    return count


@torch.no_grad()
def _fix_inputs(state: dict[str, Tensor], inputs: UNetInputs) -> None:
    """Make fixed inputs part of the weights, in place; what they came in through goes.

    Raises:
        ValueError: if an input is missing, or given and not known to the network.
    """
    _check_inputs(state, inputs)
    if inputs.modality is not None:
        classes = state.pop("class_embedding.weight")
        if not 0 <= inputs.modality < len(classes):
            raise ValueError(f"--modality {inputs.modality}: it knows the numbers 0 to {len(classes) - 1}")
        state["time_embed.2.bias"] = state["time_embed.2.bias"] + classes[inputs.modality]
    # In the order in which they are concatenated behind the time's embedding.
    spacing = None if inputs.spacing is None else [UNIT * length for length in inputs.spacing]
    meta = None if inputs.meta is None else [inputs.meta]
    constants = [*_embedded(state, "spacing_layer", spacing), *_embedded(state, "meta_layer", meta)]
    if not constants:
        return
    beside = F.silu(torch.cat(constants))
    for name in [name for name in state if name.endswith("time_emb_proj.weight")]:
        weight, bias = state[name], name.removesuffix("weight") + "bias"
        own = weight.shape[1] - len(beside)
        state[bias] = (state[bias].double() + weight[:, own:].double() @ beside).float()
        state[name] = weight[:, :own].contiguous()


def _check_inputs(state: Mapping[str, Tensor], inputs: UNetInputs) -> None:
    for prefix, what in (
        ("top_region_index_layer.", "the region of the body, as MAISI's older DDPM networks are"),
        ("bottom_region_index_layer.", "the region of the body, as MAISI's older DDPM networks are"),
        ("token_encoder.", "a set of attributes, of which no fixed value can be given here"),
    ):
        if any(name.startswith(prefix) for name in state):
            raise ValueError(f"it is told {what}")
    for option, name, value in (
        ("spacing", "spacing_layer.0.weight", inputs.spacing),
        ("modality", "class_embedding.weight", inputs.modality),
        ("meta", "meta_layer.0.weight", inputs.meta),
    ):
        if name in state and value is None:
            raise ValueError(f"it is told --{option}; give one")
        if name not in state and value is not None and option != "spacing":
            raise ValueError(f"--{option} {value}: it is told none; leave the option out")


def _embedded(state: dict[str, Tensor], layer: str, values: list[float] | None) -> Iterator[Tensor]:
    """What a fixed input is embedded as, float64, if the network has the layer, which goes."""
    if values is None or f"{layer}.0.weight" not in state:
        return
    first, bias, second, last = (
        state.pop(f"{layer}.{part}").double() for part in ("0.weight", "0.bias", "2.weight", "2.bias")
    )
    yield second @ F.silu(first @ torch.tensor(values, dtype=torch.float64) + bias) + last


def _last(value: Any) -> int:
    return int(value[-1] if isinstance(value, list) else value)


def _number(content: Mapping[str, Any], name: str, default: float) -> float:
    value = content.get(name, default) if isinstance(content, Mapping) else default
    return float(value.reshape(-1)[0]) if isinstance(value, Tensor) else float(value)

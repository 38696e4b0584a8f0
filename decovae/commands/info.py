"""``decovae info``: what runs here, and how large a patch a card can train on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch

import decovae
from decovae.data.volumes import times
from decovae.errors import InputError
from decovae_kernels._dispatch import CHOICES, VARIABLE

if TYPE_CHECKING:
    from decovae.training.config import VAEConfig
    from decovae.training.memory import MemoryMode

GIB = 2**30
USABLE = 0.9
"""Share of a card that the prediction may fill: the CUDA context, workspaces and fragmentation are not in it."""

PATCHES = ((160, 192, 160), (128, 256, 128), (128, 128, 128), (96, 96, 96), (64, 64, 64))
"""Patches to try, largest first."""

USUAL_CARD = 24.0

UNKNOWN_DRIVER = "unknown (needs nvidia-ml-py)"


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Print versions, devices, active kernels and what processes talk through, and hints where something can be had by
    a word; then, for each memory mode, the largest patch that trains on a card.

    Nothing is trained: a step's memory is predicted from the shapes of its tensors, in a few seconds a line.
    """

    memory_of: Literal["paper", "quickstart"] = "paper"
    """Preset whose training step is predicted."""
    card_gib: float | None = None
    """Memory of the card in GiB (2^30 bytes); by default that of the cards found here, or 24 where there is none."""
    batch: tuple[int, ...] = (1, 2)
    """Batch sizes to predict for."""


def main(arguments: Sequence[str]) -> int:
    """The command, from its options to its exit code.

    Raises:
        InputError: an unusable option, or DECOVAE_KERNELS has an unknown value.
    """
    config = InfoConfig()
    if arguments:  # without options there is something to tell without the train extra too
        from decovae.training.command_line import parse_options

        config = parse_options(InfoConfig, arguments, program="decovae info")
    if config.card_gib is not None and not 0 < config.card_gib < math.inf:
        raise InputError(f"--card-gib {config.card_gib:g}: must be above 0.")
    if not config.batch or min(config.batch) < 1:
        raise InputError(f"--batch {' '.join(map(str, config.batch))}: batch sizes are at least 1.")
    for line in (*describe(), ""):
        print(line, flush=True)
    for card in cards(config):
        for line in largest_patches(config, card):
            print(line, flush=True)
    return 0


def describe() -> Iterator[str]:
    """Lines on versions, devices, kernels and communication, warnings of what does not go together, and hints.

    Raises:
        InputError: DECOVAE_KERNELS has an unknown value.
    """
    cudnn = cudnn_version()
    yield f"decovae {decovae.__version__}, Python {platform.python_version()}, {platform.system()}"
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, cuDNN {_dotted(cudnn)}"
    yield f"triton {_version('triton')}, driver {_driver()}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        architecture = f"sm_{properties.major}{properties.minor}"
        size = f"{properties.total_memory / GIB:.1f} GiB{_free(index)}"
        yield f"device {index}: {properties.name}, {size}, {architecture}"
    if not torch.cuda.device_count():
        yield f"device: CPU, {torch.get_num_threads()} threads; torch sees no CUDA device"
    yield f"kernels: {active_kernels()}"
    yield f"processes: {communication()}"
    warning = known_bad(torch.__version__, cudnn)
    if warning is not None:
        yield f"warning: {warning}"
    for hint in hints():
        yield f"hint: {hint}"


def communication() -> str:
    """What the processes of a run talk through, on GPUs and on CPUs."""
    distributed = torch.distributed
    if not distributed.is_available():
        return "one only, because this torch was built without torch.distributed"
    gloo = "gloo" if distributed.is_gloo_available() else "no gloo"
    if not distributed.is_nccl_available():
        return f"no NCCL on CUDA devices, {gloo} on CPUs"
    version = torch.cuda.nccl.version() if torch.cuda.is_available() else _version(f"nvidia-nccl-cu{_cuda_major()}")
    number = ".".join(map(str, version)) if isinstance(version, tuple) else version
    return f"NCCL {number} on CUDA devices, {gloo} on CPUs"


def hints() -> Iterator[str]:
    """What would make more of this machine."""
    devices = torch.cuda.device_count()
    talks = torch.distributed.is_available()
    nccl = talks and torch.distributed.is_nccl_available()
    if devices > 1 and nccl:
        yield f"all {devices} GPUs train one run by torchrun --nproc_per_node {devices} train/vae.py …"
    if devices > 1 and not nccl:
        yield f"without NCCL the {devices} GPUs cannot share a run, only one trains; install a torch that has it."
    names = {torch.cuda.get_device_name(index) for index in range(devices)}
    if len(names) > 1:
        yield f"a run over {' and '.join(sorted(names))} goes at the slowest's pace; CUDA_VISIBLE_DEVICES chooses."
    if devices and not (talks and torch.distributed.is_gloo_available()):
        yield "runs of several processes need gloo beside NCCL, to agree on the CPU; install a torch that has it."
    if devices and importlib.util.find_spec("pynvml") is None:
        yield "power, temperature and use of GPUs are logged with pip install nvidia-ml-py."
    if not devices and torch.version.cuda is not None and _driver() not in ("none", UNKNOWN_DRIVER):
        yield "torch sees no device of the NVIDIA driver: CUDA_VISIBLE_DEVICES hides it, or the driver is too old."


def active_kernels() -> str:
    """Which kernels run, and why.

    Raises:
        InputError: DECOVAE_KERNELS has an unknown value.
    """
    choice = os.environ.get(VARIABLE, "auto")
    installed = importlib.util.find_spec("triton") is not None
    asked = f"{VARIABLE}={choice}"
    if choice not in CHOICES:
        raise InputError(f"{asked}: unknown; use one of {', '.join(CHOICES)}.")
    if choice == "torch":
        return f"torch everywhere, because of {asked}"
    if not installed:
        return f"{'none can run' if choice == 'triton' else 'torch everywhere'}, because Triton is not installed"
    cuda = torch.cuda.is_available()
    if choice == "triton" and not cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"none can run: torch sees no CUDA device, and Triton's interpreter needs TRITON_INTERPRET=1 ({asked})"
    if choice == "triton":
        return f"Triton everywhere, because of {asked}"
    if cuda:
        return f"Triton for CUDA tensors, torch for others ({asked})"
    return f"torch, because torch sees no CUDA device ({asked})"


def cudnn_version() -> tuple[int, int, int] | None:
    """Of the cuDNN that torch loads; None if it has none."""
    number = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if number is None:
        return None
    major = 10_000 if number >= 90_000 else 1_000
    return number // major, number % major // 100, number % 100


def known_bad(torch_version: str, cudnn: tuple[int, int, int] | None) -> str | None:
    """Why two versions should not be used together, or None."""
    if torch_version.startswith("2.9.") and cudnn is not None and (9, 8) <= cudnn[:2] < (9, 15):
        return (
            f"PyTorch {torch_version} with cuDNN {_dotted(cudnn)} runs 3D convolutions in bf16 4 times slower and with "
            "3 to 17 times the memory (PyTorch issues 166122, 166643): install PyTorch 2.10 and cuDNN 9.15 or later."
        )
    return None


def cards(config: InfoConfig) -> list[float]:
    """GiB of the cards to answer for, each size once."""
    if config.card_gib is not None:
        return [config.card_gib]
    found = [torch.cuda.get_device_properties(i).total_memory / GIB for i in range(torch.cuda.device_count())]
    return sorted(set(found)) or [USUAL_CARD]


def largest_patches(config: InfoConfig, card: float) -> Iterator[str]:
    """Lines of a table: for each batch size and memory mode the largest of `PATCHES` that fits so many GiB."""
    from decovae.training.memory import MemoryMode
    from decovae.training.presets import VAE_PRESETS

    _, preset = VAE_PRESETS[config.memory_of]
    yield f"What patch fits a card of {card:.4g} GiB, training {config.memory_of} in bf16 on one GPU (predicted peak):"
    for batch in config.batch:
        for memory in get_args(MemoryMode):
            peak = math.inf
            for patch in PATCHES:
                peak = _peak(preset, patch, batch, memory)
                if peak <= USABLE * card * GIB:
                    yield f"  batch {batch}, memory {memory:8}  {times(patch):>11}  {peak / GIB:5.1f} GiB"
                    break
            else:
                yield f"  batch {batch}, memory {memory:8}  none; {times(PATCHES[-1])} takes {peak / GIB:.1f} GiB"
    yield (
        f"Of {', '.join(map(times, PATCHES))}; the largest that fills at most {USABLE:.0%} of the card. Not in the "
        "prediction: CUDA context, cuDNN workspaces, fragmentation, torch.compile."
    )


def _peak(preset: VAEConfig, patch: tuple[int, int, int], batch: int, memory: MemoryMode) -> int:
    from decovae.training.memory import predict_training_peak

    data = replace(preset.data, patch=patch, batch_size=batch)
    return predict_training_peak(replace(preset, data=data, memory=memory))


def _dotted(version: tuple[int, int, int] | None) -> str:
    return "none" if version is None else ".".join(map(str, version))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda_major() -> str:
    return (torch.version.cuda or "").partition(".")[0]


def _free(index: int) -> str:
    """What is left of a device's memory, or why that is unknown."""
    try:
        free, _ = torch.cuda.mem_get_info(index)
    except RuntimeError:  # someone else has it for themselves, or it is in no state to be asked
        return ", not to be had now"
    return f" ({free / GIB:.1f} free)"


def _driver() -> str:
    """The NVIDIA driver's version, or why it is unknown."""
    if importlib.util.find_spec("pynvml") is None:
        return UNKNOWN_DRIVER
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return "none"
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()

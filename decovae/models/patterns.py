"""Questions that `fuse` asks about modules: what they are, and what stands in the way of another forward.

Other libraries' classes are looked up among the modules that are already imported, never imported here.
"""

from __future__ import annotations

import sys

from torch import nn

OURS = "decovae.models.blocks"
MAISI = "monai.apps.generation.maisi.networks.autoencoderkl_maisi"
MONAI = "monai.networks.nets.autoencoderkl"
MONAI_CONVOLUTION = "monai.networks.blocks.convolutions.Convolution"

WRAPPERS = (f"{OURS}.Named", f"{MAISI}.MaisiConvolution", MONAI_CONVOLUTION)
"""Modules that hold a convolution, or another wrapper, under the name ``conv``."""
NORMS = ("torch.nn.modules.normalization.GroupNorm", f"{MAISI}.MaisiGroupNorm3D")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was fused."""
    plain: type[nn.Module] = type(module).__dict__.get("_unfused_class", type(module))
    return plain


def name_of(module: nn.Module) -> str:
    """The qualified name of a module's class, or "" where its home holds another class under that name."""
    cls = plain_class(module)
    home = sys.modules.get(cls.__module__)
    return f"{cls.__module__}.{cls.__qualname__}" if getattr(home, cls.__qualname__, None) is cls else ""


def watched(module: nn.Module) -> str | None:
    """Why a module's call cannot be left out: somebody changed or watches it."""
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if any(module.__dict__.get(hooks) for hooks in _HOOKS):
        return "it has hooks"
    return None


def norm_obstacle(module: nn.Module) -> str | None:
    """Why a module is not a group norm that can be computed elsewhere."""
    if not isinstance(module, nn.GroupNorm) or name_of(module) not in NORMS:
        return f"{type(module).__name__} is not torch's or MAISI's group norm"
    if any(module._parameters.get(name) is None for name in ("weight", "bias")):
        return "the group norm has no weight and bias"
    return watched(module)


def silu_obstacle(module: nn.Module) -> str | None:
    """Why a module is not a SiLU that can be computed elsewhere."""
    return watched(module) if type(module) is nn.SiLU else f"the activation is {type(module).__name__}, not SiLU"


def does_nothing(module: nn.Module) -> bool:
    """Whether a module is an identity, or a dropout that drops nothing."""
    idle = isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout | nn.Dropout3d) and module.p == 0)
    return idle and watched(module) is None


def innermost(module: nn.Module) -> nn.Module:
    """What the wrappers around a convolution hold."""
    while name_of(module) in WRAPPERS and isinstance(held := getattr(module, "conv", None), nn.Module):
        module = held
    return module


def convolution_obstacle(module: nn.Module, *, called: bool = False) -> str | None:
    """Why a module is not a 3D convolution, perhaps wrapped, that can be computed elsewhere.

    Args:
        module: any module.
        called: whether the module itself will still be called, so that only what it wraps would no longer be.
    """
    inside = innermost(module)
    if isinstance(inside, nn.Conv1d | nn.Conv2d):
        return f"{len(inside.kernel_size)}D"
    if isinstance(inside, nn.ConvTranspose3d):
        return "transposed convolution"
    if not isinstance(inside, nn.Conv3d) or plain_class(inside) is not nn.Conv3d:
        return f"{type(inside).__name__} is not torch's Conv3d"
    if inside.padding_mode != "zeros" or isinstance(inside.padding, str):
        return f"padding {inside.padding if isinstance(inside.padding, str) else inside.padding_mode!r}"
    layers = list(module.modules())
    if len(layers) > 1 and any(len(list(layer.children())) > 1 for layer in layers):
        return "layers beside the convolution"
    if called and "forward" in module.__dict__:
        return "its forward was replaced"
    reasons = (watched(layer) for layer in layers[1 if called else 0 :])
    return next((f"inside it: {reason}" for reason in reasons if reason), None)

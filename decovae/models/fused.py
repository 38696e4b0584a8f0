"""What fused modules do instead of their own forward; `decovae.models.fuse` decides which modules these are.

A fused module is of a class made from one of those below and the module's own, so its parameters, its ``state_dict``,
its type and its hooks are what they were. Blocks in a row hand each other the channel statistics of their outputs.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from decovae.models import patterns
from decovae_kernels import BlockParameters, Geometry, convolution, group_norm, norm_conv, residual_block
from decovae_kernels.upsample_conv import upsample_conv


class Step(NamedTuple):
    """One step along a row: the modules at the places `first` to `last`.

    Either one module that is called, or a norm, with SiLU or without, and with a convolution at the end or without.
    """

    first: int
    last: int
    norm: bool = False
    silu: bool = False
    convolution: bool = False


class Settings(NamedTuple):
    """How a fused module computes."""

    tight: bool
    tile_bytes: int
    steps: tuple[Step, ...] = ()


class Carry:
    """Channel statistics on their way from the block that took them to the norm that needs them.

    Not a tensor, and not a container that torch looks into: whoever casts the inputs of a module leaves it alone.
    """

    def __init__(self) -> None:
        self.features: Tensor | None = None
        self.version = 0
        self.statistics: Tensor | None = None

    def put(self, features: Tensor, statistics: Tensor) -> Tensor:
        """Remember the statistics of these features, and return the features."""
        self.features, self.version, self.statistics = features, _version(features), statistics.detach()
        return features

    def of(self, features: Tensor) -> Tensor | None:
        """The statistics of these very features, if they are known: a hook may have changed or replaced them."""
        return self.statistics if self._are(features) and self.version == _version(features) else None

    def _are(self, features: Tensor) -> bool:
        # FSDP hands a block another tensor over the same memory, to learn when its backward is done.
        if self.features is features or self.features is None:
            return self.features is features
        return type(features) is Tensor and not torch.compiler.is_compiling() and features.is_set_to(self.features)


def _version(x: Tensor) -> int:
    """How often a tensor was written to, where torch counts that."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


class Fused(nn.Module):
    """The base of all that is put before a module's own class."""

    _fused_label: ClassVar[str]
    _unfused_class: ClassVar[type[nn.Module]]
    _fused_forward: ClassVar[type[Fused]]
    _fused_settings: Settings

    @classmethod
    def _fuse_obstacle(cls, module: nn.Module) -> str | None:
        """Why this forward cannot take the place of the module's own."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no name to be found by: it is made again from its two parts.
        reduced = super().__reduce_ex__(protocol)
        if "_unfused_class" not in type(self).__dict__:
            return reduced
        return (_remade, (self._fused_forward, self._unfused_class), *cast("tuple[Any, ...]", reduced)[2:])


_MADE: dict[tuple[type[Fused], type[nn.Module]], type[nn.Module]] = {}


def fused_class(forward: type[Fused], plain: type[nn.Module]) -> type[nn.Module]:
    """`plain` with the forward of `forward`; the same class for the same two."""
    if (forward, plain) not in _MADE:
        own = {"__module__": plain.__module__, "_unfused_class": plain, "_fused_forward": forward}
        _MADE[forward, plain] = type(f"Fused{plain.__name__}", (forward, plain), own)
    return _MADE[forward, plain]


def _remade(forward: type[Fused], plain: type[nn.Module]) -> nn.Module:
    cls = fused_class(forward, plain)
    return cls.__new__(cls)


def first_reason(*reasons: str | None) -> str | None:
    return next((reason for reason in reasons if reason), None)


def _convolution(module: nn.Module) -> nn.Conv3d:
    while not isinstance(module, nn.Conv3d):
        module = cast(nn.Module, module.conv)
    return module


def _geometry(conv: nn.Conv3d) -> Geometry:
    assert not isinstance(conv.padding, str)  # refused before
    return Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)


def _norm_conv(
    x: Tensor, norm: nn.GroupNorm, conv: nn.Conv3d, settings: Settings, *, silu: bool, statistics: Tensor | None
) -> tuple[Tensor, Tensor]:
    return norm_conv(
        x,
        norm.weight,
        norm.bias,
        norm.num_groups,
        norm.eps,
        conv.weight,
        conv.bias,
        silu=silu,
        geometry=_geometry(conv),
        statistics=statistics,
        tile_bytes=settings.tile_bytes,
    )


class Carrying(Fused):
    """A block that reads and leaves statistics where it is called with a `carry`; alone it returns the same tensor."""


class Convolution(Carrying):
    """A convolution in a row of modules, which may be handed the norm before it. Alone it computes as it always did."""

    _fused_label = "convolution → statistics"

    def forward(
        self, x: Tensor, *, carry: Carry | None = None, norm: nn.GroupNorm | None = None, silu: bool = False
    ) -> Tensor:
        """The convolution of `x`, or of the norm of `x`."""
        if carry is None:
            return cast(Tensor, super().forward(x))
        conv = _convolution(self)
        if norm is None:
            return carry.put(*convolution(x, conv.weight, conv.bias, geometry=_geometry(conv)))
        return carry.put(*_norm_conv(x, norm, conv, self._fused_settings, silu=silu, statistics=carry.of(x)))


class ResidualBlock(Carrying):
    """x + conv₂(silu(norm₂(conv₁(silu(norm₁(x)))))), of MAISI, MONAI and this project."""

    _fused_label = "residual block"
    norm1: nn.GroupNorm
    norm2: nn.GroupNorm
    conv1: nn.Module
    conv2: nn.Module

    @classmethod
    def _fuse_obstacle(cls, module: nn.Module) -> str | None:
        block = cast(ResidualBlock, module)
        shortcut = cls.shortcut(block)
        return first_reason(
            patterns.norm_obstacle(block.norm1),
            patterns.convolution_obstacle(block.conv1),
            patterns.norm_obstacle(block.norm2),
            patterns.convolution_obstacle(block.conv2),
            None if shortcut is None else patterns.convolution_obstacle(shortcut),
        )

    @staticmethod
    def shortcut(block: nn.Module) -> nn.Module | None:
        """The module on the way past the convolutions, None for an identity."""
        module = cast(nn.Module, block.nin_shortcut)
        return None if isinstance(module, nn.Identity) else module

    def forward(self, x: Tensor, *, carry: Carry | None = None) -> Tensor:
        """(N, O, D, H, W) of (N, C, D, H, W); where the kernels are 3×3×3, x alone or x and conv₁'s output are kept."""
        carry = Carry() if carry is None else carry
        conv1, conv2 = _convolution(self.conv1), _convolution(self.conv2)
        shortcut = self.shortcut(self)
        side = None if shortcut is None else _convolution(shortcut)
        if not (_is_cube(conv1) and _is_cube(conv2)):
            inner, found = _norm_conv(x, self.norm1, conv1, self._fused_settings, silu=True, statistics=carry.of(x))
            out, _ = _norm_conv(inner, self.norm2, conv2, self._fused_settings, silu=True, statistics=found)
            return out + (x if shortcut is None else cast(Tensor, shortcut(x)))
        parameters = BlockParameters(
            self.norm1.weight,
            self.norm1.bias,
            conv1.weight,
            conv1.bias,
            self.norm2.weight,
            self.norm2.bias,
            conv2.weight,
            conv2.bias,
            None if side is None else side.weight,
            None if side is None else side.bias,
        )
        out, found = residual_block(
            x,
            parameters,
            (self.norm1.num_groups, self.norm2.num_groups),
            (self.norm1.eps, self.norm2.eps),
            tight=self._fused_settings.tight,
            statistics=carry.of(x),
            tile_bytes=self._fused_settings.tile_bytes,
        )
        return carry.put(out, found)


def _is_cube(conv: nn.Conv3d) -> bool:
    return conv.kernel_size == (3, 3, 3) and _geometry(conv) == Geometry()


class Downsample(Carrying):
    """One voxel of zeros at the far end of each axis, then a stride-2 convolution; the padded copy is not kept."""

    _fused_label = "padding → convolution"
    conv: nn.Module

    @classmethod
    def _fuse_obstacle(cls, module: nn.Module) -> str | None:
        pad = getattr(module, "pad", None)
        watched = patterns.watched(pad) if isinstance(pad, nn.Module) else None
        return first_reason(watched, patterns.convolution_obstacle(cast(Downsample, module).conv))

    def forward(self, x: Tensor, *, carry: Carry | None = None) -> Tensor:
        """(N, C, ⌊D/2⌋, ⌊H/2⌋, ⌊W/2⌋)."""
        conv = _convolution(self.conv)
        out, found = convolution(x, conv.weight, conv.bias, geometry=_geometry(conv), far_padding=1)
        return out if carry is None else carry.put(out, found)


class Upsample(Fused):
    """Trilinear interpolation to twice the size, then a convolution; the interpolated tensor is never made."""

    _fused_label = "upsampling → convolution"
    conv: nn.Module

    @classmethod
    def _fuse_obstacle(cls, module: nn.Module) -> str | None:
        if getattr(module, "use_convtranspose", False):
            return "transposed convolution"
        return patterns.convolution_obstacle(cast(Upsample, module).conv)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, 2D, 2H, 2W)."""
        conv = _convolution(self.conv)
        return upsample_conv(x, conv.weight, conv.bias, tile_bytes=self._fused_settings.tile_bytes)


class Cascade(Fused):
    """Modules applied one after the other, held under the name ``blocks``."""

    _fused_label = "row of blocks"

    def _fused_row(self) -> list[nn.Module]:
        return list(cast(nn.ModuleList, self.blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Each module in turn, statistics handed on between those that have any use for them."""
        row, carry = self._fused_row(), Carry()
        for step in self._fused_settings.steps:
            modules = row[step.first : step.last + 1]
            first, last = modules[0], modules[-1]
            if not step.norm:
                x = first(x, carry=carry) if isinstance(first, Carrying) else first(x)
            elif any(map(_needs_its_call, modules[:-1])) or (step.convolution and not isinstance(last, Convolution)):
                for module in modules:
                    x = module(x)
            elif step.convolution:
                x = last(x, carry=carry, norm=first, silu=step.silu)
            else:
                norm = cast(nn.GroupNorm, first)
                x = group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
        return x


def _needs_its_call(module: nn.Module) -> bool:
    """Whether somebody gave a module hooks since it was fused: whoever watches it, or FSDP, which gathers it there."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return any(map(bool, hooks))


class Sequence(Cascade):
    """`nn.Sequential`."""

    def _fused_row(self) -> list[nn.Module]:
        return list(cast(nn.Sequential, self))

    def forward(self, x: Tensor) -> Tensor:
        """As `Cascade`."""
        if "_fused_settings" in self.__dict__:
            return super().forward(x)
        # A slice of a Sequential is a new one of the same class, without settings.
        return cast(Tensor, nn.Sequential.forward(cast(nn.Sequential, self), x))

"""`fuse`: a finished network's GroupNorm → SiLU → Conv3d paths on the fused operators. `unfuse`: the way back."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast, get_args, overload

from torch import nn

from decovae.models import fused, fused_video, patterns
from decovae.models.fused import Fused, Settings, Step
from decovae_kernels.norm_conv import TILE_BYTES

Module = TypeVar("Module", bound=nn.Module)
Memory = Literal["balanced", "tight"]

_DIFFUSERS = "diffusers.models.autoencoders"

BLOCKS: dict[str, type[Fused]] = {
    f"{patterns.OURS}.ResidualBlock": fused.ResidualBlock,
    f"{patterns.OURS}.Downsample": fused.Downsample,
    f"{patterns.OURS}.Upsample": fused.Upsample,
    f"{patterns.MAISI}.MaisiResBlock": fused.ResidualBlock,
    f"{patterns.MAISI}.MaisiDownsample": fused.Downsample,
    f"{patterns.MAISI}.MaisiUpsample": fused.Upsample,
    f"{patterns.MONAI}.AEKLResBlock": fused.ResidualBlock,
    f"{patterns.MONAI}.AEKLDownsample": fused.Downsample,
    "diffusers.models.resnet.TemporalResnetBlock": fused_video.TemporalBlock,
    f"{_DIFFUSERS}.autoencoder_kl_hunyuan_video.HunyuanVideoResnetBlockCausal3D": fused_video.HunyuanBlock,
    f"{_DIFFUSERS}.autoencoder_kl_magvit.EasyAnimateResidualBlock3D": fused_video.MagvitBlock,
    f"{_DIFFUSERS}.autoencoder_kl_cogvideox.CogVideoXResnetBlock3D": fused_video.CogVideoXBlock,
}
"""Qualified name of a class → the forward that takes the place of its own."""

CASCADES = (
    f"{patterns.OURS}.Cascade",
    f"{patterns.MAISI}.MaisiEncoder",
    f"{patterns.MAISI}.MaisiDecoder",
    f"{patterns.MONAI}.Encoder",
    f"{patterns.MONAI}.Decoder",
)
"""Qualified names of the classes that `fused.Cascade` serves."""


@dataclass
class FuseReport:
    """What `fuse` did.

    Attributes:
        replaced: (name of the module, what runs fused there).
        left: (name of the module, why it computes as before).
    """

    replaced: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [f"fused {len(self.replaced)}, left {len(self.left)}"]
        for sign, found in (("+", self.replaced), ("-", self.left)):
            for what, count in Counter(what for _, what in found).most_common():
                first = next(name for name, said in found if said == what)
                rows.append(f"  {sign} {count:3d} × {what}, {'at' if count == 1 else 'first at'} {first or 'the root'}")
        return "\n".join(rows)


@overload
def fuse(module: Module, *, memory: Memory = ..., tile_bytes: int = ..., report: Literal[False] = ...) -> Module: ...


@overload
def fuse(
    module: Module, *, memory: Memory = ..., tile_bytes: int = ..., report: Literal[True]
) -> tuple[Module, FuseReport]: ...


def fuse(
    module: Module, *, memory: Memory = "balanced", tile_bytes: int = TILE_BYTES, report: bool = False
) -> Module | tuple[Module, FuseReport]:
    """Let a network compute its convolutional blocks by fused operators, in place; `unfuse` undoes it.

    Parameters, buffers and ``state_dict`` keys stay as they are, so checkpoints load before and after, and so do
    ``isinstance``, ``deepcopy``, pickling and the hooks of the modules that are still called: fused blocks, rows of
    blocks, and convolutions in a row. Fused are, in 3D:

    - residual blocks, down- and upsampling of MONAI's ``AutoencoderKlMaisi`` and ``AutoencoderKL`` and of this
      project's `Autoencoder`, and the norms and first convolutions between them;
    - GroupNorm → SiLU → Conv3d, GroupNorm → Conv3d and GroupNorm → SiLU in ``nn.Sequential``s;
    - diffusers' ``TemporalResnetBlock``, and the norms and activations of its causal residual blocks (HunyuanVideo,
      Magvit, CogVideoX).

    Attention, nearest-neighbour upsampling, transposed convolutions, other paddings than zeros, reparametrised weights,
    and whatever has hooks inside or a forward of its own are left. MAISI's ``num_splits`` and ``save_mem`` have no
    effect on what is fused (above ``tile_bytes`` the operators cut by themselves), nor has ``norm_float16``:
    normalised features are not stored. A fused block returns the dtype that its convolutions compute in: its input's,
    and autocast's where that is on.

    Fuse before sharding with FSDP, and again after editing a network. Fusing again changes the options.

    Args:
        module: a network, or a part of one; takes (N, C, D, H, W) floating-point features in any memory layout.
        memory: what a residual block keeps for backward: "balanced", its input and its first convolution's output;
            "tight", its input alone, and that convolution runs twice.
        tile_bytes: without gradients, temporaries larger than this are computed in slabs, to the same result as whole;
            0 never cuts.
        report: return what was replaced and what was left instead of printing a summary of it.

    Returns:
        The module that was given; with ``report``, that and a `FuseReport`.

    Raises:
        TypeError: ``module`` is not an ``nn.Module``.
        ValueError: an unknown ``memory``, a negative ``tile_bytes``, or fused modules that were sharded since.
    """
    if memory not in get_args(Memory):
        raise ValueError(f"memory={memory!r} is unknown: use one of {', '.join(get_args(Memory))}")
    if tile_bytes < 0:
        raise ValueError(f"tile_bytes={tile_bytes} is negative: 0 never cuts")
    unfuse(module)
    visit = _Visit(Settings(memory == "tight", tile_bytes))
    visit.module(module, "")
    visit.rest(module)
    if report:
        return module, visit.report
    print(visit.report)
    return module


def unfuse(module: Module) -> Module:
    """Give every fused module in a network its own forward back, in place.

    Args:
        module: a network, fused or not.

    Returns:
        The module that was given, as it was before `fuse`.

    Raises:
        TypeError: ``module`` is not an ``nn.Module``.
        ValueError: fused modules were sharded or parametrised since: their class is no longer the fused one.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"fuse and unfuse take a torch.nn.Module, got {type(module).__name__}")
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, Fused)]
    for name, layer in layers:
        if patterns.plain_class(layer) is type(layer):
            kind = type(layer).__name__
            raise ValueError(
                f"{name or 'this'} was fused and then made a {kind}: undo that first (parametrization, sharding)"
            )
    for _, layer in layers:
        layer.__class__ = patterns.plain_class(layer)  # type: ignore[assignment]
        layer.__dict__.pop("_fused_settings", None)
    return module


class _Visit:
    """One walk over a network, which replaces what it can."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.report = FuseReport()
        self.seen: set[int] = set()
        self.settled: set[int] = set()

    def module(self, module: nn.Module, name: str) -> None:
        """Replace a block, or what is inside a container and then the container's row."""
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        forward = BLOCKS.get(patterns.name_of(module))
        if forward is not None:
            self.settled.update(map(id, module.modules()))
            reason = "its forward was replaced" if "forward" in module.__dict__ else forward._fuse_obstacle(module)
            if reason is None:
                self.replace(module, name, forward)
            else:
                self.leave(name, reason)
            return
        for child_name, child in module.named_children():
            self.module(child, _join(name, child_name))
        if patterns.name_of(module) in CASCADES:
            self.row(module, _join(name, "blocks"), fused.Cascade, cast(nn.Module, module.blocks))
        elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            self.row(module, name, fused.Sequence, module)

    def replace(self, module: nn.Module, name: str, forward: type[Fused], steps: tuple[Step, ...] = ()) -> None:
        """Give a module another forward."""
        module.__class__ = fused.fused_class(forward, patterns.plain_class(module))
        module.__dict__["_fused_settings"] = self.settings._replace(steps=steps)
        if not issubclass(forward, fused.Cascade):
            self.report.replaced.append((name, forward._fused_label))

    def leave(self, name: str, reason: str) -> None:
        """Say why a module stays."""
        self.report.left.append((name, reason))

    def row(self, module: nn.Module, name: str, forward: type[Fused], holder: nn.Module) -> None:
        """Replace a container's loop over its modules, if that gains anything."""
        # Not `named_children`, which names a module that stands in two places once.
        children = [(_join(name, place), child) for place, child in holder._modules.items() if child is not None]
        if "forward" in module.__dict__ or len(children) != len(holder._modules):
            return
        steps = _Row(self, children).steps()
        carrying = sum(isinstance(child, fused.Carrying) for _, child in children)
        if carrying > 1 or any(step.norm for step in steps):
            self.replace(module, name, forward, steps)

    def rest(self, module: nn.Module) -> None:
        """Name the layers that no pattern took in."""
        for name, layer in module.named_modules():
            if id(layer) in self.settled:
                continue
            if isinstance(layer, nn.Upsample):
                self.leave(name, f"{layer.mode} upsampling")
            elif isinstance(layer, nn.ConvTranspose3d):
                self.leave(name, "transposed convolution")
            elif isinstance(layer, nn.GroupNorm):
                parent = type(module.get_submodule(name.rpartition(".")[0]))
                self.leave(name, f"group norm in {parent.__name__}, which is no known pattern")


class _Row:
    """Modules that are applied one after the other."""

    def __init__(self, visit: _Visit, children: list[tuple[str, nn.Module]]) -> None:
        self.visit = visit
        self.children = children

    def steps(self) -> tuple[Step, ...]:
        """How to walk the row; convolutions that take part in a step are replaced."""
        steps: list[Step] = []
        place = 0
        while place < len(self.children):
            step, place = self.step(place)
            steps.append(step)
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            # A convolution that the next step's norm can have its statistics from.
            if not step.norm and following is not None and self.begins_with_norm(following):
                name, child = self.children[step.first]
                if self.obstacle(child) is None:
                    self.visit.replace(child, name, fused.Convolution)
        return tuple(steps)

    def step(self, place: int) -> tuple[Step, int]:
        """The step that begins at a place, and the place after it."""
        name, child = self.children[place]
        if not isinstance(child, nn.GroupNorm):
            return Step(place, place), place + 1
        self.visit.settled.add(id(child))
        after = self.skip(place + 1)
        silu = after < len(self.children) and patterns.silu_obstacle(self.children[after][1]) is None
        target = self.skip(after + 1) if silu else after
        reason = patterns.norm_obstacle(child)
        refused = self.obstacle(self.children[target][1]) if target < len(self.children) else "no convolution"
        if reason is None and refused is None:
            target_name, convolution = self.children[target]
            self.visit.replace(convolution, target_name, fused.Convolution)
            self.visit.report.replaced[-1] = (target_name, f"norm → {'SiLU → ' * silu}convolution")
            return Step(place, target, norm=True, silu=silu, convolution=True), target + 1
        if reason is None and silu and refused not in ("1D", "2D"):
            self.visit.report.replaced.append((name, "norm → SiLU"))
            return Step(place, after, norm=True, silu=True), after + 1
        missing = f"no SiLU after it, and {refused}" if not silu else refused
        self.visit.leave(name, reason or cast(str, missing))
        return Step(place, place), place + 1

    def skip(self, place: int) -> int:
        """The first place from this one on whose module does something."""
        while place < len(self.children) and patterns.does_nothing(self.children[place][1]):
            place += 1
        return place

    def obstacle(self, child: nn.Module) -> str | None:
        """Why a module is no convolution that a step can take in."""
        return patterns.convolution_obstacle(child, called=True)

    def begins_with_norm(self, step: Step) -> bool:
        """Whether a step can use the statistics of what comes before it."""
        if step.norm:
            return step.convolution
        return isinstance(self.children[step.first][1], fused.ResidualBlock)


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child

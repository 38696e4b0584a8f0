"""Every Triton kernel once in each of its main variants, on small odd shapes, against float64.

python -m bench.tour [--only WORD …] [--quick] [--canaries] [--out FILE]

Runs on the GPU, or in Triton's interpreter where there is none; a minute at most. Prints a line a case: its largest
error as a share of what is allowed, and the kernels that it launched. With ``--canaries`` all memory around a kernel's
arguments is poisoned; ``--quick`` runs as few cases as launch every kernel. Exits with 1 if a case is wrong.
`bench.sanitize` runs it under NVIDIA's compute-sanitizer.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.settings import exact_settings
from decovae.errors import InputError
from decovae.files import write_text
from decovae_kernels import (
    BlockParameters,
    Geometry,
    Terms,
    _launch,
    channel_moments,
    convolution,
    decorrelation,
    group_norm,
    latent_head,
    moments_decorrelation,
    norm_conv,
    reference,
    residual_block,
    upsample_conv,
)
from decovae_kernels import terms as loss_terms
from decovae_kernels.philox import normals

Shape = tuple[int, ...]
EPS = (1e-6, 1e-5)
ALL = Terms(1.0, 0.5, 2.0, 0.25, 1.5)
SEED = 2**62 + 12345

ALLOWED = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Norm of an error over the norm of the truth: several roundings of the dtype, far less than any wrong index makes."""


QUICK = (
    "decorrelation, 3 channels",
    "latent head, 4 channels, channels_last",
    "loss of moments, 20 channels",
    "moments, 40 channels",
    "group norm, 2×6×5×4×7, channels_last",
    "residual blocks in slabs",
    "norm and convolution, grouped",
    "upsampling convolution, 1×3×3×2×5",
    "upsampling convolution, 1×3×2×3×2",
)
"""How cases begin that launch every kernel between them: enough for an interpreter."""


class Pair(NamedTuple):
    """What was computed, and the same in float64; an error is relative to the norm of the truth, or to `floor`."""

    found: Tensor
    truth: Tensor
    floor: float = 1e-3


@dataclass(frozen=True)
class Case:
    """One call forward and, where it has one, backward.

    Attributes:
        name: what is run, and in which variant.
        dtype: of the tensors that the kernels read and write.
        run: computes on a device; returns results beside their truths.
    """

    name: str
    dtype: torch.dtype
    run: Callable[[torch.device], list[Pair]]


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        name: the case's.
        share: the largest error over what is allowed; at most 1 is right.
        kernels: names of the kernels launched, each once, in the order of their first launch.
        error: why there is no share, or None.
        seconds: wall time, compilation included.
    """

    name: str
    share: float | None
    kernels: list[str] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        return self.share is not None and self.share <= 1


def drawn(shape: Shape, dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0) -> Tensor:
    """Numbers around different means, the same on every device, on the CPU."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    x = torch.randn(shape, generator=generator)
    if len(shape) > 2:
        scale = torch.rand(shape[1], generator=generator).add(0.5).view(-1, *[1] * (len(shape) - 2))
        x = (x + scale) * scale
    return laid_out(x.to(dtype), layout)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """`x` in another layout; ``sliced`` is every other channel of a larger tensor."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return torch.stack([x, x + 1], dim=2).flatten(1, 2)[:, ::2]
    return x.contiguous()


def compared(
    ours: Callable[..., Sequence[Tensor]],
    truth: Callable[..., Sequence[Tensor]],
    leaves: Sequence[Tensor | None],
    device: torch.device,
) -> list[Pair]:
    """Results and the gradients of all leaves, of a weighted sum of the results that no symmetry cancels.

    Some that have a number a channel cancel, that of a bias before a norm to nothing: they are held to the largest.
    """
    mine = [None if x is None else _moved(x, device).requires_grad_() for x in leaves]
    exact = [None if x is None else x.double().requires_grad_() for x in leaves]
    found, expected = list(ours(*mine)), list(truth(*exact))
    weights = [torch.linspace(-1, 2, y.numel()).view(y.shape) / math.sqrt(y.numel()) for y in expected]
    along = torch.autograd.grad(
        found,
        [x for x in mine if x is not None],
        [w.to(y) for w, y in zip(weights, found, strict=True)],
        allow_unused=True,
    )
    wanted = torch.autograd.grad(
        expected,
        [x for x in exact if x is not None],
        [w.to(y.dtype).double() for w, y in zip(weights, found, strict=True)],
        allow_unused=True,
    )
    pairs = [Pair(a, b) for a, b in zip(found, expected, strict=True)]
    gradients = [(a, b) for a, b in zip(along, wanted, strict=True) if a is not None and b is not None]
    floor = 0.1 * max((float(b.norm()) for _, b in gradients if b.ndim == 1), default=0.0)
    return pairs + [Pair(a, b, floor) if b.ndim == 1 and floor else Pair(a, b) for a, b in gradients]


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device with the same strides, gaps included."""
    whole = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype)
    whole.untyped_storage().copy_(x.untyped_storage())
    return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset()).detach()


def packed_moments(x: Tensor) -> Tensor:
    """The definition's moments as one vector."""
    mean, scatter = reference.channel_moments(x)
    return torch.cat([mean.new_full((1,), x.numel() // x.shape[1]), mean, scatter.flatten()])


class _Loss(torch.autograd.Function):
    """A sum of decorrelation losses of packed moments, by the equations."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> Tensor:
        loss, direction = loss_terms.loss_and_direction(packed, ALL)
        ctx.save_for_backward(direction)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (direction,) = ctx.saved_tensors
        found: Tensor = grad * direction
        return found


def loss_of(packed: Tensor) -> Tensor:
    value: Tensor = _Loss.apply(packed)
    return value


def decorrelation_case(channels: int, spatial: Shape, dtype: torch.dtype, layout: str, device: torch.device) -> Any:
    x = drawn((3, channels, *spatial), dtype, layout)
    scale = x.numel()  # keeps float16's gradients away from zero
    return compared(
        lambda x: [decorrelation(x, ALL) * scale], lambda x: [loss_of(packed_moments(x)) * scale], [x], device
    )


def moments_case(channels: int, spatial: Shape, dtype: torch.dtype, layout: str, device: torch.device) -> Any:
    x = drawn((3, channels, *spatial), dtype, layout)
    return compared(lambda x: [channel_moments(x)], lambda x: [packed_moments(x)], [x], device)


def packed_loss_case(channels: int, device: torch.device) -> Any:
    packed = packed_moments(drawn((3, channels, 50)))
    return compared(lambda x: [moments_decorrelation(x, ALL)], lambda x: [loss_of(x)], [packed], device)


def head_case(channels: int, spatial: Shape, dtype: torch.dtype, layout: str, device: torch.device) -> Any:
    mu, spread = (drawn((3, channels, *spatial), dtype, layout, seed) for seed in (0, 1))
    samples = mu.numel() // channels
    first = 2**31  # of its volumes: samples are numbered in 64 bits
    epsilon = normals(torch.tensor([SEED]), 3, first * samples // 3, samples, channels).double()
    epsilon = epsilon.view(channels, 3, *spatial).movedim(0, 1)
    weight = 1 / samples  # moments grow with the samples, and would drown the rest

    def ours(mu: Tensor, spread: Tensor) -> list[Tensor]:
        z, kl, packed = latent_head(mu, spread, torch.tensor([SEED], device=device), offset=3, first=first)
        return [z, kl, packed * weight]

    def truth(mu: Tensor, spread: Tensor) -> list[Tensor]:
        z, kl, packed = reference.latent_head(mu, spread, epsilon)
        return [z, kl, packed * weight]

    return compared(ours, truth, [mu, spread], device)


def norm_case(
    shape: Shape, groups: int, dtype: torch.dtype, layout: str, silu: bool, shifted: bool, device: torch.device
) -> Any:
    leaves = [drawn(shape, dtype, layout), *_affine(shape[1]), drawn((shape[1],), seed=3) if shifted else None]

    def ours(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None) -> list[Tensor]:
        return [group_norm(x, weight, bias, groups, EPS[0], silu=silu, shift=shift)]

    def truth(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None) -> list[Tensor]:
        return [reference.group_norm(x, weight, bias, groups, EPS[0], silu=silu, shift=shift)]

    return compared(ours, truth, leaves, device)


def block_case(
    shape: Shape, out: int, groups: tuple[int, int], dtype: torch.dtype, tight: bool, biases: bool, device: torch.device
) -> Any:
    leaves = [drawn(shape, dtype, "channels_last"), *_block(shape[1], out, biases=biases)]
    return compared(
        lambda x, *p: residual_block(x, BlockParameters(*p), groups, EPS, tight=tight)[:1],
        lambda x, *p: [reference.residual_block(x, p, groups, EPS)],
        leaves,
        device,
    )


def slabs_case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """Without gradients, in slabs of one plane, and with the statistics handed on to a second block."""
    x, parameters = drawn(shape, dtype, "channels_last"), _block(shape[1], shape[1], biases=True)
    there: list[Any] = [None if p is None else p.to(device) for p in parameters]
    here = BlockParameters(*there)
    exact = [None if p is None else p.double() for p in parameters]
    with torch.no_grad():
        y, statistics = residual_block(x.to(device), here, (2, 3), EPS, tile_bytes=1)
        y, _ = residual_block(y, here, (2, 3), EPS, statistics=statistics, tile_bytes=1)
        truth = x.double()
        for _ in range(2):
            truth = reference.residual_block(truth, exact, (2, 3), EPS)
    return [Pair(y, truth)]


def norm_conv_case(shape: Shape, dtype: torch.dtype, geometry: Geometry, kernel: Shape, device: torch.device) -> Any:
    channels = shape[1]
    leaves = [
        drawn(shape, dtype), *_affine(channels),
        drawn((4, channels // geometry.groups, *kernel), seed=4) * 0.2, drawn((4,), seed=5),
    ]  # fmt: skip

    def truth(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        return [F.conv3d(reference.group_norm(x, gamma, beta, 3, EPS[0]), weight, bias, *geometry)]

    return compared(
        lambda x, gamma, beta, *convolution: norm_conv(x, gamma, beta, 3, EPS[0], *convolution, geometry=geometry)[:1],
        truth,
        leaves,
        device,
    )


def convolution_case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    leaves = [drawn(shape, dtype), drawn((5, shape[1], 3, 3, 3), seed=4) * 0.2, drawn((5,), seed=5)]
    geometry = Geometry((2, 2, 2), (0, 0, 0))
    return compared(
        lambda *x: convolution(*x, geometry=geometry, far_padding=1)[:1],
        lambda x, weight, bias: [F.conv3d(F.pad(x, (0, 1) * 3), weight, bias, stride=2)],
        leaves,
        device,
    )


def upsample_case(
    shape: Shape, out: int, dtype: torch.dtype, layout: str, method: str, tile_bytes: int, device: torch.device
) -> Any:
    leaves = [
        drawn(shape, dtype, layout),
        (drawn((out, shape[1], 3, 3, 3), seed=4) / math.sqrt(27 * shape[1])).to(dtype),
        drawn((out,), seed=5),
    ]
    return compared(
        lambda *x: [upsample_conv(*x, method=method, tile_bytes=tile_bytes)],
        lambda *x: [reference.upsample_conv(*x)],
        leaves,
        device,
    )


def _affine(channels: int) -> list[Tensor]:
    return [1 + 0.2 * drawn((channels,), seed=1), 0.2 * drawn((channels,), seed=2)]


def _block(channels: int, out: int, *, biases: bool) -> list[Tensor | None]:
    """Parameters in the order of `BlockParameters`, with a shortcut where the number of channels changes."""

    def bias(seed: int) -> Tensor | None:
        return 0.2 * drawn((out,), seed=seed) if biases else None

    shortcut = channels != out
    return [
        *_affine(channels), 0.2 * drawn((out, channels, 3, 3, 3), seed=3), bias(4),
        *_affine(out), 0.2 * drawn((out, out, 3, 3, 3), seed=5), bias(6),
        0.2 * drawn((out, channels, 1, 1, 1), seed=7) if shortcut else None, bias(8) if shortcut else None,
    ]  # fmt: skip


def cases() -> list[Case]:
    """All of them: kernels by their number of channels, layout, dtype, and what is optional."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    found: list[Case] = []

    def add(name: str, dtype: torch.dtype, run: Callable[..., Any], *arguments: Any) -> None:
        found.append(Case(f"{name}, {str(dtype).removeprefix('torch.')}", dtype, partial(run, *arguments)))

    latents: list[tuple[int, Shape, torch.dtype, str]] = [
        (1, (2, 5), f16, "contiguous"),
        (3, (3, 5, 7), f32, "sliced"),
        (4, (9, 11, 13), bf16, "contiguous"),
        (4, (5, 7, 3), f32, "channels_last"),
        (8, (7, 9), bf16, "contiguous"),
        (8, (7, 9), f16, "channels_last"),
        (12, (5, 9), f32, "contiguous"),
        (16, (5, 9), bf16, "contiguous"),
        (16, (5, 9), f32, "channels_last"),
        (40, (5, 7), f32, "contiguous"),
        (64, (3, 5), bf16, "channels_last"),
    ]
    for channels, spatial, dtype, layout in latents:
        what = f"{channels} channels, {layout}"
        add(f"decorrelation, {what}", dtype, decorrelation_case, channels, spatial, dtype, layout)
        if channels in (3, 12, 40):
            add(f"moments, {what}", dtype, moments_case, channels, spatial, dtype, layout)
        if channels in (1, 3, 4, 8, 12):
            add(f"latent head, {what}", dtype, head_case, channels, spatial, dtype, layout)
    for channels in (3, 20):
        add(f"loss of moments, {channels} channels", f32, packed_loss_case, channels)

    norms: list[tuple[Shape, int, torch.dtype, str, bool, bool]] = [
        ((2, 6, 5, 4, 7), 3, f32, "contiguous", True, False),
        ((2, 6, 5, 4, 7), 3, bf16, "channels_last", True, True),
        ((1, 4, 13, 11, 17), 2, f16, "channels_last", False, True),  # several chunks a volume
        ((1, 2, 31, 29, 23), 1, bf16, "contiguous", True, False),
        ((1, 96, 3, 3), 32, f32, "channels_last", True, False),  # more channels than a tile holds
        ((1, 8, 8, 8, 8), 4, bf16, "channels_last", True, False),  # tiles without a remainder
    ]
    for shape, groups, dtype, layout, silu, shifted in norms:
        what = f"{_size(shape)}, {layout}{', SiLU' if silu else ''}{', shift' if shifted else ''}"
        add(f"group norm, {what}", dtype, norm_case, shape, groups, dtype, layout, silu, shifted)

    add("residual block, 6 to 12 channels", bf16, block_case, (2, 6, 5, 4, 7), 12, (3, 4), bf16, False, True)
    add("residual block, 6 channels, tight", f32, block_case, (1, 6, 3, 5, 4), 6, (2, 3), f32, True, True)
    add("residual block, no biases", f16, block_case, (1, 5, 3, 2, 3), 5, (5, 1), f16, False, False)
    add("residual blocks in slabs", f32, slabs_case, (2, 6, 4, 3, 5), f32)
    add("norm and convolution", bf16, norm_conv_case, (2, 6, 5, 4, 7), bf16, Geometry(), (3, 3, 3))
    add("norm and convolution, grouped", f32, norm_conv_case, (1, 6, 3, 4, 5), f32,
        Geometry(padding=(0, 0, 0), groups=2), (1, 1, 1))  # fmt: skip
    add("convolution, padded at the far end", bf16, convolution_case, (2, 3, 6, 4, 8), bf16)

    upsamplings: list[tuple[Shape, int, torch.dtype, str, str, int]] = [
        ((1, 3, 3, 2, 5), 4, f32, "channels_last", "factorised", 0),
        ((1, 2, 4, 1, 2), 6, bf16, "contiguous", "factorised", 3 * 2 * 27 * 6 * 2),  # slots that wrap around
        ((1, 4, 1, 3, 1), 24, f16, "channels_last", "factorised", 0),
        ((1, 3, 2, 3, 2), 4, f32, "contiguous", "direct", 0),
        ((1, 20, 3, 1, 1), 2, bf16, "channels_last", "direct", 1),
    ]
    for shape, out, dtype, layout, method, tile_bytes in upsamplings:
        slabs = ", in slabs" if tile_bytes else ""
        add(f"upsampling convolution, {_size(shape)} to {out} channels, {layout}, {method}{slabs}", dtype,
            upsample_case, shape, out, dtype, layout, method, tile_bytes)  # fmt: skip
    return found


def _size(shape: Shape) -> str:
    return "×".join(map(str, shape))


def run_case(case: Case, device: torch.device) -> Outcome:
    """Compute a case with Triton, and measure its errors."""
    begin = time.perf_counter()
    kernels: list[str] = []
    share: float | None = None
    error: str | None = None
    with mock.patch.dict(os.environ, DECOVAE_KERNELS="triton"), exact_settings(device), _launch.recorded() as launches:
        try:
            pairs = case.run(device)
            share = max(_error(pair) for pair in pairs) / ALLOWED[case.dtype]
        except Exception as raised:  # one case tells nothing about the next, unless the GPU is lost
            error = f"{type(raised).__name__}: {str(raised).strip().splitlines()[0] if str(raised) else ''}"
        kernels = list(dict.fromkeys(launched.kernel for launched in launches))
    return Outcome(case.name, share, kernels, error, time.perf_counter() - begin)


def _error(pair: Pair) -> float:
    """Norm of the difference over that of the truth; infinite for what is not a number, or has another shape."""
    found, truth = pair.found.detach().cpu().double(), pair.truth.detach()
    if found.shape != truth.shape:
        return math.inf
    error = float((found - truth).norm() / truth.norm().clamp_min(pair.floor))
    return error if math.isfinite(error) else math.inf


def all_kernels() -> set[str]:
    """Names of all kernels that are launched: jitted functions that no other jitted function calls."""
    from bench.canaries import triton_modules

    functions = {
        value.fn
        for module in triton_modules()
        for value in vars(module).values()
        if getattr(value, "fn", None) is not None and getattr(value.fn, "__module__", "").startswith("decovae_kernels")
    }
    called = {name for function in functions for name in function.__code__.co_names}
    return {function.__name__ for function in functions if function.__name__ not in called}


def device_of_kernels() -> torch.device:
    """The GPU, or the CPU for Triton's interpreter.

    Raises:
        InputError: there is no Triton.
    """
    if importlib.util.find_spec("triton") is None:
        raise InputError("triton: not installed, so there are no kernels to run; use Linux, where it has wheels.")
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0 if all is right, 1 if not, 2 for a wrong option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="words; only cases whose name has one of them")
    parser.add_argument("--quick", action="store_true", help="only as many cases as launch every kernel")
    parser.add_argument("--canaries", action="store_true", help="poison the memory around every kernel's arguments")
    parser.add_argument("--out", type=Path, help="a JSON file for what was seen")
    options = parser.parse_args(arguments)
    try:
        device = device_of_kernels()
        chosen = [case for case in cases() if not options.only or any(word in case.name for word in options.only)]
        if options.quick:
            chosen = [case for case in chosen if case.name.startswith(QUICK)]
        if not chosen:
            raise InputError(f"--only {' '.join(options.only)}: no case has such a name; leave it out for all of them.")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    outcomes: list[Outcome] = []
    with contextlib.ExitStack() as stack:
        if options.canaries:
            from bench.canaries import guarded

            stack.enter_context(guarded())
        for case in chosen:
            outcomes.append(run_case(case, device))
            print(line(outcomes[-1]), flush=True)
            if options.out:  # each time, as a case may end the process
                _write(options.out, outcomes, len(chosen), ended=False)
            if device.type == "cuda" and not _alive(device):
                print("the GPU does not answer after this case; the others are not run")
                break
    wrong = [outcome for outcome in outcomes if not outcome.right]
    launched = {kernel for outcome in outcomes for kernel in outcome.kernels}
    print(f"{len(outcomes)} of {len(chosen)} cases, {len(launched)} kernels, {len(wrong)} wrong")
    if options.out:
        _write(options.out, outcomes, len(chosen), ended=True)
    return 1 if wrong or len(outcomes) < len(chosen) else 0


def _write(out: Path, outcomes: Sequence[Outcome], chosen: int, *, ended: bool) -> None:
    """What was seen so far, of how many cases, and whether the tour came to its end by itself."""
    seen = {
        "cases": [asdict(outcome) for outcome in outcomes],
        "chosen": chosen,
        "kernels": sorted({kernel for outcome in outcomes for kernel in outcome.kernels}),
        "wrong": sum(not outcome.right for outcome in outcomes),
        "ended": ended,
    }
    write_text(out, json.dumps(seen, indent=2) + "\n")


def _alive(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def line(outcome: Outcome) -> str:
    """A case for people to read."""
    if outcome.share is None:
        return f"wrong {outcome.name}: {outcome.error}"
    word = "ok   " if outcome.right else "wrong"
    return f"{word} {outcome.name}: {outcome.share:.2g} of the allowed error; {' '.join(outcome.kernels)}"


if __name__ == "__main__":
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton asks for it when it is first imported, which has happened by now.
        interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
        os.execve(sys.executable, [sys.executable, "-m", "bench.tour", *sys.argv[1:]], interpreted)
    sys.exit(main())

"""The convolutional blocks and the autoencoder against plain torch, eager and compiled, MONAI's MAISI and Liger-Kernel.

    pytest bench/test_blocks.py --benchmark-only --benchmark-json FILE, then python -m bench.table FILE

A group is one block at one shape, dtype and direction; its rows are the ones to compare. Forward is without gradients,
as in inference. Forward+backward gives the gradients of all parameters and, but for the training step, of what goes in,
from a given gradient of what comes out. A time is one call from Python until the device is done.

On CUDA shapes are those of the paper's training (two 96³ patches) and of one whole latent, norm + act in both dtypes,
the rest in bfloat16 by autocast with float32 parameters; on the CPU they are small, and everything but norm + act is
float32. Norm + act takes both layouts, its parameters in the dtype of its input. Otherwise the layout is each
implementation's own: contiguous for MONAI, whose norm takes no other; for the rest, unless the name says which,
channels-last on CUDA and contiguous on the CPU, as is faster there. What is not timed runs once, networks at half size.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import block_baselines, measure
from bench.block_baselines import Budgeted, Checkpointed
from bench.floors import Counting, Floor
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.blocks import ResidualBlock, Upsample
from decovae.training.live_memory import SavedForBackward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_CPU = DEVICE.type == "cpu"
DTYPE = "float32" if ON_CPU else "bfloat16"

GROUPS = 16 if ON_CPU else 32
CONFIG = AutoencoderConfig(channels=(16, 32, 64) if ON_CPU else (64, 128, 256), groups=GROUPS)
NORMS = ["2x16x32x32x32", "2x64x16x16x16"] if ON_CPU else ["2x64x96x96x96"]
FINEST = 32 if ON_CPU else 96
LEVELS = [(2, width, *[FINEST >> level] * 3) for level, width in enumerate(CONFIG.channels)]
IMAGE = (2, 1, FINEST, FINEST, FINEST)
LATENT = (1, 4, 8, 16, 8) if ON_CPU else (1, 4, 32, 64, 32)


@dataclass
class Row:
    """One implementation of a block at one shape.

    Attributes:
        block: what it computes.
        name: of the implementation; the part behind the last dash may be "compiled".
        shape: of what goes in.
        dtype: of what goes in and, on CUDA, of the products.
        direction: "forward" or "forward+backward".
        features: elements of the largest features in it, the size that a copy is compared at.
        channels_last: layout of what goes in, and of the parameters.
        layout: that layout, if it makes another case and not another implementation.
    """

    block: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    direction: str
    features: int
    channels_last: bool
    layout: str | None = None

    @property
    def backward(self) -> bool:
        return self.direction == "forward+backward"

    @property
    def case(self) -> dict[str, str]:
        layout = {} if self.layout is None else {"layout": self.layout}
        shape = "x".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        return {"block": self.block, "shape": shape, "dtype": dtype, **layout, "direction": self.direction}

    @property
    def counting(self) -> Counting:
        return Counting(self.dtype.itemsize, self.backward)

    def place(self, tensor: Tensor) -> Tensor:
        """A tensor on the device, in this row's layout."""
        layout = torch.channels_last_3d if self.channels_last else torch.contiguous_format
        return tensor.to(DEVICE).contiguous(memory_format=layout)


@pytest.fixture(autouse=True)
def _fastest_convolutions() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # as in training
        yield


@pytest.fixture(autouse=True)
def _room() -> None:
    if not ON_CPU:
        torch.cuda.empty_cache()


def skip_what_cannot_run(name: str, timed: bool) -> None:
    if name == "liger" and ON_CPU:
        pytest.skip("Liger-Kernel's GroupNorm is a Triton kernel: needs CUDA")
    if not name.endswith("compiled"):
        return
    if not timed:
        pytest.skip("only compiled to be timed")
    if ON_CPU and not any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU, and there is none")


def compiled(module: nn.Module, *, fullgraph: bool = True) -> nn.Module:
    torch._dynamo.reset()
    result: nn.Module = torch.compile(module, fullgraph=fullgraph, dynamic=False)  # type: ignore[assignment]
    return result


def halved(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:2], *(size // 2 for size in shape[2:]))


def own_layout(name: str) -> bool:
    """Whether an implementation that may choose runs channels-last."""
    return "channels-last" in name or not (ON_CPU or "contiguous" in name or name.startswith("monai"))


def measured(benchmark: Any, row: Row, module: nn.Module, x: Tensor, floor: Floor) -> None:
    """Time one row, and note what it needs beside time.

    Args:
        benchmark: pytest-benchmark's fixture.
        row: what is measured.
        module: takes `x`, and gives features or a loss.
        x: on the device; wants its gradient if that is part of the work.
        floor: the least that has to be moved and multiplied.
    """
    mixed = any(parameter.dtype != row.dtype for parameter in module.parameters())
    wanted = [tensor for tensor in (x, *module.parameters()) if tensor.requires_grad]
    along: Tensor | None = None

    def forward(given: Tensor = x) -> Tensor:
        with torch.autocast(DEVICE.type, row.dtype, enabled=mixed):
            y: Tensor = module(given)
        return y

    def run(given: Tensor = x) -> Any:
        if row.backward:
            return torch.autograd.grad(forward(given), wanted, along)
        with torch.no_grad():
            return forward(given)

    def run_to_the_end() -> None:
        run()
        measure.synchronise(DEVICE)

    try:
        with torch.set_grad_enabled(row.backward):
            y = forward()
        if y.ndim > 0:
            along = torch.randn_like(y)
        result_bytes = sum(tensor.nbytes for tensor in wanted) if row.backward else y.nbytes
        del y
        if benchmark.enabled:
            run_to_the_end()  # compiles, tunes, fills caches
    except torch.OutOfMemoryError:
        available = measure.available_memory(DEVICE) or 0
        pytest.skip(f"does not fit: {available / 1e9:.1f} GB are available on {DEVICE.type}")
    benchmark.group = " ".join(row.case.values())
    benchmark(run_to_the_end)
    in_compiled_code = row.name.endswith("compiled")
    benchmark.extra_info |= {
        "implementation": row.name,
        **row.case,
        "bytes_moved_floor": floor.bytes_moved,
        "flops_floor": floor.flops,
        "copy_bytes_per_second": measure.copy_bandwidth(row.features, row.dtype, DEVICE),
        "matrix_flops_per_second": measure.matrix_rate(row.dtype, DEVICE) if floor.flops else None,
        "peak_extra_bytes": measure.peak_extra_bytes(run, DEVICE, result_bytes),
        "saved_bytes": saved_bytes(module, forward) if row.backward else None,
        # Generated code bypasses the dispatcher, and compilation refuses to run under a mode that would watch it.
        # A view, because the counter's hooks refuse a leaf whose gradient is asked for.
        "flops": None if in_compiled_code else measure.arithmetic(lambda: run(x.view_as(x))),
    }


def saved_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """What a forward keeps for backward; parameters, and what autocast made of them, left out."""
    with SavedForBackward(module) as saved:
        forward()
    return saved.activations


def norm_rows() -> Iterator[tuple[str, str, str, str, str]]:
    for shape in NORMS:
        for dtype in ("float32", "bfloat16"):
            for layout in ("contiguous", "channels-last"):
                for direction in ("forward", "forward+backward"):
                    for name in ("ours", "plain-eager", "plain-compiled", "monai-eager", "liger"):
                        if name != "monai-eager" or layout == "contiguous":  # MONAI's norm takes no other
                            yield shape, dtype, layout, direction, name


@pytest.mark.benchmark(min_rounds=5, max_time=0.5)
@pytest.mark.parametrize(("shape", "dtype", "layout", "direction", "name"), list(norm_rows()))
def test_norm_act(benchmark: Any, shape: str, dtype: str, layout: str, direction: str, name: str) -> None:
    skip_what_cannot_run(name, timed=benchmark.enabled)
    if name == "liger":
        pytest.importorskip("liger_kernel", reason="needs Liger-Kernel: pip install -e '.[bench]'")
    size = tuple(int(length) for length in shape.split("x"))
    last = layout == "channels-last"
    row = Row("norm + act", name, size, getattr(torch, dtype), direction, math.prod(size), last, layout)
    module = block_baselines.norm_act(name.partition("-")[0], size[1], GROUPS).to(DEVICE, row.dtype)
    if name.endswith("compiled"):
        module = compiled(module)
    x = row.place(torch.randn(size, dtype=row.dtype, device=DEVICE)).requires_grad_(row.backward)
    measured(benchmark, row, module, x, row.counting.norm_act(size))


RESIDUAL_BLOCKS = [
    "ours-balanced",
    "ours-tight",
    "plain-contiguous-eager",
    "plain-channels-last-eager",
    "plain-channels-last-compiled",
    "monai-eager",
    "monai-checkpointed",
]


@pytest.mark.benchmark(min_rounds=5, max_time=0.5)
@pytest.mark.parametrize("name", RESIDUAL_BLOCKS)
@pytest.mark.parametrize("size", LEVELS, ids=lambda size: f"{size[1]}x{size[2]}")
def test_residual_block(benchmark: Any, size: tuple[int, ...], name: str) -> None:
    skip_what_cannot_run(name, timed=benchmark.enabled)
    row = training_row("residual block", name, size, math.prod(size))
    kind, _, mode = name.partition("-")
    module = block_baselines.residual_block(mode if kind == "ours" else kind, size[1], GROUPS)
    plain = ResidualBlock(size[1], size[1], groups=GROUPS, eps=CONFIG.eps)
    floor, _ = row.counting.residual_block(plain, size)
    time_features(benchmark, row, Checkpointed(module) if mode == "checkpointed" else module, floor)


@pytest.mark.benchmark(min_rounds=5, max_time=0.5)
@pytest.mark.parametrize("name", ["ours-factorised", "ours-direct", "plain-eager", "plain-compiled", "monai-eager"])
@pytest.mark.parametrize("size", LEVELS[1:], ids=lambda size: f"{size[1]}x{size[2]}")
def test_upsampling_convolution(benchmark: Any, size: tuple[int, ...], name: str) -> None:
    skip_what_cannot_run(name, timed=benchmark.enabled)
    row = training_row("upsampling + convolution", name, size, 8 * math.prod(size))
    kind, _, mode = name.partition("-")
    module = block_baselines.upsampling(mode if kind == "ours" else kind, size[1])
    floor, _ = row.counting.row([Upsample(size[1])], size)
    time_features(benchmark, row, module, floor)


def training_row(block: str, name: str, size: tuple[int, ...], features: int) -> Row:
    return Row(block, name, size, getattr(torch, DTYPE), "forward+backward", features, own_layout(name))


def time_features(benchmark: Any, row: Row, module: nn.Module, floor: Floor) -> None:
    """Time a module that maps features in the row's dtype and layout."""
    module = placed(row, module)
    if row.name.endswith("compiled"):
        module = compiled(module)
    x = row.place(torch.randn(row.shape, dtype=row.dtype, device=DEVICE)).requires_grad_()
    measured(benchmark, row, module, x, floor)


def placed(row: Row, module: nn.Module) -> nn.Module:
    """A module on the device, its convolutions' weights in the row's layout."""
    module = module.to(DEVICE)
    return module.to(memory_format=torch.channels_last_3d) if row.channels_last else module


TRAINING_STEPS = [
    "ours-balanced",
    "ours-tight",
    "plain-eager",
    "plain-compiled",
    "plain-budgeted-compiled",
    "monai-eager",
    "monai-checkpointed",
    "monai-checkpointed-compiled",
]


@pytest.mark.benchmark(min_rounds=5, max_time=2)
@pytest.mark.parametrize("name", TRAINING_STEPS)
def test_training_step(benchmark: Any, name: str) -> None:
    skip_what_cannot_run(name, timed=benchmark.enabled)
    image = IMAGE if benchmark.enabled else halved(IMAGE)
    row = training_row("training step of the autoencoder", name, image, CONFIG.channels[0] * math.prod(image))
    kind, _, mode = name.partition("-")
    step = block_baselines.training_step(
        mode if kind == "ours" else kind, CONFIG, checkpointed=mode.startswith("checkpointed")
    )
    module = placed(row, step)
    if mode.endswith("compiled"):
        # Checkpointing may break the graph, as it does for whoever trains so.
        module = compiled(module, fullgraph=kind != "monai")
    if mode.startswith("budgeted"):
        module = Budgeted(module)
    with torch.device("meta"):
        floor = row.counting.autoencoder(Autoencoder(CONFIG, memory=None), image)
    measured(benchmark, row, module, torch.rand(image, device=DEVICE), floor)


@pytest.mark.benchmark(min_rounds=5, max_time=1)
@pytest.mark.parametrize("name", ["ours", "plain-compiled", "monai-eager"])
def test_decoding(benchmark: Any, name: str) -> None:
    skip_what_cannot_run(name, timed=benchmark.enabled)
    latent = LATENT if benchmark.enabled else halved(LATENT)
    features = CONFIG.channels[0] * math.prod(latent[2:]) * CONFIG.compression**3
    row = Row("decoding", name, latent, getattr(torch, DTYPE), "forward", features, own_layout(name))
    module = placed(row, block_baselines.decoding(name.partition("-")[0], CONFIG))
    if name.endswith("compiled"):
        module = compiled(module)
    with torch.device("meta"):
        floor = row.counting.decoder(Autoencoder(CONFIG, memory=None), latent)
    measured(benchmark, row, module, torch.randn(latent, device=DEVICE), floor)

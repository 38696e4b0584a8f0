"""One kernel at one shape: with inputs, the call to time, and what it should compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}
GROUPS = 32
"""Of the norms of the paper's autoencoder."""


class Prepared(NamedTuple):
    """Inputs in place.

    run: the call, with every result in new memory.
    comparable: what two ways to compute it must agree on, from what `run` gave.
    expected: that, in plain torch, from the same inputs; for small sizes.
    bytes_moved: the least that the call moves.
    """

    run: Callable[[], Tensors]
    comparable: Callable[[Tensors], Tensors]
    expected: Callable[[], Tensors]
    bytes_moved: int


@dataclasses.dataclass(frozen=True)
class Work:
    """One kernel at one shape.

    Attributes:
        kernel: its name in the configurations.
        shape: a name for the sizes.
        sizes: (N, C, D, H, W) of its input; of the low resolution for upsampling.
        layout: of that in memory, "contiguous" or "channels_last".
        reads: the layout by which the kernel's configuration is looked up.
        channels: likewise, if not those of the input.
        recipe: makes its inputs.
        latent: whether its channels are those of a latent, which compile to other code for every number of them.
    """

    kernel: str
    shape: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    reads: str
    channels: int
    recipe: Recipe = dataclasses.field(repr=False)
    latent: bool

    @property
    def id(self) -> str:
        sizes = "x".join(map(str, self.sizes))
        return f"{self.kernel}[{self.shape}-{sizes}-{str(self.dtype).partition('.')[2]}-{self.layout}]"

    @property
    def condition(self) -> tuple[int, str, int]:
        """What the configuration is looked up by, after kernel and architecture."""
        return self.channels, self.reads, self.dtype.itemsize

    def prepare(self, device: torch.device, seed: int = 0) -> Prepared:
        """Inputs on `device`, the same for the same seed and kind of device."""
        return self.recipe(self, Maker(self, device, seed))

    def tiny(self) -> Work:
        """The same kernel, dtype, layout and, if they are few, channels, where plain torch can check it."""
        volumes, channels, *_ = self.sizes
        spatial = (7, 9, 11) if self.latent else (2, 3, 4)
        narrow = channels if self.latent else min(channels, 32)
        own = self.channels if self.channels != channels else narrow
        return dataclasses.replace(self, shape="tiny", sizes=(min(volumes, 2), narrow, *spatial), channels=own)


class Maker:
    """Random tensors for one work."""

    def __init__(self, work: Work, device: torch.device, seed: int) -> None:
        self.work, self.device = work, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def numbers(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, generator=self.generator, device=self.device, dtype=torch.float32).to(dtype)

    def tensor(self, scale: int = 1) -> Tensor:
        """Of the work's sizes, `scale` times as large along each spatial axis, its dtype and layout."""
        volumes, channels, *spatial = self.work.sizes
        x = self.numbers(volumes, channels, *(scale * size for size in spatial), dtype=self.work.dtype)
        return x.contiguous(memory_format=FORMATS[self.work.layout])


Recipe: TypeAlias = Callable[[Work, Maker], Prepared]


def same(found: Tensors) -> Tensors:
    """Results that can be compared as they are."""
    return found

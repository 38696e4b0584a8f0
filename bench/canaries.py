"""Poisoned memory around everything that a kernel is given, so that no access out of bounds stays unseen.

Every tensor among a launch's arguments is moved into a buffer of its own, in which all that is not the tensor, before
it, behind it and in the gaps of its strides, is filled with NaN. What a kernel reads of that shows in its results, and
what it writes there is found after the launch. That works on a GPU and in Triton's interpreter alike.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch

import decovae_kernels

_POISONS = range(-63, 0)
"""Numbers of 16 bits of which every floating-point dtype makes NaN; each tensor's differ from those of its neighbours,
so that poison which is copied from one to the other is seen too."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

MARGIN = 8192
"""Bytes of poison on either side; a multiple of what Triton asks of a pointer's alignment."""


class OutOfBounds(AssertionError):
    """A kernel wrote where none of its arguments lies."""


def triton_modules() -> list[ModuleType]:
    """The modules of `decovae_kernels` whose kernels are Triton's."""
    names = [module.name for module in pkgutil.iter_modules(decovae_kernels.__path__)]
    return [importlib.import_module(f"decovae_kernels.{name}") for name in names if name.endswith("_triton")]


@contextmanager
def guarded() -> Iterator[list[str]]:
    """Guards every launch inside; yields the names of the kernels that were guarded, as they are.

    Raises:
        OutOfBounds: from a launch that wrote out of bounds, with the kernel's name and the place.
    """
    seen: list[str] = []
    with ExitStack() as stack:
        for module in triton_modules():
            stack.enter_context(mock.patch.object(module, "launch", _guarding(module.launch, seen)))
        yield seen


def _guarding(launch: Any, seen: list[str]) -> Any:
    def guarding(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        if any(x.is_meta or isinstance(x, torch._subclasses.FakeTensor) for x in tensors):
            launch(kernel, grid, *arguments, **options)
            return
        storages = {x.untyped_storage()._cdata: x for x in tensors}
        guards = {key: _Guard(x, poison) for poison, (key, x) in zip(_POISONS, storages.items(), strict=False)}
        places = [guards[x.untyped_storage()._cdata].take(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        launch(kernel, grid, *places, **options)
        name = kernel.fn.__name__
        seen.append(name)
        for number, (original, place) in enumerate(zip(arguments, places, strict=True)):
            if isinstance(original, torch.Tensor):
                guards[original.untyped_storage()._cdata].check(f"{name}, around argument {number}")
                _once(original).copy_(_once(place))

    return guarding


class _Guard:
    """A copy of a storage between poison, of which only what was taken is not poison itself."""

    def __init__(self, x: torch.Tensor, poison: int) -> None:
        self.poison = poison
        size = x.untyped_storage().nbytes() + 2 * MARGIN
        self.buffer = torch.full((size // 2,), poison, dtype=torch.int16, device=x.device)
        self.owned = torch.zeros_like(self.buffer)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """`x` in this buffer, with its strides and its content."""
        place = _view(self.buffer, x)
        _once(place).copy_(_once(x))
        _once(_view(self.owned, x)).view(_INTEGERS[x.element_size()]).fill_(-1)
        return place

    def check(self, where: str) -> None:
        changed = ((self.buffer != self.poison) & (self.owned == 0)).nonzero().flatten()
        if len(changed):
            first, last = 2 * int(changed[0]) - MARGIN, 2 * int(changed[-1]) + 1 - MARGIN
            raise OutOfBounds(f"{where}: wrote between bytes {first} and {last} of its storage, which are not its own")


def _view(buffer: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The memory of `buffer` that corresponds to `x`."""
    offset = MARGIN // x.element_size() + x.storage_offset()
    empty = torch.empty(0, dtype=x.dtype, device=x.device)
    return empty.set_(buffer.untyped_storage(), offset, x.shape, x.stride())


def _once(x: torch.Tensor) -> torch.Tensor:
    """`x` without the repetitions of expanded axes, and as autograd does not see it."""
    x = x.data
    for dim, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x

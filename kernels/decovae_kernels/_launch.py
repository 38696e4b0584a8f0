"""Launching Triton kernels from code that also runs on fake tensors.

Host functions allocate and launch; on fake tensors they only allocate. So an operator's implementation is its own fake:
shapes, strides and temporaries cannot differ between the two, and memory can be predicted without a GPU.
Every kernel goes through `launch`, so that launches can be seen in one place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from decovae_kernels._dispatch import without_memory

IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}
"""Operator overload → the function behind it, for whoever wants to see an operator's temporaries."""


class Launched(NamedTuple):
    """One launch: the kernel's name, its grid, its compile-time constants and options, and what Triton compiled."""

    kernel: str
    grid: tuple[int, ...]
    options: dict[str, Any]
    compiled: Any


_RECORDS: list[list[Launched]] = []


def launch(kernel: Any, grid: tuple[int, ...], first: torch.Tensor, *others: Any, **options: Any) -> None:
    """`kernel[grid](first, *others, **options)` on the device of the first argument.

    Nothing is launched where that has no memory (then no tensor among the arguments has any) or the grid is empty.
    """
    if 0 in grid or without_memory(first):
        return
    # Triton launches on the current device, whatever device its arguments are on.
    with torch.cuda.device_of(first):
        compiled = kernel[grid](first, *others, **options)
    for record in _RECORDS:
        record.append(Launched(kernel.fn.__name__, grid, options, compiled))


@contextlib.contextmanager
def recorded() -> Iterator[list[Launched]]:
    """The launches of all threads while the context is open, in their order."""
    launches: list[Launched] = []
    _RECORDS.append(launches)
    try:
        yield launches
    finally:
        # By identity: two empty lists are equal.
        _RECORDS[:] = [record for record in _RECORDS if record is not launches]


def self_describing(operator: Any) -> Any:
    """Make the implementation of a `torch.library.custom_op` its own fake, and list it in `IMPLEMENTATIONS`."""
    implementation = operator._init_fn
    operator.register_fake(implementation)
    IMPLEMENTATIONS[operator._opoverload] = implementation
    return operator

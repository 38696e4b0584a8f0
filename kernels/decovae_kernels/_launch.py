"""Launching Triton kernels from code that also runs on fake tensors.

Host functions allocate and launch; on fake tensors they only allocate. So an operator's implementation is its own fake:
shapes, strides and temporaries cannot differ between the two, and memory can be predicted without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from decovae_kernels._dispatch import without_memory

IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}
"""Operator overload → the function behind it, for whoever wants to see an operator's temporaries."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)` on the device of the first argument, a tensor.

    Nothing is launched where a tensor among the arguments has no memory or the grid is empty.
    """
    if 0 in grid or any(isinstance(x, torch.Tensor) and without_memory(x) for x in arguments):
        return
    # Triton launches on the current device, whatever device its arguments are on.
    with torch.cuda.device_of(next(x for x in arguments if isinstance(x, torch.Tensor))):
        kernel[grid](*arguments, **options)


def self_describing(operator: Any) -> Any:
    """Make the implementation of a `torch.library.custom_op` its own fake, and list it in `IMPLEMENTATIONS`."""
    implementation = operator._init_fn
    operator.register_fake(implementation)
    IMPLEMENTATIONS[operator._opoverload] = implementation
    return operator

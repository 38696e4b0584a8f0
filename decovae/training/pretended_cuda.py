"""Running a network for its allocations alone: fake tensors that take the ways that tensors on a GPU would.

Tensors that claim to be on a GPU cannot be run backward on a machine without one. So they are fake CPU tensors, and the
two differences that matter are made up for: which of this project's implementations runs, and autocast's lists.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from decovae.runtime import Module, Runtime
from decovae_kernels._dispatch import VARIABLE

_FLOAT32 = frozenset(
    """
    group_norm layer_norm interpolate softplus pow __pow__ square rsqrt exp expm1 log log2 log10 log1p reciprocal norm
    mse_loss l1_loss smooth_l1_loss cosine_similarity
    """.split()
)
"""Names of functions whose arguments autocast casts to float32 on CUDA but not on CPUs, those that networks use."""

_INTO_FLOAT32 = frozenset({"sum", "prod", "cumsum", "cumprod", "softmax", "log_softmax"})
"""Names of functions whose result it asks for in float32 there, without casting their argument first."""

_HALVES = (torch.bfloat16, torch.float16)

_AS_GIVEN = (F.max_pool3d, F.avg_pool3d, F.max_pool3d_with_indices, F.adaptive_avg_pool3d, torch.cat, torch.stack)
"""Functions that autocast computes in float32 on CPUs only, or refuses float16 for; promotion is torch's own anyway."""


class _CudaAutocast(TorchFunctionMode):
    """CUDA's lists for autocast on the CPU. Convolutions and products are in 16 bits on both."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _FLOAT32:
            args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        elif name in _INTO_FLOAT32:
            if args and args[0].dtype in _HALVES and kwargs.get("dtype") is None:
                kwargs = {**kwargs, "dtype": torch.float32}
        elif func not in _AS_GIVEN:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALVES else x


class Nowhere(Runtime):
    """A runtime of one process whose networks stay what they are: fake parameters cannot be moved."""

    def place(self, module: Module) -> Module:
        """The same module."""
        return module


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """Within it tensors are fake, on the "CPU", and networks allocate what they would allocate on a GPU.

    As there, DECOVAE_KERNELS says whether this project's operators go by their Triton kernels; ``auto`` means yes where
    Triton is installed. That variable is set as long as the context lasts, so other threads should wait.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen in (None, "auto") and find_spec("triton") is not None:
        os.environ[VARIABLE] = "triton"
    try:
        with FakeTensorMode(), _CudaAutocast():
            yield
    finally:
        os.environ.pop(VARIABLE, None)
        if chosen is not None:
            os.environ[VARIABLE] = chosen

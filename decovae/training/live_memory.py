"""The bytes of live tensors, followed operator by operator: on real tensors, and on fake ones that have only shapes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from decovae_kernels._launch import IMPLEMENTATIONS

CUDA_BLOCK = 512
"""Bytes that PyTorch's CUDA allocator rounds every tensor up to."""


class MemoryTracker(TorchDispatchMode):
    """Counts the storages of all tensors that operators return while it is entered, each once and as long as it lives.

    Views cost nothing. Of this project's operators the temporaries count too: instead of the operator its
    implementation runs, with the tracker on. What another operator allocates and frees inside its own kernel is not
    seen: cuDNN's workspaces, copies that a norm makes for another layout. Nor is anything below tensors: the CUDA
    context, the allocator's fragmentation and the segments of 2 MiB and more that it cuts tensors from. So on a GPU
    the peak answers to ``torch.cuda.max_memory_allocated``, not to what ``nvidia-smi`` shows.

    Enter it after a ``FakeTensorMode`` to count without running, and after a ``FlopCounterMode``, which would otherwise
    take operators of torch's apart.

    Args:
        granularity: bytes that a storage's size is rounded up to; 1 counts tensors as they are, `CUDA_BLOCK` as
            PyTorch's CUDA allocator hands them out.

    Attributes:
        current: bytes now alive.
        peak: most bytes alive at once since the start, or since `reset_peak`.
    """

    def __init__(self, *, granularity: int = 1) -> None:
        super().__init__()
        self.granularity = granularity
        self.current = 0
        self.peak = 0
        # By the address of the storage, which no other has as long as this one lives.
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._see(tensor.untyped_storage())

    def reset_peak(self) -> None:
        """Let the peak begin again at what is alive now."""
        self.peak = self.current

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        implementation = IMPLEMENTATIONS.get(func)
        if implementation is None:
            result = func(*args, **(kwargs or {}))
        else:
            with self:  # off while it handles an operator
                result = implementation(*args, **(kwargs or {}))
        self.follow(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        size = -(-storage.nbytes() // self.granularity) * self.granularity
        known = self._sizes.get(key)
        if known == size:
            return
        if known is None:
            self._references[key] = weakref.ref(storage, partial(self._forget, key))
        self._sizes[key] = size  # a storage that `out=` or `resize_` enlarged is counted anew
        self.current += size - (known or 0)
        self.peak = max(self.peak, self.current)

    def _forget(self, key: int, _: object) -> None:
        self.current -= self._sizes.pop(key)
        del self._references[key]


class SavedForBackward:
    """Counts what autograd keeps for backward while it is entered: storages, each once, without the parameters.

    Attributes:
        activations: bytes kept, but for `weight_casts`; there once it is left.
        weight_casts: bytes of copies of parameters in another dtype, as autocast makes them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        parameters = list(module.parameters())
        self._own = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._shapes = {parameter.shape for parameter in parameters}
        self._kept: dict[int, tuple[torch.UntypedStorage, bool]] = {}
        self.activations = 0
        self.weight_casts = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._kept[storage._cdata] = storage, tensor.shape in self._shapes
        return tensor

    def __enter__(self) -> SavedForBackward:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)
        self.activations = sum(storage.nbytes() for storage, cast in self._kept.values() if not cast)
        self.weight_casts = sum(storage.nbytes() for storage, cast in self._kept.values() if cast)
        self._kept.clear()  # from here on only the graph keeps them alive

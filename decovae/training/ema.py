"""Exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class ExponentialMovingAverage:
    """average ← decay·average + (1 − decay)·weights, after every step; sharded as the weights are.

    Early on the decay is (1 + steps)/(10 + steps), so that the average forgets the random start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = module
        self.averages = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the weights after ``steps`` steps."""
        weight = 1 - min(self.decay, (1 + steps) / (10 + steps))
        parameters = dict(self.module.named_parameters())
        averages = [local_part(self.averages[name]) for name in parameters]
        # In one call for all: a call for each would cost as much time as a step of a small network.
        torch._foreach_lerp_(averages, [local_part(parameter) for parameter in parameters.values()], weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in the place of the weights."""
        trained: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                trained[name] = parameter.detach().clone()
                parameter.copy_(self.averages[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.module.named_parameters():
                    parameter.copy_(trained[name])


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or its part of a sharded one; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

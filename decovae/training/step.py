"""One step of training: the gradients of every network, and the update that they make."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from decovae.runtime import Runtime
from decovae.training.clock import Phase
from decovae.training.config import RunConfig
from decovae.training.ema import ExponentialMovingAverage
from decovae.training.parallel import accumulating, uses_bf16
from decovae.training.schedule import learning_rate_factor, seed_step
from decovae.training.stage import Batch, Networks


class Observer:
    """What is told of the parts of a step as they begin and end. This one does not listen."""

    def phase(self, name: Phase, of: str = "") -> AbstractContextManager[object]:
        """A part of a step: ``name`` of the network ``of``, while it is entered."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, of: str) -> None:
        """Run the backward of a network's loss."""
        loss.backward()


@dataclass(frozen=True)
class Gradients:
    """What `Step.gradients` found.

    Attributes:
        terms: of the losses, averaged over the accumulated batches, and the gradients' norms; of this process.
        broken: scalar, float32: 1 where a loss of this process or a gradient is not finite, else 0.
        batches: that they were found on.
    """

    terms: dict[str, Tensor]
    broken: Tensor
    batches: list[Batch]


class Step:
    """The networks' optimisers and averages, and what a step does with them.

    Args:
        stage: networks, their learning rates, and their losses.
        config: the run's.
        runtime: where the networks are.
        observer: told of the step's parts.
    """

    def __init__(
        self, stage: Networks, config: RunConfig, runtime: Runtime, *, observer: Observer | None = None
    ) -> None:
        self.stage, self.config, self.runtime = stage, config, runtime
        self.observer = observer or Observer()
        settings = config.optimizer
        self.optimizers = {
            name: AdamW(
                network.parameters(),
                lr=stage.learning_rates[name],
                weight_decay=settings.weight_decay,
                eps=settings.eps,
                fused=runtime.device.type == "cuda",
            )
            for name, network in stage.networks.items()
        }
        self.exported = next(iter(stage.networks))
        self.averages: dict[str, ExponentialMovingAverage] = {}
        if settings.ema_decay > 0:
            network = stage.networks[self.exported]
            self.averages[self.exported] = ExponentialMovingAverage(network, settings.ema_decay)
        self.autocast = torch.autocast(runtime.device.type, torch.bfloat16, enabled=uses_bf16(config, runtime))
        self._trained: dict[str, nn.Module] = {}

    def gradients(self, batches: Iterator[Batch], step: int) -> Gradients:
        """Take the step's batches, and leave every network's gradient in it, averaged over processes and clipped."""
        observer, settings = self.observer, self.config.optimizer
        seed_step(self.config.seed, step, self.runtime.rank)
        sums: dict[str, Tensor] = {}
        broken = torch.zeros((), device=self.runtime.device)
        taken: list[Batch] = []
        trained: dict[str, nn.Module] = {}
        for accumulated in range(settings.accumulation):
            with observer.phase("data"):
                taken.append(next(batches))
            losses = self.stage.losses(taken[-1], step)
            name = self.exported
            with accumulating(self.stage.networks.values(), last=accumulated == settings.accumulation - 1):
                while True:
                    with observer.phase("forward", name), self.autocast:
                        found = next(losses, None)
                    if found is None:
                        break
                    name, loss = found
                    trained[name] = self.stage.networks[name]
                    broken = torch.maximum(broken, 1.0 - loss.total.detach().isfinite().float())
                    observer.backward(loss.total / settings.accumulation, name)
                    for term, value in loss.terms.items():
                        sums[term] = sums.get(term, torch.zeros_like(value)) + value / settings.accumulation
        with observer.phase("optimizer"):
            limit = settings.clip_norm if settings.clip_norm > 0 else math.inf
            for name, network in trained.items():
                norm = nn.utils.clip_grad_norm_(network.parameters(), limit)
                sums[f"gradient_norm_{name}"] = norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
                broken = torch.maximum(broken, 1.0 - norm.isfinite().float())
        self._trained = trained
        return Gradients(sums, broken, taken)

    def update(self, step: int) -> None:
        """Let the gradients change the networks."""
        with self.observer.phase("optimizer"):
            for name in self._trained:
                optimizer = self.optimizers[name]
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate(step, name)
                optimizer.step()
            if self.exported in self.averages:
                self.averages[self.exported].update(step)
        self.discard()

    def learning_rate(self, step: int, name: str | None = None) -> float:
        """Of a step, counted from 0: the exported network's, or that of the network ``name``."""
        settings = self.config.optimizer
        factor = learning_rate_factor(
            step, steps=self.config.steps, warmup=settings.warmup_steps, schedule=settings.schedule
        )
        return factor * self.stage.learning_rates[name or self.exported]

    def discard(self) -> None:
        """Drop the gradients."""
        for name in self._trained:
            self.optimizers[name].zero_grad(set_to_none=True)
        self._trained = {}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving averages in the place of the weights they are of."""
        with contextlib.ExitStack() as stack:
            for average in self.averages.values():
                stack.enter_context(average.in_place())
            yield

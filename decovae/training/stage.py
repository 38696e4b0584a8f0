"""What a kind of training (autoencoder, decoder, flow) hands to the one loop that serves them all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from decovae.losses.objective import Loss
from decovae.training.checkpoints import Best

Batch = dict[str, Any]


class Networks(Protocol):
    """Networks, and their losses on a batch: what a step of training needs."""

    networks: dict[str, nn.Module]
    """Trainable networks, each with an optimiser of its own; the first is the one that is averaged and exported."""

    learning_rates: dict[str, float]
    """Peak learning rate of each network."""

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Loss]]:
        """For each network its loss on the batch; the step runs its backward before it asks for the next."""
        ...


class Stage(Networks, Protocol):
    """The same with data, validation and export."""

    best: Best
    """By which figure of a validation a checkpoint is kept for longer."""

    inputs: dict[str, str]
    """Hashes of what the run is given beside its options, such as latents; it is not resumed with others."""

    def begin(self, folder: Path) -> None:
        """Put into the run's folder what has to be there before training; one process calls this."""
        ...

    def batches(self, position: int, *, steps: int) -> Iterable[Batch]:
        """This process's batches from a position in the order of samples on, enough for ``steps`` steps."""
        ...

    def validate(self, step: int, folder: Path, autocast: AbstractContextManager[Any]) -> dict[str, Any]:
        """Figures on the validation set, equal on every process; pictures go below the run's ``folder``.

        The networks run within ``autocast``, measures outside.
        """
        ...

    def summary(self, validations: list[dict[str, Any]]) -> dict[str, Any]:
        """What ``summary.json`` says of the finished run, from its validations in order."""
        ...

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write the finished network's whole ``state_dict`` into the run's folder; one process calls this."""
        ...

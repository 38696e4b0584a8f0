"""From crops to batches on the device: what loader processes do, and what is left to the training process.

Workers hand out what is cheap to move. Scaling and augmentation follow where they are fast: on the GPU, on whole
batches, where the run has one; else in the workers, of which there are several.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from decovae.data.augmentation import Augmentation
from decovae.data.outbox import Inbox, Outbox, Parcel
from decovae.data.patches import Crop, PatchDataset, WithFollowing

Batch = dict[str, Any]

KEPT = {-1: 1 << 28, -3: 1 << 25}
"""glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD: how much free memory a worker keeps, and how large the arrays are that
it takes it from; in bytes."""


class Loader(Iterable[Batch]):
    """Batches of a dataset in a given order, made ahead by worker processes.

    Args:
        dataset: gives the sample at a position.
        order: the positions of each batch.
        workers: processes that make batches; 0 makes them in this one.
        prefetch: batches that each of them works ahead.
        device: where batches are used; for a GPU they lie in pinned memory, from which copies wait for nothing.
        collate: of samples to a batch, in the workers; torch's own where there is none.
        finish: the rest of what is done to a batch, in this process.
        at_start: called in each worker.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        order: Iterable[list[int]],
        *,
        workers: int,
        prefetch: int,
        device: torch.device,
        collate: Callable[[Any], Batch] | None = None,
        finish: Callable[[Batch], Batch] | None = None,
        at_start: Callable[[int], None] | None = None,
    ) -> None:
        self._finish = finish
        self._batches: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            pin_memory=device.type == "cuda",
            collate_fn=collate,
            worker_init_fn=partial(_begin, at_start=at_start),
        )

    def __iter__(self) -> Iterator[Batch]:
        batches = _received(iter(self._batches))  # workers begin here, not with the first batch
        return batches if self._finish is None else map(self._finish, batches)


def _begin(worker: int, *, at_start: Callable[[int], None] | None) -> None:
    """What a worker does first."""
    # Every array of a patch's size would be given back to the system and its pages be made anew for the next one.
    with contextlib.suppress(OSError, AttributeError):  # not every C library can be told
        library = ctypes.CDLL(None)
        for option, bytes_ in KEPT.items():
            library.mallopt(option, bytes_)
    if at_start is not None:
        at_start(worker)


def _received(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Batches out of the workers' outboxes."""
    inbox = Inbox()
    try:
        for batch in batches:
            yield {name: inbox.copy(value) if isinstance(value, Parcel) else value for name, value in batch.items()}
    except (ConnectionError, EOFError) as error:
        raise RuntimeError("DataLoader worker ended in the middle of a message") from error


def patch_loader(
    dataset: PatchDataset,
    order: Iterable[list[int]],
    *,
    augmentation: Augmentation | None,
    workers: int,
    prefetch: int,
    device: torch.device,
    at_start: Callable[[int], None] | None = None,
) -> Loader:
    """Batches of patches: `image`, `(N, 1, *patch)`, float32, scaled and augmented; `subject`; `position`.

    Images are on a GPU, if that is the device, and else where workers made them; positions stay on the CPU. What stands
    at a position is the same whatever the batches and wherever it is finished: to the bit on CPUs, to rounding on GPUs.

    Args:
        augmentation: of the patches; its draws follow the dataset's seed.
        dataset, order, workers, prefetch, device, at_start: see `Loader`.
    """
    finish = Finish(augmentation, seed=dataset.seed, device=device)
    in_workers = device.type == "cpu"
    return Loader(
        dataset,
        InView(order, max(workers, 1)),
        workers=workers,
        prefetch=prefetch,
        device=device,
        collate=Collate(finish if in_workers else None, Outbox(prefetch + 1)),
        finish=_trained_on if in_workers else finish,
        at_start=at_start,
    )


class InView(Iterable[list[int]]):
    """Batches of positions, each with the one that follows it where as many workers take turns."""

    def __init__(self, order: Iterable[list[int]], workers: int) -> None:
        self.order, self.workers = order, workers

    def __iter__(self) -> Iterator[list[int]]:
        waiting: deque[WithFollowing] = deque()
        for positions in self.order:
            waiting.append(WithFollowing(positions))
            if len(waiting) > self.workers:
                waiting[0].following = positions
                yield waiting.popleft()
        yield from waiting


class Collate:
    """Crops to a batch in an outbox, finished where it is told how.

    Args:
        finish: the rest of what is done to a batch; None leaves that for later.
        outbox: of the worker that makes batches, or of the training process.
    """

    def __init__(self, finish: Finish | None, outbox: Outbox) -> None:
        self.finish, self.outbox = finish, outbox

    def __call__(self, crops: Sequence[Crop]) -> Batch:
        """The batch: as `stacked` makes it, its voxels of the crops' own type, or float32 where they have several; or
        finished, with a parcel in place of the image."""
        kinds = {crop.voxels.dtype.name for crop in crops}
        dtype = getattr(torch, kinds.pop()) if len(kinds) == 1 and self.finish is None else torch.float32
        batch = stacked(crops, self.outbox.room((len(crops), 1, *crops[0].voxels.shape), dtype))
        if self.finish is None:
            return batch  # as a tensor, which torch's thread for pinned memory copies as soon as it is here
        return {**batch, "image": self.outbox.parcel(self.finish.image(batch))}


class Finish:
    """Scales and augments batches of crops on a device.

    Args:
        augmentation: what it does to them; None for nothing.
        seed: of its draws.
        device: where.
    """

    def __init__(self, augmentation: Augmentation | None, *, seed: int, device: torch.device) -> None:
        self.augmentation, self.seed, self.device = augmentation, seed, device

    def __call__(self, batch: Batch) -> Batch:
        """From what `stacked` made to what training takes; waits for no copy."""
        return _trained_on({**batch, "image": self.image(batch)})

    def image(self, batch: Batch) -> Tensor:
        """The images of a batch that `stacked` made, in their place where they are on the device and are float32."""
        image: Tensor = batch["image"].to(self.device, non_blocking=True).float()
        image.sub_(self._numbers(batch["low"])).div_(self._numbers(batch["span"]))
        return image if self.augmentation is None else self.augmentation(image, batch["position"], seed=self.seed)

    def _numbers(self, values: Sequence[float]) -> Tensor:
        """One for each image, float32; a GPU copies them without being waited for."""
        numbers = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1, 1)
        return numbers.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else numbers


def _trained_on(batch: Batch) -> Batch:
    return {"image": batch["image"], "subject": batch["subject"], "position": torch.tensor(batch["position"])}


def stacked(crops: Sequence[Crop], image: Tensor) -> Batch:
    """Crops as they are stored, one copy away from the page cache.

    Args:
        crops: at least one.
        image: where their voxels go, `(N, 1, *patch)`, on the CPU, of a type that holds their values.

    Returns:
        `image`, and lists of the crops' `low`, `span`, from there to what is scaled to 1, `subject` and `position`:
        lists travel faster from process to process than small tensors.
    """
    for voxels, crop in zip(image.numpy(), crops, strict=True):
        voxels[0] = crop.voxels
    return {
        "image": image,
        "low": [crop.low for crop in crops],
        "span": [crop.high - crop.low for crop in crops],
        "subject": [crop.subject for crop in crops],
        "position": [crop.position for crop in crops],
    }

"""Many samples: noise, latent, image and file of each, with what can be done side by side done side by side."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from decovae.data.volumes import Shape
from decovae.errors import RunError
from decovae.generation.sampling import Sampler
from decovae.generation.threads import fitting
from decovae.models.autoencoder import AutoencoderConfig
from decovae.threads import one_thread

FEATURES_A_VOLUME = 5
"""Times the widest features on the full grid that decoding takes at its peak: 3.6 to 4.2 measured, 80³ to 112³."""

WRITERS = 2
"""Threads that compress and write volumes while the GPU makes the next ones."""


@dataclass(frozen=True)
class Task:
    """One sample to make.

    Attributes:
        name: of its files, without suffix.
        label: what a person calls it, for example ``seed 42 sample 3``.
        noise: gives the noise it starts from, (C, d, h, w); may be called in any thread.
        facts: what is to be known of it alone, in JSON's types.
    """

    name: str
    label: str
    noise: Callable[[], Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


def decoding_bytes(config: AutoencoderConfig, grid: Shape) -> int:
    """About what decoding a volume on the CPU takes at its peak, in float32 and without the network.

    The widest features on the full grid are those of the second level, which the last upsampling leaves there.
    """
    return FEATURES_A_VOLUME * math.prod(grid) * max(config.channels[:2]) * torch.float32.itemsize


def usual_batch(device: torch.device, volume_bytes: int) -> int:
    """Samples to make at once: 1 on a GPU; on the CPU as many as torch would use threads for one, if memory has room.

    Args:
        device: of the sampler.
        volume_bytes: memory that one sample needs, see `decoding_bytes`.
    """
    if device.type != "cpu":
        return 1
    return min(torch.get_num_threads(), fitting(volume_bytes))


def produce(
    sampler: Sampler,
    tasks: Sequence[Task],
    finish: Callable[[Task, Tensor], None],
    *,
    condition: Tensor | None = None,
    batch: int = 1,
) -> None:
    """Make each task's image and hand it to `finish`, in any order.

    On the CPU up to `batch` samples are made side by side, each by one thread; on a GPU batches of `batch` go through
    the flow together, and images are decoded one at a time. A sample does not depend on `batch` (see `Sampler`).

    Args:
        sampler: makes the images.
        tasks: what to make.
        finish: gets a task and its image, (1, D, H, W), float32, on the CPU; called in several threads.
        condition: (K,), a row of conditions for all; None for none.
        batch: at least 1.

    Raises:
        RunError: a sample's latent or image is not finite; names it.
        Exception: what `finish` raised; tasks that were not begun are then left.
    """
    on_cpu = sampler.device.type == "cpu"
    with one_thread() if on_cpu else nullcontext(), ThreadPoolExecutor(batch if on_cpu else WRITERS) as pool:
        pending: deque[Future[None]] = deque()
        try:
            if on_cpu:
                pending.extend(pool.submit(_alone, sampler, task, finish, condition) for task in tasks)
            else:
                for start in range(0, len(tasks), batch):
                    _together(sampler, tasks[start : start + batch], finish, condition, batch, pool, pending)
            while pending:
                pending.popleft().result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _alone(sampler: Sampler, task: Task, finish: Callable[[Task, Tensor], None], condition: Tensor | None) -> None:
    finish(task, _decoded(sampler, task, sampler.latents(task.noise()[None], condition)[0]))


def _together(
    sampler: Sampler,
    tasks: Sequence[Task],
    finish: Callable[[Task, Tensor], None],
    condition: Tensor | None,
    batch: int,
    pool: ThreadPoolExecutor,
    pending: deque[Future[None]],
) -> None:
    """A batch on a GPU, filled up for a compiled flow, which is made for batches of one size."""
    filled = [*tasks, *[tasks[-1]] * (batch - len(tasks))] if sampler.compiled else tasks
    latents = sampler.latents(torch.stack([task.noise() for task in filled]), condition)
    for task, latent in zip(tasks, latents, strict=False):
        pending.append(pool.submit(finish, task, _decoded(sampler, task, latent)))
        while len(pending) > 2 * WRITERS:  # images wait in memory
            pending.popleft().result()


def _decoded(sampler: Sampler, task: Task, latent: Tensor) -> Tensor:
    if not torch.isfinite(latent).all():
        raise RunError(f"{task.label}: its latent is not finite; try --precision fp32, or train the flow again.")
    image = sampler.decode(latent)
    if not torch.isfinite(image).all():
        raise RunError(f"{task.label}: its image is not finite; try --precision fp32, or another --decoder.")
    return image

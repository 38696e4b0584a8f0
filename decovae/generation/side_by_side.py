"""Volumes that are encoded side by side: as many as there are threads, and no more than fit into memory."""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from decovae.data.volumes import Shape
from decovae.generation.encoding_plan import Encoded
from decovae.generation.threads import fitting
from decovae.models.autoencoder import AutoencoderConfig
from decovae.runtime import Runtime

COPIES = 6
"""Of the finest level's features, that the encoder holds at once for a volume: 2.9 to 5.3 of them were measured, with
64 to 16 channels; of the image itself, where a GPU encodes it: what is read, resized, and waits for its turn."""


def volumes_at_once(runtime: Runtime, config: AutoencoderConfig, grid: Shape) -> int:
    """How many volumes a process works on side by side, 1 to 8.

    On the CPU as many as torch would use threads for one, on a GPU as many as the process has CPUs to load the next;
    no more than memory has room for.
    """
    if runtime.device.type == "cpu":
        threads = torch.get_num_threads()
    else:
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, processors // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(threads, fitting(volume_bytes(config, grid, on_cpu=runtime.device.type == "cpu")))


def volume_bytes(config: AutoencoderConfig, grid: Shape, *, on_cpu: bool) -> int:
    """What a volume is taken to need of the CPU's memory: the encoder's finest features, or, for a GPU, its image.

    In float32; autocast to bfloat16 needs about half.
    """
    channels = config.channels[0] if on_cpu else config.image_channels
    return COPIES * channels * math.prod(grid) * torch.float32.itemsize


def encoded_ahead(
    load: Callable[[int], Tensor],
    encode: Callable[[int, Tensor], Encoded],
    places: Sequence[int],
    *,
    threads: int,
    on_cpu: bool,
) -> Generator[Encoded, None, None]:
    """Latents in order. Threads work ahead: they load for a GPU, which this thread feeds; on the CPU they do it all.

    Args:
        load: the image at a place; called in any thread.
        encode: the latent of a place and its image; called in any thread on the CPU, in the caller's for a GPU.
        places: what to encode.
        threads: at least 1.
        on_cpu: where the encoder is.
    """

    def work(place: int) -> Tensor | Encoded:
        image = load(place)
        return encode(place, image) if on_cpu else image

    waiting: deque[tuple[int, Future[Tensor | Encoded]]] = deque()
    remaining = iter(places)
    pool = ThreadPoolExecutor(threads)
    try:
        while True:
            for place in itertools.islice(remaining, 2 * threads - len(waiting)):
                waiting.append((place, pool.submit(work, place)))
            if not waiting:
                return
            place, future = waiting.popleft()
            done = future.result()
            yield done if isinstance(done, Encoded) else encode(place, done)
    finally:
        pool.shutdown(cancel_futures=True)

"""What both kinds of ``decovae evaluate`` open before they measure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from decovae.commands.evaluate import EvaluateConfig
from decovae.data.volumes import Shape, Volumes
from decovae.errors import InputError
from decovae.evaluation.outputs import probe
from decovae.evaluation.slices import Slicing, build_networks
from decovae.evaluation.tools import Tools
from decovae.generation.production import decoding_bytes, usual_batch
from decovae.generation.side_by_side import volumes_at_once
from decovae.metrics.slice_features import SliceNetwork
from decovae.models.autoencoder import AutoencoderConfig
from decovae.runtime import Runtime
from decovae.training.finished import FinishedVAE
from decovae.training.volumes import split, volumes_of


class Evaluated(NamedTuple):
    """What there is to write: `evaluation.json`, the rows of `volumes.csv`, and the folder for them."""

    evaluation: dict[str, Any]
    rows: list[dict[str, Any]]
    out: Path


def open_split(run: FinishedVAE, runtime: Runtime) -> tuple[Volumes, dict[str, list[int]]]:
    """A run's volumes, and their indices by split; "all" is both.

    Raises:
        InputError: the volumes cannot be had, or are others than those that the run was trained on.
    """
    volumes = volumes_of(run, runtime)
    training, validation = split(volumes, run.config.data)
    return volumes, {"training": training, "validation": validation, "all": sorted([*training, *validation])}


def open_networks(config: EvaluateConfig, runtime: Runtime, out: Path) -> list[SliceNetwork]:
    """Feature networks on the device, and a look whether `out` can be written: both before hours of work.

    Raises:
        InputError: weights are missing, or are no such network's, or the folder cannot be written.
    """
    runtime.on_main(writing(out)(lambda: probe(out)))
    return build_networks(config.networks, runtime.device, radimagenet=config.radimagenet, inception=config.inception)


def tools_for(
    config: EvaluateConfig,
    runtime: Runtime,
    grid: Shape,
    *,
    autoencoder: AutoencoderConfig,
    networks: Sequence[SliceNetwork],
) -> Tools:
    """What volumes are measured with, and how many of them to work on at once."""
    on_cpu = runtime.device.type == "cpu"
    threads = usual_batch(runtime.device, decoding_bytes(autoencoder, grid)) if on_cpu else 0
    threads = threads or volumes_at_once(runtime, autoencoder, grid)
    return Tools(runtime, grid, Slicing(networks, config.slice_every, config.cache), threads)


def need_two(count: int, *, what: str, advice: str) -> None:
    """Refuse a set that has no covariance.

    Raises:
        InputError: says what it is, and ends with the advice.
    """
    if count < 2:
        raise InputError(f"{what} is {count} volume{'' if count == 1 else 's'}, and a covariance needs 2; {advice}.")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Around what writes into ``--out``, also as a decorator.

    Raises:
        InputError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror or error}); give another folder.") from error

"""The latents that a flow trains on: those that are there, or else encoded first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from decovae.data.volumes import times
from decovae.errors import InputError
from decovae.generation.conditioning import fit_conditions
from decovae.generation.encoding import encode_volumes
from decovae.generation.latents import LatentStore, open_latents
from decovae.models.weights import encoder_fingerprint, load_autoencoder
from decovae.runtime import Runtime
from decovae.training.config import DecoderConfig, FlowConfig
from decovae.training.finished import FinishedVAE, open_vae
from decovae.training.run_folder import read_inputs
from decovae.training.volumes import describe, split, volumes_of


def latents_and_decoder(config: FlowConfig, runtime: Runtime) -> tuple[LatentStore, Path]:
    """The latents that ``--latents`` and ``--vae`` stand for, and the weights of the autoencoder that decodes them.

    Without ``--latents`` they are the run's own, or those of the run whose decoder it tuned on the same data; where
    there are none, the run's volumes are encoded into its folder, by all processes.

    Raises:
        InputError: if a run is not finished, latents are damaged or unfinished, of another encoder or of another grid,
            or a condition is no column of the volumes that would have to be encoded.
    """
    if config.vae is None and config.latents is None:
        raise InputError("--vae: give the folder of a finished autoencoder run, or --latents with encoded latents.")
    source = None if config.vae is None else runtime.on_main(lambda: open_vae(config.vae))
    folder = config.latents
    if folder is None and source is not None:
        folder = latents_of(source, runtime, conditions=config.conditions)
    assert folder is not None
    runtime.on_main(lambda: check_latents(folder, source))
    store = open_latents(folder)
    return store, store.autoencoder_path if source is None else source.weights


def latents_of(source: FinishedVAE, runtime: Runtime, *, conditions: Sequence[str] = ()) -> Path:
    """The folder of a run's latents, or of those of the run whose decoder it tuned on the same data.

    Where there are none, the run's volumes are encoded into its folder, by all processes.

    Args:
        source: the run.
        runtime: the processes, all of which call this.
        conditions: columns that the volumes need to have, before hours of encoding.

    Raises:
        InputError: if a run before it is not finished, its volumes cannot be had, or a condition is no column of them.
    """
    return runtime.on_main(lambda: _existing(source)) or _encoded(source, runtime, conditions)


def check_latents(
    folder: Path, source: FinishedVAE | None, *, advice: str = "encode anew, or give --latents without --vae"
) -> None:
    """Refuse latents that do not belong to a run's encoder, or to its grid.

    Args:
        folder: of the latents.
        source: the run; without it the autoencoder that lies beside the latents.
        advice: what to do about another grid.

    Raises:
        InputError: they do not, or they are damaged or unfinished.
    """
    store = open_latents(folder)
    weights, owner = (store.autoencoder_path, folder) if source is None else (source.weights, source.folder)
    fingerprint = encoder_fingerprint(load_autoencoder(weights))
    if store.space.encoder != fingerprint:
        raise InputError(
            f"{folder}: its latents were made by another encoder ({store.space.encoder[:12]}) than that of "
            f"{owner} ({fingerprint[:12]}); give the run that they were encoded with, or encode anew."
        )
    if source is not None and store.space.grid != source.config.data.grid:
        raise InputError(
            f"{folder}: its latents are of volumes of {times(store.space.grid)} voxels, and {owner} was trained on "
            f"{times(source.config.data.grid)}; {advice}."
        )


def _encoded(source: FinishedVAE, runtime: Runtime, conditions: Sequence[str]) -> Path:
    data, out = source.config.data, source.folder / "latents"
    volumes = volumes_of(source, runtime)
    training, validation = split(volumes, data)
    rows = [{"subject": record.subject, **record.columns} for record in volumes.records]
    runtime.on_main(lambda: fit_conditions(conditions, rows, training))
    encode_volumes(
        load_autoencoder(source.weights),
        volumes,
        training=training,
        validation=validation,
        grid=data.grid,
        out=out,
        runtime=runtime,
        data=describe(data),
    )
    return out


def _existing(source: FinishedVAE) -> Path | None:
    """The run's finished latents, or those of the runs before it that had the same volumes: their encoder is its."""
    for run in _line(source):
        if (run.folder / "latents" / "index.json").is_file() and _same_volumes(run, source):
            return run.folder / "latents"
    return None


def _line(run: FinishedVAE) -> Iterator[FinishedVAE]:
    """A run, the run whose decoder it tuned, and so on, as far as they are still there."""
    yield run
    while isinstance(run.config, DecoderConfig) and run.config.vae is not None and run.config.vae.is_dir():
        run = open_vae(run.config.vae)
        yield run


def _same_volumes(first: FinishedVAE, second: FinishedVAE) -> bool:
    def volumes(run: FinishedVAE) -> tuple[object, ...]:
        data, store = run.config.data, (read_inputs(run.folder) or {}).get("store")
        cohort = (data.cohort_size, data.cohort_shape) if data.root is None else ()
        return data.root, store, data.grid, data.seed, data.validation_fraction, data.validation_limit, *cohort

    return volumes(first) == volumes(second)

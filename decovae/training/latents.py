"""The latents that a flow trains on: those that are there, or else encoded first."""

from __future__ import annotations

from pathlib import Path

from decovae.errors import InputError
from decovae.generation.encoding import encode_volumes
from decovae.generation.latents import LatentStore, open_latents
from decovae.models.weights import encoder_fingerprint, load_autoencoder
from decovae.runtime import Runtime
from decovae.training.config import DecoderConfig, FlowConfig
from decovae.training.finished import FinishedVAE, open_vae
from decovae.training.volumes import describe, open_volumes, split


def latents_and_decoder(config: FlowConfig, runtime: Runtime) -> tuple[LatentStore, Path]:
    """The latents that ``--latents`` and ``--vae`` stand for, and the weights of the autoencoder that decodes them.

    Without ``--latents`` they are the run's own, or those of the run whose decoder it tuned; where there are none, the
    run's volumes are encoded into its folder, by all processes.

    Raises:
        InputError: if a run is not finished, latents are damaged or unfinished, or of another encoder.
    """
    source = None if config.vae is None else runtime.on_main(lambda: open_vae(config.vae))
    if config.latents is not None:
        folder = config.latents
        store = runtime.on_main(lambda: open_latents(folder))
        if source is None:
            return store, store.autoencoder_path
    else:
        if source is None:
            raise InputError("--vae: give the folder of a finished autoencoder run, or --latents with encoded latents.")
        store = _own_latents(source, runtime)
    fingerprint = encoder_fingerprint(load_autoencoder(source.weights))
    if store.space.encoder != fingerprint:
        raise InputError(
            f"--latents {store.folder}: were made by another encoder ({store.space.encoder[:12]}) than that of --vae "
            f"{source.folder} ({fingerprint[:12]}); give the run that they were encoded with, or encode anew."
        )
    return store, source.weights


def _own_latents(source: FinishedVAE, runtime: Runtime) -> LatentStore:
    folder = runtime.on_main(lambda: _existing(source))
    if folder is not None:
        return runtime.on_main(lambda: open_latents(folder))
    data = source.config.data
    runtime.fill_caches(lambda: open_volumes(data))
    volumes = open_volumes(data)
    training, validation = split(volumes, data)
    return encode_volumes(
        load_autoencoder(source.weights),
        volumes,
        training=training,
        validation=validation,
        grid=data.grid,
        out=source.folder / "latents",
        runtime=runtime,
        data=describe(data),
    )


def _existing(source: FinishedVAE) -> Path | None:
    """The run's finished latents, or those of the run whose decoder it tuned: the encoder is the same."""
    config = source.config
    before = config.vae if isinstance(config, DecoderConfig) else None
    for folder in (source.folder, before):
        if folder is not None and (folder / "latents" / "index.json").is_file():
            return folder / "latents"
    return None

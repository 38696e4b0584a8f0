"""A training command from its arguments to its exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from decovae.errors import InputError
from decovae.files import writing
from decovae.runtime import Runtime, start_runtime
from decovae.training.checks import check
from decovae.training.command_line import exit_code, given, parse
from decovae.training.config import AdversarialConfig, DecoderConfig, FlowConfig, TrainingConfig
from decovae.training.finished import open_vae
from decovae.training.interruption import Interrupted
from decovae.training.presets import DECODER_PRESETS, FLOW_PRESETS, VAE_PRESETS
from decovae.training.run_folder import check_folder, check_inputs, create_folder, read_summary
from decovae.training.stage import Stage


def train_vae(arguments: Sequence[str]) -> int:
    """Train the autoencoder as a command line says.

    Returns:
        0 when the run is finished, 1 if it could not go on, 2 for a wrong input, 128 + the signal's number when it was
        interrupted.
    """
    return _command(lambda: parse(VAE_PRESETS, arguments, default="quickstart"))


def train_decoder(arguments: Sequence[str]) -> int:
    """Fine-tune the decoder of ``--vae RUN``, with that run's data; returns as `train_vae` does."""

    def config() -> DecoderConfig:
        source = _source(arguments)
        if source is None:
            return parse(DECODER_PRESETS, arguments, default="quickstart")
        presets = {
            name: (description, replace(preset, data=source.data))
            for name, (description, preset) in DECODER_PRESETS.items()
        }
        return parse(presets, arguments, default=source.preset)

    return _command(config)


def train_flow(arguments: Sequence[str]) -> int:
    """Train the flow on the latents of ``--vae RUN`` or in ``--latents FOLDER``; returns as `train_vae` does."""

    def config() -> FlowConfig:
        source = _source(arguments)
        return parse(FLOW_PRESETS, arguments, default="quickstart" if source is None else source.preset)

    return _command(config)


def _source(arguments: Sequence[str]) -> AdversarialConfig | None:
    """The configuration of the run that ``--vae`` names; it decides what the preset is and what the data are."""
    folder = given(arguments, "--vae")
    return None if folder is None else open_vae(Path(folder)).config


def _command(configure: Callable[[], TrainingConfig]) -> int:
    def run() -> int:
        config = resolved(configure())
        check(config)
        with start_runtime(config.device) as runtime:
            return _run(config, runtime)

    # Ctrl-C before training, or for the second time.
    return exit_code(run, stopped="stopped at once; a run that had begun continues from its last checkpoint.")


def resolved(config: TrainingConfig) -> TrainingConfig:
    """The same with absolute paths to its data, which a run's folder keeps for steps that may start elsewhere."""

    def absolute(path: Path | None) -> Path | None:
        return None if path is None else path.resolve()

    if isinstance(config, FlowConfig):
        return replace(config, vae=absolute(config.vae), latents=absolute(config.latents))
    config = replace(config, data=replace(config.data, root=absolute(config.data.root)))
    if isinstance(config, DecoderConfig):
        return replace(config, vae=absolute(config.vae))
    return replace(config, init=absolute(config.init))


def _run(config: TrainingConfig, runtime: Runtime) -> int:
    from decovae.training.loop import train
    from decovae.training.summary import print_summary, write_summary

    folder = config.folder
    runtime.on_main(lambda: check_folder(folder, config))
    summary = runtime.on_main(lambda: read_summary(folder))
    if summary is not None:
        if runtime.main:
            print(f"{folder}: this run is finished.")
            print_summary(folder, summary)
        return 0
    stage = _stage(config, runtime)
    runtime.on_main(lambda: create_folder(folder, config))
    if not all(runtime.gather(folder.is_dir())):
        raise InputError(f"--out {folder}: not every node sees it; give a folder on storage that all nodes share.")
    runtime.on_main(lambda: check_inputs(folder, stage.inputs))
    runtime.on_main(lambda: stage.begin(folder))
    try:
        validations = train(stage, config, runtime, folder)
    except Interrupted as stop:
        if runtime.main:
            print(f"Interrupted by {stop}; checkpoint written. The same command continues it.", file=sys.stderr)
        return stop.exit_code
    if runtime.main:
        with writing(folder):
            summary = write_summary(folder, config, stage.summary(validations))
        print_summary(folder, summary)
    return 0


def _stage(config: TrainingConfig, runtime: Runtime) -> Stage:
    """Networks and data of a run. Each kind is imported when it is wanted: none pays for what another needs."""
    if isinstance(config, DecoderConfig):
        from decovae.training.decoder import DecoderStage

        return DecoderStage(config, runtime)
    if isinstance(config, FlowConfig):
        from decovae.training.flow import FlowStage

        return FlowStage(config, runtime)
    from decovae.training.vae import VAEStage

    return VAEStage(config, runtime)

"""A training command from its arguments to its exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from decovae.errors import InputError, RunError
from decovae.runtime import Runtime, start_runtime
from decovae.training.command_line import fail, parse
from decovae.training.config import VAE_PRESETS, VAEConfig, check
from decovae.training.interruption import Interrupted
from decovae.training.run_folder import check_folder, create_folder, read_summary


def train_vae(arguments: Sequence[str]) -> int:
    """Train the autoencoder as a command line says.

    Returns:
        0 when the run is finished, 1 if it could not go on, 2 for a wrong input, 128 + the signal's number when it was
        interrupted.
    """
    try:
        config = parse(VAE_PRESETS, arguments, default="quickstart")
        check(config)
        with start_runtime(config.device) as runtime:
            return _run(config, runtime)
    except InputError as error:
        return fail(error, 2)
    except RunError as error:
        return fail(error, 1)
    except KeyboardInterrupt:  # before training, or for the second time
        return fail(RunError("stopped at once; a run that had begun continues from its last checkpoint."), 130)


def _run(config: VAEConfig, runtime: Runtime) -> int:
    from decovae.training.loop import train
    from decovae.training.summary import print_summary, write_summary
    from decovae.training.vae import VAEStage

    folder = config.folder
    runtime.on_main(lambda: check_folder(folder, config))
    summary = runtime.on_main(lambda: read_summary(folder))
    if summary is not None:
        if runtime.main:
            print(f"{folder}: this run is finished.")
            print_summary(folder, summary)
        return 0
    stage = VAEStage(config, runtime)
    runtime.on_main(lambda: create_folder(folder, config))
    if not all(runtime.gather(folder.is_dir())):
        raise InputError(f"--out {folder}: not every node sees it; give a folder on storage that all nodes share.")
    try:
        validations = train(stage, config, runtime, folder)
    except Interrupted as stop:
        if runtime.main:
            print(f"Interrupted by {stop}; checkpoint written. The same command continues it.", file=sys.stderr)
        return stop.exit_code
    if runtime.main:
        print_summary(folder, write_summary(folder, config, validations))
    return 0

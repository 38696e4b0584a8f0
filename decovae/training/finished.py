"""What a finished run offers to the steps after it: its configuration and its autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from decovae.errors import InputError
from decovae.models.weights import WEIGHTS_FILE
from decovae.training.config import AdversarialConfig
from decovae.training.config_file import read_config
from decovae.training.run_folder import read_summary


@dataclass(frozen=True)
class FinishedVAE:
    """A finished run of ``train/vae.py`` or ``train/decoder.py``.

    Attributes:
        folder: the run's.
        config: what was trained, on which data.
        weights: the whole autoencoder.
    """

    folder: Path
    config: AdversarialConfig
    weights: Path


def open_vae(folder: Path | None, *, option: str = "--vae") -> FinishedVAE:
    """A finished autoencoder or decoder run.

    Args:
        folder: the run's.
        option: what the user gave it by, for the message.

    Raises:
        InputError: if none is given, there is no such run there, or it is not finished.
    """
    if folder is None:
        raise InputError(f"{option}: give the folder of a finished run of train/vae.py.")
    if not folder.is_dir():
        raise InputError(f"{option} {folder}: no such folder; give the folder of a finished run of train/vae.py.")
    try:
        config = read_config(folder)
    except FileNotFoundError:
        raise InputError(
            f"{option} {folder}: holds no run (no config.yaml); give the folder of a finished run of train/vae.py."
        ) from None
    if not isinstance(config, AdversarialConfig):
        raise InputError(f"{option} {folder}: is the run of a {config.stage}; give that of an autoencoder.")
    if read_summary(folder) is None or not (folder / WEIGHTS_FILE).is_file():
        raise InputError(
            f"{option} {folder}: is not finished; run the command that began it again with --out {folder}."
        )
    return FinishedVAE(folder, config, folder / WEIGHTS_FILE)

"""What a finished run is, whatever its stage: its folder's name, its data, and the loss behind its latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from decovae.errors import InputError
from decovae.generation.flow_file import FlowRun, open_flow_run
from decovae.training.config import FlowConfig, TrainingConfig, VAEConfig
from decovae.training.config_file import NAME, read_config
from decovae.training.finished import FinishedVAE, open_vae


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: the run's.
        config: what was trained, on which data.
        files: of an autoencoder's or a decoder's run, or of a flow's.
    """

    folder: Path
    config: TrainingConfig
    files: FinishedVAE | FlowRun

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def deco(self) -> str | None:
        """The decorrelation loss of the autoencoder behind it; None where that run is no longer there."""
        return _deco(self.config)


def open_run(folder: Path, *, command: str) -> Run:
    """A finished run of any stage.

    Args:
        folder: the run's.
        command: what the user gave it to, for the message.

    Raises:
        InputError: there is no run, or it is not finished.
    """
    if not folder.is_dir():
        raise InputError(f"{command} {folder}: no such folder; give the folder of a finished run.")
    try:
        config = read_config(folder)
    except FileNotFoundError:
        raise InputError(
            f"{command} {folder}: holds no run (no {NAME}); give the folder of a finished run of train/vae.py, "
            "train/decoder.py or train/flow.py."
        ) from None
    if isinstance(config, FlowConfig):
        return Run(folder, config, open_flow_run(folder))
    return Run(folder, config, open_vae(folder, option=command))


def _deco(config: TrainingConfig) -> str | None:
    while not isinstance(config, VAEConfig):
        before = next((folder for folder in _sources(config) if (folder / NAME).is_file()), None)
        if before is None:
            return None
        try:
            config = read_config(before)
        except InputError:
            return None
    return config.deco


def autoencoder_behind(run: Run) -> FinishedVAE:
    """The autoencoder's run that a flow's latents are of, whose data real volumes are taken from.

    Raises:
        InputError: it is no longer there.
    """
    for folder in _sources(run.config):
        if (folder / NAME).is_file():
            return open_vae(folder, option="decovae evaluate")
    if isinstance(run.config, FlowConfig) and run.config.vae is None:
        raise InputError(
            f"{run.folder}: was trained on the latents in {run.config.latents}, which lie in no run's folder, so that "
            f"it is not known what the real volumes are; in its {NAME}, set vae to the folder of the run that encoded "
            "them."
        )
    raise InputError(
        f"{run.folder}: the run of the autoencoder behind it is gone, {' or '.join(map(str, _sources(run.config)))}, "
        "and with it what the real volumes are; put it back."
    )


def _sources(config: TrainingConfig) -> list[Path]:
    """Where the run before this one should be."""
    if isinstance(config, VAEConfig):
        return []
    latents = config.latents if isinstance(config, FlowConfig) else None
    # Latents are by default in the run that encoded them.
    return [path for path in (config.vae, latents and latents.parent) if path is not None]

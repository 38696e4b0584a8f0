"""A folder of samples: what they were made with, which are there, and the pictures of them."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import decovae
from decovae.data.frame import Frame
from decovae.errors import InputError
from decovae.generation.contact_sheet import MOST_SAMPLES, save_contact_sheet
from decovae.generation.interpolation import save_animation
from decovae.generation.production import Task
from decovae.generation.volumes_out import is_written, read_volume, write_json

SETTINGS = "samples.json"
CONTACT_SHEET = "contact-sheet.png"
ANIMATION = "interpolation.gif"


def begin_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder with its ``samples.json``, or see that it holds samples of the same settings.

    Args:
        folder: of the samples.
        settings: all that a sample depends on besides its number, in JSON's types.

    Raises:
        InputError: the folder holds other files or samples of other settings, or cannot be read or written.
    """
    path = folder / SETTINGS
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--out {folder}: is a file; give a folder.")
        if path.exists():
            _compare(folder, json.loads(path.read_text(encoding="utf-8")), settings)
            return
        if folder.is_dir() and any(entry.suffix != ".partial" for entry in folder.iterdir()):
            raise InputError(f"--out {folder}: holds files but no {SETTINGS}; give an empty or a new folder.")
        write_json(path, settings)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be used ({error.strerror}); give another folder.") from error
    except ValueError as error:
        raise InputError(f"{path}: is damaged ({error}); give another --out.") from error


def _compare(folder: Path, found: Any, settings: Mapping[str, Any]) -> None:
    if not isinstance(found, dict):
        raise ValueError("not an object")
    for name in [*settings, *found]:
        if found.get(name) != settings.get(name):
            raise InputError(
                f"--out {folder}: holds samples with {name}={_shown(found.get(name))}, not "
                f"{_shown(settings.get(name))}; give another --out, or the same options to go on."
            )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def missing(folder: Path, tasks: Sequence[Task]) -> list[int]:
    """Which of the tasks are still to be done, as places in `tasks`."""
    return [place for place, task in enumerate(tasks) if not is_written(folder, task.name)]


def versions() -> dict[str, str]:
    """Of what a sample was computed with."""
    return {
        "decovae": decovae.__version__,
        "torch": torch.__version__,
        "monai": importlib.metadata.version("monai"),
        "python": platform.python_version(),
    }


def draw_pictures(folder: Path, tasks: Sequence[Task], *, frame: Frame, title: str, animated: bool) -> list[Path]:
    """Write the contact sheet of the first 16 samples and, if asked for, an animation of all; both from the files.

    Args:
        folder: where all the tasks are done.
        tasks: in their order.
        frame: of the volumes.
        title: of the contact sheet, which begins with ``synthetic`` in any case.
        animated: whether to write the animation.

    Returns:
        The files.

    Raises:
        OSError: a file cannot be written.
    """
    sheet = folder / CONTACT_SHEET
    labels = [task.label for task in tasks]
    first = (read_volume(folder, task.name) for task in tasks[:MOST_SAMPLES])
    save_contact_sheet(first, sheet, frame=frame, title=title, labels=labels)
    if not animated:
        return [sheet]
    volumes = (read_volume(folder, task.name) for task in tasks)
    save_animation(volumes, folder / ANIMATION, frame=frame, labels=labels)
    return [sheet, folder / ANIMATION]

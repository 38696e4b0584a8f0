"""Files that appear whole or not at all, and other people's ``.pt`` files read without running what they pickle."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from decovae.errors import InputError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a new file and move it to ``path`` in one step, so that no reader ever sees half of it.

    Several writers may do so at once; a process that is killed leaves a file ``.….partial`` beside ``path``.

    Raises:
        OSError: if the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def load_tensors(path: Path, *, advice: str) -> Any:
    """What a ``.pt`` or ``.pth`` file of tensors and plain containers holds, on the CPU.

    Raises:
        InputError: if the file is not one, or holds anything else; ends with ``advice``.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # broken bytes surface as IndexError, KeyError, UnpicklingError, RuntimeError, …
        raise InputError(
            f"{path}: not a file of plain tensors that torch.load(weights_only=True) reads; {advice}."
        ) from error

"""Reading other people's ``.pt`` files without running what they pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from decovae.errors import InputError


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

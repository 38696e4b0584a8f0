"""Files that appear whole or not at all; tensors in files, read without running what other people pickled."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from decovae.errors import InputError, RunError


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


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all.

    Raises:
        OSError: if the folder cannot be made or written.
    """
    write_atomically(path, lambda file: file.write(text.encode()))


def remove_partial(folder: Path) -> None:
    """Remove what killed processes left of files that `write_atomically` was writing into a folder; no other may write
    there now."""
    for left in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):
            left.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses meanwhile, a full disk above all, as one sentence.

    Raises:
        RunError: in place of OSError; it names the file, or ``path`` where the error does not.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{error.filename or path}: cannot be written ({error.strerror or error}); make room, or see to the "
            "folder, and start the same command again."
        ) from error


_STAND_INS: list[Any] = [
    (Tensor, "monai.data.meta_tensor.MetaTensor"),
    *((str, f"monai.utils.enums.{name}") for name in ("MetaKeys", "SpaceKeys", "TraceKeys")),
]
"""What is read where a file has tensors of MONAI's, with what they remember of a volume: nothing of MONAI's is run."""


@contextlib.contextmanager
def locked(path: Path, *, refusal: str) -> Iterator[int]:
    """Hold a file for one process at a time, and for what it starts with the descriptor that this yields.

    The lock ends with the last of those processes, however it ends.

    Args:
        path: made if it is not there; it stays.
        refusal: the sentence for one who finds it held.

    Raises:
        InputError: another process holds it.
        OSError: it cannot be made.
    """
    import fcntl  # not on Windows, where nothing that needs it runs

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(refusal) from error
        yield file.fileno()


def load_tensors(path: Path, *, advice: str) -> Any:
    """What a ``.pt`` or ``.pth`` file of tensors and plain containers holds, on the CPU.

    Raises:
        InputError: if the file is not one, or holds anything else; ends with ``advice``.
    """
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # broken bytes surface as IndexError, KeyError, UnpicklingError, RuntimeError, …
        raise InputError(
            f"{path}: not a file of plain tensors that torch.load(weights_only=True) reads; {advice}."
        ) from error


def save_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write tensors, on any device, as safetensors with their metadata; the file appears whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    content = save(
        {key: value.detach().to("cpu").contiguous() for key, value in tensors.items()}, metadata=dict(metadata)
    )
    write_atomically(path, lambda file: file.write(content))


def load_safetensors(path: Path, *, advice: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a safetensors file.

    Raises:
        InputError: if the file is not one, or safetensors is not installed; the former ends with ``advice``.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: reading it needs safetensors; pip install 'decovae[train]'.") from error

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); {advice}.") from error

"""Tensors into the files of a checkpoint and out of them: in torch's format, with checksums, running no pickle."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.futures import Future

from decovae.training.checkpoint_files import Damaged


class _SummedFile(io.BufferedWriter):
    """A new file that keeps the checksum and the number of the bytes it was given."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"), 1 << 20)
        self.crc = self.size = 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        self.crc = zlib.crc32(data, self.crc)
        try:
            written = super().write(data)
        except OSError as error:
            self.failure = error
            raise
        self.size += written
        return written


class _SummingFileSystem(FileSystem):
    def __init__(self) -> None:
        self.written: dict[str, dict[str, int]] = {}
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        stream = _SummedFile(Path(path))
        try:
            with stream:
                yield stream
        finally:
            self.failure = stream.failure
        self.written[Path(path).name] = {"bytes": stream.size, "crc32": stream.crc}

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class Writer(FileSystemWriter):
    """Writes this process's share of the tensors; ``written`` then has the bytes and checksum of each of its files.

    They are summed up as they are written, so that nothing is read again.
    """

    def __init__(self, partial: Path) -> None:
        # Nothing to copy ahead: the tensors are on the CPU already, and asking for a stream would touch a GPU.
        super().__init__(partial, per_thread_copy_ahead=0)
        self._files = self.fs = _SummingFileSystem()

    @property
    def written(self) -> dict[str, dict[str, int]]:
        """Bytes and checksum of the files so far, by name."""
        return self._files.written

    def write_data(self, *arguments: Any, **options: Any) -> Future[Any]:
        """As the base class does, but what the file system refused is raised as such.

        torch's serializer makes an error of its own of it, of which nobody learns that the disk is full.
        """
        try:
            return super().write_data(*arguments, **options)
        except Exception:
            if self._files.failure is not None:
                raise self._files.failure from None
            raise


_LIBRARY = "torch.distributed.checkpoint"
_PLAIN = {
    *((f"{_LIBRARY}.metadata", name) for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata")),
    *((f"{_LIBRARY}.metadata", name) for name in ("TensorProperties", "ChunkStorageMetadata", "MetadataIndex")),
    *((f"{_LIBRARY}.metadata", name) for name in ("StorageMeta", "_MEM_FORMAT_ENCODING")),
    (f"{_LIBRARY}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
"""What torch's description of a checkpoint consists of, beside dtypes."""


class _MetadataUnpickler(pickle.Unpickler):
    """torch keeps the description of a checkpoint as a pickle, which could run anything; this one runs nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint")


class Reader(FileSystemReader):
    """Reads entries without running what others pickled: of tensors torch reads plain ones only."""

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        """The description of the entry.

        Raises:
            Damaged: if it cannot be read, or holds anything but descriptions of tensors.
        """
        try:
            with (Path(self.path) / ".metadata").open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            items = metadata.state_dict_metadata.items()
            other = [key for key, item in items if not isinstance(item, TensorStorageMetadata)]
        except Exception as error:  # broken bytes surface as nearly anything
            raise Damaged(f"its .metadata cannot be read: {error}") from error
        if other:
            raise Damaged(f"its {other[0]} is not a tensor")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        result: Metadata = metadata
        return result


def read_tensors(entry: Path, prefix: str) -> dict[str, Tensor]:
    """Whole tensors of an entry on the CPU, read by this process alone.

    Args:
        entry: a folder ``step-00001000`` of a run's ``checkpoints/``.
        prefix: which, for example ``autoencoder.weights.`` or ``autoencoder.average.``; the names come without it.

    Raises:
        Damaged: if the entry cannot be read.
    """
    reader = Reader(entry)
    described = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in described.items()
        if name.startswith(prefix) and isinstance(item, TensorStorageMetadata)
    }
    ignore_warnings()
    try:
        load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise Damaged(last_line(error)) from error
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def ignore_warnings() -> None:
    """torch warns of what is meant, one process, and of what it does itself. For good, since filters are no business of
    one thread alone."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)


def last_line(error: BaseException) -> str:
    """The last line of an error's text, where storage and planner put the cause below a traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__

"""The bytes of a file that may be compressed with gzip, read no further than they are asked for."""

from __future__ import annotations

import hashlib
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from decovae.errors import InputError

GZIP_MAGIC = b"\x1f\x8b"
MOST_OF_A_BYTE = 1032
"""Bytes that deflate makes of one at best: what a compressed file can hold is known before it is decompressed."""
SURPLUS = 1 << 20
"""Bytes behind what was promised that are read over: padding. More of them means that the promise is wrong."""
_AGAIN = "copy or export it again"
_CHUNK = 1 << 18  # of the file, at a time
_PIECE = 1 << 24  # of what comes out, at a time


class Content(Protocol):
    """What is in an opened file, uncompressed."""

    def head(self, count: int) -> bytes:
        """The first `count` bytes, or all if there are fewer; asked for once, before `whole`."""
        ...

    def whole(self, count: int, *, limit: int) -> np.ndarray:
        """The first `count` bytes, uint8; a read-only memory map where the file is not compressed.

        Raises:
            ValueError: there are fewer, or many more than that, `count` is above `limit`, or checksums inside the file
                are wrong; the message completes "the volume …".
        """
        ...

    def digest(self) -> str:
        """SHA-256 of the file, compressed as it is, in hexadecimal; to be asked for last."""
        ...


def printable(name: object) -> str:
    r"""A file's name as text that any terminal, JSON or CSV can take: bytes that are no UTF-8 as `\xff`."""
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@contextmanager
def opened(path: Path, *, volume: Path) -> Iterator[Content]:
    """A file's content, compressed or not, by its first bytes and not by its name: exports mix them up.

    Args:
        volume: what errors are to name.

    Raises:
        InputError: for what the body raises as OSError, MemoryError or ValueError, too; one sentence.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for its writer
            raise ValueError("cannot be read: it is not a file")
        with path.open("rb") as file:
            magic = file.read(len(GZIP_MAGIC))
            if not magic:
                raise ValueError(f"is an empty file: {_AGAIN}")
            file.seek(0)
            yield _Gzipped(file, path.stat().st_size) if magic == GZIP_MAGIC else _Plain(path)
    except OSError as error:
        raise InputError(f"The volume {printable(volume)} cannot be read: {error.strerror or error}.") from error
    except MemoryError as error:
        raise InputError(f"The volume {printable(volume)} does not fit into the memory that is left.") from error
    except ValueError as error:
        raise InputError(f"The volume {printable(volume)} {error}.") from error


class _Plain:
    def __init__(self, path: Path) -> None:
        self._map = np.memmap(path, mode="r")

    def head(self, count: int) -> bytes:
        return bytes(self._map[:count])

    def whole(self, count: int, *, limit: int) -> np.ndarray:
        _check_promise(count, most=self._map.size, limit=limit)
        _check_surplus(self._map.size - count)
        return self._map[:count]

    def digest(self) -> str:
        return hashlib.sha256(self._map.data).hexdigest()


class _Gzipped:
    """Members one after the other, padded with zeros or not; every member's length and checksum is verified."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._most = size * MOST_OF_A_BYTE
        self._file = file
        self._hash = hashlib.sha256()
        self._member = zlib.decompressobj(wbits=31)
        self._waiting = b""  # read from the file, not yet decompressed
        self._head = b""

    def head(self, count: int) -> bytes:
        buffer = np.empty(count, np.uint8)
        self._head = buffer[: self._fill(buffer)].tobytes()
        return self._head

    def whole(self, count: int, *, limit: int) -> np.ndarray:
        _check_promise(count, most=self._most, limit=limit)
        # Memory that is not written is not used: a file that promises more than it holds costs what it holds.
        buffer = np.empty(max(count, len(self._head)), np.uint8)
        buffer[: len(self._head)] = np.frombuffer(self._head, np.uint8)
        filled = len(self._head) + self._fill(buffer[len(self._head) :])
        _check_promise(count, most=filled, limit=limit)
        # To the end, for the checksum behind the last byte.
        _check_surplus(filled - count + self._fill(np.empty(SURPLUS + 1, np.uint8)))
        return buffer[:count]

    def digest(self) -> str:
        while self._read():
            pass
        return self._hash.hexdigest()

    def _fill(self, target: np.ndarray) -> int:
        """Decompress into `target`, uint8, until it is full or there is no more; returns how far it went."""
        filled = 0
        try:
            while filled < target.size and (not self._member.eof or self._next_member()):
                compressed = self._waiting or self._read()
                piece = self._member.decompress(compressed, min(target.size - filled, _PIECE))
                self._waiting = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
                if not compressed and not piece and not self._member.eof:
                    raise ValueError(f"is truncated or damaged: its compressed data end too early; {_AGAIN}")
                target[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
                filled += len(piece)
        except zlib.error as error:
            what = str(error).rpartition(": ")[2]  # behind zlib's number and the words for it
            raise ValueError(f"is truncated or damaged: decompressing it met an {what}; {_AGAIN}") from error
        return filled

    def _next_member(self) -> bool:
        while not (rest := self._waiting.lstrip(b"\0")):
            self._waiting = self._read()
            if not self._waiting:
                return False
        self._waiting = rest
        self._member = zlib.decompressobj(wbits=31)
        return True

    def _read(self) -> bytes:
        chunk = self._file.read(_CHUNK)
        self._hash.update(chunk)
        return chunk


def _check_promise(count: int, *, most: int, limit: int) -> None:
    if count > most:
        raise ValueError(f"is truncated: {count} bytes are promised, at most {most} are there; {_AGAIN}")
    if count > limit:
        raise ValueError(
            f"is {count / 2**30:.1f} GiB, above the limit of {limit / 2**30:.1f} GiB for one volume: raise the limit "
            "where there is an option for it, or resample the volume to fewer voxels"
        )


def _check_surplus(count: int) -> None:
    if count > SURPLUS:
        raise ValueError("holds far more than its header promises: the header is damaged, or it is not one 3D volume")

"""What of a store is done already: a line a volume, written when its file is in place, so that a killed run goes on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from decovae.data.file_bytes import printable
from decovae.data.pairs import stamp
from decovae.data.store import JOURNAL, VERSION, file_size
from decovae.data.store_index import canonical
from decovae.data.volumes import Shape
from decovae.errors import InputError
from decovae.files import write_text, writing
from decovae.preparation.candidates import Candidate

Entry = dict[str, Any]


Stamp = list[list[Any]]
"""Of `decovae.data.pairs.stamp`, and where its mask lies, if it has one."""


def stamp_of(candidate: Candidate) -> Stamp | None:
    """What tells whether a candidate's files are what they were; None where one cannot be looked at."""
    try:
        if candidate.mask is None:
            return stamp(candidate.path)
        which = os.path.relpath(candidate.mask, candidate.path.parent)  # masks may be alike in size and time
        return [*stamp(candidate.path, candidate.mask), [printable(which)]]
    except (OSError, ValueError):
        return None


class Journal:
    """The volumes that are done in a store's folder.

    Attributes:
        sources: of all volumes that it tells of.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, grid: Shape) -> None:
        """Read the journal of a folder, or begin one.

        Args:
            folder: the store's.
            settings: what volumes are prepared with, in JSON's types; those of a folder are all prepared alike.
            grid: the size of a prepared volume.

        Raises:
            InputError: the folder was begun with other settings, or its journal cannot be read.
            RunError: the journal cannot be written.
        """
        self._folder, self._path = folder, folder / JOURNAL
        self._sizes = {name: file_size(grid, name) for name in ("int16", "float16")}
        head = {"version": VERSION, "settings": json.loads(canonical(settings))}
        self._done: dict[str, tuple[Stamp, Entry]] = {}
        if self._path.exists():
            self._read(head)
        else:
            with writing(self._path):
                write_text(self._path, f"{canonical(head)}\n")

    @property
    def sources(self) -> set[str]:
        return set(self._done)

    def entry(self, candidate: Candidate, stamp: Stamp | None) -> Entry | None:
        """A volume's entry in the index, if it was prepared from these very files and its own file is in place."""
        if candidate.source not in self._done:
            return None
        before, entry = self._done[candidate.source]
        with contextlib.suppress(OSError, KeyError, TypeError):
            if before == stamp and (self._folder / entry["file"]).stat().st_size == self._sizes[entry["dtype"]]:
                return entry
        return None

    def file(self, source: str) -> str | None:
        """The file of a source's volume in the store, in place or not; None where nothing is known of it."""
        _, entry = self._done.get(source, (None, {}))
        return entry.get("file")

    @contextlib.contextmanager
    def appending(self) -> Iterator[Appender]:
        """To note meanwhile what gets done.

        Raises:
            RunError: the journal cannot be written.
        """
        with writing(self._path), self._path.open("r+b") as file:
            file.truncate(self._end_of_lines(file))
            file.seek(0, os.SEEK_END)
            yield Appender(file)

    def _read(self, head: Mapping[str, Any]) -> None:
        advice = "give another --out, or remove that folder"
        try:
            first, *lines = self._path.read_bytes().split(b"\n")[:-1]  # a last line without its end was cut off
            begun = json.loads(first)
            version, settings = begun["version"], dict(begun["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._path}: damaged; {advice}.") from error
        if version != head["version"]:
            raise InputError(f"{self._folder}: begun by another version of DeCo-VAE; {advice}.")
        if settings != head["settings"]:
            raise InputError(f"{self._folder}: begun with {_difference(settings, head['settings'])}; {advice}.")
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a volume more to prepare, no more than that
                done = json.loads(line)
                self._done[done["source"]] = done["stamp"], done["entry"]

    @staticmethod
    def _end_of_lines(file: BinaryIO) -> int:
        content = file.read()
        return content.rfind(b"\n") + 1


class Appender:
    """A journal that is open for another line."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def note(self, candidate: Candidate, stamp: Stamp | None, entry: Entry) -> None:
        """A volume is done: its file is in place.

        Raises:
            OSError: the line cannot be written.
        """
        line = canonical({"source": candidate.source, "stamp": stamp, "entry": entry})
        self._file.write(f"{line}\n".encode())
        self._file.flush()


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The options that differ, as they were and as they are: ``--volume.fit resize instead of resample``."""
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return ", ".join(
        f"--volume.{name.replace('_', '-')} {_words(before.get(name))} instead of {_words(now.get(name))}"
        for name in names
    )


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)

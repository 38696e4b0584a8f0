"""The volumes that a manifest lists, each row judged for itself."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePath, PureWindowsPath

from decovae.data.manifest import RESERVED, Row, read_rows
from decovae.data.openable import NOT_THERE, unopenable
from decovae.data.pairs import halves
from decovae.data.walk import Entry, foreign_format
from decovae.preparation.candidates import Candidate, Exclusion
from decovae.preparation.selection import Selection, Survey, source_of


def survey_manifest(manifest: Path, source_root: Path | None, selection: Selection, *, masks: bool) -> Survey:
    """The volumes of a table with a column `path` and, if wanted, `subject`, `session` and `mask`.

    Every other column is carried along. A row that names no file, one outside the folder that paths are relative to, or
    one that an earlier row named is an exclusion, which tells the line. What is outside is judged by the path's text:
    where links lead to is their owner's business.

    Args:
        source_root: that folder; by default the manifest's.
        masks: look for the files in the column `mask`; else what it says does not matter.

    Raises:
        InputError: the table cannot be read.
    """
    rows = _Rows(manifest, manifest.parent if source_root is None else source_root, selection, masks=masks)
    return selection.survey(rows, [])


class _Rows:
    def __init__(self, manifest: Path, root: Path, selection: Selection, *, masks: bool) -> None:
        self._table = read_rows(manifest, "path")
        self._masks = masks
        self._name = manifest.name
        self._root = root
        self._above = [Path(os.path.abspath(root)), Path(os.path.realpath(root))]
        self._selection = selection
        self._lines: dict[PurePath, int] = {}

    def __iter__(self) -> Iterator[Candidate | Exclusion]:
        for row in self._table:
            entry = row.value("path")
            try:
                if row.surplus:
                    raise ValueError(row.surplus)
                if not entry:
                    raise ValueError("names no path")
                path = self._inside(entry)
            except ValueError as error:
                reason = f"Line {row.line} of {self._name} {error}."
                yield Exclusion(row.value("subject"), row.value("session"), _shown(entry), "problem", reason)
                continue
            if self._selection.wants(Entry(path, "volume")):
                yield self._taken(row, path)

    def _taken(self, row: Row, path: PurePath) -> Candidate | Exclusion:
        source = source_of(path)
        subject, session = row.value("subject"), row.value("session")
        try:
            if not subject:
                subject, named = self._selection.names(source)
                session = session or named
            file = self._file(path)
            first = self._lines.setdefault(PurePath(os.path.relpath(file, self._root)), row.line)
            if first != row.line:
                raise ValueError(f"names the same file as line {first}")
            named_mask = row.value("mask") if self._masks else ""
            mask = self._file(self._inside(named_mask)) if named_mask else None
        except ValueError as error:
            reason = f"Line {row.line} of {self._name} {error}".rstrip(".")
            return Exclusion(subject, session, source, "problem", f"{reason}.")
        return Candidate(subject, session, file, source, row.others(*RESERVED), mask)

    def _inside(self, entry: str) -> PurePath:
        """A path of the table, relative to the folder that it may not leave."""
        if "\0" in entry:
            raise ValueError("names a path with a NUL in it")
        if PureWindowsPath(entry).is_absolute() and not Path(entry).is_absolute():
            raise ValueError(f"names {_shown(entry)} by a path of Windows: write it relative to the table, with /")
        path = Path(os.path.normpath(self._above[0] / entry))
        for folder in self._above:
            if folder in path.parents:
                return path.relative_to(folder)
        raise ValueError(
            f"names {_shown(entry)}, which is not in the folder of the table; give a folder above both with "
            "--select.source-root"
        )

    def _file(self, path: PurePath) -> Path:
        """The file with a volume's voxels."""
        # Systems write one accented letter in two ways; a table and a disk need not agree.
        spelt = [self._root / path, *(self._root / unicodedata.normalize(form, str(path)) for form in ("NFC", "NFD"))]
        file = next((file for file in spelt if os.path.lexists(file)), spelt[0])
        if advice := foreign_format(path.name):
            raise ValueError(f"names {source_of(path)}, which {advice}")
        if problem := unopenable(file):
            slashes = " (write / between folders, not \\)" if problem == NOT_THERE and "\\" in path.name else ""
            raise ValueError(f"names {source_of(path)}, which {problem}{slashes}")
        try:
            return halves(file)[1]
        except OSError as error:
            raise ValueError(f"names {source_of(path)}, which is half of a pair, and {error.strerror}") from error


def _shown(entry: str) -> str:
    """A path of the table as a report gives it: where a whole one leads on this machine is nobody's business."""
    path = PureWindowsPath(entry)  # it takes either slash
    return path.name if path.root or path.is_absolute() else entry

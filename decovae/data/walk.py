"""What looks like a volume in a folder's tree, whether it can be opened or not."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath
from typing import Literal, NamedTuple

from decovae.data.file_bytes import printable
from decovae.data.openable import is_there, unopenable
from decovae.data.pairs import halves, is_half

SUFFIXES = (".nii", ".nii.gz", ".img", ".img.gz")
"""Of the files that volumes are read from; a `.hdr` is the other half of an `.img`."""
_CONVERTERS = {
    (".mgz", ".mgh"): "is in FreeSurfer's format: convert it with `mri_convert`",
    (".nrrd", ".nhdr"): "is in NRRD format: convert it to NIfTI, for example with `c3d` or 3D Slicer",
    (".mha", ".mhd"): "is in MetaImage format: convert it to NIfTI, for example with `c3d` or 3D Slicer",
    (".mnc", ".mnc.gz"): "is in MINC format: convert it with `mnc2nii`",
    (".nii.bz2", ".nii.xz", ".nii.zst", ".nii.zip"): "is compressed by other means than gzip: decompress it",
}

State = Literal["volume", "broken", "foreign", "closed", "again"]
"""Of an entry: a file to be opened; one that cannot be; something else that may hold a volume; a folder that cannot be
read; one that is searched elsewhere."""


class Entry(NamedTuple):
    """A file or folder that is or should be a volume.

    Attributes:
        path: relative to the folder that was searched.
        problem: what is wrong with it, to follow "the file …"; empty for a volume.
    """

    path: PurePath
    state: State
    problem: str = ""


class Walk(NamedTuple):
    """What was found, in an order that no file system has a say in.

    Attributes:
        hidden: how many hidden folders and volumes were passed by.
        astray: links to nothing whose names do not tell whether a volume, or a folder of them, should be there.
    """

    entries: list[Entry]
    hidden: int
    astray: list[PurePath]


def bare_name(name: str) -> str:
    """A file's name without a volume's suffix."""
    return re.sub(r"\.(nii|img|hdr)(\.gz)?$", "", name, flags=re.IGNORECASE)


def foreign_format(name: str) -> str:
    """What to do about a volume in a format that is not read, to follow "the file …"; empty for other names."""
    return next((advice for endings, advice in _CONVERTERS.items() if name.lower().endswith(endings)), "")


def walk(root: Path, *, passed_by: Collection[str] = ()) -> Walk:
    """Everything below a folder that looks like a volume; links are followed, each folder is searched once.

    Links to folders wait until all else is searched, so that a folder goes by its own name wherever it has one below
    the root. A second way to a folder with volumes in it is an entry of its own; the way back to a folder from inside
    it is none. Hidden files and folders are passed by: they are other systems' side files, and what tools such as
    git-annex keep.

    Args:
        passed_by: names of folders in the root that are not searched.
    """
    search = _Search(root, passed_by)
    while search.waiting:
        search.below(search.waiting.popleft())
    return Walk(search.found + search.closing(), search.hidden, search.astray)


class _Search:
    def __init__(self, root: Path, passed_by: Collection[str]) -> None:
        self.found: list[Entry] = []
        self.astray: list[PurePath] = []
        self.hidden = 0
        self.waiting = deque([root])
        self._root = root
        self._passed_by = passed_by
        self._seen: dict[tuple[int, int], PurePath] = {}
        self._repeats: list[tuple[PurePath, PurePath]] = []
        self._named_like_volumes: list[PurePath] = []

    def below(self, start: Path) -> None:
        """Search a folder and what is below it without a link."""
        for name, children, files in os.walk(start, onerror=self._closed):
            folder = Path(name)
            place = folder.relative_to(self._root)
            if not self._is_new(folder, place):
                children.clear()
                continue
            self.hidden += sum(child.startswith(".") for child in children)
            self.hidden += sum(file.startswith(".") and _is_volume(file) for file in files)
            shown = sorted(child for child in children if not child.startswith("."))
            if folder == self._root:
                shown = [child for child in shown if child not in self._passed_by]
            links = {child: os.path.islink(folder / child) for child in shown}
            self.waiting += [folder / child for child in shown if links[child]]
            # Which of two ways into a folder comes first must not depend on the file system.
            children[:] = [child for child in shown if not links[child]]
            self._named_like_volumes += [place / child for child in shown if _is_volume(child) or is_half(child)]
            files = sorted(file for file in files if not file.startswith("."))
            self.found += _entries(folder, place, files)
            for file in files:
                if "." not in file:
                    self._follow(folder / file)

    def closing(self) -> list[Entry]:
        """What can be said only when all is searched."""
        holding = {parent for entry in self.found for parent in (entry.path, *entry.path.parents)}
        entries = []
        for place, first in self._repeats:
            if first in holding:
                link = "a link to a folder" if os.path.islink(self._root / place) else "a folder"
                entries.append(Entry(place, "again", f"is {link} that is searched as {printable(first.as_posix())}"))
                holding.update((place, *place.parents))
        entries += [
            Entry(place, "foreign", "is a folder with a volume's name, and there is no volume in it")
            for place in self._named_like_volumes
            if place not in holding
        ]
        return entries

    def _is_new(self, folder: Path, place: PurePath) -> bool:
        """Whether a folder can be searched and is not yet."""
        try:
            first = self._seen.setdefault(_identity(folder), place)
        except OSError as error:
            self._closed(error)
            return False
        if first == place:
            return True
        if first not in place.parents:
            self._repeats.append((place, first))
        return False

    def _follow(self, path: Path) -> None:
        """Look where it leads, if it is a link, whose name does not tell what should be there."""
        try:
            if not is_there(path):
                self.astray.append(path.relative_to(self._root))
        except OSError as error:
            self._closed(error)

    def _closed(self, error: OSError) -> None:
        place = PurePath(os.path.relpath(error.filename, self._root))
        what = "link that cannot be followed" if os.path.islink(self._root / place) else "folder that cannot be read"
        self.found.append(Entry(place, "closed", f"is a {what} ({error.strerror})"))


def _identity(folder: Path) -> tuple[int, int]:
    """What tells a folder from others, whatever it is called. A folder whose files may not be opened has none."""
    status = os.stat(os.path.join(folder, "."))
    return status.st_dev, status.st_ino


def _entries(folder: Path, place: PurePath, files: list[str]) -> Iterator[Entry]:
    for file in files:
        if advice := foreign_format(file):
            yield Entry(place / file, "foreign", advice)
        elif _is_volume(file) or is_half(file):
            problem = unopenable(folder / file)
            header = not _is_volume(file)
            if is_half(file) and (lone := _lone(folder / file)):
                yield Entry(place / file, "foreign", problem or lone)
            elif not header:
                yield Entry(place / file, "broken" if problem else "volume", problem)


def _lone(path: Path) -> str:
    try:
        halves(path)
    except FileNotFoundError as error:
        return f"is half of a .hdr/.img pair, and {error.strerror}"
    except OSError:  # said when the volume is opened
        pass
    return ""


def _is_volume(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)

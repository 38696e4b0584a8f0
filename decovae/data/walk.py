"""What looks like a volume in a folder's tree, whether it can be opened or not."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Literal, NamedTuple

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

State = Literal["volume", "broken", "foreign", "closed"]
"""Of an entry: a file to be opened; one that cannot be; something else that may hold a volume; an unreadable folder."""


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


def unopenable(path: Path) -> str:
    """Why a path cannot be opened as a file, to follow "the file …"; empty if it can."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if not path.is_symlink():
            return f"cannot be read ({error.strerror})"
        if error.errno == errno.ELOOP:
            return "is a link that leads to itself"
        annexed = "annex" in os.readlink(path)
        return "is a link to a file that is not here" + (": fetch it with `datalad get`" if annexed else "")
    if stat.S_ISREG(mode):
        return ""
    return "is a folder" if stat.S_ISDIR(mode) else "is a pipe, a socket or a device"


def walk(root: Path) -> Walk:
    """Everything below a folder that looks like a volume; links are followed, each folder is searched once.

    Hidden files and folders are passed by: they are other systems' side files, and what tools such as git-annex keep.
    """
    found: list[Entry] = []
    named_like_volumes: list[PurePath] = []
    astray: list[PurePath] = []
    hidden = 0

    def closed(error: OSError) -> None:
        folder = PurePath(os.path.relpath(error.filename, root))
        found.append(Entry(folder, "closed", f"is a folder that cannot be read ({error.strerror})"))

    seen = set()  # a link to a parent would never end
    for name, children, files in os.walk(root, followlinks=True, onerror=closed):
        folder = Path(name)
        try:
            status = os.stat(folder)
        except OSError as error:
            closed(error)
            continue
        if (status.st_dev, status.st_ino) in seen:
            children.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        hidden += sum(child.startswith(".") for child in children)
        hidden += sum(file.startswith(".") and _is_volume(file) for file in files)
        # Which of two ways into a folder comes first must not depend on the file system.
        children[:] = sorted(child for child in children if not child.startswith("."))
        place = folder.relative_to(root)
        named_like_volumes += [place / child for child in children if _is_volume(child) or is_half(child)]
        files = sorted(file for file in files if not file.startswith("."))
        found += _entries(folder, place, files)
        astray += [place / file for file in files if "." not in file and unopenable(folder / file)]
    holding = {parent for entry in found for parent in (entry.path, *entry.path.parents)}
    found += [
        Entry(path, "foreign", "is a folder with a volume's name, and there is no volume in it")
        for path in named_like_volumes
        if path not in holding
    ]
    return Walk(found, hidden, astray)


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
    except OSError as error:
        return f"is half of a .hdr/.img pair, and {error.strerror}"
    return ""


def _is_volume(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)

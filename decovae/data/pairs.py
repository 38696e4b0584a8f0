"""NIfTI volumes in two files, a header `.hdr` and its voxels `.img`, each compressed or not."""

from __future__ import annotations

import re
from pathlib import Path

from decovae.data.openable import is_there

_HALF = re.compile(r"(?P<stem>.+)\.(?P<half>hdr|img)(?P<gz>\.gz)?", re.IGNORECASE | re.DOTALL)


def is_half(name: str) -> bool:
    """Whether a file is one of a pair, by its name."""
    return _HALF.fullmatch(name) is not None


def halves(path: Path) -> tuple[Path, Path]:
    """The files with the header and with the voxels; the same one twice for a volume that is one file.

    Args:
        path: either half of a pair, or any other file.

    Raises:
        FileNotFoundError: the other half is not there.
        OSError: nobody can tell where it is.
    """
    if not (match := _HALF.fullmatch(path.name)):
        return path, path
    other = _other_half(path, match)
    return (other, path) if match["half"].lower() == "img" else (path, other)


def _other_half(path: Path, match: re.Match[str]) -> Path:
    half, gz = match["half"], match["gz"] or ""
    wanted = "img" if half.lower() == "hdr" else "hdr"
    wanted = wanted.upper() if half.isupper() else wanted
    names = [f"{match['stem']}.{wanted}{end}" for end in dict.fromkeys((gz, "", ".gz"))]
    try:
        other = next((name for name in names if is_there(path.with_name(name))), None)
    except OSError as error:
        raise OSError(error.errno, f"its other half, {names[0]}, cannot be read ({error.strerror})") from error
    if other is not None:
        return path.with_name(other)
    raise FileNotFoundError(None, f"its other half, {names[0]}, is not beside it", str(path))


Stamp = list[list[int]]
"""Size in bytes and time of the last change in ns, of each file that a volume is made from."""


def stamp(*paths: Path) -> Stamp:
    """What tells whether volumes' files are what they were: of a pair, both halves.

    Raises:
        OSError: a file cannot be looked at.
    """
    stats = [file.stat() for path in paths for file in dict.fromkeys(halves(path))]
    return [[each.st_size, each.st_mtime_ns] for each in stats]

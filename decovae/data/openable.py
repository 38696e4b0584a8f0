"""Whether there is a file to be opened, on systems that may not answer."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

NOT_THERE = "does not exist"
"""What `unopenable` says of a path to nothing."""
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def is_there(path: Path) -> bool:
    """Whether a path leads to anything.

    Not pathlib's `exists`, which says in some versions of Python that what may not be looked at is not there.

    Raises:
        OSError: nobody can tell, because a folder on the way may not be searched, for example.
    """
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise
    return True


def unopenable(path: Path) -> str:
    """Why a path cannot be opened as a file, to follow "the file …"; empty if it can."""
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # a NUL in it
        return NOT_THERE
    except OSError as error:
        if error.errno not in _ABSENT:
            return f"cannot be read ({error.strerror})"
        if error.errno == errno.ELOOP:
            return "is a link that leads to itself"
        if not os.path.islink(path):
            return NOT_THERE
        annexed = "annex" in os.readlink(path)
        return "is a link to a file that is not here" + (": fetch it with `datalad get`" if annexed else "")
    if stat.S_ISREG(mode):
        return ""
    return "is a folder" if stat.S_ISDIR(mode) else "is a pipe, a socket or a device"

"""Every volume is read once before training starts: bad ones stop the run, good ones get their scaling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import track

from decovae.data.cache import recall, remember
from decovae.data.file_bytes import printable
from decovae.data.pairs import stamp
from decovae.data.volumes import Affine, Shape, affine_rows
from decovae.errors import InputError
from decovae.threads import usable_cpus

Item = TypeVar("Item")
Result = TypeVar("Result")

MEASURE_VERSION = 3  # raise it when the meaning of what is remembered of a volume changes
SHOW_PROGRESS_FROM = 8  # fewer volumes are done before a bar would be read


def for_all(
    function: Callable[[Item], Result], items: Sequence[Item], *, description: str, workers: int | None = None
) -> list[Result | InputError]:
    """`function` of every item, in order, an `InputError` in the place of what it raised; other errors are raised.

    Threads, not processes: decompression, sorting and torch release the interpreter's lock, nothing has to be pickled,
    and a fork of a process that has touched CUDA or holds a process group is not safe.
    """

    def attempt(item: Item) -> Result | InputError:
        try:
            return function(item)
        except InputError as error:
            return error

    workers = workers or min(8, usable_cpus())
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(attempt, items)
        if len(items) < SHOW_PROGRESS_FROM:
            return list(results)
        console = Console(stderr=True)  # standard output belongs to the command's own result
        return list(track(results, description, total=len(items), console=console, transient=True))


def accepted(results: Sequence[Result | InputError]) -> list[Result]:
    """All results, if none is an error.

    Raises:
        InputError: the first error, with the number of others.
    """
    errors = [result for result in results if isinstance(result, InputError)]
    if not errors:
        return [result for result in results if not isinstance(result, InputError)]
    if len(errors) == 1:
        raise errors[0]
    raise InputError(f"{str(errors[0]).rstrip('.')} ({len(errors) - 1} more volumes cannot be used either).")


class Measurement(NamedTuple):
    """What reading a volume tells: the fields of `VolumeRecord` of the same names."""

    shape: Shape
    low: float
    high: float
    affine: Affine
    foreground: bytes


def measured(path: Path, measure: Callable[[Path], Measurement]) -> Measurement:
    """`measure(path)`, remembered for as long as the file's size and time stay, of a pair both files'.

    Raises:
        InputError: there is no such file, or what `measure` raises.
    """
    try:
        sizes_and_times = ":".join(str(number) for file in stamp(path) for number in file)
    except OSError as error:
        raise InputError(f"The volume {printable(path)} cannot be read: {error.strerror}.") from error
    key = f"{MEASURE_VERSION}:{path.resolve()}:{sizes_and_times}"
    if (known := _parsed(recall(key))) is not None:
        return known
    found = measure(path)
    rows = [list(row) for row in found.affine]
    remember(
        key,
        {**found._asdict(), "shape": list(found.shape), "affine": rows, "foreground": found.foreground.hex()},
    )
    return found


def _parsed(entry: dict[str, Any] | None) -> Measurement | None:
    try:
        if entry is None:
            return None
        depth, height, width = (int(size) for size in entry["shape"])
        affine = affine_rows(entry["affine"])
        foreground = bytes.fromhex(entry["foreground"])
        return Measurement((depth, height, width), float(entry["low"]), float(entry["high"]), affine, foreground)
    except (KeyError, TypeError, ValueError):
        return None

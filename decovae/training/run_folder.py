"""A run's folder: its configuration, its log, its summary."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from decovae.errors import InputError, RunError
from decovae.files import remove_partial, write_text, writing
from decovae.training.config import RunConfig
from decovae.training.config_file import NAME, RETIRED, as_plain, leaves, read_plain
from decovae.training.interruption import Interrupted
from decovae.training.trackers import Board, Trackers

HOW_NOT_WHAT = (
    "out",
    "device",
    "compile",
    "memory",
    *RETIRED,
    "checkpoint_every",
    "keep_checkpoints",
    "keep_best",
    "log_every",
    "skip_limit",
    "data.workers",
    "data.prefetch",
    "data.batch_size",
    "optimizer.accumulation",
    "parallel",
    "telemetry",
)
"""Options, and groups of options, that change how a run is computed or kept, and may differ when it is resumed. How
many samples a step takes is said when it changes: more processes may have smaller batches."""

PATHS = ("data.root", "vae", "latents", "init")
"""Options that name what a run is given; older runs kept them as they were typed."""

INPUTS = "inputs.json"


def check_folder(folder: Path, config: RunConfig) -> None:
    """Refuse a folder that this configuration cannot start or resume in; nothing is written.

    Raises:
        InputError: if the folder holds another configuration's run or other files.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--out {folder}: is a file; give a folder.")
        found = read_plain(folder)
    except FileNotFoundError:
        if folder.is_dir() and any(entry.suffix != ".partial" for entry in folder.iterdir()):
            raise InputError(f"--out {folder}: holds files but no run; give an empty or a new folder.") from None
        return
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be read ({error.strerror}); give another folder.") from error
    # What did not exist when the run began had its default.
    before = dict(leaves(as_plain(type(config)()))) | dict(leaves(found))
    before |= {option: str(Path(before[option]).resolve()) for option in PATHS if before.get(option)}
    after = dict(leaves(as_plain(config)))
    for option in sorted(before.keys() | after.keys(), key=lambda name: (name != "stage", name)):
        if not {option, option.partition(".")[0]} & {*HOW_NOT_WHAT} and before.get(option) != after.get(option):
            raise InputError(
                f"--out {folder}: holds a run with {option}={before.get(option)}, not {after.get(option)}; "
                "give another --out, or the same options to resume it."
            )


def create_folder(folder: Path, config: RunConfig) -> None:
    """Make the run's folder with its ``config.yaml``, unless it is there; then remove what a kill left half written.

    Raises:
        InputError: if it cannot be written.
    """
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for written in (folder, folder / "previews", folder / "nonfinite"):
            remove_partial(written)
        if not path.exists():
            write_text(path, yaml.safe_dump(as_plain(config), sort_keys=False))
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror}); give another folder.") from error


def check_inputs(folder: Path, inputs: Mapping[str, str]) -> None:
    """Note what a run is given beside its options, or refuse what is not what it began with.

    Args:
        folder: the run's.
        inputs: names and hashes.

    Raises:
        InputError: naming the input that is another.
    """
    before = read_inputs(folder)
    if before is None:
        path = folder / INPUTS
        with writing(path):
            write_text(path, json.dumps(dict(inputs), indent=2) + "\n")
        return
    for name, digest in inputs.items():
        if before.get(name) != digest:
            raise InputError(
                f"--out {folder}: this run began with another {name} than there is now; restore that, or give another "
                "--out."
            )


def read_inputs(folder: Path) -> dict[str, str] | None:
    """What a run was given beside its options, as names and hashes; None where that was never noted.

    Raises:
        InputError: if the note is damaged.
    """
    return _read_note(folder / INPUTS, advice="restore it, or train again elsewhere")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run, or None.

    Raises:
        InputError: if it is damaged.
    """
    return _read_note(folder / "summary.json", advice="remove it to finish the run again")


def _read_note(path: Path, *, advice: str) -> dict[str, Any] | None:
    try:
        note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {advice}.") from error
    return note


def _complain(line: str) -> None:
    print(line, file=sys.stderr)


class MetricsLog:
    """``metrics.jsonl``, one object a line; the same figures as TensorBoard's events, and in the trackers asked for.

    Opening it drops what a run that died after its last checkpoint left behind: the lines of steps after ``step``, the
    one that is resumed from, or all of them where there is none. As a context manager it is closed at the end, whatever
    that is: an error is not hidden by one of closing.

    Args:
        folder: the run's.
        config: the run's.
        step: the one that is resumed from.
        say: prints what is wrong with a tracker.

    Raises:
        InputError: if a tracker is not installed or cannot be reached.
        RunError: on construction and of every method, if the files cannot be written.
    """

    def __init__(
        self, folder: Path, config: RunConfig, *, step: int | None, say: Callable[[str], None] = _complain
    ) -> None:
        self.folder, self.path = folder, folder / "metrics.jsonl"
        with writing(folder), ExitStack() as opened:
            kept = [] if step is None else [record for record in self.records() if record["step"] <= step]
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
            self._file = self.path.open("a", encoding="utf-8")
            opened.callback(self._file.close)
            self._board = Board(folder, purge=0 if step is None else step + 1)
            opened.callback(self._board.close)
            self._trackers = Trackers(folder, config, say=say)
            opened.pop_all()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            with suppress(RunError):
                self.close(failed=not isinstance(error, Interrupted))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line and flush it."""
        scalars = {name: float(value) for name, value in values.items() if isinstance(value, float | int)}
        with writing(self.path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            self._board.write(step, scalars)
        self._trackers.write(step, scalars)

    def sync(self) -> None:
        """Have what was written on the disk, not in the system's memory: a checkpoint that is there has its lines."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """Every line so far; none where there is no file."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        return [record for line in lines if (record := _parsed(line)) is not None]

    def close(self, *, failed: bool = False) -> None:
        """Flush to disk and close, all of it even where a part cannot be."""
        with writing(self.path), ExitStack() as closing:
            closing.callback(self._trackers.close, failed=failed)
            closing.callback(self._board.close)
            closing.callback(self._file.close)
            self._file.flush()
            os.fsync(self._file.fileno())


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:  # the last line of a process that was killed while it wrote
        return None
    return record if isinstance(record, dict) and "step" in record else None

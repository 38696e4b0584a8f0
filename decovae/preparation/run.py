"""A preparation from its source to a finished store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from decovae.data.file_bytes import printable
from decovae.data.splits import COLUMN
from decovae.data.store import STORE
from decovae.errors import InputError
from decovae.files import locked, writing
from decovae.preparation.candidates import Candidate, Exclusion
from decovae.preparation.choice import Chosen, choose
from decovae.preparation.config import PrepareConfig
from decovae.preparation.folder import LOCK, refuse_other_folders, sweep, withdraw
from decovae.preparation.journal import Entry, Journal, stamp_of
from decovae.preparation.pictures import ACCEPTED, REJECTED, draw
from decovae.preparation.report import EXCLUDED, Outcome, sorted_exclusions, write_excluded, write_report
from decovae.preparation.selection import counted
from decovae.preparation.splits import Splits, assign_splits
from decovae.preparation.volume import Preparation, prepare_volume
from decovae.preparation.workers import for_each, usual_workers
from decovae.preparation.writer import finish_store, write_volume


def prepare(config: PrepareConfig) -> Outcome:
    """Make or finish the store that ``config`` describes.

    The same volumes and options give the same files, byte for byte, however often the process was killed on the way.

    Raises:
        InputError: an option cannot be used, or no volume can; in the latter case ``excluded.csv`` says why.
        RunError: the folder cannot be written, or no processes can be started.
    """
    if config.source is None or config.out is None:
        raise InputError("Give the volumes and a folder for the store: decovae prepare SRC --out DIR.")
    out = config.out
    refuse_other_folders(out)
    chosen = choose(config, config.source)
    if not out.exists():  # else those who withdrew have to leave it first
        _check_splits(chosen, config.split)
    refusal = f"{out}: another `decovae prepare` is at work there; wait for it, or give another --out."
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / LOCK, refusal=refusal):
            return _prepare(config, out, chosen)


def settings_of(preparation: Preparation) -> dict[str, Any]:
    """What determines a prepared volume besides its file. The limit does not: it says only what is refused."""
    return {name: value for name, value in asdict(preparation).items() if name != "limit_gib"}


def _prepare(config: PrepareConfig, out: Path, chosen: Chosen) -> Outcome:
    settings = settings_of(config.volume)
    journal = Journal(out, settings, grid=config.volume.grid)
    if journal.sources and journal.sources.isdisjoint(chosen.found):
        raise InputError(
            f"{out}: holds other volumes, {min(journal.sources)} among them, and none of {config.source}; give another "
            "--out, or remove that folder."
        )
    by_rule = (journal.file(each.source) for each in chosen.exclusions if each.kind == "rule")
    withdrawn = withdraw(out, filter(None, by_rule), others=(ACCEPTED, REJECTED))
    _check_splits(chosen, config.split)
    entries, failures = _prepared(config, out, chosen.candidates, journal)
    entries, copies = _without_copies(entries)
    exclusions = sorted_exclusions([*chosen.exclusions, *failures, *copies])
    write_excluded(out, exclusions)
    if not entries:
        (out / STORE).unlink(missing_ok=True)  # of an earlier preparation, with what this one does not let through
        reason = next((each.reason for each in exclusions if each.kind == "problem"), exclusions[0].reason)
        raise InputError(
            f"None of the {len(exclusions)} volumes of {config.source} can be prepared; {out / EXCLUDED} says why of "
            f"each, of the first: {reason}"
        )
    entries = _split(entries, config.split)
    outcome = Outcome(out, entries, exclusions, chosen.notes)
    if config.pictures:
        outcome = replace(outcome, notes=[*outcome.notes, *draw(outcome, chosen.found, config)])
    write_report(outcome, _options(config))
    finish_store(out, entries, settings, grid=config.volume.grid)
    if gone := withdrawn | sweep(out, entries):
        was = "was" if len(gone) == 1 else "were"
        note = f"{counted(len(gone), 'volume')} of an earlier preparation {was} removed from the store."
        outcome = replace(outcome, notes=[*outcome.notes, note])
    return outcome


def _prepared(
    config: PrepareConfig, out: Path, candidates: Iterable[Candidate], journal: Journal
) -> tuple[list[Entry], list[Exclusion]]:
    """The entries of all volumes that can be used, and why each other cannot: that is asked anew every time, since what
    stood in a volume's way, memory or a permission, may be gone."""
    entries: list[Entry] = []
    failures: list[Exclusion] = []
    stamps = {candidate.source: stamp_of(candidate) for candidate in candidates}
    waiting: list[Candidate] = []
    for candidate in candidates:
        known = journal.entry(candidate, stamps[candidate.source])
        if known is None:
            waiting.append(candidate)
        else:
            entries.append(_of(candidate, known))
    if not waiting:
        return entries, failures
    one = partial(prepare_one, preparation=config.volume, folder=out)
    workers = min(usual_workers() if config.workers is None else config.workers, len(waiting))
    with (
        journal.appending() as lines,
        _progress(done=len(entries), total=len(entries) + len(waiting)) as advance,
        contextlib.closing(for_each(one, waiting, workers=workers)) as results,
    ):
        for candidate, result in results:
            if isinstance(result, InputError):
                failures.append(Exclusion.of(candidate, "problem", str(result)))
            else:
                lines.note(candidate, stamps[candidate.source], result)
                entries.append(_of(candidate, result))
            advance()
    return entries, failures


def prepare_one(candidate: Candidate, *, preparation: Preparation, folder: Path) -> Entry:
    """Put a volume into a store's folder and return its entry in the index.

    Raises:
        InputError: the volume cannot be used, and why.
        RunError: the folder cannot be written.
    """
    try:
        prepared = prepare_volume(candidate, preparation)
    except InputError as error:  # where files lie on this machine is nobody's business who reads the report
        reason = str(error).replace(printable(candidate.path), candidate.source)
        if candidate.mask is not None:
            reason = reason.replace(printable(candidate.mask), candidate.mask.name)
        raise InputError(reason) from error
    with writing(folder):
        write_volume(folder, prepared)
    return prepared.entry


def _of(candidate: Candidate, entry: Entry) -> Entry:
    """The entry with what is said of the volume now: a manifest may have changed since, and its file not."""
    return {
        **entry,
        "subject": candidate.subject,
        "session": candidate.session,
        "columns": dict(candidate.columns),
    }


def _without_copies(entries: Iterable[Entry]) -> tuple[list[Entry], list[Exclusion]]:
    """The entries in order, and those whose voxels an earlier one has too."""
    first: dict[str, Entry] = {}
    copies = []
    for entry in sorted(entries, key=lambda entry: (entry["subject"], entry["source"])):
        original = first.setdefault(entry["sha256"], entry)
        if original is not entry:
            reason = (
                f"Its voxels are those of another volume: {original['source']} of subject {original['subject']}; a "
                "copy could be trained on and tested on."
            )
            copies.append(Exclusion(entry["subject"], entry["session"], entry["source"], "problem", reason))
    return list(first.values()), copies


def _check_splits(chosen: Chosen, splits: Splits) -> None:
    """Refuse now what would be refused in hours."""
    if chosen.candidates:
        assign_splits([(each.subject, each.columns) for each in chosen.candidates], splits)


def _split(entries: list[Entry], splits: Splits) -> list[Entry]:
    names = assign_splits([(entry["subject"], entry["columns"]) for entry in entries], splits)
    if names is None:
        return entries
    return [
        {**entry, "columns": {**entry["columns"], COLUMN: name}} for entry, name in zip(entries, names, strict=True)
    ]


def _options(config: PrepareConfig) -> dict[str, Any]:
    """What was asked for, in JSON's types and without the places of this machine."""
    names = ("volume", "select", "table", "exclude", "split")
    parts: dict[str, Any] = {name: getattr(config, name) for name in names}
    return {
        name: {key: value.name if isinstance(value, Path) else value for key, value in asdict(part).items()}
        for name, part in parts.items()
    }


@contextlib.contextmanager
def _progress(*, done: int, total: int) -> Iterator[Any]:
    """A bar on standard error, which leaves standard output to the result."""
    columns = (
        TextColumn("Preparing volumes"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda: progress.advance(task)

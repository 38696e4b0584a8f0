"""Which files of a folder, a BIDS dataset or a manifest are asked for, and whose they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NamedTuple

from decovae.data.file_bytes import printable
from decovae.data.sources import session_of, subject_of
from decovae.data.walk import Entry, Walk, bare_name
from decovae.errors import InputError
from decovae.preparation.candidates import Candidate, Exclusion

_GLOB = re.compile(r"\*\*/|\*\*|\*|\?|\[!?[^\]]+\]|.", re.DOTALL)
_WILD = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


@dataclass(frozen=True, kw_only=True)
class SurveyOptions:
    """Which of the files to take."""

    match: str = ""
    """Take only files whose path below SRC matches, for example '**/T1_brain_to_MNI.nii.gz', where ** is any number of
    folders; without a / it is the file's name, wherever it lies."""
    subject: str = ""
    r"""Regular expression that finds the subject in that path, as a group of this name, and the session if it has such
    a group: '(?P<subject>\d{7})_20252_(?P<session>\d)'. By default BIDS' sub-XXX and ses-YYY, or
    UK Biobank's names, such as 1000011_20252_2_0, else the file's name."""
    suffix: str = "T1w"
    """Which images of a BIDS dataset to take."""
    source_root: Path | None = None
    """Folder that a manifest's paths are relative to and may not leave; by default the manifest's own."""


class Survey(NamedTuple):
    """What was found: volumes to be read, what cannot be, and remarks, one sentence each, on what was passed by."""

    candidates: list[Candidate]
    exclusions: list[Exclusion]
    notes: list[str]


class Selection:
    """The options, compiled.

    Raises:
        InputError: a regular expression or a pattern that is none.
    """

    def __init__(self, options: SurveyOptions) -> None:
        self._wanted = _compiled(_translated(options.match), "match", options.match) if options.match else None
        self._subject = _compiled(options.subject, "subject", options.subject) if options.subject else None
        if self._subject is not None and "subject" not in self._subject.groupindex:
            raise InputError(
                f"The pattern for subjects {options.subject!r} has no group named subject: write (?P<subject>…)."
            )
        self._options = options
        self._not_wanted = 0

    def wants(self, entry: Entry) -> bool:
        """Whether a file is asked for; a folder that is not searched might hold what is."""
        wanted = self._wanted is None or self._wanted.fullmatch(source_of(entry.path)) is not None
        if wanted or entry.state in ("closed", "again"):
            return True
        self._not_wanted += 1
        return False

    def names(self, source: str) -> tuple[str, str]:
        """The subject and the session of a path.

        Raises:
            ValueError: the path names no subject; the message completes "it …".
        """
        if self._subject is None:
            path = PurePath(source)
            return subject_of(path), session_of(path)
        match = self._subject.search(source)
        if match is None or not match["subject"]:
            raise ValueError(f"has a path in which {self._options.subject!r} finds no subject")
        return match["subject"], (match["session"] or "") if "session" in self._subject.groupindex else ""

    def take(self, root: Path, entry: Entry) -> Candidate | Exclusion:
        """What becomes of an entry of a folder's tree."""
        source = source_of(entry.path)
        if entry.state == "closed":
            return Exclusion("", "", source, "problem", f"It {entry.problem}, so nobody knows what is in it.")
        if entry.state == "again":
            return Exclusion("", "", source, "problem", f"It {entry.problem}.")
        try:
            subject, session = self.names(source)
        except ValueError as error:
            return Exclusion("", "", source, "problem", f"It {error}.")
        if entry.state == "volume":
            return Candidate(subject, session, root / entry.path, source)
        return Exclusion(subject, session, source, "problem", f"It {entry.problem}.")

    def survey(self, taken: Iterable[Candidate | Exclusion], notes: Iterable[str]) -> Survey:
        """All of it in order, each candidate's `source` once."""
        candidates: dict[str, Candidate] = {}
        exclusions: list[Exclusion] = []
        for item in taken:
            if isinstance(item, Exclusion):
                exclusions.append(item)
            elif candidates.setdefault(item.source, item) is not item:
                exclusions.append(Exclusion.of(item, "problem", "Another file's path is written in the same way."))
        if self._not_wanted:
            notes = [*notes, f"{counted(self._not_wanted, 'file')} did not match {self._options.match!r}."]
        notes = [*notes, *_named_alike(candidates.values())]
        return Survey(
            sorted(candidates.values(), key=lambda candidate: (candidate.subject, candidate.source)),
            sorted(exclusions, key=lambda exclusion: (exclusion.subject, exclusion.source, exclusion.reason)),
            notes,
        )


def source_of(path: PurePath) -> str:
    """A path as index and report give it."""
    return printable(path.as_posix())


def counted(count: int, noun: str) -> str:
    """A number of things: 1 file, 2 files."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def passed_by(walk: Walk) -> Iterator[str]:
    """Remarks on what a search took no account of."""
    if walk.hidden:
        yield f"{walk.hidden:,} hidden files or folders passed by."
    if walk.astray:
        count, first = len(walk.astray), source_of(walk.astray[0])
        yield f"{counted(count, 'link')} to nothing, such as {first}: volumes behind them are not taken."


def _named_alike(candidates: Iterable[Candidate]) -> Iterator[str]:
    """UK Biobank's T1_brain_to_MNI.nii.gz, thousands of times: not one subject with as many sessions."""
    by_name = (each.subject for each in candidates if each.subject == bare_name(PurePath(each.source).name))
    alike = {subject: count for subject, count in Counter(by_name).items() if count > 1}
    if alike:
        yield (
            f"{counted(sum(alike.values()), 'volume')} count as those of {counted(len(alike), 'subject')}, for "
            f"files have the same name, such as {min(alike)}: say how paths name the subject if these are several."
        )


def _translated(pattern: str) -> str:
    pattern = pattern if "/" in pattern else f"**/{pattern}"
    return "".join(_token(token) for token in _GLOB.findall(pattern.removeprefix("./")))


def _token(token: str) -> str:
    if token in _WILD:
        return _WILD[token]
    if len(token) > 1:
        inside = token[1:-1].replace("\\", "\\\\").replace("[", "\\[")
        return f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"
    return re.escape(token)


def _compiled(expression: str, option: str, given: str) -> re.Pattern[str]:
    try:
        return re.compile(expression, re.DOTALL)
    except re.error as error:
        raise InputError(f"The pattern {given!r} of the option {option} is none: {error}.") from error

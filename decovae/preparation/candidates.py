"""What comes into a preparation, and what does not come out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Kind = Literal["rule", "problem"]
"""Why a volume is left out: a rule that the user gave asked for it, or something is wrong with the volume."""


@dataclass(frozen=True)
class Candidate:
    """A file that a preparation was pointed at.

    Attributes:
        subject: whose volume it is.
        session: which of the subject's sessions, or empty.
        path: where to open it.
        source: the path as index and report give it: with forward slashes, relative to the folder that was given (or to
            that of the manifest), no two alike.
        columns: what tables say of it, column to value.
        mask: a file with its brain mask, if one was named.
    """

    subject: str
    session: str
    path: Path
    source: str
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    mask: Path | None = None


@dataclass(frozen=True)
class Exclusion:
    """A volume that is left out, and the sentence that says why: a row of ``excluded.csv``."""

    subject: str
    session: str
    source: str
    kind: Kind
    reason: str

    @classmethod
    def of(cls, candidate: Candidate, kind: Kind, reason: str) -> Exclusion:
        """The exclusion of a candidate."""
        return cls(candidate.subject, candidate.session, candidate.source, kind, reason)

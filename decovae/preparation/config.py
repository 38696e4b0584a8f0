"""What a preparation can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from decovae.errors import InputError
from decovae.preparation.rules import Rules
from decovae.preparation.splits import Splits
from decovae.preparation.survey import SurveyOptions
from decovae.preparation.tables import TableOptions
from decovae.preparation.volume import Preparation


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Prepare volumes for training: checked, in RAS axes, resized, scaled, in 16 bits, as a store that training reads.

    What cannot be used, or is excluded by a rule, is listed in OUT/excluded.csv with the reason. The same command goes
    on where it was stopped. It ends with exit code 0; 3 if a volume was left out for which no rule asked; 2 for a wrong
    option, 1 if it could not go on. Training takes the store by --data.root OUT.
    """

    source: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")] = None
    """A folder with NIfTI files anywhere below it, a BIDS dataset, or a CSV manifest with a column `path` (and
    `subject`, `session`, `split`, `mask` where you like; other columns are carried along)."""
    out: Path | None = None
    """Folder for the store: a new one, an empty one, or that of the same command before."""
    verify: Path | None = None
    """Prepare nothing, but check every file of this store."""
    volume: Preparation = field(default_factory=Preparation)
    select: SurveyOptions = field(default_factory=SurveyOptions)
    table: TableOptions = field(default_factory=TableOptions)
    exclude: Rules = field(default_factory=Rules)
    split: Splits = field(default_factory=Splits)
    workers: int | None = None
    """Processes; by default one for each CPU, fewer where memory is short. 0: this process does it all."""
    allow_excluded: bool = False
    """End with exit code 0 though volumes were left out for which no rule asked."""
    pictures: bool = True
    """Write accepted.png and rejected.png, up to 24 volumes each."""

    def __post_init__(self) -> None:
        """Raises:
        InputError: a number of processes that there cannot be.
        """
        if self.workers is not None and self.workers < 0:
            raise InputError(f"--workers {self.workers}: give 0 or more.")

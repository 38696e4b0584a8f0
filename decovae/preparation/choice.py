"""Who takes part in a preparation, before any volume is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from decovae.errors import InputError
from decovae.preparation.candidates import Candidate, Exclusion
from decovae.preparation.columns import columns_named
from decovae.preparation.config import PrepareConfig
from decovae.preparation.rules import Rules, apply_rules, needed_columns
from decovae.preparation.survey import survey
from decovae.preparation.tables import join_table


class Chosen(NamedTuple):
    """Who takes part, and who does not."""

    candidates: list[Candidate]
    exclusions: list[Exclusion]
    notes: list[str]
    found: Mapping[str, Candidate]
    """All that was found, by its source, those that rules leave out among them."""


def choose(config: PrepareConfig, source: Path) -> Chosen:
    """Who takes part in a preparation, without reading a volume.

    Raises:
        InputError: as `survey`, `join_table` and `apply_rules`, or masks are asked for and nobody has one.
    """
    with_masks = config.volume.mask == "column"
    found = survey(source, config.select, masks=with_masks)
    candidates, exclusions, notes = list(found.candidates), list(found.exclusions), list(found.notes)
    if not candidates and not exclusions:
        said = "".join(f" {note}" for note in notes)
        raise InputError(f"{source}: no volumes found there; see --select of `decovae prepare --help`.{said}")
    by_source = {candidate.source: candidate for candidate in candidates}
    table, by_columns = config.table, replace(config.exclude, subjects=None)
    needed = needed_columns(by_columns)
    # First, since whoever withdrew is on the list and, likely, no longer in the table.
    candidates, excluded, remarks = apply_rules(candidates, Rules(subjects=config.exclude.subjects))
    exclusions, notes = exclusions + excluded, notes + remarks
    if table.path is not None:
        candidates, strangers = join_table(candidates, table.path, table.key, columns=table.columns, needed=needed)
        exclusions += strangers
    elif table.key or table.columns:
        raise InputError("--table.key and --table.columns are of a table: give it with --table.path.")
    if candidates:
        candidates, excluded, remarks = apply_rules(candidates, by_columns)
        exclusions, notes = exclusions + excluded, notes + remarks
    if with_masks and candidates and all(each.mask is None for each in candidates):
        raise InputError(
            f"--volume.mask column: none of the {len(candidates)} volumes has a mask; give a manifest with their paths "
            "in a column `mask`, or leave the option out."
        )
    kept = [
        replace(each, columns=_wanted(each.columns, by_source[each.source].columns, config.table.columns))
        for each in candidates
    ]
    return Chosen(kept, exclusions, notes, by_source)


def _wanted(columns: Mapping[str, str], own: Mapping[str, str], asked: Iterable[str]) -> dict[str, str]:
    """A volume's columns without those that only the rules had to see."""
    wanted = {*own, *(name for text in asked for name in columns_named(text, columns))}
    return {name: value for name, value in columns.items() if name in wanted}

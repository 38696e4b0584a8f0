"""The two contact sheets of a preparation, made from what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from decovae.errors import InputError
from decovae.preparation.candidates import Candidate, Exclusion
from decovae.preparation.config import PrepareConfig
from decovae.preparation.report import Outcome
from decovae.preparation.sheet import MOST, Small, Tile, save_sheet, small_prepared, small_rejected, spread
from decovae.preparation.volume import Preparation
from decovae.preparation.workers import for_each, usual_workers

ACCEPTED = "accepted.png"
REJECTED = "rejected.png"


def draw(outcome: Outcome, found: Mapping[str, Candidate], config: PrepareConfig) -> list[str]:
    """Write both sheets, or only the first where nothing was left out.

    Problems come first on the second one, and only they are looked at: whoever a rule leaves out may have withdrawn,
    and has a grey tile with the reason.

    Args:
        outcome: its volumes are in place.
        found: the volumes that there were, by source; what is not among them has no file to show.
        config: of the preparation.

    Returns:
        A sentence if there are no pictures: no preparation of hours fails for them.
    """
    (outcome.folder / REJECTED).unlink(missing_ok=True)
    try:
        _draw_accepted(outcome, outcome.folder / ACCEPTED, config.volume)
        if outcome.exclusions:
            _draw_rejected(outcome, found, outcome.folder / REJECTED, config)
    except ModuleNotFoundError as error:
        return [f"no pictures were drawn: {error.name} is not installed; pip install 'decovae[train]'."]
    except OSError:
        raise
    except Exception as error:
        return [f"not all pictures were drawn ({type(error).__name__}: {error})."]
    return []


def _draw_accepted(outcome: Outcome, path: Path, volume: Preparation) -> None:
    small = partial(small_prepared, outcome.folder, grid=volume.grid, whole_box=volume.fit == "resize")
    tiles = [Tile(_title(entry["subject"], entry["session"]), "", small(entry)) for entry in spread(outcome.entries)]
    save_sheet(tiles, path, title=f"accepted: {len(tiles)} of {len(outcome.entries)} volumes")


def _draw_rejected(outcome: Outcome, found: Mapping[str, Candidate], path: Path, config: PrepareConfig) -> None:
    problems = spread(outcome.problems)
    by_rules = [each for each in outcome.exclusions if each.kind == "rule"]
    shown = [*problems, *spread(by_rules, MOST - len(problems))]
    candidates = [found[each.source] for each in problems if each.source in found]
    look = partial(small_rejected, limit=int(config.volume.limit_gib * 2**30))
    workers = min(usual_workers() if config.workers is None else config.workers, len(candidates))
    seen: dict[str, Small | None] = {
        candidate.source: None if isinstance(result, InputError) else result
        for candidate, result in for_each(look, candidates, workers=workers)
    }
    tiles = [Tile(_name(each), each.reason, seen.get(each.source)) for each in shown]
    save_sheet(tiles, path, title=f"rejected: {len(tiles)} of {len(outcome.exclusions)} volumes")


def _name(exclusion: Exclusion) -> str:
    return _title(exclusion.subject, exclusion.session) or exclusion.source


def _title(subject: str, session: str) -> str:
    return f"{subject}, {session}" if session else subject

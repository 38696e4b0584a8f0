"""What an evaluation leaves in its folder: `evaluation.json` and `volumes.csv`."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import decovae
from decovae import machine
from decovae.data.volumes import Shape
from decovae.evaluation.runs import Run
from decovae.files import write_text
from decovae.metrics.tissue import METHOD

EVALUATION = "evaluation.json"
VOLUMES = "volumes.csv"
VERSION = 1
"""Of the file's format."""


def heading(
    kind: str, run: Run, *, data: str, grid: Shape, seconds: Mapping[str, float], partial: str | None
) -> dict[str, Any]:
    """What reconstructions and samples have in common.

    Args:
        kind: "reconstruction" or "generation".
        run: what was evaluated.
        data: a sentence on the volumes.
        grid: voxels on which everything was measured.
        seconds: by part, added up over volumes.
        partial: how much was left out, or None.
    """
    return {
        "kind": kind,
        "version": VERSION,
        "date": datetime.date.today().isoformat(),
        "decovae": decovae.__version__,
        "machine": machine.describe(),
        "run": run.name,
        "stage": run.config.stage,
        "deco": run.deco,
        "preset": run.config.preset,
        "data": data,
        "grid": list(grid),
        "seconds": {part: round(value, 3) for part, value in seconds.items()},
        "partial": partial,
    }


def tissue_entry(sets: Mapping[str, Sequence[tuple[str, Mapping[str, float]]]]) -> dict[str, Any]:
    """Volumes of tissue of sets of named volumes."""
    return {
        "method": METHOD,
        "unit": "ml",
        "sets": {
            kind: [
                {"volume": name, **{part: round(value, 3) for part, value in tissue.items()}} for name, tissue in rows
            ]
            for kind, rows in sets.items()
        },
    }


def partial_sentence(used: Mapping[str, tuple[int, int]], limit: int | None) -> str | None:
    """How partial an evaluation is: "12 of 40 volumes: --limit 12"; None for a whole one.

    Args:
        used: by what they are, how many were measured and how many there are.
        limit: the option.
    """
    parts = [f"{taken} of {there} {kind}" for kind, (taken, there) in used.items() if taken < there]
    return f"{' and '.join(parts)}: --limit {limit}" if parts else None


def write_evaluation(evaluation: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write `volumes.csv`, with a row each volume, and `evaluation.json`.

    Numbers that are not finite, such as the PSNR of an exact reconstruction, are null there and empty here.

    Raises:
        OSError: the folder cannot be written.
    """
    forget_evaluation(folder)
    table = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([_finite(row) for row in rows])
    text = json.dumps(_finite(evaluation), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(folder / VOLUMES, table.getvalue())
    write_text(folder / EVALUATION, text)


def forget_evaluation(folder: Path) -> None:
    """Remove an earlier evaluation's files, so that new ones, of a run that fails too, never lie beside its figures.

    Raises:
        OSError: they cannot be removed.
    """
    for name in (EVALUATION, VOLUMES):
        (folder / name).unlink(missing_ok=True)


def probe(folder: Path) -> None:
    """See that a folder can be written, or made; nothing stays behind.

    Raises:
        OSError: it cannot.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    with tempfile.TemporaryFile(dir=nearest):
        pass


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

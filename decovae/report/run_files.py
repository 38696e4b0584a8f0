"""A run's files, read and checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decovae.errors import InputError
from decovae.generation.sample_folder import SETTINGS
from decovae.report.models import RunInfo, SampleSet
from decovae.training.config_file import NAME as CONFIG
from decovae.training.config_file import STAGES, read_plain

STUDY = "study.json"
DEPTH = 3
"""Levels below a study's folder at which runs are looked for."""

VERSION = 1
"""Of analysis.json and evaluation.json."""

EXPECTED = {
    "analysis": ("cosine_similarity", "effective_rank"),
    "reconstruction": ("measures", "volumes", "frechet"),
    "generation": ("frechet",),
}
"""Kinds of those files, and what a page cannot do without."""


def find_folders(folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The folders of runs, and those of samples, that these folders are or hold.

    Raises:
        InputError: one of them does not exist, or neither is nor holds either.
    """
    runs: list[Path] = []
    samples: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give folders of finished runs, or that of a study.")
        if (folder / CONFIG).is_file():
            runs.append(folder)
        elif (folder / SETTINGS).is_file():
            samples.append(folder.resolve())
        else:
            found = [path.parent for level in range(1, DEPTH) for path in sorted(folder.glob("*/" * level + CONFIG))]
            if not found:
                raise InputError(f"{folder}: holds no run (no {CONFIG}); give folders of finished runs, or a study's.")
            runs += found
    if not runs:
        raise InputError(f"{folders[0]}: holds samples only; give the folder of the flow that made them too.")
    return runs, samples


def read_run(folder: Path) -> RunInfo:
    """A finished run.

    Raises:
        InputError: it is still in training, or a file of it is missing or damaged.
    """
    try:
        config = read_plain(folder)
    except FileNotFoundError:
        raise InputError(f"{folder}: holds no run (no {CONFIG}); give the folder of a finished run.") from None
    stage = config.get("stage", "vae")
    if stage not in STAGES:
        raise InputError(f"{folder / CONFIG}: stage {stage} is none of {', '.join(STAGES)}.")
    summary = _read_object(folder / "summary.json", advice="remove it, and finish the run again")
    if summary is None:
        raise InputError(
            f"{folder}: is still in training (no summary.json); wait for its end, or begin its command again to "
            "resume it."
        )
    return RunInfo(
        folder=folder,
        stage=stage,
        config=config,
        summary=summary,
        metrics=_read_metrics(folder / "metrics.jsonl"),
        analysis=_first(
            [folder / "analysis" / "analysis.json", folder / "latents" / "analysis" / "analysis.json"],
            advice="run `decovae analyze` again",
        ),
        evaluation=_first([folder / "evaluation" / "evaluation.json"], advice="run `decovae evaluate` again"),
    )


def read_samples(folder: Path) -> SampleSet:
    """A folder of samples with its evaluation, if there is one.

    Raises:
        InputError: a file is damaged.
    """
    return SampleSet(
        folder,
        _read_object(folder / SETTINGS, advice="run `decovae sample` again") or {},
        _first([folder / "evaluation" / "evaluation.json"], advice="run `decovae evaluate` again"),
    )


def read_study(folder: Path) -> dict[str, Any] | None:
    """What `decovae study` noted in its folder, or None.

    Raises:
        InputError: the file is damaged.
    """
    return _read_object(folder / STUDY, advice="remove it, and run `decovae study` again")


def _first(paths: Sequence[Path], *, advice: str) -> dict[str, Any] | None:
    for path in paths:
        found = _read_object(path, advice=advice)
        if found is not None:
            if found.get("version") != VERSION:
                raise InputError(f"{path}: is of version {found.get('version')}, not {VERSION}; {advice}.")
            if found.get("kind") not in EXPECTED:
                raise InputError(f"{path}: kind {found.get('kind')} is none of {', '.join(EXPECTED)}; {advice}.")
            if lacking := [name for name in EXPECTED[found["kind"]] if name not in found]:
                raise InputError(f"{path}: lacks {lacking[0]}; {advice}.")
            return found
    return None


def _read_object(path: Path, *, advice: str) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {advice}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no object; {advice}.")
    return found


def _read_metrics(path: Path) -> tuple[dict[str, Any], ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); restore it, or move it away.") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):  # of a process that was killed while it wrote
                break
            raise InputError(f"{path}: line {number} is damaged; restore the file, or move it away.") from None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return tuple(records)

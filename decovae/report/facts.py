"""What was run, how fast, on what: the tables of a page that are not the paper's."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from decovae.data.volumes import times
from decovae.report.models import Model, RunInfo
from decovae.report.run_files import read_study

STAGE_NAMES = {"vae": "autoencoder", "decoder": "decoder fine-tuning", "flow": "flow"}
SHORT_STAGES = {"vae": "VAE", "decoder": "DFT", "flow": "flow"}

PATHS = ("out", "vae", "latents", "root")
"""Options that name folders: where a page shows them, it shows their names, not where they lie."""


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
        caption: what it shows and in which unit.
        columns: headings, the first of the row names.
        rows: texts, a row as long as `columns`.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Configuration:
    """A run's options as text, under its name."""

    title: str
    text: str


def run_table(models: Sequence[Model]) -> Table:
    """A row a run: what was trained, how long, on what."""
    columns = ("run", "preset", "steps", "seed", "learning rate", "batch", "grid", "patch", "finished")
    rows = [
        (
            f"{name}: {SHORT_STAGES[run.stage]}",
            str(run.config.get("preset", "–")),
            _count(run.summary.get("steps")),
            str(run.config.get("seed", "–")),
            _plain(run.config.get("optimizer", {}).get("learning_rate")),
            _plain(run.config.get("data", {}).get("batch_size")),
            _shape(run.config.get("data", {}).get("grid")),
            _shape(run.config.get("data", {}).get("patch")),
            _written(run.folder / "summary.json"),
        )
        for name, run in runs(models)
    ]
    return Table("The runs on this page. The batch is that of one process.", columns, rows)


def speed_table(models: Sequence[Model]) -> Table:
    """A row a run: time of a step, throughput, time of all steps, memory of the GPU."""
    columns = ("run", "seconds a step", "samples a second", "all steps", "peak GPU memory, GB")
    rows = []
    for name, run in runs(models):
        seconds = _logged(run, "seconds_per_step")
        throughput = _logged(run, "samples_per_second")
        memory = _logged(run, "peak_memory_gb")
        steps = run.summary.get("steps")
        total = statistics.fmean(seconds) * steps if seconds and isinstance(steps, int) else None
        rows.append(
            (
                f"{name}: {SHORT_STAGES[run.stage]}",
                f"{statistics.median(seconds):.3g}" if seconds else "not logged",
                f"{statistics.median(throughput):.3g}" if throughput else "not logged",
                duration(total),
                f"{max(memory):.2f}" if memory else "no GPU",
            )
        )
    return Table(
        "Speed and memory of training, medians of each run's log; validation and checkpoints are not in the time.",
        columns,
        rows,
    )


def studies(models: Sequence[Model]) -> list[Mapping[str, Any]]:
    """The records of the studies that the models lie in.

    Raises:
        InputError: a record is damaged.
    """
    folders = dict.fromkeys(run.folder.parent.parent for _, run in runs(models))
    return [study for folder in folders if (study := read_study(folder)) is not None]


def study_tables(models: Sequence[Model]) -> list[Table]:
    """Of every study a row a step: time and memory of each model's. Errors as in `studies`."""
    order = list(dict.fromkeys(run.folder.parent.name for _, run in runs(models)))
    return [_study_table(study["cells"], order) for study in studies(models) if study.get("cells")]


def _study_table(cells: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> Table:
    steps = list(dict.fromkeys(name.partition("/")[2] for name in cells))
    columns = [name for name in order if any(cell.partition("/")[0] == name for cell in cells)]

    def took(column: str, step: str) -> str:
        cell = cells.get(f"{column}/{step}")
        return "–" if cell is None else f"{duration(cell['seconds'])}, {cell['peak_memory_gb']:.1f} GB"

    rows = [(step, *(took(column, step) for column in columns)) for step in steps]
    caption = "Steps of the study: how long each took, and the most memory, not the GPU's, that its processes held."
    return Table(caption, ("step", *columns), rows)


def cost_table(models: Sequence[Model]) -> Table | None:
    """A row an evaluation: seconds of its parts; None where there are none."""
    found = [
        (f"{model.name}: {what}", evaluation["seconds"])
        for model in models
        for what, evaluation in evaluations(model)
        if isinstance(evaluation.get("seconds"), Mapping)
    ]
    parts = list(dict.fromkeys(part for _, seconds in found for part in seconds))
    if not found:
        return None
    rows = [(name, *(_plain(seconds.get(part), "{:.1f}") for part in parts)) for name, seconds in found]
    return Table("Seconds that the parts of each evaluation took.", ("evaluation", *parts), rows)


def machines(models: Sequence[Model]) -> dict[str, list[str]]:
    """The machines that were used, by what for, each with its dates; a run by itself does not note its machine."""
    measured = [evaluation for model in models for _, evaluation in evaluations(model)]
    measured += [model.analysis for model in models if model.analysis is not None]
    uses = {"Trained": studies(models), "Analysed and evaluated": measured}
    found = {use: _machines(entries) for use, entries in uses.items()}
    return {use: texts for use, texts in found.items() if texts}


def _machines(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    dates: dict[str, set[str]] = {}
    for entry in entries:
        machine = entry.get("machine")
        if isinstance(machine, Mapping) and (text := ", ".join(_machine_parts(machine))):
            dates.setdefault(text, set()).add(str(entry.get("date") or "undated"))
    return [f"{text} ({', '.join(sorted(days))})" for text, days in dates.items()]


def configurations(models: Sequence[Model]) -> list[Configuration]:
    """All options of every run."""
    return [
        Configuration(
            f"{name}: {STAGE_NAMES[run.stage]}",
            yaml.safe_dump(_without_paths(run.config), sort_keys=False, allow_unicode=True),
        )
        for name, run in runs(models)
    ]


def runs(models: Sequence[Model]) -> Iterator[tuple[str, RunInfo]]:
    """Every run once, with the name of the first model that it belongs to."""
    seen: set[Path] = set()
    for model in models:
        for run in model.runs.values():
            if run.folder not in seen:
                seen.add(run.folder)
                yield model.name, run


def evaluations(model: Model) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Those that a model has, each with what it is of."""
    for stage, phase in (("vae", "before"), ("decoder", "after")):
        run = model.runs.get(stage)
        if run is not None and run.evaluation is not None:
            yield f"reconstruction {phase} DFT", run.evaluation
    if model.flow is not None:
        for phase, samples in model.flow.samples.items():
            if samples.evaluation is not None:
                yield f"samples {phase} DFT", samples.evaluation


def short_path(folder: Path) -> str:
    """The last two names of a folder's path: enough to know it by, without where a machine keeps its files."""
    return "/".join(folder.parts[-2:])


def sentence(text: object) -> str:
    """The text with a full stop, unless it ends a sentence already."""
    words = str(text).strip()
    return words if not words or words.endswith((".", "!", "?")) else f"{words}."


def duration(seconds: float | None) -> str:
    """In words that suit its length."""
    if seconds is None:
        return "not logged"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _logged(run: RunInfo, key: str) -> list[float]:
    return [float(record[key]) for record in run.metrics if isinstance(record.get(key), int | float)]


def _machine_parts(machine: Mapping[str, Any]) -> Iterator[str]:
    if machine.get("gpu"):
        yield str(machine["gpu"])
    if machine.get("processor"):
        yield str(machine["processor"])
    if machine.get("torch_threads"):
        yield f"{machine['torch_threads']} {'thread' if machine['torch_threads'] == 1 else 'threads'}"
    for name in ("torch", "python"):
        if machine.get(name):
            yield f"{name} {machine[name]}"


def _without_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    def shown(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return _without_paths(value)
        return PurePath(value).name if key in PATHS and isinstance(value, str) else value

    return {key: shown(key, value) for key, value in options.items()}


def _written(path: Path) -> str:
    return datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.timezone.utc).date().isoformat()


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def _plain(value: Any, form: str = "{:g}") -> str:
    return form.format(value) if isinstance(value, int | float) else "–"


def _shape(value: Any) -> str:
    return times(value) if isinstance(value, Sequence) and not isinstance(value, str) and value else "–"

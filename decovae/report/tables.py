"""Tables 1 to 5 of the paper, from what a study left on disk: ours beside the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from decovae.report.models import AFTER, BEFORE, Model, Phase
from decovae.report.paper import LATENTS, QUALITY, Key

NAMES = {"none": "MAISI-VAE", "cov": "+ COV", "sid": "DeCo-VAE (SID)", "vad": "DeCo-VAE (VAD)"}
"""What the paper calls an autoencoder by its decorrelation loss; Tables 4 and 5 name the loss alone."""

LOSSES = {"none": "VAE", "cov": "VAE + COV", "sid": "VAE + SID", "vad": "VAE + VAD"}

NETWORKS = ("radimagenet", "inception", "random")
"""Features of the Fréchet distance, the paper's first; tables show the first that all models were measured with."""

PARTS = ("axial", "coronal", "sagittal", "average")
"""Of a Fréchet distance."""

Mark = Literal["best", "second"]


@dataclass(frozen=True)
class Column:
    """A measure: its name, the decimals that ours and the paper's are shown with, and which way is better."""

    label: str
    digits: int
    better: Literal["higher", "lower"]
    paper_digits: int

    @property
    def heading(self) -> str:
        """The name with an arrow that points where better is."""
        return f"{self.label} {'↑' if self.better == 'higher' else '↓'}"


@dataclass(frozen=True)
class Cell:
    """What the runs of one row measured, one value a seed, and of how many runs there are."""

    values: tuple[float, ...]
    runs: int

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.values)

    def shown(self, digits: int) -> str:
        """The value, or mean ± standard deviation of several seeds."""
        some = "" if len(self.values) == self.runs else f" (n = {len(self.values)})"
        if len(self.values) == 1:
            return f"{self.mean:.{digits}f}{some}"
        return f"{self.mean:.{digits}f} ± {statistics.stdev(self.values):.{digits}f}{some}"


@dataclass(frozen=True)
class Row:
    """A model: ours and the paper's values, one a column; None where there is none."""

    label: str
    ours: tuple[Cell | None, ...]
    paper: tuple[float | None, ...]


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables.

    Attributes:
        number: in the paper.
        title: what it compares.
        columns: measures.
        rows: models, in the paper's order; a row that the paper lacks has None for its values.
        notes: what a reader has to know to compare.
    """

    number: int
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def marks(self, column: int) -> dict[int, Mark]:
        """Rows whose value of ours is the best of a column, and the second-best where a third is worse."""
        found = [(cell.mean, place) for place, row in enumerate(self.rows) if (cell := row.ours[column]) is not None]
        ranked = sorted({value for value, _ in found}, reverse=self.columns[column].better == "higher")
        marks: tuple[Mark, ...] = ("best", "second") if len(ranked) > 2 else ("best",) if len(ranked) == 2 else ()
        names: dict[float, Mark] = dict(zip(ranked, marks, strict=False))
        return {place: names[value] for value, place in found if value in names}

    def as_dict(self) -> dict[str, Any]:
        """The table in JSON's types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> PaperTable:
        """The table that `as_dict` gave.

        Raises:
            KeyError, TypeError: `entry` is no such thing.
        """

        def cell(found: Mapping[str, Any] | None) -> Cell | None:
            return None if found is None else Cell(tuple(found["values"]), found["runs"])

        rows = [Row(row["label"], tuple(map(cell, row["ours"])), tuple(row["paper"])) for row in entry["rows"]]
        columns = [Column(**column) for column in entry["columns"]]
        return cls(entry["number"], entry["title"], tuple(columns), tuple(rows), tuple(entry["notes"]))

    @property
    def empty(self) -> bool:
        """Whether none of its values was measured."""
        return not any(cell for row in self.rows for cell in row.ours)


def study_tables(models: Sequence[Model], *, expected: Sequence[str] = ()) -> list[PaperTable]:
    """Tables 1 to 5 of the models that are there.

    Of a table that has a value, columns and rows without any are left out, and notes name them: a reader is to see what
    was measured, not dashes.

    Args:
        models: see `decovae.report.collect.collect`.
        expected: decorrelation losses of models that will be there: a table names those that it still lacks.
    """
    quality = _Quality(models, expected)
    rows: dict[int, tuple[Key, ...]] = {
        2: (("none", BEFORE), ("sid", AFTER), ("vad", AFTER)),
        3: (("none", BEFORE), ("sid", AFTER), ("vad", AFTER)),
        4: tuple((deco, phase) for deco in ("none", "sid", "vad") for phase in (BEFORE, AFTER)),
        5: (("none", AFTER), ("cov", AFTER), ("vad", AFTER)),
    }
    unlike = "As in the paper, the baseline is the autoencoder as trained, SID and VAD after decoder fine-tuning (DFT)."
    tuned = "All after decoder fine-tuning (DFT)."
    return [
        _latents(models, expected),
        quality.table(2, "Reconstruction", rows[2], range(4), notes=[unlike], name=_plain),
        quality.table(3, "Generation", rows[3], range(4, 8), notes=[unlike], name=_plain),
        quality.table(4, "Ablation: decoder fine-tuning (DFT)", rows[4], range(8), notes=[], name=_with_phase),
        quality.table(5, "Ablation: covariance and variance", rows[5], range(8), notes=[tuned], name=_loss),
    ]


def _plain(key: Key) -> str:
    return NAMES[key[0]]


def _loss(key: Key) -> str:
    return LOSSES[key[0]]


def _with_phase(key: Key) -> str:
    return LOSSES[key[0]] + (" + DFT" if key[1] == AFTER else "")


def _of(models: Sequence[Model], deco: str) -> list[Model]:
    return [model for model in models if model.deco == deco]


def _cell(values: Sequence[Any]) -> Cell | None:
    numbers = tuple(float(value) for value in values if value is not None)
    return Cell(numbers, len(values)) if numbers else None


def _lacking(expected: Sequence[str], names: Sequence[tuple[str, str]], rows: Sequence[Row]) -> list[str]:
    """A note on the rows, by loss and label, that are expected and not there."""
    there = {row.label for row in rows}
    lacking = [label for deco, label in names if deco in expected and label not in there]
    return [f"Not finished yet: {', '.join(lacking)}."] if lacking else []


def _latents(models: Sequence[Model], expected: Sequence[str]) -> PaperTable:
    columns = (Column("cosine similarity", 4, "lower", 4), Column("effective rank", 2, "higher", 2))
    rows = []
    for deco in ("none", "cov", "sid", "vad"):
        analyses = [model.analysis for model in _of(models, deco) if model.analysis is not None]
        if analyses:
            ours = tuple(_cell([each[key] for each in analyses]) for key in ("cosine_similarity", "effective_rank"))
            rows.append(Row(NAMES[deco], ours, LATENTS.get(deco, (None, None))))
    notes = ["The paper has no row on COV here."] if any(row.label == NAMES["cov"] for row in rows) else []
    analysed = [model for model in models if model.analysis is not None]
    notes += _lacking(expected, list(NAMES.items()), rows)
    return PaperTable(1, "Use of the latent channels", columns, tuple(rows), (*notes, *_common(analysed)))


class _Quality:
    """Reconstruction and generation of all models: the eight columns of Table 4."""

    def __init__(self, models: Sequence[Model], expected: Sequence[str]) -> None:
        self.expected = expected
        self.models = [model for model in models if any(self._measured(model, phase) for phase in (BEFORE, AFTER))]
        self.network = self._network()
        distance, digits = ("FD", 4) if self.network == "random" else ("FID", 3)
        self.columns = (
            Column("PSNR", 2, "higher", 2),
            Column("SSIM", 3, "higher", 3),
            Column("LPIPS", 3, "lower", 3),
            Column(f"r{distance}", digits, "lower", 3),
            *(
                Column(f"g{distance} {part}", digits, "lower", 3)
                for part in ("axial", "coronal", "sagittal", "average")
            ),
        )

    def table(
        self,
        number: int,
        title: str,
        keys: Sequence[Key],
        columns: Sequence[int],
        *,
        notes: Sequence[str],
        name: Callable[[Key], str],
    ) -> PaperTable:
        """One of Tables 2 to 5: these rows, these of the eight columns, as far as they have values."""
        rows = []
        for key in keys:
            ours = tuple(self._value(key, column) for column in columns)
            if any(ours):
                rows.append(Row(name(key), ours, tuple(QUALITY[key][column] for column in columns)))
        kept = [place for place in range(len(columns)) if any(row.ours[place] for row in rows)]
        below = [*notes, *_lacking(self.expected, [(key[0], name(key)) for key in keys], rows)]
        if kept and len(kept) < len(columns):
            unmeasured = dict.fromkeys(
                self.columns[column].label.partition(" ")[0]  # one gFD for its three planes and their average
                for place, column in enumerate(columns)
                if place not in kept
            )
            below.append(f"Not measured, so without a column: {', '.join(unmeasured)}.")
        kept = kept or list(range(len(columns)))
        return PaperTable(
            number,
            title,
            tuple(self.columns[columns[place]] for place in kept),
            tuple(
                Row(row.label, tuple(row.ours[place] for place in kept), tuple(row.paper[place] for place in kept))
                for row in rows
            ),
            (*below, *self._notes()),
        )

    @staticmethod
    def _measured(model: Model, phase: Phase) -> bool:
        return model.reconstruction(phase) is not None or model.generation(phase) is not None

    def _evaluations(self) -> list[Mapping[str, Any]]:
        return [
            found
            for model in self.models
            for phase in (BEFORE, AFTER)
            for found in (model.reconstruction(phase), model.generation(phase))
            if found is not None
        ]

    def _network(self) -> str:
        found = self._evaluations()
        return next((name for name in NETWORKS if all(name in each["frechet"] for each in found)), "random")

    def _value(self, key: Key, column: int) -> Cell | None:
        deco, phase = key
        values = []
        for model in _of(self.models, deco):
            evaluation = model.reconstruction(phase) if column < 4 else model.generation(phase)
            values.append(None if evaluation is None else self._read(evaluation, column))
        return _cell(values)

    def _read(self, evaluation: Mapping[str, Any], column: int) -> Any:
        if column < 3:
            measure = evaluation["measures"].get(("psnr", "ssim", "lpips")[column])
            return None if measure is None else measure["mean"]
        distances = evaluation["frechet"].get(self.network, {})
        return distances.get("average" if column == 3 else PARTS[column - 4])

    def _notes(self) -> list[str]:
        notes = list(_common(self.models))
        found = self._evaluations()
        kinds = [kind for kind, entry in (("r", "reconstruction"), ("g", "generation")) if _any_of(found, entry)]
        ours, theirs = (" and ".join(f"{kind}{name}" for kind in kinds) for name in ("FD", "FID"))
        several = len(kinds) > 1
        if self.network == "random" and kinds:
            notes.append(
                f"{ours} {'are Fréchet distances' if several else 'is a Fréchet distance'} of features from a network "
                f"with random weights: a proxy for the paper's {theirs} on RadImageNet features, comparable within "
                "this table and with nothing else."
            )
        elif self.network == "inception" and kinds:
            verb = "are" if several else "is"
            notes.append(f"{theirs} {verb} of ImageNet's Inception features, the paper's of RadImageNet's.")
        reasons = dict.fromkeys(str(each["lpips_note"]) for each in found if each.get("lpips_note"))
        notes += [f"LPIPS: {reason}." for reason in reasons]
        partial = dict.fromkeys(str(each["partial"]) for each in found if each.get("partial"))
        return notes + [f"Partial: {sentence}." for sentence in partial]


def _any_of(evaluations: Sequence[Mapping[str, Any]], kind: str) -> bool:
    return any(evaluation["kind"] == kind for evaluation in evaluations)


def _common(models: Sequence[Model]) -> list[str]:
    """Notes on the data and the seeds of the models that a table shows."""
    notes = []
    if any(model.template_cohort for model in models):
        notes.append(
            "Ours are of the template cohort, simulated from the MNI-152 template, the paper's of 25,252 subjects of "
            "UK Biobank: values are not comparable, orders may be."
        )
    seeds: dict[str, list[str]] = {}
    for model in sorted(models, key=lambda each: each.seed):
        seeds.setdefault(model.deco, []).append(str(model.seed))
    groups: dict[tuple[str, ...], list[str]] = {}
    for deco, own in seeds.items():
        groups.setdefault(tuple(own), []).append(NAMES.get(deco, deco))
    for shared, names in groups.items():
        whose = "" if len(groups) == 1 else f"{', '.join(names)}: "
        if len(shared) == 1:
            notes.append(f"{whose}one seed ({shared[0]}), small differences are no result.")
        else:
            notes.append(f"{whose}mean ± standard deviation over seeds {', '.join(shared)}.")
    return [note[0].upper() + note[1:] for note in notes]

"""Tables and charts of the evaluations that go beyond the paper's tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from decovae.report.charts import Spread, spread_chart
from decovae.report.curves import Chart, colour
from decovae.report.facts import Table, sentence
from decovae.report.material import PHASES
from decovae.report.models import AFTER, Model, Phase
from decovae.report.tables import PARTS

Evaluated = tuple[Model, Phase, Mapping[str, Any]]
"""A model, before or after fine-tuning, and an evaluation, or a part of one."""

NONE = "–"
REAL = "#111827"
"""Colour of what is real."""

TISSUES = {"grey": "Grey matter", "white": "White matter", "csf": "CSF"}
INTERVALS = (("psnr", "PSNR, dB", 2), ("ssim", "SSIM", 4), ("ms_ssim", "MS-SSIM", 4), ("lpips", "LPIPS", 4))
FIDELITY = (
    ("precision", "precision ↑", 3),
    ("recall", "recall ↑", 3),
    ("density", "density ↑", 3),
    ("coverage", "coverage ↑", 3),
    ("kid", "KID ↓", 4),
)


def reconstruction_table(models: Sequence[Model]) -> Table | None:
    """Means with their intervals, a row a model and phase; None where nothing was evaluated."""
    rows = []
    for model, phase, found in _reconstructions(models):
        measures = found["measures"]
        cells = [_interval(measures.get(key), digits) for key, _, digits in INTERVALS]
        rows.append((f"{model.name}, {_phase(phase)}", str(len(found["volumes"])), *cells))
    columns = ("model", "volumes", *(label for _, label, _ in INTERVALS))
    caption = "Reconstruction quality: mean over volumes, with the 95 % interval of a bootstrap over subjects."
    return Table(caption, columns, rows) if rows else None


def frechet_tables(models: Sequence[Model]) -> list[Table]:
    """Distances per plane, of reconstructions and of samples, a row a model, phase and feature network."""
    tables = []
    for caption, evaluations in (
        (
            "rFID (rFD of proxy features): slices of originals against those of their reconstructions",
            _reconstructions(models),
        ),
        ("gFID (gFD of proxy features): slices of real volumes against those of samples", _generations(models)),
    ):
        rows = []
        for model, phase, found in evaluations:
            for network, distances in found["frechet"].items():
                slices = distances["slices"]
                rows.append(
                    (
                        f"{model.name}, {_phase(phase)}",
                        f"{network}{' (proxy)' if distances['proxy'] else ''}",
                        *(_significant(distances.get(plane)) for plane in PARTS),
                        f"{slices['real']:,} / {slices['generated']:,}",
                    )
                )
        if rows:
            tables.append(
                Table(f"Fréchet distances, lower is better. {caption}.", ("model", "features", *PARTS, "slices"), rows)
            )
    return tables


def frechet_notes(models: Sequence[Model]) -> list[str]:
    """What was said about each feature network, once."""
    notes = []
    for _, _, found in [*_reconstructions(models), *_generations(models)]:
        for network, distances in found["frechet"].items():
            named = "proxy" in distances["title"].lower() or not distances["proxy"]
            notes.append(f"{network}: {sentence(distances['title'])}{'' if named else ' This is a proxy.'}")
            if distances.get("note"):
                notes.append(f"{network}: {sentence(distances['note'])}")
    if notes:
        notes.append("Slices are those of one plane: real / reconstructed or generated.")
    return list(dict.fromkeys(notes))


def fidelity_table(models: Sequence[Model]) -> Table | None:
    """Precision, recall, density, coverage and KID of samples; None where nothing was evaluated."""
    rows = []
    for model, phase, found in _generations(models):
        for network, values in (found.get("fidelity") or {}).items():
            features = f"{network}{' (proxy)' if values.get('proxy') else ''}"
            cells = [_number(values.get(key), digits) for key, _, digits in FIDELITY]
            rows.append((f"{model.name}, {_phase(phase)}", features, *cells, _number(values.get("slices"), 0)))
    columns = ("samples", "features", *(label for _, label, _ in FIDELITY), "slices")
    caption = "Fidelity (precision, density) and variety (recall, coverage) of generated slices, and kernel distance."
    return Table(caption, columns, rows) if rows else None


def tissue_charts(models: Sequence[Model]) -> list[Chart]:
    """How the volumes of grey matter, white matter and CSF spread: real, reconstructed and generated."""
    rows = list(_tissue_rows(models))
    charts = []
    for key, name in TISSUES.items():
        spreads = [
            Spread(label, ink, values)
            for label, ink, entries in rows
            if (values := [float(entry[key]) for entry in entries if entry.get(key) is not None])
        ]
        if spreads:
            what = f"the volume of {name if name == 'CSF' else name.lower()} in millilitres"
            charts.append(Chart(name, spread_chart(spreads, name=what, x_label="ml")))
    return charts


def tissue_methods(models: Sequence[Model]) -> list[str]:
    """How the volumes were measured, each way once."""
    found = [*_generations(models), *_reconstructions(models)]
    return list(dict.fromkeys(sentence(entry["tissue"]["method"]) for _, _, entry in found if entry.get("tissue")))


def memorisation_chart(models: Sequence[Model]) -> Chart | None:
    """How near the samples of every model, and how near held-out subjects, come to a training volume."""
    held_out: dict[tuple[float, ...], str] = {}
    spreads = []
    for model, _, check in _memorisation(models):
        held_out.setdefault(tuple(check["held_out"]), model.name)
        spreads.append(Spread(f"{model.name}, samples", colour(models.index(model)), check["samples"]))
    if not spreads:
        return None
    unseen = [
        Spread("held-out subjects" if len(held_out) == 1 else f"held out, {name}", REAL, values)
        for values, name in held_out.items()
    ]
    what = "distance to the nearest training volume"
    chart = spread_chart([*unseen, *spreads], name=f"the {what}", x_label=what)
    return Chart("Distance to the nearest training volume", chart)


def memorisation_verdicts(models: Sequence[Model]) -> list[str]:
    """A sentence on each model."""
    return [f"{model.name}, {_phase(phase)}: {_verdict(check)}" for model, phase, check in _memorisation(models)]


def memorisation_space(models: Sequence[Model]) -> str:
    """A sentence on where distances were measured, or nothing."""
    checks = (found.get("memorisation") for _, _, found in _generations(models))
    return next((sentence(check["space"]) for check in checks if check), "")


def _memorisation(models: Sequence[Model]) -> Iterator[Evaluated]:
    for model, phase, found in _last(_generations(models)):
        check = found.get("memorisation")
        if check and check["samples"] and check["held_out"]:
            yield model, phase, check


def _verdict(check: Mapping[str, Any]) -> str:
    suspicious = [str(name) for name in check.get("suspicious") or ()]
    parts = [f"suspiciously near: {', '.join(suspicious)}" if suspicious else "no sample is suspiciously near"]
    if check.get("ratio") is not None:
        parts.insert(0, f"median distance {check['ratio']:.2f} times that of held-out subjects")
    if check.get("note"):
        parts.append(str(check["note"]))
    return sentence("; ".join(parts))


def _tissue_rows(models: Sequence[Model]) -> Iterator[tuple[str, str, Sequence[Mapping[str, Any]]]]:
    generated = [entry for entry in _last(_generations(models)) if entry[2].get("tissue")]
    reconstructed = [entry for entry in _last(_reconstructions(models)) if entry[2].get("tissue")]
    for found in [entry for *_, entry in (*generated, *reconstructed)][:1]:
        yield "real", REAL, found["tissue"]["sets"]["real"]
    for what, evaluations, key in (
        ("reconstructed", reconstructed, "reconstructed"),
        ("generated", generated, "generated"),
    ):
        for model, _, found in evaluations:
            yield f"{model.name}, {what}", colour(models.index(model)), found["tissue"]["sets"][key]


def _last(evaluations: Sequence[Evaluated]) -> list[Evaluated]:
    """Of each model the evaluation after fine-tuning, or else that before."""
    return list({entry[0].name: entry for entry in evaluations}.values())


def _reconstructions(models: Sequence[Model]) -> list[Evaluated]:
    every = [(model, phase, model.reconstruction(phase)) for model in models for phase in PHASES]
    return [(model, phase, found) for model, phase, found in every if found is not None]


def _generations(models: Sequence[Model]) -> list[Evaluated]:
    every = [(model, phase, model.generation(phase)) for model in models for phase in PHASES]
    return [(model, phase, found) for model, phase, found in every if found is not None]


def _phase(phase: Phase) -> str:
    return "after DFT" if phase == AFTER else "before DFT"


def _interval(measure: Mapping[str, Any] | None, digits: int) -> str:
    if measure is None or measure.get("mean") is None:
        return "not measured"
    mean = f"{measure['mean']:.{digits}f}"
    if measure.get("low") is None or measure.get("high") is None:
        return mean
    return f"{mean} [{measure['low']:.{digits}f}, {measure['high']:.{digits}f}]"


def _significant(value: Any) -> str:
    """Four digits: distances of different features differ by orders of magnitude."""
    return f"{value:#.4g}" if isinstance(value, int | float) else NONE


def _number(value: Any, digits: int) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else NONE

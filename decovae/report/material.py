"""Volumes that runs left behind and that a page can show: kept originals and reconstructions, and samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from decovae.report.models import AFTER, BEFORE, Model, Phase

PHASES: tuple[Phase, ...] = (BEFORE, AFTER)

PHASE_NAMES: dict[Phase, str] = {BEFORE: "before fine-tuning", AFTER: "after fine-tuning"}


@dataclass(frozen=True)
class Kept:
    """A volume of the evaluated split and its reconstruction.

    Attributes:
        subject: whose it is.
        original: NIfTI file on the network's grid.
        reconstruction: NIfTI file on the same grid.
        psnr: of this volume, in dB, or None.
    """

    subject: str
    original: Path
    reconstruction: Path
    psnr: float | None


def kept_volumes(model: Model, phase: Phase) -> list[Kept]:
    """What `decovae evaluate` kept of a model's reconstructions, as far as the files are still there."""
    run, evaluation = (model.vae if phase == BEFORE else model.decoder), model.reconstruction(phase)
    if run is None or evaluation is None:
        return []
    folder = run.folder / "evaluation"
    kept = [
        # Only names count, so that a file from elsewhere reads nothing outside its own folder.
        Kept(
            str(entry["subject"]),
            folder / Path(str(entry["original"])).name,
            folder / Path(str(entry["reconstruction"])).name,
            entry.get("psnr"),
        )
        for entry in evaluation.get("kept") or ()
    ]
    return [entry for entry in kept if entry.original.is_file() and entry.reconstruction.is_file()]


def subjects(models: Sequence[Model]) -> dict[str, Path]:
    """Every subject that was kept, those that most models kept first, and a file of the original volume."""
    found: dict[str, list[Path]] = {}
    for model in models:
        for phase in PHASES:
            for entry in kept_volumes(model, phase):
                found.setdefault(entry.subject, []).append(entry.original)
    return {subject: found[subject][0] for subject in sorted(found, key=lambda name: -len(found[name]))}


def sample_files(model: Model, phase: Phase) -> list[Path]:
    """The volumes that were sampled and are no frames of an interpolation, in the order of their numbers."""
    samples = model.samples(phase)
    return [] if samples is None else sorted(samples.folder.glob("sample-*.nii.gz"))


def sample_phases(models: Sequence[Model]) -> Iterator[tuple[Model, Phase]]:
    """Every model and phase of which there are samples."""
    for model in models:
        for phase in PHASES:
            if sample_files(model, phase):
                yield model, phase

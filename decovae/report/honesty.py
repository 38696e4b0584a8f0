"""What on a page stands in for something else, what is as the paper has it, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from decovae.report.facts import evaluations, runs, sentence, short_path
from decovae.report.material import PHASE_NAMES, PHASES, sample_files
from decovae.report.models import BEFORE, Model, generates


@dataclass(frozen=True)
class Gap:
    """Something that a complete page would have: what, of which model, and the command that brings it, or nothing."""

    model: str
    what: str
    command: str = ""

    def __str__(self) -> str:
        return f"{self.model}: {self.what}" + (f": {self.command}" if self.command else "")


PAPER_STEPS = {"vae": 100_000, "decoder": 10_000, "flow": 100_000}
"""The paper's training."""

PAPER_GRID = (128, 256, 128)


def data_sentences(models: Sequence[Model]) -> list[str]:
    """What the models were trained on, each data set once."""
    return list(dict.fromkeys(model.data for model in models))


def proxies(models: Sequence[Model]) -> list[str]:
    """Sentences on what is simulated, smaller, shorter or a stand-in."""
    return list(dict.fromkeys(_proxies(models)))


def genuine(models: Sequence[Model]) -> list[str]:
    """Sentences on what is measured as the paper says, or for real."""
    return list(dict.fromkeys(_genuine(models)))


def missing(models: Sequence[Model]) -> list[Gap]:
    """What a complete page would have and this one has not; flows only where one of the models has one."""
    flows = generates(models)
    return [Gap(model.name, what, command) for model in models for what, command in _missing(model, flows=flows)]


def _proxies(models: Sequence[Model]) -> Iterator[str]:
    for model in models:
        if model.template_cohort:
            yield (
                "Data: template cohort. Every volume is a random deformation of the MNI-152 template with its own "
                "contrast, bias field and noise; no subject is real. What holds here need not hold for scans."
            )
    for _, run in runs(models):
        steps, usual = run.summary.get("steps"), PAPER_STEPS[run.stage]
        if isinstance(steps, int) and steps < usual:
            yield f"Training: {_STAGE[run.stage]} {steps:,} steps; the paper's has {usual:,}."
        grid = run.config.get("data", {}).get("grid")
        if grid and tuple(grid) != PAPER_GRID:
            yield f"Resolution: volumes have {_times(grid)} voxels; the paper's have {_times(PAPER_GRID)}."
        if run.summary.get("perceptual_network") == "random":
            yield "Perceptual loss: of a network with random weights, where the paper uses pretrained LPIPS."
    for _, found in _evaluations(models):
        for network, distances in found["frechet"].items():
            if distances["proxy"]:
                yield f"Fréchet distances ({network}): {sentence(distances['title'])}"
            if distances.get("note"):
                yield f"Fréchet distances ({network}): {sentence(distances['note'])}"
        if found.get("lpips_note"):
            yield f"LPIPS: {sentence(found['lpips_note'])}"
    for name, found in _evaluations(models):
        if found.get("partial"):
            yield f"Partial evaluation, {name}: {sentence(found['partial'])}"


def _genuine(models: Sequence[Model]) -> Iterator[str]:
    if any(not model.template_cohort and model.data != "unknown" for model in models):
        names = dict.fromkeys(model.data for model in models if not model.template_cohort)
        yield f"Data: {', '.join(names)}, the volumes that were given; nothing of them was simulated."
    if any(model.analysis is not None for model in models):
        yield "Latent channels: measured on the means μ of every voxel of every latent, by the paper's definitions."
    found = [evaluation for _, evaluation in _evaluations(models)]
    if any("measures" in evaluation for evaluation in found):
        yield "PSNR, SSIM and MS-SSIM: of whole volumes in 3D, clipped to [0, 1], at the resolution of training."
    if any(evaluation.get("measures", {}).get("lpips") for evaluation in found):
        yield "LPIPS: with its published weights, on slices of the three planes."
    for evaluation in found:
        for network, distances in evaluation["frechet"].items():
            if not distances["proxy"]:
                yield f"Fréchet distances ({network}): {sentence(distances['title'])}"
    yield "Times and memory: as the runs logged them while they trained; nothing is extrapolated except “all steps”."
    yield "The paper's columns: as printed in the paper, of 25,252 subjects of UK Biobank; none of them was run again."


def _missing(model: Model, *, flows: bool) -> Iterator[tuple[str, str]]:
    if model.vae is None:
        yield "the autoencoder's run is not among the folders", ""
    if model.decoder is None:
        yield "no decoder fine-tuning", "torchrun train/decoder.py --vae RUN"
    if model.flow is None and flows:
        yield "no flow, so nothing was generated", "torchrun train/flow.py --vae RUN"
    if model.analysis is None:
        run = next(iter(model.runs.values()))
        yield "no analysis of the latents", f"decovae analyze {short_path(run.folder)}"
    for stage, phase in (("vae", PHASES[0]), ("decoder", PHASES[1])):
        if stage in model.runs and model.runs[stage].evaluation is None:
            folder = short_path(model.runs[stage].folder)
            yield f"no evaluation of reconstructions {PHASE_NAMES[phase]}", f"decovae evaluate {folder}"
    yield from _missing_samples(model)


def _missing_samples(model: Model) -> Iterator[tuple[str, str]]:
    if model.flow is None:
        return
    flow = short_path(model.flow.folder)
    for phase in PHASES:
        run = model.vae if phase == BEFORE else model.decoder
        samples = model.samples(phase)
        if samples is None or not sample_files(model, phase):
            if run is not None:
                command = f"decovae sample {flow} -n 8 --decoder {short_path(run.folder)}"
                yield f"no samples {PHASE_NAMES[phase]}", command
        elif samples.evaluation is None:
            command = f"decovae evaluate {flow} --samples {short_path(samples.folder)}"
            yield f"no evaluation of the samples {PHASE_NAMES[phase]}", command


def _evaluations(models: Sequence[Model]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(f"{model.name}, {what}", found) for model in models for what, found in evaluations(model)]


_STAGE = {"vae": "the autoencoder has", "decoder": "the fine-tuning has", "flow": "the flow has"}


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))

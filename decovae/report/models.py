"""What the runs of one or more models left on disk, as the report and the paper's tables read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

BEFORE: Final = "before"
AFTER: Final = "after"
"""Keys of `RunInfo.samples`: decoded by the autoencoder as trained, or after its decoder was fine-tuned (DFT)."""

TITLES = {"none": "no decorrelation", "cov": "COV", "sid": "SID", "vad": "VAD"}
"""How a page names the decorrelation losses."""

TEMPLATE_COHORT = "template cohort"
"""The words that a description of the data holds where no subject is real."""

Phase = Literal["before", "after"]


@dataclass(frozen=True)
class SampleSet:
    """A folder of `decovae sample`.

    Attributes:
        folder: with ``sample-*.nii.gz`` and their sidecars.
        settings: its ``samples.json``: solver, steps, seed, decoder, ….
        evaluation: ``evaluation/evaluation.json`` in it, or None.
    """

    folder: Path
    settings: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None = None

    @property
    def seed(self) -> int | None:
        """Seed of the noise that the samples start from."""
        seed = self.settings.get("seed")
        return seed if isinstance(seed, int) else None


@dataclass(frozen=True)
class RunInfo:
    """A finished run.

    Attributes:
        folder: absolute.
        stage: "vae", "decoder" or "flow".
        config: ``config.yaml``.
        summary: ``summary.json``.
        metrics: the lines of ``metrics.jsonl`` in their order.
        analysis: ``analysis/analysis.json`` in the run's folder or in its ``latents``, or None.
        evaluation: ``evaluation/evaluation.json``, or None; a flow's are with its samples.
        samples: of a flow, by whose decoder made them: `BEFORE` and `AFTER`; a key is absent where there are none.
    """

    folder: Path
    stage: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...] = ()
    analysis: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    samples: Mapping[str, SampleSet] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """An autoencoder, its fine-tuned decoder and the flow on its latents, as far as they were given.

    Attributes:
        name: unique among the models of a report: the loss, with the folder's name where that is not enough.
        deco: "none", "cov", "sid" or "vad"; "unknown" where only a flow was given.
        seed: of the autoencoder's training, or else of the first run that is there.
        preset: "quickstart", "paper", ….
        data: what it was trained on, in words.
        vae: the autoencoder's run.
        decoder: the run that fine-tuned its decoder.
        flow: the run that trained the flow.
    """

    name: str
    deco: str
    seed: int
    preset: str
    data: str
    vae: RunInfo | None = None
    decoder: RunInfo | None = None
    flow: RunInfo | None = None

    @property
    def runs(self) -> dict[str, RunInfo]:
        """Those that are there, by stage, in the order in which they are run."""
        found = {"vae": self.vae, "decoder": self.decoder, "flow": self.flow}
        return {stage: run for stage, run in found.items() if run is not None}

    @property
    def analysis(self) -> Mapping[str, Any] | None:
        """Of its latents: fine-tuning leaves the encoder as it is, so whichever run holds one."""
        return next((run.analysis for run in self.runs.values() if run.analysis is not None), None)

    @property
    def template_cohort(self) -> bool:
        """Whether it was trained on simulated subjects."""
        return TEMPLATE_COHORT in self.data

    def reconstruction(self, phase: Phase) -> Mapping[str, Any] | None:
        """The evaluation of its reconstructions before or after fine-tuning, or None."""
        run = self.vae if phase == BEFORE else self.decoder
        return None if run is None else run.evaluation

    def samples(self, phase: Phase) -> SampleSet | None:
        """The flow's samples, decoded before or after fine-tuning, or None."""
        return None if self.flow is None else self.flow.samples.get(phase)

    def generation(self, phase: Phase) -> Mapping[str, Any] | None:
        """The evaluation of these samples, or None."""
        samples = self.samples(phase)
        return None if samples is None else samples.evaluation


def generates(models: Sequence[Model]) -> bool:
    """Whether any of the models has a flow: without one nothing can have been generated."""
    return any(model.flow is not None for model in models)


def without_further_seeds(models: Sequence[Model]) -> list[Model]:
    """The models but for lone autoencoders whose loss another model has that went on: they tell how seeds vary."""
    whole = {model.deco for model in models if len(model.runs) > 1}
    return [model for model in models if len(model.runs) > 1 or model.deco not in whole]

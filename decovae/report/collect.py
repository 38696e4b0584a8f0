"""From folders to models: which autoencoder, fine-tuned decoder, flow and samples belong together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from decovae.errors import InputError
from decovae.generation.flow_file import sha256
from decovae.models.weights import WEIGHTS_FILE, encoder_fingerprint, load_autoencoder
from decovae.report.models import AFTER, BEFORE, TITLES, Model, RunInfo, SampleSet
from decovae.report.run_files import find_folders, read_run, read_samples

UNKNOWN = "unknown"


def collect(folders: Sequence[Path]) -> list[Model]:
    """The models that folders hold, in the order none, COV, SID, VAD.

    A run brings the runs that it was made from with it, where its ``config.yaml`` still finds them. Of runs that were
    moved, those belong together whose weights say so: equal encoders, equal autoencoder files.

    Args:
        folders: runs (of an autoencoder, a decoder, a flow), folders of samples, and folders that hold such, as a
            study's does.

    Raises:
        InputError: there is no such folder, it holds no run, or a run is still in training or damaged.
    """
    run_folders, sample_folders = find_folders(folders)
    runs: dict[Path, RunInfo] = {}
    waiting = list(run_folders)
    while waiting:
        folder = waiting.pop(0).resolve()
        if folder not in runs:
            runs[folder] = run = read_run(folder)
            origin = _origin(run)
            if origin is not None and (origin / "config.yaml").is_file():
                waiting.append(origin)
    lineage = Lineage(runs)
    models = [lineage.with_samples(model, sample_folders) for model in lineage.models()]
    order = [*TITLES, UNKNOWN]
    models.sort(key=lambda model: (order.index(model.deco) if model.deco in order else len(order), model.seed))
    return _named(models)


class Lineage:
    """Runs, and which of them was made from which.

    Args:
        runs: by their absolute folders.
    """

    def __init__(self, runs: Mapping[Path, RunInfo]) -> None:
        self.runs = runs
        self._encoders: dict[Path, str | None] = {}

    def models(self) -> Iterator[Model]:
        """A model for every flow, then one for every autoencoder and decoder that no flow was trained on."""
        used: set[Path] = set()
        for flow in self._stage("flow"):
            parent = self.parent(flow)
            vae = parent if parent is None or parent.stage == "vae" else self.parent(parent)
            decoder = parent if parent is not None and parent.stage == "decoder" else self._decoder_of(vae, flow)
            yield _model(vae, decoder, flow)
            used |= {run.folder for run in (vae, decoder) if run is not None}
        for decoder in self._stage("decoder"):
            if decoder.folder not in used:
                vae = self.parent(decoder)
                yield _model(vae, decoder, None)
                used |= {run.folder for run in (vae, decoder) if run is not None}
        for vae in self._stage("vae"):
            if vae.folder not in used:
                yield _model(vae, None, None)

    def parent(self, run: RunInfo) -> RunInfo | None:
        """The run that this one was made from, among those that are there."""
        origin = _origin(run)
        if origin is not None and origin.resolve() in self.runs:
            return self.runs[origin.resolve()]
        if run.stage == "flow":
            weights = _digest(run.folder / WEIGHTS_FILE)
            for candidate in (*self._stage("vae"), *self._stage("decoder")):
                if weights is not None and _digest(candidate.folder / WEIGHTS_FILE) == weights:
                    return candidate
        return next((vae for vae in self._stage("vae") if self._same_encoder(run, vae)), None)

    def with_samples(self, model: Model, given: Iterable[Path]) -> Model:
        """The model with the samples of its flow: those in its folder, and those of the folders that are its own."""
        if model.flow is None:
            return model
        flow = _digest(model.flow.folder / "flow.safetensors")
        inside = sorted(path.parent for path in model.flow.folder.glob("samples/*/samples.json"))
        outside = [folder for folder in given if folder not in inside]
        decoders = {_digest(run.folder / WEIGHTS_FILE): phase for phase, run in _phases(model)}
        sets: dict[str, SampleSet] = {}
        for samples in map(read_samples, [*outside, *inside]):
            phase = decoders.get(samples.settings.get("autoencoder_sha256"))
            if phase is None or (samples.settings.get("flow_sha256") != flow and samples.folder in outside):
                continue
            if phase not in sets or _preference(samples, phase) > _preference(sets[phase], phase):
                sets[phase] = samples
        return replace(
            model, flow=replace(model.flow, samples={phase: sets[phase] for phase in (BEFORE, AFTER) if phase in sets})
        )

    def _decoder_of(self, vae: RunInfo | None, flow: RunInfo) -> RunInfo | None:
        """The decoder that was tuned for the autoencoder whose latents a flow learnt, where there is just one."""
        tuned = [run for run in self._stage("decoder") if vae is not None and self.parent(run) is vae]
        if vae is None:
            tuned = [run for run in self._stage("decoder") if self._same_encoder(flow, run)]
        return tuned[0] if len(tuned) == 1 else None

    def _same_encoder(self, run: RunInfo, other: RunInfo) -> bool:
        ours = self._encoder(run)
        return ours is not None and ours == self._encoder(other)

    def _encoder(self, run: RunInfo) -> str | None:
        if run.folder not in self._encoders:
            self._encoders[run.folder] = run.summary.get("encoder") or _fingerprint(run.folder / WEIGHTS_FILE)
        return self._encoders[run.folder]

    def _stage(self, stage: str) -> list[RunInfo]:
        return [run for run in self.runs.values() if run.stage == stage]


def _origin(run: RunInfo) -> Path | None:
    path = run.config.get("vae")
    return Path(path) if run.stage != "vae" and isinstance(path, str) and path else None


def _phases(model: Model) -> Iterator[tuple[str, RunInfo]]:
    if model.vae is not None:
        yield BEFORE, model.vae
    if model.decoder is not None:
        yield AFTER, model.decoder
    elif model.vae is None and model.flow is not None:
        yield BEFORE, model.flow  # alone, it still has the autoencoder that it decodes with


def _preference(samples: SampleSet, phase: str) -> tuple[bool, bool]:
    return samples.evaluation is not None, samples.folder.name == phase


def _model(vae: RunInfo | None, decoder: RunInfo | None, flow: RunInfo | None) -> Model:
    first = next(run for run in (vae, decoder, flow) if run is not None)
    deco = UNKNOWN if vae is None else str(vae.config.get("deco") or "none")
    return Model(
        name=deco if deco == "none" else TITLES.get(deco, deco),
        deco=deco,
        seed=int(first.config.get("seed") or 0),
        preset=str(first.config.get("preset") or UNKNOWN),
        data=str(first.summary.get("data") or UNKNOWN),
        vae=vae,
        decoder=decoder,
        flow=flow,
    )


def _named(models: list[Model]) -> list[Model]:
    """The models with names that differ: by their seeds, else by the folder of their last run, else by a number."""
    for addition in (
        lambda place: f"seed {models[place].seed}",
        lambda place: list(models[place].runs.values())[-1].folder.name,
        lambda place: f"number {place + 1}",
    ):
        names = Counter(model.name for model in models)
        alike = [place for place, model in enumerate(models) if names[model.name] > 1]
        additions = {place: addition(place) for place in alike}
        telling = Counter((models[place].name, text) for place, text in additions.items())
        for place, text in additions.items():
            if telling[models[place].name, text] < names[models[place].name]:
                models[place] = replace(models[place], name=f"{models[place].name}, {text}")
    return models


def _digest(path: Path) -> str | None:
    try:
        return sha256(path)
    except OSError:
        return None


def _fingerprint(weights: Path) -> str | None:
    try:
        return encoder_fingerprint(load_autoencoder(weights))
    except InputError:
        return None

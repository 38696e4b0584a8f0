"""Which runs belong together, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from decovae.errors import InputError
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.weights import encoder_fingerprint, save_autoencoder
from decovae.report.collect import collect
from decovae.report.models import AFTER, BEFORE
from tests.report.fake_study import DECOS, digest, write_json, write_run, write_samples, write_study

CONFIG = AutoencoderConfig(channels=(4, 8), residual_blocks=1, groups=2)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "study", decos=("vad", "none"), samples=2)


def test_a_study_is_a_model_a_loss_in_the_papers_order(tmp_path: Path) -> None:
    models = collect([write_study(tmp_path, decos=tuple(reversed(DECOS)), samples=1)])
    assert [model.deco for model in models] == ["none", "cov", "sid", "vad"]
    assert [model.name for model in models] == ["none", "COV", "SID", "VAD"]
    for model in models:
        assert list(model.runs) == ["vae", "decoder", "flow"]
        assert {run.folder.parent.name for run in model.runs.values()} == {f"{model.deco}-seed42"}
        assert model.template_cohort
        assert model.seed == 42


def test_evaluations_and_analyses_are_those_of_their_runs(study: Path) -> None:
    vad = collect([study])[1]
    assert vad.analysis is not None
    assert vad.analysis["deco"] == "vad"
    for phase in (BEFORE, AFTER):
        samples = vad.samples(phase)
        assert samples is not None
        assert samples.folder.name == phase
        assert samples.seed == 42
        assert vad.reconstruction(phase)["kind"] == "reconstruction"
        assert vad.generation(phase)["kind"] == "generation"
    assert (
        vad.reconstruction(AFTER)["measures"]["psnr"]["mean"] > vad.reconstruction(BEFORE)["measures"]["psnr"]["mean"]
    )
    assert [record["step"] for record in vad.vae.metrics] == sorted(record["step"] for record in vad.vae.metrics)


def test_a_flow_brings_what_it_was_made_from(study: Path) -> None:
    (model,) = collect([study / "vad-seed42" / "flow"])
    assert model.deco == "vad"
    assert model.vae is not None
    assert model.decoder is None  # nothing says that there is one
    (model,) = collect([study / "vad-seed42" / "flow", study / "vad-seed42" / "decoder"])
    assert list(model.runs) == ["vae", "decoder", "flow"]


def test_a_run_that_is_given_twice_is_one(study: Path) -> None:
    flow = study / "vad-seed42" / "flow"
    assert len(collect([flow, study / "vad-seed42", flow])) == 1


def test_an_autoencoder_alone_is_a_model(study: Path) -> None:
    (model,) = collect([study / "none-seed42" / "vae"])
    assert (model.name, model.decoder, model.flow) == ("none", None, None)


def test_samples_may_lie_elsewhere(study: Path, tmp_path: Path) -> None:
    flow, decoder = (study / "vad-seed42" / stage for stage in ("flow", "decoder"))
    shutil.rmtree(flow / "samples")
    elsewhere = shutil.copytree(study / "none-seed42" / "flow" / "samples" / "after", tmp_path / "of-another-flow")
    own = tmp_path / "own"
    write_samples(own, flow, decoder, 1, lambda seed: torch.zeros(4, 4, 4).numpy())
    none, vad = collect([study, elsewhere, own])
    assert {phase: samples.folder for phase, samples in vad.flow.samples.items()} == {AFTER: own}
    assert none.samples(AFTER).folder.name == "after"


def test_two_flows_of_one_autoencoder_are_two_models_by_name(study: Path) -> None:
    vae = study / "none-seed42" / "vae"
    write_run(study / "none-seed42" / "flow-mean", "flow", vae=str(vae))
    names = [model.name for model in collect([study / "none-seed42"])]
    assert names == ["none, flow", "none, flow-mean"]


def test_seeds_tell_models_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(seed) / "vae", "vae", deco="sid", seed=seed) for seed in (2, 1)]
    assert [(model.name, model.seed) for model in collect(folders)] == [("SID, seed 1", 1), ("SID, seed 2", 2)]


def test_runs_that_were_moved_are_matched_by_their_encoders(tmp_path: Path) -> None:
    for seed, deco in enumerate(("none", "vad")):
        torch.manual_seed(seed)
        network = Autoencoder(CONFIG)
        vae = write_run(tmp_path / deco / "vae", "vae", deco=deco)
        decoder = write_run(tmp_path / deco / "decoder", "decoder", vae=f"/gone/{deco}/vae")
        for run in (vae, decoder):
            save_autoencoder(network.state_dict(), CONFIG, run / "autoencoder.safetensors")
        summary = json.loads((decoder / "summary.json").read_text())
        write_json(decoder / "summary.json", {**summary, "encoder": encoder_fingerprint(network)})
        with torch.no_grad():  # fine-tuning changes the decoder alone
            next(network.decoder.parameters()).add_(1)
        save_autoencoder(network.state_dict(), CONFIG, decoder / "autoencoder.safetensors")
        flow = write_run(tmp_path / deco / "flow", "flow", vae=str(decoder))
        (flow / "config.yaml").write_text((flow / "config.yaml").read_text().replace(str(decoder), "/gone/decoder"))
        assert digest(flow / "autoencoder.safetensors") == digest(decoder / "autoencoder.safetensors")
    models = collect([tmp_path])
    assert [model.deco for model in models] == ["none", "vad"]
    for model in models:
        assert list(model.runs) == ["vae", "decoder", "flow"]
        assert {run.folder.parent.name for run in model.runs.values()} == {model.deco}


def test_the_last_line_of_a_log_may_be_half_written(study: Path) -> None:
    path = study / "none-seed42" / "vae" / "metrics.jsonl"
    whole = len(path.read_text().splitlines())
    path.write_text(path.read_text() + '{"step": 130, "l1')
    assert len(collect([study])[0].vae.metrics) == whole


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("flow/summary.json", None, "flow: is still in training (no summary.json); wait for its end"),
        ("vae/summary.json", "{", "summary.json: cannot be read"),
        ("vae/summary.json", "[]", "summary.json: holds no object"),
        ("vae/config.yaml", "stage: discriminator", "stage discriminator is none of vae, decoder, flow."),
        ("vae/config.yaml", "- a", "config.yaml: holds no options"),
        ("vae/metrics.jsonl", 'oops\n{"step": 1}\n', "metrics.jsonl: line 1 is damaged"),
        ("vae/analysis/analysis.json", '{"version": 9}', "analysis.json: is of version 9, not 1"),
        ("vae/analysis/analysis.json", '{"version": 1, "kind": "sum"}', "kind sum is none of analysis, reconstruction"),
        ("vae/evaluation/evaluation.json", '{"version": 1, "kind": "reconstruction"}', "lacks measures; run `decovae"),
        ("decoder/evaluation/evaluation.json", "nonsense", "evaluation.json: cannot be read"),
        ("flow/samples/after/samples.json", "7", "samples.json: holds no object"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_sentence(
    study: Path, file: str, text: str | None, sentence: str
) -> None:
    path = study / "vad-seed42" / file
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(InputError) as refused:
        collect([study])
    assert sentence in str(refused.value)
    assert str(path.parent if text is None else path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_folders_without_runs_are_refused(study: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, sentence in {
        tmp_path / "nowhere": "no such folder",
        tmp_path / "empty": "holds no run",
        study / "vad-seed42" / "flow" / "samples" / "after": "holds samples only",
    }.items():
        with pytest.raises(InputError, match=sentence):
            collect([folder])

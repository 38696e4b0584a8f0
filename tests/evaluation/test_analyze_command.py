"""`decovae analyze` from its options to its files, and every wrong input in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from decovae import cli
from decovae.evaluation.analysis import read_analysis
from decovae.generation.latents import open_latents
from decovae.metrics.latents import analyze_latents
from decovae.models.weights import load_autoencoder, save_autoencoder
from decovae.training.config import DecoderConfig
from decovae.training.run_folder import create_folder
from decovae.training.volumes import COHORT
from tests.evaluation.conftest import finished_flow, sentence

FILES = ["analysis.json", "channels.csv", "cosine.png", "tsne.png", "variance.png"]


def analyze(*arguments: object) -> int:
    """The command's exit code, on the CPU, with few codes."""
    return cli.main(["analyze", *map(str, arguments), "--tsne-codes", "20", "--device", "cpu"])


def analysis_in(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "analysis.json").read_text())
    return content


def test_a_run_is_encoded_and_analysed(vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze(vae) == 0
    printed = capsys.readouterr().out
    assert "5 latents (all)" in printed
    assert COHORT in printed
    assert sorted(path.name for path in (vae / "analysis").iterdir()) == FILES
    found = read_analysis(vae / "analysis" / "analysis.json")
    assert (found.run, found.stage, found.deco, found.split) == ("vae", "vae", "vad", "all")
    assert found.data == COHORT
    assert found.latents == len(open_latents(vae / "latents").records) == 5
    assert f"effective rank {found.effective_rank:.3f} of 4" in printed


def test_the_training_split_is_what_encode_prints(vae: Path) -> None:
    assert analyze(vae, "--split", "training") == 0
    found = read_analysis(vae / "analysis" / "analysis.json")
    expected = analyze_latents(open_latents(vae / "latents").moments)
    assert found.cosine_similarity == expected.cosine_similarity
    assert found.effective_rank == expected.effective_rank
    assert found.latents == 4


def test_the_same_latents_give_the_same_analysis_wherever_they_are_asked_of(vae: Path, tmp_path: Path) -> None:
    flow = finished_flow(vae, tmp_path / "flow")
    decoder = tmp_path / "decoder"
    data = {"grid": (16, 20, 16), "patch": (16, 20, 16), "cohort_shape": (16, 20, 16), "cohort_size": 5}
    from decovae.training.config import DataConfig  # the run's own, as train/decoder.py takes it over

    config = DecoderConfig(vae=vae.resolve(), data=DataConfig(**data, validation_fraction=0.125))  # type: ignore[arg-type]
    create_folder(decoder, config)
    (decoder / "autoencoder.safetensors").write_bytes((vae / "autoencoder.safetensors").read_bytes())
    (decoder / "summary.json").write_text("{}")
    found = []
    for source in (vae, decoder, flow, vae / "latents"):
        assert analyze(source, "--out", tmp_path / "out") == 0
        found.append(analysis_in(tmp_path / "out"))
    assert [one.pop("stage") for one in found] == ["vae", "decoder", "flow", "latents"]
    assert [one.pop("deco") for one in found] == ["vad", "vad", "vad", None]
    assert [one.pop("run") for one in found] == ["vae", "decoder", "flow", "latents"]
    assert all(one == found[0] for one in found)


def test_a_flow_whose_latents_are_gone_has_them_encoded_again(vae: Path, tmp_path: Path) -> None:
    flow = finished_flow(vae, tmp_path / "flow")
    (vae / "latents" / "index.json").unlink()
    assert analyze(flow) == 0
    assert (flow / "analysis" / "analysis.json").is_file()


def test_a_folder_of_latents_stays_one_that_can_be_filled(vae: Path, tmp_path: Path) -> None:
    for out, analysis in ((vae / "latents", vae / "analysis"), (tmp_path / "mine", tmp_path / "mine-analysis")):
        assert cli.main(["encode", str(vae), "--out", str(out), "--device", "cpu"]) == 0
        assert analyze(out) == 0
        assert sorted(path.name for path in analysis.iterdir()) == FILES
        assert cli.main(["encode", str(vae), "--out", str(out), "--device", "cpu"]) == 0


def test_without_codes_there_is_no_embedding(vae: Path) -> None:
    assert cli.main(["analyze", str(vae), "--tsne-codes", "0", "--device", "cpu"]) == 0
    assert read_analysis(vae / "analysis" / "analysis.json").tsne is None


def unfinished(vae: Path) -> None:
    (vae / "summary.json").unlink()


def no_config(vae: Path) -> None:
    (vae / "config.yaml").unlink()


def half_encoded(vae: Path) -> None:
    assert cli.main(["encode", str(vae), "--device", "cpu"]) == 0
    (vae / "latents" / "latents-00000.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (unfinished, "is not finished; run the command that began it again"),
        (no_config, "holds no run (no config.yaml)"),
        (half_encoded, "is damaged"),
    ],
)
def test_a_run_that_cannot_be_analysed(
    vae: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None], said: str
) -> None:
    harm(vae)
    capsys.readouterr()
    assert analyze(vae) == 2
    assert said in sentence(capsys)


def test_a_flow_without_anything_behind_it(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow = finished_flow(vae, tmp_path / "flow")
    vae.rename(tmp_path / "elsewhere")
    assert analyze(flow) == 2
    assert "are gone; give the folder of the autoencoder's run" in sentence(capsys)


def other_encoder(vae: Path) -> None:
    """Train the run again, as it were: its latents stay."""
    model = load_autoencoder(vae)
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1)
    save_autoencoder(model.state_dict(), model.config, vae / "autoencoder.safetensors")


def test_latents_of_another_encoder_are_no_runs(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow = finished_flow(vae, tmp_path / "flow")
    other_encoder(vae)
    assert analyze(vae) == 2
    assert "its latents were made by another encoder" in sentence(capsys)
    assert analyze(flow) == 0  # its latents are still the ones that it was trained on
    (vae / "latents" / "index.json").unlink()
    capsys.readouterr()
    assert analyze(flow) == 2
    assert "is of another encoder" in sentence(capsys)


def test_latents_that_a_flow_was_not_trained_on_are_refused(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = finished_flow(vae, tmp_path / "flow")
    other_encoder(vae)
    assert cli.main(["encode", str(vae), "--out", str(tmp_path / "others"), "--device", "cpu"]) == 0
    (flow / "summary.json").write_text(json.dumps({"latents": str(tmp_path / "others")}))
    capsys.readouterr()
    assert analyze(flow) == 2
    assert "others: is of another encoder" in sentence(capsys)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nowhere"], "no such folder"),
        (["--tsne-codes", "3"], "give 5 or more"),
        (["--seed", "-1"], "give 0 or more"),
        (["--split", "test"], "see --help"),
        (["--oute", "x"], "did you mean --out"),
    ],
)
def test_wrong_options(vae: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    source = [] if options == ["nowhere"] else [str(vae)]
    assert cli.main(["analyze", *source, *options]) == 2
    assert said in sentence(capsys)


def test_a_folder_that_cannot_be_written(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert analyze(vae, "--out", tmp_path / "file") == 2
    assert "cannot be written" in sentence(capsys)

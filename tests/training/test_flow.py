"""Training of the flow: what it leaves, that it resumes to the same bits, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import pytest
import torch
from safetensors.torch import load_file

from decovae.data.cohort import cohort_affine, cohort_subject
from decovae.generation.flow_file import load_flow
from decovae.generation.latents import open_latents
from decovae.models.weights import encoder_fingerprint, load_autoencoder
from decovae.training.flow import FlowStage
from decovae.training.main import train_flow
from tests.training.conftest import TINY_FLOW, finished_vae, tiny_decoder_run, tiny_flow_run, torchrun
from tests.training.test_decoder import figures

SHAPE = (32, 36, 32)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_vae(tmp_path_factory.mktemp("flow") / "vae")


@pytest.fixture(scope="module")
def finished(vae: Path) -> Path:
    """An uninterrupted run, which encoded the autoencoder's volumes first."""
    out = vae.parent / "flow"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECOVAE_CACHE", str(vae.parent.parent / "decovae-cache"))
        assert tiny_flow_run(vae, out) == 0
    return out


def test_a_run_leaves_a_flow_that_needs_no_other_folder(vae: Path, finished: Path) -> None:
    network, description = load_flow(finished)
    space = open_latents(vae / "latents").space
    assert description.space == replace(space, std=math.hypot(space.std, space.noise))  # of the draws it trained on
    assert space.encoder == encoder_fingerprint(load_autoencoder(finished))
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert (finished / "autoencoder.safetensors").read_bytes() == (vae / "autoencoder.safetensors").read_bytes()
    assert sorted(path.name for path in (finished / "previews").iterdir()) == [
        f"step-{step:08d}.png" for step in (0, 3, 6)
    ]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["stage"] == "flow"
    assert summary["encoder"] == space.encoder
    assert "template cohort" in summary["data"]
    assert 0 < summary["flow_loss"] < summary["flow_loss_before_training"]


def test_a_network_that_says_nothing_has_the_loss_of_the_data(finished: Path) -> None:
    """Before training the velocity is zero: E|x₁ − x₀|² = E x₁² + 1, and standardised latents have E x₁² near 1."""
    first = next(line for line in figures(finished) if "validation/flow_loss" in line)
    assert first["step"] == 0
    assert first["validation/flow_loss_training"] == pytest.approx(2, abs=0.3)
    assert len(first["validation/flow_loss_at_times"]) == 8


def test_an_interrupted_run_continues_to_the_same_bits(
    vae: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = FlowStage.losses

    def interrupted(self: FlowStage, batch: dict, step: int):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return losses(self, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(FlowStage, "losses", interrupted)
        assert tiny_flow_run(vae, tmp_path / "run") == 128 + signal.SIGINT
    assert tiny_flow_run(vae, tmp_path / "run") == 0
    assert figures(tmp_path / "run") == figures(finished)
    whole, resumed = load_file(finished / "flow.safetensors"), load_file(tmp_path / "run" / "flow.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_validate_as_one_does(vae: Path, finished: Path, tmp_path: Path) -> None:
    done = torchrun("train/flow.py", ["--vae", str(vae), *TINY_FLOW, "--out", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    one, two = (
        [line["validation/flow_loss"] for line in figures(run) if "validation/flow_loss" in line]
        for run in (finished, tmp_path / "run")
    )
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    assert two[-1] < two[0]
    load_flow(tmp_path / "run")


@pytest.mark.gpu
def test_a_gpu_trains_in_bf16_and_compiled(vae: Path, finished: Path, tmp_path: Path) -> None:
    assert tiny_flow_run(vae, tmp_path / "run", ["--device", "cuda", "--data.workers", "1"]) == 0
    assert all(line["peak_memory_gb"] > 0 for line in figures(tmp_path / "run") if "flow_loss" in line)


@pytest.mark.parametrize("options", ["--train-on mean", "--norm l1", "--preview.samples 0", "--precision bf16"])
def test_options_train(vae: Path, finished: Path, tmp_path: Path, options: str) -> None:
    assert tiny_flow_run(vae, tmp_path / "run", [*options.split(), "--steps", "2"]) == 0


def test_latents_alone_are_enough(vae: Path, finished: Path, tmp_path: Path) -> None:
    """They carry the autoencoder that made them; where they were encoded before does not matter."""
    shutil.copytree(vae / "latents", tmp_path / "latents")
    options = ["--steps", "3"]
    assert tiny_flow_run(tmp_path / "latents", tmp_path / "run", options, option="--latents") == 0
    assert tiny_flow_run(vae, tmp_path / "same", options) == 0
    assert figures(tmp_path / "run") == figures(tmp_path / "same")


def test_a_tuned_decoder_shares_the_latents_of_its_encoder(vae: Path, finished: Path, tmp_path: Path) -> None:
    assert tiny_decoder_run(vae, tmp_path / "decoder", ["--steps", "1"]) == 0
    assert tiny_flow_run(tmp_path / "decoder", tmp_path / "run", ["--steps", "1"]) == 0
    assert not (tmp_path / "decoder" / "latents").exists()
    tuned, used = ((tmp_path / name / "autoencoder.safetensors").read_bytes() for name in ("decoder", "run"))
    assert tuned == used


def test_a_decoder_tuned_on_other_volumes_gets_latents_of_its_own(vae: Path, finished: Path, tmp_path: Path) -> None:
    assert tiny_decoder_run(vae, tmp_path / "decoder", ["--steps", "1", "--data.seed", "7"]) == 0
    assert tiny_flow_run(tmp_path / "decoder", tmp_path / "run", ["--steps", "1"]) == 0
    own, first = (open_latents(run / "latents") for run in (tmp_path / "decoder", vae))
    assert own.space.encoder == first.space.encoder
    assert own.checksums != first.checksums


def test_a_run_is_not_resumed_on_other_latents(
    vae: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(vae / "latents", tmp_path / "latents")
    assert tiny_flow_run(tmp_path / "latents", tmp_path / "run", ["--steps", "2"], option="--latents") == 0
    (tmp_path / "run" / "summary.json").unlink()
    other = finished_vae(tmp_path / "other", ["--data.seed", "3"])
    assert tiny_flow_run(other, tmp_path / "another", ["--steps", "1"]) == 0
    shutil.rmtree(tmp_path / "latents")
    shutil.copytree(other / "latents", tmp_path / "latents")
    capsys.readouterr()
    assert tiny_flow_run(tmp_path / "latents", tmp_path / "run", ["--steps", "2"], option="--latents") == 2
    assert "another latents" in capsys.readouterr().err


@pytest.fixture(scope="module")
def vae_on_files(vae: Path) -> Path:
    """A run on files with a manifest of ages and sexes."""
    folder = vae.parent / "volumes"
    folder.mkdir()
    rows = []
    for index in range(5):
        volume = cohort_subject(index, seed=0, shape=SHAPE)
        nib.save(nib.Nifti1Image(volume, cohort_affine(SHAPE)), folder / f"sub-{index:04d}.nii.gz")
        rows.append({"path": f"sub-{index:04d}.nii.gz", "age": str(50 + 3 * index), "sex": "MF"[index % 2]})
    with (folder / "cohort.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "age", "sex"])
        writer.writeheader()
        writer.writerows(rows)
    return finished_vae(vae.parent / "on-files", ["--data.root", str(folder / "cohort.csv")])


def test_conditions_come_from_the_manifest(vae_on_files: Path, tmp_path: Path) -> None:
    assert tiny_flow_run(vae_on_files, tmp_path / "run", ["--conditions", "age", "sex"]) == 0
    _, description = load_flow(tmp_path / "run")
    assert [condition.name for condition in description.conditions] == ["age", "sex"]
    assert description.condition_dropout == 0.1


def test_a_condition_that_is_no_column(vae_on_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seen before anything is encoded: that takes hours."""
    latents = vae_on_files / "latents"
    shutil.rmtree(latents, ignore_errors=True)
    refused(tmp_path, capsys, ["--vae", str(vae_on_files), "--conditions", "weight"], "weight", "age, sex")
    assert not latents.exists()


def of_another_autoencoder(vae: Path, at: Path) -> tuple[list[str], list[str]]:
    other = finished_vae(at / "other", seed=1)
    return ["--vae", str(other), "--latents", str(vae / "latents")], ["another encoder", str(other)]


def with_another_autoencoder_inside(vae: Path, at: Path) -> tuple[list[str], list[str]]:
    shutil.copytree(vae / "latents", at / "latents")
    shutil.copy(finished_vae(at / "other", seed=1) / "autoencoder.safetensors", at / "latents")
    return ["--latents", str(at / "latents")], ["another encoder"]


def of_another_grid(vae: Path, at: Path) -> tuple[list[str], list[str]]:
    other = finished_vae(at / "other", ["--data.grid", "24", "24", "24"])
    return ["--vae", str(other), "--latents", str(vae / "latents")], ["32×36×32", "24×24×24"]


def damaged_latents(vae: Path, at: Path) -> tuple[list[str], list[str]]:
    shutil.copytree(vae / "latents", at / "latents")
    shard = next((at / "latents").glob("latents-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    return ["--latents", str(at / "latents")], [shard.name]


def unfinished_latents(vae: Path, at: Path) -> tuple[list[str], list[str]]:
    shutil.copytree(vae / "latents", at / "latents")
    (at / "latents" / "index.json").unlink()
    return ["--latents", str(at / "latents")], ["decovae encode"]


def an_unfinished_autoencoder(vae: Path, at: Path) -> tuple[list[str], list[str]]:
    run = finished_vae(at / "begun")
    (run / "autoencoder.safetensors").unlink()
    return ["--vae", str(run)], ["not finished"]


def the_run_of_a_flow(vae: Path, at: Path) -> tuple[list[str], list[str]]:
    return ["--vae", str(vae.parent / "flow")], ["of a flow"]


def nothing_given(vae: Path, at: Path) -> tuple[list[str], list[str]]:
    return [], ["--vae"]


def levels_that_do_not_match(vae: Path, at: Path) -> tuple[list[str], list[str]]:
    return ["--vae", str(vae), "--model.attention", "True"], ["--model.attention"]


BAD = [
    of_another_autoencoder,
    with_another_autoencoder_inside,
    of_another_grid,
    damaged_latents,
    unfinished_latents,
    an_unfinished_autoencoder,
    the_run_of_a_flow,
    nothing_given,
    levels_that_do_not_match,
]


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: Callable[[Path, Path], tuple[list[str], list[str]]],
    vae: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options, words = case(vae, tmp_path)
    capsys.readouterr()
    refused(tmp_path, capsys, options, *words)


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], *words: str) -> None:
    assert train_flow([*options, "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()

"""Whole runs: what they leave, that they resume to the same bits, and that files and cohort are the same data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from decovae.data.cohort import cohort_affine, cohort_subject
from decovae.models.weights import load_autoencoder
from decovae.training.presets import QUICKSTART
from decovae.training.schedule import learning_rate_factor
from decovae.training.telemetry import OF_SPEED
from tests.training.conftest import TINY, tiny_run

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ("psnr", "ssim", "cosine_similarity", "pearson", "effective_rank")


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_times(out: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in OF_SPEED} for r in records(out)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, as a reference for the others."""
    out = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECOVAE_CACHE", str(tmp_path_factory.getbasetemp() / "decovae-cache"))
        assert tiny_run(out) == 0
    return out


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    present = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "previews", "autoencoder.safetensors"} <= present
    assert any(name.startswith("events.out.tfevents") for name in present)
    assert not list(finished.rglob("*.partial"))
    assert sorted(p.name for p in (finished / "previews").iterdir()) == [f"step-{s:08d}.png" for s in (0, 3, 6)]
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]

    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 6
    assert all(np.isfinite(summary[name]) for name in FIGURES)
    assert len(summary["explained_variance"]) == 4
    assert sum(summary["explained_variance"]) == pytest.approx(1)
    assert summary["lpips"] is None  # random features are no LPIPS
    assert "template cohort" in summary["data"]


def test_every_term_is_logged_at_every_step(finished: Path) -> None:
    training = [record for record in records(finished) if "l1" in record]
    assert [record["step"] for record in training] == [1, 2, 3, 4, 5, 6]
    terms = {
        *("generator", "l1", "kl", "deco", "perceptual_random", "adversarial_volume", "adversarial_slices"),
        *("discriminator_volume", "discriminator_slices", "learning_rate", "seconds_per_step"),
    }
    assert all(terms <= record.keys() for record in training)
    assert [r["step"] for r in records(finished) if "validation/psnr" in r] == [0, 3, 6]


def test_the_export_is_the_validated_model(finished: Path) -> None:
    model = load_autoencoder(finished)
    assert model.config.channels == (4, 8)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_finished_run_is_not_run_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert tiny_run(finished) == 0
    assert "finished" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_the_same_seed_gives_the_same_run_and_another_does_not(finished: Path, tmp_path: Path) -> None:
    assert tiny_run(tmp_path / "again", ["--log-every", "2"]) == 0
    assert tiny_run(tmp_path / "other", ["--seed", "1"]) == 0
    reference = load_file(finished / "autoencoder.safetensors")
    again, other = (load_file(tmp_path / name / "autoencoder.safetensors") for name in ("again", "other"))
    assert all(torch.equal(reference[key], again[key]) for key in reference)
    assert not all(torch.equal(reference[key], other[key]) for key in reference)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_an_interrupted_run_continues_to_the_same_bits(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """The signal arrives in step 3 (no checkpoint falls there), with an average and accumulation in another run."""
    from decovae.training import vae

    losses = vae.VAEStage.losses

    def interrupted(self: vae.VAEStage, batch: dict, step: int):
        if step == 2:
            os.kill(os.getpid(), number)
        return losses(self, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(vae.VAEStage, "losses", interrupted)
        assert tiny_run(tmp_path / "run") == 128 + number
    assert "The same command continues it" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    assert not (tmp_path / "run" / "summary.json").exists()
    assert tiny_run(tmp_path / "run") == 0
    assert without_times(tmp_path / "run") == without_times(finished)
    reference, resumed = (load_file(out / "autoencoder.safetensors") for out in (finished, tmp_path / "run"))
    assert all(torch.equal(reference[key], resumed[key]) for key in reference)


def test_average_and_accumulation_resume_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from decovae.training.step import Step

    options = ["--optimizer.ema-decay", "0.9", "--optimizer.accumulation", "2", "--data.batch-size", "1"]
    assert tiny_run(tmp_path / "whole", options) == 0
    gradients = Step.gradients

    def dies(self: Step, batches: object, step: int):
        if step == 5:
            raise KeyboardInterrupt  # an abrupt end: nothing is saved
        return gradients(self, batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "gradients", dies)
        assert tiny_run(tmp_path / "died", options) == 130
    assert records(tmp_path / "died")[-1]["step"] == 5
    assert tiny_run(tmp_path / "died", options) == 0
    assert without_times(tmp_path / "died") == without_times(tmp_path / "whole")
    whole, died = (load_file(tmp_path / name / "autoencoder.safetensors") for name in ("whole", "died"))
    assert all(torch.equal(whole[key], died[key]) for key in whole)


def test_a_stop_during_the_adversarial_warmup_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The discriminators' optimiser has no state yet when the checkpoint is written."""
    from decovae.training import vae

    options = ["--loss.adversarial-warmup", "4"]
    assert tiny_run(tmp_path / "whole", [*options, "--checkpoint-every", "6"]) == 0
    losses = vae.VAEStage.losses

    def interrupted(self: vae.VAEStage, batch: dict, step: int):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(self, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(vae.VAEStage, "losses", interrupted)
        assert tiny_run(tmp_path / "stopped", options) == 128 + signal.SIGTERM
    assert tiny_run(tmp_path / "stopped", options) == 0
    assert without_times(tmp_path / "stopped") == without_times(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_script_and_its_loader_processes(tmp_path: Path, number: int) -> None:
    """The script itself, as a process group with a loader process, as Ctrl-C, torchrun and schedulers stop it."""
    out = tmp_path / "run"
    options = [*TINY, "--steps", "5000", "--data.workers", "1", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "train/vae.py", *options],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or len(records(out)) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Stopping after this step" in errors
    assert f"Interrupted by {signal.Signals(number).name}" in errors
    assert "Traceback" not in errors
    assert len(list((out / "checkpoints").glob("step-*"))) > 0


def test_a_folder_of_files_gives_the_run_on_the_cohort(finished: Path, tmp_path: Path) -> None:
    """The cohort's subjects on disk, each in another orientation, are the cohort."""
    shape = (32, 36, 32)
    for index, codes in enumerate(("RAS", "LPS", "PIR", "ASL", "IRP")):
        volume = cohort_subject(index, seed=0, shape=shape)
        image = nib.Nifti1Image(volume, cohort_affine(shape))
        transform = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)
        )
        folder = tmp_path / "volumes" / f"sub-{index:04d}" / "anat"
        folder.mkdir(parents=True)
        nib.save(image.as_reoriented(transform), folder / f"sub-{index:04d}_T1w.nii.gz")
    assert tiny_run(tmp_path / "run", ["--data.root", str(tmp_path / "volumes")]) == 0
    cohort, files = (json.loads((out / "summary.json").read_text()) for out in (finished, tmp_path / "run"))
    for name in FIGURES:
        assert files[name] == pytest.approx(cohort[name], rel=1e-4), name
    assert files["data"] == "volumes"


@pytest.mark.parametrize("deco", ["none", "cov", "sid"])
def test_every_decorrelation_trains(tmp_path: Path, deco: str) -> None:
    assert tiny_run(tmp_path / "run", ["--deco", deco, "--steps", "2", "--loss.adversarial-warmup", "1"]) == 0
    first, second = (record for record in records(tmp_path / "run") if "l1" in record)
    assert ("deco" in first) == (deco != "none")
    assert "adversarial_volume" not in first
    assert "adversarial_volume" in second


def test_without_adversaries_and_perceptual_and_with_bf16(tmp_path: Path) -> None:
    options = "--loss.adversarial-slices 0 --loss.adversarial-volume 0 --loss.perceptual-network none --precision bf16"
    assert tiny_run(tmp_path / "run", options.split()) == 0
    last = [record for record in records(tmp_path / "run") if "l1" in record][-1]
    assert not any("adversarial" in name or "perceptual" in name or "discriminator" in name for name in last)


def test_augmented_patches_train(tmp_path: Path) -> None:
    assert tiny_run(tmp_path / "run", ["--data.augment", "--steps", "2"]) == 0


def figures_kept(out: Path) -> dict[str, object]:
    """Of each checkpoint of a run the validation that it is kept for, or None."""
    entries = sorted((out / "checkpoints").iterdir())
    return {entry.name: json.loads((entry / "manifest.json").read_text())["figure"] for entry in entries}


def test_the_best_checkpoints_stay_whatever_happens_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation that is the best so far has a checkpoint, between two and where the run was stopped at it too."""
    from decovae.training import vae

    options = "--checkpoint-every 5 --keep-checkpoints 1 --keep-best 2".split()
    assert tiny_run(tmp_path / "whole", options) == 0
    whole = figures_kept(tmp_path / "whole")
    assert list(whole) == ["step-00000003", "step-00000006"]
    assert all(figure is not None for figure in whole.values())
    losses = vae.VAEStage.losses

    def interrupted(self: vae.VAEStage, batch: dict, step: int):
        if step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return losses(self, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(vae.VAEStage, "losses", interrupted)
        assert tiny_run(tmp_path / "stopped", options) == 128 + signal.SIGUSR1
    assert figures_kept(tmp_path / "stopped") == {"step-00000003": None}
    assert tiny_run(tmp_path / "stopped", options) == 0
    assert figures_kept(tmp_path / "stopped") == whole


def broken_at(steps: set[int], patch: pytest.MonkeyPatch) -> None:
    """Let the images of some steps, counted from 0, be NaN."""
    from decovae.training import vae

    losses = vae.VAEStage.losses

    def broken(self: vae.VAEStage, batch: dict, step: int):
        if step in steps:
            batch = {**batch, "image": batch["image"] * float("nan")}
        return losses(self, batch, step)

    patch.setattr(vae.VAEStage, "losses", broken)


def test_a_step_that_is_not_finite_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes no weight, its subjects are named, and a resumed run still counts it."""
    from decovae.training.step import Step

    update = Step.update

    def dies(self: Step, step: int):
        if step == 4:
            raise KeyboardInterrupt
        update(self, step)

    with monkeypatch.context() as patch:
        broken_at({3}, patch)
        patch.setattr(Step, "update", dies)
        assert tiny_run(tmp_path / "run") == 130
    line = next(record for record in records(tmp_path / "run") if "skipped_for" in record)
    assert line["step"] == 4
    assert {"l1", "deco", "gradient_norm_autoencoder"} <= set(line["skipped_for"])  # never a silent zero
    assert len(line["skipped_subjects"]) == 2
    assert not any("l1" in record for record in records(tmp_path / "run") if record["step"] == 4)
    rates = {
        record["step"]: record["learning_rate"] for record in records(tmp_path / "run") if "learning_rate" in record
    }
    assert rates[4] == QUICKSTART.optimizer.learning_rate * learning_rate_factor(3, steps=6, warmup=20)
    assert tiny_run(tmp_path / "run") == 0
    assert records(tmp_path / "run")[-2]["skipped_steps"] == 1
    assert np.isfinite(json.loads((tmp_path / "run" / "summary.json").read_text())["psnr"])


def test_too_many_steps_that_are_not_finite_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_at({2, 3}, monkeypatch)
    assert tiny_run(tmp_path / "run", ["--skip-limit", "1"]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    dump = next((tmp_path / "run" / "nonfinite").glob("step-00000004*"))
    assert str(dump) in message
    content = torch.load(dump, weights_only=True)
    assert all(subject in message for subject in content["batches"][0]["subject"])
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]

"""Runs of several processes over gloo: the same artefacts, and the same training as one process."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import TINY, tiny_run, torchrun

STEPS = 6
STOPPED = 2
"""Steps before a run stops, in the middle of a timeline that has two checkpoints more."""

TERMS = ("generator", "l1", "kl", "deco", "perceptual", "adversarial", "discriminator", "gradient", "validation/psnr")
"""Beginnings of the names of what training makes equal, unlike times."""

Lines = dict[tuple[int, bool], dict[str, Any]]
"""Of a log, by step and whether they are of a validation."""


def train(out: Path, *options: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    return torchrun("train/vae.py", [*TINY, "--out", str(out), *options], processes=processes)


def test_two_processes_train_and_summarise_and_one_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "whole"
    done = train(whole, "--data.batch-size", "2", "--keep-checkpoints", "9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("effective rank") == 1
    summary = json.loads((whole / "summary.json").read_text())
    assert {"steps", "psnr", "ssim", "lpips", "pearson", "effective_rank", "explained_variance"} <= summary.keys()
    assert [step for step, validation in lines(whole) if not validation] == list(range(1, STEPS + 1))

    adapted = stopped(whole, tmp_path / "adapted")
    assert tiny_run(adapted, ["--data.batch-size", "4"]) == 0
    printed = capsys.readouterr().out
    assert f"resumed at step {STOPPED}" in printed
    assert "warning: a step has" not in printed
    check_equal(adapted, whole)

    smaller = stopped(whole, tmp_path / "smaller")
    assert tiny_run(smaller, ["--data.batch-size", "2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())  # lines break where the terminal ends
    assert "warning: a step has 2 samples from here on, not 4 as before" in printed
    before, after = lines(whole), lines(smaller)
    assert after.keys() == before.keys()
    for (step, validation), line in after.items():
        if not validation:
            assert line["learning_rate"] == before[step, False]["learning_rate"]
            same_samples = line["l1"] == pytest.approx(before[step, False]["l1"], rel=1e-4)
            assert same_samples == (step <= STOPPED), step


@pytest.mark.slow
def test_four_processes_go_on_where_two_stopped_and_divide_it_otherwise(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    done = train(whole, "--data.batch-size", "2", "--keep-checkpoints", "9", "--parallel.strategy", "fsdp")
    assert done.returncode == 0, done.stderr
    for strategy in ("ddp", "hsdp --parallel.shard 2"):
        out = stopped(whole, tmp_path / strategy.partition(" ")[0])
        options = ["--data.batch-size", "1", "--parallel.strategy", *strategy.split()]
        done = train(out, *options, processes=4)
        assert done.returncode == 0, done.stderr
        assert f"resumed at step {STOPPED}" in done.stdout
        assert "warning: a step has" not in done.stdout
        check_equal(out, whole)


def stopped(whole: Path, out: Path) -> Path:
    """A copy of a run as it was when it had taken ``STOPPED`` steps, but for the log, which knows of later ones."""
    shutil.copytree(whole, out)
    for name in ("summary.json", "autoencoder.safetensors"):
        (out / name).unlink()
    for entry in (out / "checkpoints").iterdir():
        if entry.name > f"step-{STOPPED:08d}":
            shutil.rmtree(entry)
    return out


def lines(run: Path) -> Lines:
    """What a run logged."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_step = {(record["step"], "validation/psnr" in record): record for record in records}
    assert len(by_step) == len(records)
    return by_step


def check_equal(run: Path, whole: Path) -> None:
    """Both have the same lines, rounded otherwise, learning rates that are the same, and export the same weights."""
    found, expected = lines(run), lines(whole)
    assert found.keys() == expected.keys()
    for at, line in expected.items():
        terms = {name for name in line if name.startswith(TERMS)}
        assert terms == {name for name in found[at] if name.startswith(TERMS)}
        assert terms
        for name in terms:
            assert found[at][name] == pytest.approx(line[name], rel=1e-4), f"{name} at {at}"
        assert found[at].get("learning_rate") == line.get("learning_rate")
    weights, others = (load_file(folder / "autoencoder.safetensors") for folder in (run, whole))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.gpu
def test_a_gpu_trains_in_bf16_and_compiled(tmp_path: Path) -> None:
    options = ["--device", "cuda", "--data.workers", "1", "--memory", "tight"]
    assert tiny_run(tmp_path / "run", [*options, "--steps", "4"]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(record["peak_memory_gb"] > 0 for record in records if "l1" in record)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train(tmp_path: Path) -> None:
    done = train(tmp_path / "run", "--device", "cuda")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").exists()


def test_bad_input_is_said_once(tmp_path: Path) -> None:
    done = train(tmp_path / "run", "--data.root", str(tmp_path / "nowhere"))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert not (tmp_path / "run").exists()

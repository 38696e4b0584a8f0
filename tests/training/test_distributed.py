"""Runs of several processes over gloo: the same artefacts, and the same training as one process."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests.training.conftest import TINY, tiny_run, torchrun


def train(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return torchrun("train/vae.py", [*TINY, "--out", str(out), *options])


def test_two_processes_train_resume_and_summarise(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = train(out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("effective rank") == 1
    summary = json.loads((out / "summary.json").read_text())
    assert {"steps", "psnr", "ssim", "lpips", "pearson", "effective_rank", "explained_variance"} <= summary.keys()
    assert len([line for line in (out / "metrics.jsonl").read_text().splitlines() if '"l1"' in line]) == 6

    # Dropping the last checkpoint and the end makes it a run that died; one process takes it up from two.
    for path in (out / "summary.json", out / "autoencoder.safetensors"):
        path.unlink()
    for file in (out / "checkpoints" / "step-00000006").iterdir():
        file.unlink()
    (out / "checkpoints" / "step-00000006").rmdir()
    assert tiny_run(out) == 0
    again = json.loads((out / "summary.json").read_text())
    assert again["psnr"] == pytest.approx(summary["psnr"], abs=3)


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

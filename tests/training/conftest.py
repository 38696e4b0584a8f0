"""A training run small enough for a test: seconds, and every part of the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from decovae.models.autoencoder import Autoencoder
from decovae.models.weights import save_autoencoder
from decovae.training.command_line import parse
from decovae.training.main import train_decoder, train_flow, train_vae
from decovae.training.presets import VAE_PRESETS
from decovae.training.run_folder import create_folder

ROOT = Path(__file__).resolve().parents[2]

TINY = (
    "quickstart --data.grid 32 36 32 --data.patch 24 24 24 --data.cohort-size 5 --data.cohort-shape 32 36 32 "
    "--steps 6 --validate-every 3 --checkpoint-every 2 --log-every 1 --model.channels 4 8 --model.groups 2 "
    "--loss.slice-fraction 0.05 --loss.adversarial-warmup 0 --device cpu"
).split()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for all runs of a test session: the cohort is made once."""
    monkeypatch.setenv("DECOVAE_CACHE", str(tmp_path_factory.getbasetemp() / "decovae-cache"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


TINY_DECODER = (
    "--steps 4 --validate-every 2 --checkpoint-every 2 --log-every 1 --loss.slice-fraction 0.05 --device cpu"
).split()

TINY_FLOW = (
    "--steps 6 --validate-every 3 --checkpoint-every 2 --log-every 1 --data.batch-size 2 --model.channels 4 8 "
    "--model.attention False True --model.groups 2 --model.head-channels 4 --preview.every 3 --preview.samples 1 "
    "--preview.steps 2 --device cpu"
).split()


def finished_vae(out: Path, options: Sequence[str] = (), *, seed: int = 0) -> Path:
    """The folder that ``train/vae.py`` would leave, its weights random: what comes after it does not ask how good
    they are."""
    config = parse(VAE_PRESETS, [*TINY, *options], default="quickstart")
    create_folder(out, config)
    torch.manual_seed(seed)
    autoencoder = Autoencoder(config.model)
    autoencoder.start_latent(log_variance=-2.0, orthogonal=True)
    save_autoencoder(autoencoder.state_dict(), config.model, out / "autoencoder.safetensors")
    (out / "summary.json").write_text(json.dumps({"stage": "vae", "steps": config.steps}))
    return out


def tiny_decoder_run(vae: Path, out: Path, options: Sequence[str] = ()) -> int:
    """Run ``train/decoder.py`` in this process; the exit code."""
    return train_decoder(["--vae", str(vae), *TINY_DECODER, "--out", str(out), *options])


def tiny_flow_run(source: Path, out: Path, options: Sequence[str] = (), *, option: str = "--vae") -> int:
    """Run ``train/flow.py`` in this process; the exit code."""
    return train_flow([option, str(source), *TINY_FLOW, "--out", str(out), *options])


def torchrun(script: str, options: Sequence[str], *, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a script of ``train/`` as several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*command, script, *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def tiny_run(out: Path, options: Sequence[str] = ()) -> int:
    """Run ``train/vae.py`` in this process; the exit code."""
    return train_vae([*TINY, "--out", str(out), *options])

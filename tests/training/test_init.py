"""``--init``: training that starts from the weights of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from decovae.models.weights import load_autoencoder, save_autoencoder
from tests.training.conftest import finished_vae, tiny_run

SHORT = "--steps 1 --validate-every 1 --checkpoint-every 1 --loss.perceptual 0 --optimizer.learning-rate 0".split()


def test_a_run_starts_from_the_weights_and_remembers_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = finished_vae(tmp_path / "source", seed=5), tmp_path / "run"
    given = load_autoencoder(source).state_dict()
    assert tiny_run(out, [*SHORT, "--init", str(source)]) == 0
    # At learning rate 0 they are what the run ends with: no start of its own was drawn over them.
    assert all(torch.equal(value, given[name]) for name, value in load_autoencoder(out).state_dict().items())
    assert "init" in json.loads((out / "inputs.json").read_text())

    (out / "summary.json").unlink()
    other = load_autoencoder(finished_vae(tmp_path / "other", seed=6))
    save_autoencoder(other.state_dict(), other.config, source / "autoencoder.safetensors")
    capsys.readouterr()
    assert tiny_run(out, [*SHORT, "--init", str(source)]) == 2
    assert "this run began with another init" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = finished_vae(tmp_path / "source", ["--model.channels", "4", "16"])
    for init, words in {
        source: "is an autoencoder with channels=4 16, not 4 8; give --model.channels 4 16",
        tmp_path / "nowhere.pt": "nowhere.pt: no such weights file",
    }.items():
        assert tiny_run(tmp_path / "run", [*SHORT, "--init", str(init)]) == 2
        printed = capsys.readouterr().err.strip().splitlines()
        assert words in printed[-1]

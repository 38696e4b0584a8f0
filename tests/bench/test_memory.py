"""Counts of memory and arithmetic, at the shapes that their figures are quoted for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import memory
from bench.memory import LATENT, TRAINING, VARIANTS, Decoding, Training, count_decoding, count_training, markdown

PAPER_SHAPE = TRAINING[0]


def test_monai_s_figures() -> None:
    """Those that were counted before this project had a line: 26.83 GB kept, 8.405 TFLOP forward."""
    found = count_training(VARIANTS["MONAI"], PAPER_SHAPE)
    assert found.saved == pytest.approx(26.83e9, rel=1e-3)
    assert found.forward == pytest.approx(8.405e12, rel=1e-3)
    assert found.peak > found.saved


def test_ours_keep_an_eighth_and_a_thirteenth() -> None:
    balanced, tight = (count_training(VARIANTS[f"ours, {mode}"], PAPER_SHAPE) for mode in ("balanced", "tight"))
    assert balanced.saved <= 3.5e9
    assert tight.saved <= 2.1e9
    assert balanced.forward == tight.forward <= 6.45e12
    assert balanced.both < tight.both, "tight runs a convolution of two again"
    assert tight.peak < balanced.peak < 7e9


def test_a_whole_volume_trains_and_decodes() -> None:
    found = count_training(VARIANTS["ours, balanced"], TRAINING[1])
    assert found.peak < 20e9
    ours, plain = (count_decoding(VARIANTS[name], LATENT) for name in ("ours, balanced", "plain torch, channels-last"))
    assert ours.peak <= plain.peak / 2


def test_the_result_and_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(saved=3_210_000_000, weight_casts=0, forward=6 * 10**12, both=18 * 10**12, peak=4 * 10**9)
    monkeypatch.setattr(memory, "count_training", lambda *_: training)
    monkeypatch.setattr(memory, "count_decoding", lambda *_: Decoding(forward=10**12, peak=2 * 10**9))
    file = tmp_path / "memory.json"
    monkeypatch.setattr(sys, "argv", ["memory", "--json", str(file)])
    memory.main()
    result = json.loads(file.read_text())
    assert {"torch", "monai", "decovae"} <= result["machine"].keys()
    printed = capsys.readouterr().out
    assert printed.strip() == markdown(result["rows"])
    assert printed.count("| ours, tight | 3.210 GB | 0.000 GB | 6.000 TFLOP | 18.000 TFLOP | 4.000 GB |") == len(
        TRAINING
    )
    assert "**Decoding 1×4×32×64×32, bf16**" in printed
    assert "| ours, tight | 1.000 TFLOP | 2.000 GB |" in printed

"""A training run small enough for a test: seconds, and every part of the real one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from decovae.training.main import train_vae

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


def tiny_run(out: Path, options: Sequence[str] = ()) -> int:
    """Run ``train/vae.py`` in this process; the exit code."""
    return train_vae([*TINY, "--out", str(out), *options])

"""`decovae prepare`, killed at any moment and started again, makes the store of a run that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from decovae.data.store import store_checksum
from decovae.data.store_check import verify_store
from decovae.preparation.run import prepare
from decovae.preparation.splits import Splits
from decovae.preparation.volume import Preparation
from tests.preparation.sources import config, contents, make_mixed

ROOT = Path(__file__).resolve().parents[2]
VOLUMES = 40
GRID = (24, 28, 20)
SPLITS = Splits(validation=0.1)
ENDING = ("excluded.csv", "accepted.png", "report.json", "index.jsonl")
"""What is written when all volumes are done, in this order, and then `store.json`."""
LONGEST = 180.0
"""Seconds after which a run has failed."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make_mixed(folder, VOLUMES)
    return folder


def start(source: Path, out: Path, *, pictures: bool) -> subprocess.Popen[bytes]:
    """The command in a process group of its own."""
    grid = [str(size) for size in GRID]
    options = ["--volume.grid", *grid, "--split.validation", "0.1", "--workers", "2"]
    options += [] if pictures else ["--no-pictures"]
    return subprocess.Popen(
        [sys.executable, "-m", "decovae.cli", "prepare", str(source), "--out", str(out), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def done(out: Path) -> int:
    """How many volumes the journal tells of."""
    journal = out / "progress.jsonl"
    return max(journal.read_bytes().count(b"\n") - 1, 0) if journal.exists() else 0


def kill(process: subprocess.Popen[bytes], reached: Callable[[], bool], *, seconds: float) -> None:
    """SIGKILL to all its processes, some time after it has reached something, or nothing if it ends before."""
    until = time.monotonic() + LONGEST
    while not reached() and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.0005)
    time.sleep(seconds)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    ("volumes", "files"),
    [(1, ("report.json",)), pytest.param(6, ENDING, marks=pytest.mark.slow)],
)
def test_killed_runs_come_out_alike(source: Path, tmp_path: Path, volumes: int, files: Sequence[str]) -> None:
    chance = random.Random(volumes)
    out, undisturbed = tmp_path / "store", tmp_path / "undisturbed"
    pictures = "accepted.png" in files  # they cost seconds each time
    begin = partial(start, source, out, pictures=pictures)
    for number in sorted(chance.randint(1, VOLUMES) for _ in range(volumes)):
        kill(begin(), lambda number=number: done(out) >= number, seconds=chance.uniform(0, 0.02))
        assert not (out / "store.json").exists()
    for name in files:
        kill(begin(), (out / name).exists, seconds=chance.uniform(0, 0.02))
    assert begin().wait(LONGEST) == 3
    assert verify_store(out, 1) == []
    prepare(config(source, undisturbed, volume=Preparation(grid=GRID), split=SPLITS, pictures=pictures))
    assert store_checksum(out) == store_checksum(undisturbed)
    assert contents(out) == contents(undisturbed)
    assert not list(out.rglob("*.partial"))
    assert len(list(out.rglob("*.npy"))) == VOLUMES

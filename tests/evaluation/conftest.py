"""Runs to evaluate: small, finished, and with random weights."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from decovae import cli
from decovae.generation.flow_file import FLOW, FlowDescription, save_flow
from decovae.generation.flow_matching import TimeSchedule
from decovae.generation.latents import open_latents
from decovae.models.flow_unet import FlowUNet
from decovae.models.weights import WEIGHTS_FILE
from decovae.runtime import Runtime
from decovae.training.config import FlowConfig
from decovae.training.run_folder import create_folder
from tests.generation.flows import NETWORK
from tests.training.conftest import cache, finished_vae  # noqa: F401 - `cache` is a fixture

Result = TypeVar("Result")

OPTIONS = ("--data.grid", "16", "20", "16", "--data.patch", "16", "20", "16", "--data.cohort-shape", "16", "20", "16")


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """The folder of a finished run on five subjects of the template cohort, one of them for validation."""
    return finished_vae(tmp_path / "vae", OPTIONS)


def finished_flow(vae: Path, out: Path) -> Path:
    """The folder of a finished flow run, its weights random, on latents that are encoded if need be."""
    if not (vae / "latents" / "index.json").is_file():
        assert cli.main(["encode", str(vae), "--device", "cpu"]) == 0
    store = open_latents(vae / "latents")
    create_folder(out, FlowConfig(preset="quickstart", vae=vae.resolve()))
    torch.manual_seed(1)
    flow = FlowUNet(NETWORK, store.space.channels, ())
    description = FlowDescription(store.space, NETWORK, (), TimeSchedule(), "mean", 6, 42)
    save_flow(flow.state_dict(), description, out / FLOW)
    (out / WEIGHTS_FILE).write_bytes((vae / WEIGHTS_FILE).read_bytes())
    (out / "summary.json").write_text(json.dumps({"stage": "flow", "latents": str(store.folder)}))
    return out


def sampled(flow: Path, *options: str, number: int = 3) -> None:
    """Samples of a flow run, in two steps each."""
    command = ["sample", str(flow), "-n", str(number), "--steps", "2", "--device", "cpu", *options]
    assert cli.main(command) == 0


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """What standard error holds, if it is one line of an error."""
    (line,) = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error")]
    return line


@dataclass(frozen=True)
class Thread(Runtime):
    """One of several processes, played by threads."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    board: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.barrier.wait(60)
        values = list(self.board)
        self.barrier.wait(60)
        return values


def on_processes(world: int, action: Callable[[Runtime], Result]) -> list[Result]:
    """What `action` returns on each of several processes."""
    barrier, board = threading.Barrier(world), [None] * world
    results: list[Any] = [None] * world

    def work(rank: int) -> None:
        try:
            results[rank] = action(Thread(torch.device("cpu"), rank, rank, world, barrier=barrier, board=board))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=partial(work, rank)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results

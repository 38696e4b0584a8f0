"""The loop's overhead is measured on the loop itself, with nothing in it, and checkpoints on whole ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import loop_overhead
from bench.loop_overhead import NAME, checkpoint_seconds, loop_seconds, markdown
from bench.readme import BLOCKS, Results
from decovae.runtime import Runtime
from decovae.training.presets import QUICKSTART

RUNTIME = Runtime(torch.device("cpu"))
KINDS = {"loop", "loop_without_lines", "loop_without_telemetry", "step_without_loop"}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_overhead, "STEPS", 40)
    monkeypatch.setattr(loop_overhead, "WARM", 10)
    monkeypatch.setattr(loop_overhead, "PAPER", QUICKSTART)


@pytest.mark.usefixtures("short")
def test_the_loop_runs_whole_with_and_without_telemetry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = loop_seconds(RUNTIME, tmp_path)
    assert found.keys() == KINDS
    assert all(seconds > 0 for seconds in found.values())
    assert capsys.readouterr().out == ""
    lines = {
        folder.name: [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in tmp_path.iterdir()
    }
    told = {name: [line for line in found if "nothing" in line] for name, found in lines.items()}
    assert [line["step"] for line in told["run-10-True"]] == [10, 20, 30, 40]
    assert [line["step"] for line in told[f"run-{loop_overhead.RARELY}-True"]] == [40]
    assert "seconds_forward" in told["run-10-True"][-1]
    assert "seconds_forward" not in told["run-10-False"][-1]


@pytest.mark.usefixtures("short")
def test_a_checkpoint_holds_weights_and_both_moments(tmp_path: Path) -> None:
    found = checkpoint_seconds(RUNTIME, tmp_path)
    whole = 3 * torch.float32.itemsize * found["parameters"]
    assert whole < found["bytes"] < 1.5 * whole
    assert min(found["blocking"], found["blocking_first"], found["background"]) > 0


def test_the_file_and_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = dict.fromkeys(KINDS, 1e-3)
    checkpoint = {"parameters": 1, "bytes": 2, "blocking_first": 0.4, "blocking": 0.2, "background": 3.0}

    def among(world: int, function: Any, *_: Any) -> Any:
        return times if function is loop_seconds else checkpoint

    monkeypatch.setattr(loop_overhead, "among", among)
    loop_overhead.main(["--out", str(tmp_path / NAME)])
    found = json.loads((tmp_path / NAME).read_text(encoding="utf-8"))
    assert found["loop"].keys() == {"1", "2"}
    for seconds, share in found["checkpoint"]["share"].values():
        assert share == pytest.approx(0.2 / 1000 / seconds)
    assert markdown(found) in BLOCKS["loop"](Results(tmp_path, tmp_path / "README.md"))

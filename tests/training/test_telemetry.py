"""The split of a step adds up to the step, on the host's clock and on a stream's; figures are of all processes."""

from __future__ import annotations

import gzip
import json
import math
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from decovae.runtime import Runtime
from decovae.training import clock, telemetry
from decovae.training.advice import advice
from decovae.training.clock import PHASES, StepClock
from decovae.training.config import TelemetryConfig, VAEConfig
from decovae.training.interruption import Interrupted
from decovae.training.presets import QUICKSTART
from decovae.training.telemetry import FIGURES, Telemetry
from tests.ranks import spawn

CPU = torch.device("cpu")


class Time:
    """A clock that is set by hand."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Time:
    hands = Time()
    monkeypatch.setattr(clock, "time", hands)
    return hands


class Stream:
    """What CUDA's events say: they pass when the GPU, which is behind, comes to them."""

    def __init__(self) -> None:
        self.launched = self.passed = 0.0
        self.events = 0

    def event(self) -> Any:
        event = SimpleNamespace(at=math.nan)
        self.events += 1

        def record() -> None:
            event.at = self.launched

        def synchronize() -> None:
            self.passed = max(self.passed, event.at)

        event.record, event.synchronize = record, synchronize
        event.query = lambda: event.at <= self.passed
        event.elapsed_time = lambda other: 1000 * (other.at - event.at)
        return event


def host(hands: Time) -> tuple[StepClock, Any]:
    def work(seconds: float) -> None:
        hands.now += seconds

    return StepClock(CPU), work


def stream(_: Time) -> tuple[StepClock, Any]:
    made = StepClock(CPU)
    gpu = Stream()
    made._timeline = clock._StreamTimeline(gpu.event)

    def work(seconds: float) -> None:
        gpu.launched += seconds

    return made, work


@pytest.mark.parametrize("kind", [host, stream])
def test_what_is_inside_a_phase_counts_for_itself_and_all_add_up(hands: Time, kind: Any) -> None:
    steps, work = kind(hands)
    for _ in range(2):
        with steps.phase("data"):
            work(1)
        work(2)
        with steps.phase("optimizer"):
            work(3)
            with steps.phase("communication"):
                work(4)
            work(5)
        with steps.paused():
            work(100)
        steps.step_done()
        assert steps.read() == {
            **dict.fromkeys(PHASES, 0.0),
            "data": 1.0,
            "other": 2.0,
            "optimizer": 8.0,
            "communication": 4.0,
        }
        work(50)  # a validation is in no figure
    assert steps.totals()["data"] == 2.0


def test_a_stream_s_events_are_used_again() -> None:
    steps, gpu = StepClock(CPU), Stream()
    steps._timeline = clock._StreamTimeline(gpu.event)
    for _ in range(100):
        with steps.phase("forward"):
            gpu.launched += 1
        gpu.passed = gpu.launched - 1  # one step behind
        steps.step_done()
    assert gpu.events < 10
    assert steps.read()["forward"] == 100


def test_an_error_in_a_phase_ends_it(hands: Time) -> None:
    steps, work = host(hands)
    with pytest.raises(ValueError, match="broken"), steps.phase("forward"):
        raise ValueError("broken")
    work(1)
    assert steps.read()["forward"] == 0


class Slow(torch.autograd.Function):
    """An identity whose backward takes a second."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, hands: Time) -> torch.Tensor:
        ctx.hands = hands
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.hands.now += 1.0
        # Queued in the middle of the pass, as sharded modules do.
        torch.autograd.Variable._execution_engine.queue_callback(lambda: setattr(ctx.hands, "now", ctx.hands.now + 3.0))
        return gradient, None


@pytest.mark.parametrize("waits", [False, True])
def test_what_is_waited_for_after_the_last_gradient_is_communication(hands: Time, waits: bool) -> None:
    steps = StepClock(CPU)
    x = torch.ones(2, requires_grad=True)
    for accumulated in (1, 2):
        steps.backward(Slow.apply(x, hands).sum(), waits=waits)
        assert torch.equal(x.grad, torch.full((2,), float(accumulated)))
    seconds = steps.read()
    assert (seconds["backward"], seconds["communication"]) == ((2.0, 6.0) if waits else (8.0, 0.0))


def config(**options: Any) -> VAEConfig:
    return replace(QUICKSTART, telemetry=TelemetryConfig(**options))


def run(watched: Telemetry, steps: int = 1) -> None:
    weight = torch.ones(3, requires_grad=True)
    for _ in range(steps):
        with watched.phase("data"):
            pass
        with watched.phase("forward"):
            loss = (weight * 2).sum()
        watched.backward(loss)
        watched.step_done()


def test_figures_of_one_process(tmp_path: Path) -> None:
    said: list[str] = []
    with Telemetry(config(), Runtime(CPU), tmp_path, say=said.append, network=nn.Identity()) as watched:
        watched.begin(0)
        run(watched, 3)
        figures = watched.read(4)
        assert watched.warnings(figures) == []
    split = [figures[f"seconds_{name}"] for name in PHASES]
    assert figures["seconds_per_step"] == pytest.approx(sum(split), rel=1e-3)
    assert figures["samples_per_second"] == pytest.approx(4 / figures["seconds_per_step"], rel=1e-3)
    # What a CPU does not have is not there, neither as a figure nor as a file.
    assert figures.keys() == {"seconds_per_step", "samples_per_second", *(f"seconds_{name}" for name in PHASES)}
    assert figures.keys() <= telemetry.OF_SPEED
    assert said == []
    assert list(tmp_path.iterdir()) == []


def test_utilization_counts_what_a_step_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "peak_flops_per_second", lambda device, *, bf16: 1e9)
    counted: list[int] = []

    def flops(config: VAEConfig, network: nn.Module, *, step: int) -> int:
        counted.append(step)
        return 10**6 if step < 500 else 10**7

    monkeypatch.setattr(telemetry, "step_flops", flops)
    said: list[str] = []
    with Telemetry(config(utilization="on"), Runtime(CPU), tmp_path, say=said.append, network=nn.Identity()) as watched:
        watched.begin(498)  # discriminators join at step 500
        for operations in (2e6, 1e7):
            steps = 2 if operations == 2e6 else 1
            run(watched, steps)
            figures = watched.read(2)
            expected = operations / (steps * figures["seconds_per_step"]) / 1e9
            assert figures["utilization"] == pytest.approx(expected, rel=1e-3)
    assert sorted(counted) == [498, 500]
    assert "1e-05 TFLOP" in said[0]


def test_arithmetic_that_cannot_be_counted_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> int:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(telemetry, "step_flops", broken)
    said: list[str] = []
    with Telemetry(config(utilization="on"), Runtime(CPU), tmp_path, say=said.append, network=nn.Identity()) as watched:
        watched.begin(0)
        run(watched)
        assert "utilization" not in watched.read(2)
    assert "no such thing" in said[0]


def everywhere(**figures: list[float]) -> dict[str, list[float]]:
    world = len(next(iter(figures.values())))
    nothing = {name: [math.nan] * world for name in FIGURES}
    zero = {f"seconds_{name}": [0.0] * world for name in PHASES}
    return {**nothing, **zero, "seconds_per_step": [1.0] * world, **figures}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            everywhere(seconds_data=[0.62]),
            "the loader is the bottleneck: 62% of the step; raise --data.workers",
        ),
        (everywhere(seconds_communication=[0.4, 0.4]), "waiting for other processes takes 40%"),
        (everywhere(seconds_communication=[0.6, 0.2]), "process 1 is slow: its own work takes 2.0 times"),
        (everywhere(memory_share=[0.5, 0.97]), "memory is 97% full of process 1; take --memory tight"),
        (everywhere(allocator_retries=[3.0]), "asked for again 3 times"),
        (everywhere(slowed=[0.0, float(1 << 5)]), "lowered of process 1 (hardware thermal slowdown)"),
    ],
)
def test_each_finding_says_what_to_do(found: dict[str, list[float]], said: str) -> None:
    means = {name: sum(values) / len(values) for name, values in found.items()}
    lines = [line for _, line in advice(means, found, QUICKSTART)]
    assert len(lines) == 1
    assert said in lines[0]


def test_nothing_is_said_of_a_healthy_run() -> None:
    found = everywhere(seconds_data=[0.05, 0.05], seconds_communication=[0.1, 0.12], memory_share=[0.8, 0.8])
    means = {name: sum(values) / len(values) for name, values in found.items()}
    assert list(advice(means, found, QUICKSTART)) == []


def test_each_warning_is_said_once_and_not_of_the_first_reading(
    tmp_path: Path, hands: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Telemetry(config(), Runtime(CPU), tmp_path, say=print, network=nn.Identity()) as watched:
        lines = []
        for _ in range(3):
            with watched.phase("data"):
                hands.now += 1
            watched.step_done()
            lines.append(watched.warnings(watched.read(2)))
    assert [len(found) for found in lines] == [0, 1, 0]


def test_a_trace_covers_the_steps_asked_for(tmp_path: Path) -> None:
    said: list[str] = []
    settings = config(profile_at=3, profile_steps=2)
    with Telemetry(settings, Runtime(CPU), tmp_path, say=said.append, network=nn.Identity()) as watched:
        watched.begin(1)
        run(watched, 4)
    with gzip.open(tmp_path / "profile" / "rank0.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    parts = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert [parts.count(name) for name in ("data", "forward", "backward")] == [2, 2, 2]
    summary = (tmp_path / "profile" / "summary.txt").read_text()
    assert summary.startswith("Steps 3 to 4 ")
    assert all(name in summary for name in (*PHASES, "aten::sum"))
    assert said == [f"steps 3 to 4 were traced: {tmp_path / 'profile'}"]


def test_a_run_that_ends_early_leaves_the_trace_it_has(tmp_path: Path) -> None:
    def interrupted() -> None:
        settings = config(profile_at=1, profile_steps=50)
        with Telemetry(settings, Runtime(CPU), tmp_path, say=print, network=nn.Identity()) as watched:
            watched.begin(0)
            run(watched, 2)
            raise Interrupted(signal.SIGTERM, 2)

    with pytest.raises(Interrupted):
        interrupted()
    assert (tmp_path / "profile" / "summary.txt").read_text().startswith("Steps 1 to 2 ")


def test_a_trace_that_is_behind_the_run_is_never_made(tmp_path: Path) -> None:
    with Telemetry(config(profile_at=3), Runtime(CPU), tmp_path, say=print, network=nn.Identity()) as watched:
        watched.begin(10)
        run(watched, 3)
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_is_said_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be")
    said: list[str] = []
    settings = config(profile_at=1, profile_steps=1)
    with Telemetry(settings, Runtime(CPU), tmp_path, say=said.append, network=nn.Identity()) as watched:
        watched.begin(0)
        run(watched, 2)
        assert watched.read(2)["seconds_per_step"] > 0
    assert "the trace cannot be written" in said[0]


def _two(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    runtime = Runtime(CPU, rank, rank, 2, dist.group.WORLD)
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    for part in (network[0], network):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    with Telemetry(config(), runtime, folder, say=print, network=network) as watched:
        for _ in range(2):
            with watched.phase("data"):
                time.sleep(0.05 if rank else 0.01)
            with watched.phase("forward"):
                loss = network(torch.ones(2, 4)).sum()
            watched.backward(loss)
            watched.step_done()
        figures = watched.read(4)
        (folder / f"{rank}.json").write_text(json.dumps([figures, watched._everywhere["seconds_data"]]))
    dist.destroy_process_group()


def test_figures_of_two_processes_are_means_and_the_same_on_both(tmp_path: Path) -> None:
    spawn(_two, (tmp_path,), 2)
    (figures, data), (others, _) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert figures == others
    assert data[0] < data[1]
    assert figures["seconds_data"] == pytest.approx(sum(data) / 2, rel=1e-3)
    assert figures["seconds_communication"] > 0

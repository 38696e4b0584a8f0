"""What holds of every row: its name, what it states where nothing runs, and how it ends where memory ends."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import measure, scale, test_sweep
from bench import row as rows
from bench.floors import Floor
from bench.row import Row, Work, measured, module_work
from bench.scale import chosen_scale, counts_only

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


class Benchmark:
    """pytest-benchmark's fixture where timing is off."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.group: str | None = None
        self.enabled, self.stats = False, None

    def pedantic(self, run: Callable[[], object], rounds: int) -> None:
        run()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DEVICE", CPU), ("ON_CPU", True)):
        monkeypatch.setattr(rows, name, value)
    monkeypatch.setattr(scale, "COUNT_ONLY", False)


def a_row(name: str = "ours") -> Row:
    return Row("blocks", "a block", name, (2, 3), torch.float32, "forward+backward", 64)


def test_an_option_s_own_dtype_is_another_implementation_of_the_same_case() -> None:
    float16, other = (
        dataclasses.replace(a_row(name), dtype=torch.bfloat16) for name in ("monai-float16-eager", "monai-eager")
    )
    assert float16.case == other.case
    assert (float16.autocast, other.autocast) == (torch.float16, torch.bfloat16)


def a_module_s_work(row: Row, module: torch.nn.Module) -> Work:
    return module_work(row, module, torch.randn(row.shape, requires_grad=True))


COLLECT = """
import os, sys
import pytest
import decovae.generation.sampling, decovae.training.loop, decovae.training.vae

for scale in ("gpu", "cpu", "tiny"):  # in a process each, as a scale is chosen once; what they share is loaded before
    if os.fork() == 0:
        os.environ["DECOVAE_BENCH_SCALE"] = scale
        os.dup2(os.open(os.path.join(sys.argv[1], scale), os.O_CREAT | os.O_WRONLY), 1)
        options = ["--collect-only", "--no-header", "-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider"]
        code = pytest.main(["bench", *options])
        sys.stdout.flush()
        os._exit(code)
    os.wait()
"""


def test_names_are_the_same_at_all_scales(tmp_path: Path) -> None:
    """Each scale's rows are a part of those of scale gpu, whatever their sizes."""
    environment = {**os.environ, scale.COUNT_VARIABLE: "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run([sys.executable, "-c", COLLECT, str(tmp_path)], cwd=ROOT, env=environment, check=True)
    found = {file.name: {line for line in file.read_text().splitlines() if "::" in line} for file in tmp_path.iterdir()}
    assert found["cpu"] <= found["gpu"]
    assert found["tiny"] <= found["gpu"]
    assert len(found["gpu"]) > len(found["cpu"]) > len(found["tiny"]) > 100
    suites = {f"bench/test_{name}.py" for name in ("losses", "blocks", "flow", "generation", "step", "sweep")}
    assert {row.partition("::")[0] for row in found["tiny"]} == suites


@pytest.mark.usefixtures("on_cpu")
def test_a_counted_row_states_what_a_measured_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    row, floor = a_row(), Floor(100, 200)
    whole, counted = Benchmark(), Benchmark()
    noted = measured(whole, row, floor, lambda: a_module_s_work(row, torch.nn.Linear(3, 4)))
    assert noted is whole.extra_info
    monkeypatch.setattr(scale, "COUNT_ONLY", True)
    assert measured(counted, row, floor, lambda: pytest.fail("nothing runs")) is None
    floors = {"bytes_moved_floor": 100, "flops_floor": 200, "matrix_dtype": "float32"}
    assert counted.extra_info == {**row.case, "implementation": "ours", **floors}
    assert counted.extra_info.items() <= whole.extra_info.items()
    assert counted.group == whole.group


@pytest.mark.usefixtures("on_cpu")
def test_a_measured_row_notes_its_memory() -> None:
    row, found = a_row(), Benchmark()
    moments = [torch.zeros(7)]
    linear = torch.nn.Linear(3, 4)
    measured(
        found,
        row,
        Floor(100, 200),
        lambda: module_work(row, linear, torch.randn(2, 3, requires_grad=True), beside=moments),
    )
    info = found.extra_info
    parameters, x, along = 4 * (12 + 4), 4 * 6, 4 * 8
    gradients = parameters + x
    assert info["peak_bytes"] == parameters + x + along + 4 * 7 + gradients + info["peak_extra_bytes"]
    assert info["saved_bytes"] == x
    assert info["flops"] == 3 * 2 * 2 * 3 * 4
    assert info["reserved_bytes"] is None
    assert info["copy_bytes_per_second"] > 0


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("calls", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")]
)
def test_memory_that_ends_anywhere_is_a_result(calls: int, error: RuntimeError) -> None:
    """At the first call, in timing, and in the passes behind it."""

    class Greedy(torch.nn.Linear):
        left = calls

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.left == 0:
                raise error
            self.left -= 1
            return super().forward(x)

    row, found, told = a_row(), Benchmark(), []
    with pytest.raises(pytest.skip.Exception, match=r"^does not fit: .* GB are free on cpu") as skipped:
        measured(
            found, row, Floor(1, 1), lambda: a_module_s_work(row, Greedy(3, 4)), exhausted=lambda: told.append("so")
        )
    assert skipped.value.__context__ is None  # which would hold the tensors of the frames that it came through
    assert told == ["so"]
    assert found.extra_info["implementation"] == "ours"


class Timing(Benchmark):
    """pytest-benchmark's fixture where it times."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True


NO_PLAN = "FIND was unable to find an engine to execute this computation"


class Unplanned(torch.nn.Linear):
    """A layer for which cuDNN finds no plan, so many times."""

    left = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.left:
            self.left -= 1
            raise RuntimeError(NO_PLAN)
        return super().forward(x)


@pytest.mark.usefixtures("on_cpu")
def test_a_convolution_without_a_plan_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    row, released = a_row(), []
    monkeypatch.setattr(rows, "release", lambda: released.append("cache"))
    layer = Unplanned(3, 4)
    assert measured(Timing(), row, Floor(1, 1), lambda: a_module_s_work(row, layer), rounds=1) is not None
    assert released == ["cache"]


@pytest.mark.usefixtures("on_cpu")
def test_without_a_plan_it_does_not_fit_if_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, row = Unplanned(3, 4), a_row()
    for short, raised in ((True, pytest.skip.Exception), (False, RuntimeError)):
        layer.left = 2
        monkeypatch.setattr(measure, "is_short", lambda *_, short=short: short)
        with pytest.raises(raised, match="does not fit: .* no way to convolve" if short else NO_PLAN):
            measured(Timing(), row, Floor(1, 1), lambda: a_module_s_work(row, layer))
        assert layer.left == 0


@pytest.mark.usefixtures("on_cpu")
def test_what_graphs_hold_counts_as_the_row_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their replays allocate nothing: what is reserved beyond what others hold is theirs."""
    row = a_row()
    work = a_module_s_work(row, torch.nn.Linear(3, 4))
    monkeypatch.setattr(measure, "reserved", lambda _: 1_000)
    monkeypatch.setattr(measure, "memory", lambda *_: measure.Memory(8, 9_000))
    notes = {}
    for graphs in (True, False):
        made = dataclasses.replace(work, graphs=graphs)
        notes[graphs] = measured(Benchmark(), row, Floor(1, 1), lambda made=made: made) or {}
    assert notes[True]["peak_bytes"] == 8_000
    assert notes[True]["peak_extra_bytes"] == 8_000 - work.held - work.result_bytes
    assert notes[False]["peak_bytes"] == work.held + work.result_bytes + 8
    assert notes[False]["peak_extra_bytes"] == 8


@pytest.mark.usefixtures("on_cpu")
def test_clocks_and_retries_are_those_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    row, order = a_row(), []

    class Noted(Benchmark):
        def pedantic(self, run: Callable[[], object], rounds: int) -> None:
            order.append("rounds")

    def retries(_: torch.device) -> int:
        order.append("retries")
        return 3 * order.count("rounds") + 2

    monkeypatch.setattr(measure, "allocator_retries", retries)
    monkeypatch.setattr(measure, "clocks", lambda run, _: order.append("clocks") or {"sm_clock_mhz": 1})
    monkeypatch.setattr(measure, "memory", lambda *_: order.append("memory") or measure.Memory(0, None))
    noted = measured(Noted(), row, Floor(1, 1), lambda: a_module_s_work(row, torch.nn.Linear(3, 4))) or {}
    assert order == ["retries", "rounds", "retries", "clocks", "memory"]
    assert noted["allocator_retries"] == 3
    assert noted["gpu"] == {"sm_clock_mhz": 1}


@pytest.mark.usefixtures("on_cpu")
def test_a_cpu_has_no_clocks_and_no_retries() -> None:
    row = a_row()
    noted = measured(Benchmark(), row, Floor(1, 1), lambda: a_module_s_work(row, torch.nn.Linear(3, 4))) or {}
    assert not {"gpu", "allocator_retries"} & noted.keys()


def test_a_profiler_is_attached_before_the_first_row_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(measure, "launches", lambda run: seen.append("profiled"))
    measure._warm_profiler.cache_clear()
    for device in (CPU, torch.device("cuda"), torch.device("cuda")):
        measure.warm_profiler(device)
    measure._warm_profiler.cache_clear()
    assert seen == ["profiled"]


@pytest.mark.usefixtures("on_cpu")
def test_other_errors_are_not_hidden() -> None:
    def broken() -> Work:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        measured(Benchmark(), a_row(), Floor(1, 1), broken)


@pytest.mark.usefixtures("on_cpu")
def test_a_sweep_does_not_try_what_is_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, ...]] = []

    def full(name: str, config: object) -> torch.nn.Module:
        tried.append((0,))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(test_sweep, "did_not_fit", {})
    monkeypatch.setattr(test_sweep, "DEVICE", CPU)
    monkeypatch.setattr(test_sweep.block_baselines, "training_step", full)
    name = test_sweep.IMPLEMENTATIONS[0]
    edge = test_sweep.PATCHES["patch96"][0]
    reasons = []
    for patch, implementation in (
        ("patch96", name),
        ("patch128", name),
        ("patch64", name),
        ("patch128", "plain-eager"),
    ):
        with pytest.raises(pytest.skip.Exception) as skipped:
            test_sweep.test_training(Benchmark(), patch, 1, implementation)
        reasons.append(str(skipped.value))
    assert reasons[1] == f"does not fit: already 1×1×{edge}×{edge}×{edge} did not"
    assert all("GB are free" in reasons[index] for index in (0, 2, 3))
    assert len(tried) == 3


def test_scales_are_chosen_by_name_or_by_device() -> None:
    assert chosen_scale({}, cuda=True) == "gpu"
    assert chosen_scale({}, cuda=False) == "cpu"
    assert chosen_scale({scale.SCALE_VARIABLE: "tiny"}, cuda=True) == "tiny"
    assert counts_only({scale.COUNT_VARIABLE: "1"})
    assert not counts_only({})
    with pytest.raises(pytest.UsageError, match="DECOVAE_BENCH_SCALE=huge: no such scale; choose gpu, cpu, tiny"):
        chosen_scale({scale.SCALE_VARIABLE: "huge"}, cuda=True)
    with pytest.raises(pytest.UsageError, match="DECOVAE_BENCH_COUNT=yes: neither 0 nor 1"):
        counts_only({scale.COUNT_VARIABLE: "yes"})

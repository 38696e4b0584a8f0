"""Figures reach the run's log, TensorBoard and the trackers asked for; what cannot be written is said, never lost."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from decovae.errors import InputError, RunError
from decovae.training import trackers
from decovae.training.config import TelemetryConfig, VAEConfig
from decovae.training.presets import QUICKSTART
from decovae.training.run_folder import MetricsLog


def config(**options: Any) -> VAEConfig:
    return replace(QUICKSTART, telemetry=TelemetryConfig(**options))


class Wandb(ModuleType):
    """What of W&B's package is used; it keeps what it was told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[SimpleNamespace] = []
        self.Settings = SimpleNamespace

    def init(self, **options: Any) -> SimpleNamespace:
        run = SimpleNamespace(options=options, logged=[], exit_code=None, metrics=[])
        run.define_metric = lambda name, step_metric: run.metrics.append((name, step_metric))
        run.log = run.logged.append
        run.finish = lambda exit_code: setattr(run, "exit_code", exit_code)
        self.runs.append(run)
        return run


class Mlflow(ModuleType):
    """What of MLflow's package is used."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.experiments: list[str] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.MlflowClient = lambda: self
        self.entities = ModuleType("mlflow.entities")
        self.entities.Param = lambda name, value: (name, value)
        self.entities.Metric = lambda name, value, time, step: (name, value, step)

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        return SimpleNamespace(experiment_id=name) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments.append(name)
        return name

    def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
        identity = f"{experiment}-{len(self.runs)}"
        self.runs[identity] = {"params": {}, "metrics": [], "status": "RUNNING"}
        return SimpleNamespace(info=SimpleNamespace(run_id=identity))

    def update_run(self, identity: str, status: str) -> None:
        self.runs[identity]["status"] = status

    def log_batch(self, identity: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(params) <= 100
        self.runs[identity]["params"].update(params)
        self.runs[identity]["metrics"] += metrics

    def set_terminated(self, identity: str, status: str) -> None:
        self.runs[identity]["status"] = status


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> tuple[Wandb, Mlflow]:
    made = Wandb(), Mlflow()
    for module in (*made, made[1].entities):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    return made


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_has_what_the_log_has_and_forgets_what_it_forgets(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, QUICKSTART, step=None) as log:
        for step in (1, 2, 3):
            log.write(step, {"l1": step / 8, "kl": math.nan, "names": ["a"]})
    assert scalars(tmp_path, "l1") == [(1, 0.125), (2, 0.25), (3, 0.375)]
    with MetricsLog(tmp_path, QUICKSTART, step=1) as log:
        log.write(2, {"l1": 0.5})
    assert scalars(tmp_path, "l1") == [(1, 0.125), (2, 0.5)]
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2]


def test_trackers_get_every_scalar_and_a_resumed_run_goes_on_in_them(
    tmp_path: Path, packages: tuple[Wandb, Mlflow]
) -> None:
    wandb, mlflow = packages
    settings = config(wandb="brains", mlflow="latents")
    with MetricsLog(tmp_path, settings, step=None) as log:
        log.write(1, {"l1": 0.5, "explained_variance": [1.0]})
    with contextlib.suppress(KeyboardInterrupt), MetricsLog(tmp_path, settings, step=1) as log:
        log.write(2, {"l1": 0.25})
        raise KeyboardInterrupt
    first, second = wandb.runs
    assert (first.logged, second.logged) == ([{"step": 1, "l1": 0.5}], [{"step": 2, "l1": 0.25}])
    assert (first.exit_code, second.exit_code) == (0, 1)
    assert first.options["project"] == "brains"
    assert first.options["id"] == second.options["id"]
    assert first.options["config"]["model"]["latent_channels"] == 4
    assert first.metrics == [("*", "step")]  # steps that are trained again are taken too
    (run,) = mlflow.runs.values()
    assert run["metrics"] == [("l1", 0.5, 1), ("l1", 0.25, 2)]
    assert run["params"]["model.latent_channels"] == "4"
    assert run["status"] == "FAILED"
    assert set(json.loads((tmp_path / "trackers.json").read_text())) == {"wandb", "mlflow"}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_at_once(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=rf"--telemetry\.{name}: .*pip install 'decovae\[{name}\]'"):
        MetricsLog(tmp_path, config(**{name: "project"}), step=None)


def test_a_tracker_that_cannot_be_reached_is_refused_at_once(tmp_path: Path, packages: tuple[Wandb, Mlflow]) -> None:
    wandb, _ = packages

    def init(**_: Any) -> None:
        raise RuntimeError("api_key not configured. Do this.\nAnd that.")

    wandb.init = init  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"--telemetry\.wandb: cannot be opened \(api_key not configured\); log in"):
        MetricsLog(tmp_path, config(wandb="brains"), step=None)


def test_a_tracker_that_fails_is_given_up_and_the_run_goes_on(tmp_path: Path, packages: tuple[Wandb, Mlflow]) -> None:
    _, mlflow = packages
    said: list[str] = []
    given_up = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        given_up.set()

    def gone(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    with MetricsLog(tmp_path, config(mlflow="latents"), step=None, say=say) as log:
        mlflow.log_batch = gone  # type: ignore[method-assign]
        log.write(1, {"l1": 0.5})
        assert given_up.wait(30)
        log.write(2, {"l1": 0.25})
    assert len(said) == 1
    assert "mlflow is given up for this run (no route to host)" in said[0]
    assert len(log.path.read_text().splitlines()) == 2


class Full:
    """A file on a disk that is full."""

    name = "full"

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, _: object) -> None:
        raise OSError(28, "No space left on device")

    flush = close = fileno = lambda self: self.write(b"")


@pytest.mark.parametrize("part", ["the log", "the board"])
def test_a_full_disk_is_a_sentence_for_whoever_writes(tmp_path: Path, part: str) -> None:
    log = MetricsLog(tmp_path, QUICKSTART, step=None)
    log.write(1, {"l1": 0.5})
    if part == "the log":
        log._file = Full(log._file)  # type: ignore[assignment]
    else:
        log._board._records = Full(log._board._records)  # type: ignore[assignment]
    with pytest.raises(RunError, match=r"cannot be written .*No space left on device"):
        log.write(2, {"l1": 0.25})
    if part == "the log":
        with pytest.raises(RunError, match="No space left on device"):
            log.close()


def test_closing_hides_no_other_error(tmp_path: Path) -> None:
    def broken() -> None:
        with MetricsLog(tmp_path, QUICKSTART, step=None) as log:
            log._file = Full(log._file)  # type: ignore[assignment]
            raise ValueError("what really happened")

    with pytest.raises(ValueError, match="what really happened"):
        broken()


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        MetricsLog(tmp_path / "file" / "run", QUICKSTART, step=None)

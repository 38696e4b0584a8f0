"""Where a run's figures go beside ``metrics.jsonl``: TensorBoard's event files, Weights & Biases, MLflow."""

from __future__ import annotations

import json
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from decovae.errors import InputError
from decovae.files import write_text
from decovae.training.config import RunConfig
from decovae.training.config_file import as_plain, leaves

IDENTITIES = "trackers.json"
"""What the run is called by the trackers, in its folder: it goes on there when it is resumed."""

PATIENCE = 60.0
"""Seconds that a tracker has at the end for what it was not yet sent."""

Scalars = Mapping[str, float]


class Board:
    """TensorBoard's events of a run, written at once by whoever calls: what the disk refuses, the caller hears.

    Args:
        folder: of the event files; each process that continues the run writes one of its own.
        purge: events from this step on, in older files, are of a run that died after its last checkpoint.

    Raises:
        OSError: on construction and of every method.
    """

    def __init__(self, folder: Path, *, purge: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        # TensorBoard reads files in the order of their names.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2", step=purge)
        self._add(session_log=SessionLog(status=SessionLog.START), step=purge)
        self._file.flush()

    def write(self, step: int, scalars: Scalars) -> None:
        """Append one event with all scalars."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._add(summary=self._summary(value=values), step=step)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())


class Tracker(Protocol):
    """A service that keeps figures of runs."""

    def write(self, step: int, scalars: Scalars) -> None:
        """Hand over the figures of a step."""
        ...

    def close(self, failed: bool) -> None:
        """The run is over, or at least this process of it."""
        ...


def check_trackers(config: RunConfig) -> None:
    """Refuse a tracker whose package is not there.

    Raises:
        InputError: naming the option and what to install.
    """
    for name in OPENING:
        if getattr(config.telemetry, name) is not None and find_spec(name) is None:
            raise InputError(f"--telemetry.{name}: {name} is not installed; pip install 'decovae[{name}]'.")


class Trackers:
    """The trackers that a configuration asks for, fed by a thread, so that no step waits for a network.

    One that fails while the run goes on is given up, and said: the run's own log has everything.

    Args:
        folder: the run's.
        config: the run's.
        say: prints a line.

    Raises:
        InputError: if one is not installed or cannot be reached now.
        OSError: if the folder cannot be written.
    """

    def __init__(self, folder: Path, config: RunConfig, *, say: Callable[[str], None]) -> None:
        self._say = say
        self._trackers: dict[str, Tracker] = {}
        self._todo: queue.SimpleQueue[tuple[int, Scalars] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        check_trackers(config)
        wanted = [name for name in OPENING if getattr(config.telemetry, name) is not None]
        if not wanted:
            return
        identities = _identities(folder)
        for name in wanted:
            identities[name] = self._open(name, folder, config, identities.get(name))
            write_text(folder / IDENTITIES, json.dumps(identities, indent=2) + "\n")
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._thread.start()

    def _open(self, name: str, folder: Path, config: RunConfig, identity: str | None) -> str:
        open_, advice = OPENING[name]
        try:
            self._trackers[name], identity = open_(folder, config, identity)
        except Exception as error:  # the packages' own kinds, and those of what they reach servers by
            self._close_all(failed=True)
            raise InputError(f"--telemetry.{name}: cannot be opened ({_line(error)}); {advice}.") from error
        return identity

    def write(self, step: int, scalars: Scalars) -> None:
        """Hand over the figures of a step; nobody waits."""
        if self._thread is not None:
            self._todo.put((step, scalars))

    def close(self, *, failed: bool) -> None:
        """Send what has not been sent, for at most `PATIENCE` seconds."""
        if self._thread is None:
            return
        self._todo.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._say(f"warning: {' and '.join(self._trackers)} did not take the last figures; metrics.jsonl has them.")
        else:
            self._close_all(failed=failed)
        self._thread = None

    def _work(self) -> None:
        while (record := self._todo.get()) is not None:
            step, scalars = record
            for name in list(self._trackers):
                self._try(name, partial(_write, step=step, scalars=scalars))

    def _close_all(self, *, failed: bool) -> None:
        for name in list(self._trackers):
            self._try(name, lambda tracker: tracker.close(failed))

    def _try(self, name: str, action: Callable[[Tracker], None]) -> None:
        try:
            action(self._trackers[name])
        except Exception as error:  # whatever a package or a network comes up with, the run goes on
            del self._trackers[name]
            self._say(f"warning: {name} is given up for this run ({_line(error)}); metrics.jsonl has every figure.")


def _write(tracker: Tracker, *, step: int, scalars: Scalars) -> None:
    tracker.write(step, scalars)


def _line(error: Exception) -> str:
    """The first sentence of an error."""
    first, *_ = [*str(error).strip().splitlines(), ""]
    return re.split(r"(?<=\w)\. ", first)[0][:200].strip(" .") or type(error).__name__


def _identities(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / IDENTITIES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{folder / IDENTITIES}: cannot be read ({error}); remove it to begin new runs.") from error
    return {name: str(identity) for name, identity in found.items()}


def _open_wandb(folder: Path, config: RunConfig, identity: str | None) -> tuple[Tracker, str]:
    import wandb

    identity = identity or secrets.token_hex(4)
    run = wandb.init(
        project=config.telemetry.wandb,
        id=identity,
        name=folder.name,
        dir=str(folder),
        config=as_plain(config),
        resume="allow",
        settings=wandb.Settings(console="off"),  # it would wrap the terminal that the bar is on
    )
    # With an axis of its own, steps that are trained again after a crash are taken; W&B's own axis only grows.
    run.define_metric("*", step_metric="step")
    return _Wandb(run), identity


class _Wandb:
    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, step: int, scalars: Scalars) -> None:
        self._run.log({"step": step, **scalars})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _open_mlflow(folder: Path, config: RunConfig, identity: str | None) -> tuple[Tracker, str]:
    from mlflow import MlflowClient
    from mlflow.entities import Param

    client = MlflowClient()
    if identity is not None:
        client.update_run(identity, status="RUNNING")
        return _Mlflow(client, identity), identity
    assert config.telemetry.mlflow is not None
    found = client.get_experiment_by_name(config.telemetry.mlflow)
    experiment = client.create_experiment(config.telemetry.mlflow) if found is None else found.experiment_id
    identity = str(client.create_run(experiment, run_name=folder.name).info.run_id)
    options = iter([Param(option, str(value)[:500]) for option, value in leaves(as_plain(config))])
    while hundred := list(islice(options, 100)):  # as many as a call takes
        client.log_batch(identity, params=hundred)
    return _Mlflow(client, identity), identity


class _Mlflow:
    def __init__(self, client: Any, identity: str) -> None:
        from mlflow.entities import Metric

        self._client, self._identity, self._metric = client, identity, Metric

    def write(self, step: int, scalars: Scalars) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self._identity, metrics=metrics)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._identity, status="FAILED" if failed else "FINISHED")


OPENING: dict[str, tuple[Callable[[Path, RunConfig, str | None], tuple[Tracker, str]], str]] = {
    "wandb": (_open_wandb, "log in with `wandb login`, or set WANDB_MODE=offline"),
    "mlflow": (_open_mlflow, f"see to MLFLOW_TRACKING_URI, or remove {IDENTITIES} from the run's folder to begin anew"),
}
"""How each tracker begins a run, or goes on with the one of that identity, and what to do where it cannot."""

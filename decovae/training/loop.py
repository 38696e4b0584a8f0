"""The training loop: it owns what happens between steps: agreement of processes, logging, validation, checkpoints."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from decovae.errors import RunError
from decovae.files import writing
from decovae.runtime import Runtime, raise_first
from decovae.training.checkpoints import Checkpoints, RunState
from decovae.training.clock import Phase
from decovae.training.config import RunConfig
from decovae.training.interruption import Interrupted, StopRequest, stop_requests
from decovae.training.nonfinite import Skipped
from decovae.training.progress import Progress
from decovae.training.run_folder import MetricsLog
from decovae.training.sharding import choose_sharding
from decovae.training.stage import Stage
from decovae.training.step import Gradients, Observer, Step
from decovae.training.telemetry import Telemetry
from decovae.training.watch import Watch

FIRST_STEP_PATIENCE = 7200.0
"""Seconds that a first step, and what precedes it, may take: it compiles."""

PATIENCE = 1800.0
"""Seconds, at least, that a validation or the rest of a checkpoint may take."""


def train(stage: Stage, config: RunConfig, runtime: Runtime, folder: Path) -> list[dict[str, Any]]:
    """Train from the newest checkpoint in ``folder``, or from the start, to the last step; then export.

    Returns:
        The validations of the whole run in order, each with its ``step``; on every process.

    Raises:
        Interrupted: after a signal that asks for it, once a checkpoint is written.
        RunError: if too many steps are not finite, or the run's folder cannot be written; the last good checkpoint is
            kept.
        InputError: if no checkpoint can be read, or it is another model's.
    """
    with stop_requests(announce=runtime.main) as request, Watch(runtime, config.parallel.timeout) as watch:
        return Training(stage, config, runtime, folder, request, watch).run()


class Training:
    """The state of one run while it trains."""

    def __init__(
        self, stage: Stage, config: RunConfig, runtime: Runtime, folder: Path, request: StopRequest, watch: Watch
    ) -> None:
        self.stage, self.config, self.runtime, self.folder = stage, config, runtime, folder
        self.request, self.watch = request, watch
        self.step, self.position = 0, 0
        self.samples_per_step = config.data.batch_size * runtime.world * config.optimizer.accumulation
        self.skipped = Skipped(folder, runtime, limit=config.skip_limit)
        self.best: float | None = None
        self.patience: float | None = None
        self.log: MetricsLog | None = None
        self.trouble: RunError | None = None

    def run(self) -> list[dict[str, Any]]:
        config, runtime = self.config, self.runtime
        with contextlib.ExitStack() as stack:
            self.progress = stack.enter_context(Progress(config.steps, visible=runtime.main))
            self.telemetry = stack.enter_context(
                Telemetry(config, runtime, self.folder, say=self.progress.say, network=self._network())
            )
            self.updates = Step(self.stage, config, runtime, observer=_Told(self))
            self.checkpoints = Checkpoints(
                self.folder / "checkpoints",
                runtime,
                modules=self.stage.networks,
                optimizers=self.updates.optimizers,
                averages=self.updates.averages,
                keep=config.keep_checkpoints,
                keep_best=config.keep_best,
                best=self.stage.best,
            )
            stack.callback(self.checkpoints.close)
            resumed = self._resume()
            runtime.on_main(lambda: self._open_log(resumed))
            if self.log is not None:
                stack.enter_context(self.log)
            # Before the first step, and where a stop came between a step and its validation.
            if self._is_due(config.validate_every) and self.step not in self._validated_steps():
                figure, _ = self._validate()
                if resumed:
                    self._save(figure)  # whose entry does not know of it yet
            if self.step < config.steps:
                self._train()
            self._settle()
            self._export()
            return self._validations()

    def _network(self) -> torch.nn.Module:
        return next(iter(self.stage.networks.values()))

    def _resume(self) -> bool:
        """Restore the newest checkpoint, if there is one, and say what is now going on."""
        self.watch.at("reading the checkpoint", patience=FIRST_STEP_PATIENCE)
        sharding = choose_sharding(self.config, self.runtime)
        if sharding is not None:
            self.progress.say(sharding.sentence)
        state = self.checkpoints.resume(self.progress.say)
        if state is None:
            return False
        self.step, self.position, self.skipped.count = state.step, state.position, state.skipped
        self.best = state.best
        self.progress.begin_at(self.step)
        self.progress.say(f"resumed at step {self.step}")
        if state.samples_per_step != self.samples_per_step:
            self.progress.say(
                f"warning: a step has {self.samples_per_step} samples from here on, not {state.samples_per_step} as "
                f"before; --data.batch-size and --optimizer.accumulation times {self.runtime.world} processes make it."
            )
        return True

    def _open_log(self, resumed: bool) -> None:
        self.log = MetricsLog(self.folder, self.config, step=self.step if resumed else None)

    def _train(self) -> None:
        config = self.config
        batches = iter(self.stage.batches(self.position, steps=config.steps - self.step))
        first = self.step
        self.telemetry.begin(first)
        while self.step < config.steps:
            self.patience = FIRST_STEP_PATIENCE if self.step == first else None
            found = self.updates.gradients(batches, self.step)
            broken, signal_number = self._agree(found)
            if broken:
                self._skip(found)
            else:
                self.updates.update(self.step)
            self.step += 1
            self.position += self.samples_per_step
            self.telemetry.step_done()
            validates, saves = self._is_due(config.validate_every), self._is_due(config.checkpoint_every)
            if signal_number or validates or saves or self._is_due(config.log_every):
                self._log({} if broken else found.terms)
            if signal_number:  # at once: whoever asked may not wait for a validation
                self._save(None)
                self._settle()
                raise Interrupted(signal_number, self.step)
            figure, best = self._validate() if validates else (None, False)
            if saves or (best and config.keep_best):
                self._save(figure)
            self.progress.advance()

    def _is_due(self, every: int) -> bool:
        """Whether what happens ``every`` so many steps, and after the last, happens at this one."""
        return self.step == self.config.steps or self.step % every == 0

    def _agree(self, found: Gradients) -> tuple[bool, int]:
        """Of all processes, by one message: whether the step is to be skipped, and the signal to stop on, or 0.

        Raises:
            RunError: what another process, or this one, cannot go on for.
        """
        with self.updates.observer.phase("communication"):
            trouble = self._failure() is not None
            asked = torch.tensor([float(self.request.signal_number or 0), float(trouble)])
            flags = torch.cat([found.broken.reshape(1), asked.to(self.runtime.device, non_blocking=True)])
            broken, signal_number, trouble_somewhere = self.runtime.maximum(flags).tolist()
        if trouble_somewhere:
            self._raise_failure()
        return bool(broken), int(signal_number)

    def _failure(self) -> RunError | None:
        return self.trouble or self.checkpoints.failure

    def _raise_failure(self) -> None:
        raise_first(self.runtime.gather(self._failure()))

    def _skip(self, found: Gradients) -> None:
        """Leave the networks as they are, and say why; past the limit, end the run."""
        self.updates.discard()
        record = self.skipped.add(self.step + 1, found.terms, found.batches)
        self.progress.say(record.sentence)
        self._write(record.figures, step=self.step + 1)
        self.skipped.check()

    def _log(self, terms: dict[str, Tensor]) -> None:
        figures: dict[str, float] = {}
        if terms:
            means = self.runtime.mean(torch.stack([value.float() for value in terms.values()])).tolist()
            figures = dict(zip(terms, means, strict=True))
            self.progress.show(figures)
        speed = self.telemetry.read(self.samples_per_step)
        for warning in self.telemetry.warnings(speed):
            self.progress.say(f"warning: {warning}")
        rate = self.updates.learning_rate(self.step - 1)
        skipped = {"skipped_steps": self.skipped.count} if self.skipped.count else {}
        self._write({**figures, "learning_rate": rate, **skipped, **speed})

    def _write(self, figures: dict[str, Any], *, step: int | None = None) -> None:
        """A line of the log."""
        if self.log is not None:
            with self._for_later():
                self.log.write(self.step if step is None else step, figures)

    def _sync(self) -> None:
        if self.log is not None:
            with self._for_later():
                self.log.sync()

    @contextlib.contextmanager
    def _for_later(self) -> Iterator[None]:
        """That the log cannot be written is known to all processes at the next agreement."""
        try:
            yield
        except RunError as error:
            self.trouble = self.trouble or error

    def _validate(self) -> tuple[float | None, bool]:
        """Validate; the figure by which checkpoints are compared, and whether it is the best so far."""
        self._at("validation")
        with self.updates.averaged(), torch.no_grad():
            figures = self.stage.validate(self.step, self.folder, self.updates.autocast)
        self._write({f"validation/{name}": value for name, value in figures.items()})
        shown = {name: value for name, value in figures.items() if isinstance(value, float)}
        self.progress.say(
            f"step {self.step}: validation " + "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        )
        figure = float(figures[self.stage.best.metric])
        if not math.isfinite(figure):
            return None, False
        best = self.best is None or (figure > self.best if self.stage.best.higher else figure < self.best)
        self.best = figure if best else self.best
        return figure, best

    def _at(self, place: str) -> None:
        self.watch.at(place, step=self.step, patience=max(PATIENCE, self.config.parallel.timeout))

    def _save(self, figure: float | None) -> None:
        self._at("checkpoint")
        self._sync()
        state = RunState(
            step=self.step,
            position=self.position,
            skipped=self.skipped.count,
            samples_per_step=self.samples_per_step,
            best=self.best,
        )
        self.checkpoints.save(state, figure)

    def _settle(self) -> None:
        """Wait until the last checkpoint is published, and end the run if anything could not be written."""
        self._at("checkpoint")
        self.checkpoints.wait()
        self._raise_failure()

    def _validated_steps(self) -> set[int]:
        return {validation["step"] for validation in self._validations()}

    def _validations(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.log is not None:
            for record in self.log.records():
                figures = {k.removeprefix("validation/"): v for k, v in record.items() if k.startswith("validation/")}
                if figures:
                    found.append({"step": record["step"], **figures})
        return self.runtime.gather(found)[0]

    def _export(self) -> None:
        self._at("export")
        with self.updates.averaged():
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights: dict[str, Any] = get_model_state_dict(self._network(), options=options)

            def export() -> None:
                with writing(self.folder):
                    self.stage.export(weights, self.folder)

            # While the average is in place: on the CPU these are the network's own tensors.
            self.runtime.on_main(export)


class _Told(Observer):
    """Telemetry and the watch, told of a step's parts."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def _at(self, name: str, of: str) -> None:
        training = self.training
        training.watch.at(f"{name} of {of}" if of else name, step=training.step + 1, patience=training.patience)

    def phase(self, name: Phase, of: str = "") -> AbstractContextManager[object]:
        self._at(name, of)
        return self.training.telemetry.phase(name)

    def backward(self, loss: Tensor, of: str) -> None:
        self._at("backward", of)
        self.training.telemetry.backward(loss)

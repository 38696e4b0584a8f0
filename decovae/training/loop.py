"""The training loop: it owns precision, accumulation, clipping, schedules, averages, logging and checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from decovae.errors import RunError
from decovae.runtime import Runtime
from decovae.training.checkpoints import Checkpoints
from decovae.training.config import RunConfig
from decovae.training.ema import ExponentialMovingAverage
from decovae.training.interruption import Interrupted, StopRequest, stop_requests
from decovae.training.parallel import synchronize_gradients
from decovae.training.progress import Progress
from decovae.training.run_folder import MetricsLog
from decovae.training.schedule import learning_rate_factor, seed_step
from decovae.training.stage import Stage


def train(stage: Stage, config: RunConfig, runtime: Runtime, folder: Path) -> list[dict[str, Any]]:
    """Train from the newest checkpoint in ``folder``, or from the start, to the last step; then export.

    Returns:
        The validations of the whole run in order, each with its ``step``; on every process.

    Raises:
        Interrupted: after SIGINT or SIGTERM, once a checkpoint is written.
        RunError: if a loss stops being finite.
        InputError: if the newest checkpoint cannot be read.
    """
    with stop_requests(announce=runtime.main) as request:
        return Training(stage, config, runtime, folder, request).run()


class Training:
    """The state of one run while it trains."""

    def __init__(self, stage: Stage, config: RunConfig, runtime: Runtime, folder: Path, request: StopRequest) -> None:
        self.stage, self.config, self.runtime, self.folder, self.request = stage, config, runtime, folder, request
        settings = config.optimizer
        self.optimizers = {
            name: AdamW(
                network.parameters(),
                lr=stage.learning_rates[name],
                weight_decay=settings.weight_decay,
                eps=settings.eps,
                fused=runtime.device.type == "cuda",
            )
            for name, network in stage.networks.items()
        }
        self.exported = next(iter(stage.networks))
        self.averages: dict[str, ExponentialMovingAverage] = {}
        if settings.ema_decay > 0:
            network = stage.networks[self.exported]
            self.averages[self.exported] = ExponentialMovingAverage(network, settings.ema_decay)
        self.checkpoints = Checkpoints(
            folder / "checkpoints",
            runtime,
            modules=stage.networks,
            optimizers=self.optimizers,
            averages=self.averages,
            keep=config.keep_checkpoints,
        )
        bf16 = config.precision == "bf16" or (config.precision == "auto" and runtime.device.type == "cuda")
        self.autocast = torch.autocast(runtime.device.type, torch.bfloat16, enabled=bf16)
        self.step, self.position = 0, 0

    def run(self) -> list[dict[str, Any]]:
        config, runtime = self.config, self.runtime
        entry = runtime.on_main(self.checkpoints.newest)
        if entry is not None:
            self.step, self.position = self.checkpoints.load(entry)
        self.log = MetricsLog(self.folder, step=self.step if entry else None) if runtime.main else None
        with Progress(config.steps, self.step, visible=runtime.main) as self.progress:
            try:
                if entry is not None:
                    self.progress.say(f"resumed at step {self.step}")
                # Before the first step, and where a stop came between a step and its validation.
                if self._is_due(config.validate_every) and self.step not in self._validated_steps():
                    self._validate()
                if self.step < config.steps:
                    self._train()
                self._export()
                return self._validations()
            finally:
                if self.log is not None:
                    self.log.close()

    def _train(self) -> None:
        config = self.config
        batches = iter(self.stage.batches(self.position, steps=config.steps - self.step))
        a_step_s_samples = config.data.batch_size * self.runtime.world * config.optimizer.accumulation
        since, counted = time.perf_counter(), 0
        while self.step < config.steps:
            terms = self.one_step(batches)
            self.step += 1
            self.position += a_step_s_samples
            counted += 1
            stops = self.runtime.any(bool(self.request))
            validates, saves = self._is_due(config.validate_every), self._is_due(config.checkpoint_every)
            pauses = stops or validates or saves or self._is_due(config.log_every)
            if pauses:
                seconds = (time.perf_counter() - since) / counted
                self._log(terms, seconds, a_step_s_samples / seconds)
            if stops:  # at once: whoever asked may not wait for a validation
                self.checkpoints.save(self.step, self.position)
                raise Interrupted(self._stop_signal(), self.step)
            if validates:
                self._validate()
            if saves:
                self.checkpoints.save(self.step, self.position)
            if pauses:
                since, counted = time.perf_counter(), 0
            self.progress.advance()

    def _is_due(self, every: int) -> bool:
        """Whether what happens ``every`` so many steps, and after the last, happens at this one."""
        return self.step == self.config.steps or self.step % every == 0

    def one_step(self, batches: Any) -> dict[str, Tensor]:
        """One update of every network; the terms of the losses, averaged over the accumulated batches."""
        config, settings = self.config, self.config.optimizer
        seed_step(config.seed, self.step, self.runtime.rank)
        sums: dict[str, Tensor] = {}
        trained: dict[str, nn.Module] = {}
        for accumulated in range(settings.accumulation):
            batch = next(batches)
            losses = self.stage.losses(batch, self.step)
            while True:
                with self.autocast:
                    name, loss = next(losses, (None, None))
                if name is None or loss is None:
                    break
                trained[name] = network = self.stage.networks[name]
                synchronize_gradients(network, accumulated == settings.accumulation - 1)
                (loss.total / settings.accumulation).backward()
                for term, value in loss.terms.items():
                    sums[term] = sums.get(term, torch.zeros_like(value)) + value / settings.accumulation
        factor = learning_rate_factor(
            self.step, steps=config.steps, warmup=settings.warmup_steps, schedule=settings.schedule
        )
        for name, network in trained.items():
            optimizer = self.optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = factor * self.stage.learning_rates[name]
            limit = settings.clip_norm if settings.clip_norm > 0 else math.inf
            norm = nn.utils.clip_grad_norm_(network.parameters(), limit)
            sums[f"gradient_norm_{name}"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.exported in self.averages:
            self.averages[self.exported].update(self.step)
        return sums

    def _log(self, terms: dict[str, Tensor], seconds: float, samples_per_second: float) -> None:
        means = self.runtime.mean(torch.stack([value.float() for value in terms.values()])).tolist()
        values = dict(zip(terms, means, strict=True))
        if broken := [name for name, value in values.items() if not math.isfinite(value)]:
            raise RunError(
                f"Step {self.step}: {', '.join(broken)} is not finite; the last good checkpoint is kept. Lower "
                "--optimizer.learning-rate or the weight of the term that grows."
            )
        self.progress.show(values)
        if self.log is not None:
            rate = self.optimizers[self.exported].param_groups[0]["lr"]
            speed = {"seconds_per_step": round(seconds, 4), "samples_per_second": round(samples_per_second, 3)}
            self.log.write(self.step, {**values, "learning_rate": rate, **speed, **self._memory()})

    def _memory(self) -> dict[str, float]:
        if self.runtime.device.type != "cuda":
            return {}
        return {"peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3)}

    def _validate(self) -> None:
        with contextlib.ExitStack() as stack:
            for average in self.averages.values():
                stack.enter_context(average.in_place())
            stack.enter_context(torch.no_grad())
            figures = self.stage.validate(self.step, self.folder, self.autocast)
        if self.log is not None:
            self.log.write(self.step, {f"validation/{name}": value for name, value in figures.items()})
        shown = {name: value for name, value in figures.items() if isinstance(value, float)}
        self.progress.say(
            f"step {self.step}: validation " + "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        )

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
        with contextlib.ExitStack() as stack:
            for average in self.averages.values():
                stack.enter_context(average.in_place())
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights: dict[str, Any] = get_model_state_dict(self.stage.networks[self.exported], options=options)
            # While the average is in place: on the CPU these are the network's own tensors.
            self.runtime.on_main(lambda: self.stage.export(weights, self.folder))

    def _stop_signal(self) -> int:
        numbers = [number for number in self.runtime.gather(self.request.signal_number) if number is not None]
        return int(numbers[0])

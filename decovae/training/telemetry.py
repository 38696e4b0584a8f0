"""What a run tells about its speed: where the time of a step goes, and what the hardware makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from decovae.runtime import Runtime
from decovae.training.advice import advice
from decovae.training.arithmetic import joins_at, peak_flops_per_second, step_flops
from decovae.training.clock import PHASES, Phase, StepClock
from decovae.training.config import RunConfig
from decovae.training.interruption import Interrupted
from decovae.training.parallel import uses_bf16
from decovae.training.sensors import Sensors
from decovae.training.trace import Trace

MEAN = ("seconds_per_step", *(f"seconds_{name}" for name in PHASES), "utilization", "gpu_percent", "gpu_power_w")
LARGEST = ("gpu_temperature_c", "peak_memory_gb", "reserved_gb")
SUM = ("joules_per_step",)
FOR_ADVICE = ("memory_share", "allocator_retries", "slowed")
"""Figures by what is logged of them: over processes, the mean, the largest, the sum, or nothing."""

FIGURES = (*MEAN, *LARGEST, *SUM, *FOR_ADVICE)

OF_SPEED = frozenset({"samples_per_second", *MEAN, *LARGEST, *SUM})
"""Keys of a log's lines that tell of speed: two runs that are equal in all else may differ in these."""


class Telemetry:
    """Times the phases of training steps, reads the sensors, and traces steps; every process of a run has one.

    As a context manager it ends what it began. What the machine does not have is absent from the figures.

    Args:
        config: the run's.
        runtime: the run's processes.
        folder: the run's.
        say: prints a line.
        network: the one that is exported.
    """

    def __init__(
        self, config: RunConfig, runtime: Runtime, folder: Path, *, say: Callable[[str], None], network: nn.Module
    ) -> None:
        self.config, self.runtime, self.say, self.network = config, runtime, say, network
        self._clock = StepClock(runtime.device)
        self._sensors = Sensors(runtime.device)
        self._trace: Trace | None = None
        if config.telemetry.profile_at is not None:
            self._trace = Trace(
                folder,
                runtime.device,
                runtime.rank,
                first=max(config.telemetry.profile_at, 1),
                steps=config.telemetry.profile_steps,
                seconds=self._clock.totals,
                say=say,
            )
        self._step = self._counted = self._readings = 0
        self._operations = 0.0
        self._peak: float | None = None
        self._of_a_step: tuple[int, int] = (0, 0)
        self._everywhere: dict[str, list[float]] = {}
        self._said: set[str] = set()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the device may never be done with what it was given, and a trace waits for it.
        if self._trace is not None and (error is None or isinstance(error, Interrupted)):
            self._trace.end()
        self._sensors.close()

    def begin(self, step: int) -> None:
        """Training goes on from here, after so many steps; every process calls this."""
        self._step = step
        wanted = self.config.telemetry.utilization
        if wanted == "on" or (wanted == "auto" and self.runtime.device.type == "cuda"):
            self._know_the_peak()
        if self._trace is not None:
            self._trace.after(step)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count what happens within it as ``name``, microseconds; what is entered within it counts for itself."""
        if not self._clock.running:
            self._sensors.begin()
        if self._trace is None:
            with self._clock.phase(name):
                yield
        else:
            with self._clock.phase(name), self._trace.part(name):
                yield

    def backward(self, loss: Tensor) -> None:
        """Run a loss's backward pass; where it waits for other processes at its end is "communication"."""
        waits = self.runtime.world > 1
        if self._trace is None:
            self._clock.backward(loss, waits=waits)
        else:
            with self._trace.part("backward"):
                self._clock.backward(loss, waits=waits)

    def step_done(self) -> None:
        """A step is over."""
        self._operations += self._of_a_step[self._step >= joins_at(self.config)]
        self._step += 1
        self._counted += 1
        self._clock.step_done()
        if self._trace is not None:
            with self._clock.paused():
                self._trace.after(self._step)

    def read(self, samples_per_step: int) -> dict[str, float]:
        """Figures of the steps since the last reading, over all processes; every process calls this.

        What happens between this and the next phase, such as a validation, is in no figure.
        """
        seconds = self._clock.read()
        steps, self._counted = max(self._counted, 1), 0
        operations, self._operations = self._operations, 0.0
        self._readings += 1
        mine = {"seconds_per_step": sum(seconds.values()) / steps}
        mine |= {f"seconds_{name}": seconds[name] / steps for name in PHASES}
        readings = self._sensors.read()
        if "joules" in readings:
            mine["joules_per_step"] = readings.pop("joules") / steps
        mine |= readings | {"slowed": float(self._sensors.slowed())} | self._memory()
        if self._peak is not None and mine["seconds_per_step"] > 0:
            mine["utilization"] = operations / sum(seconds.values()) / self._peak
        self._everywhere = self._gather(mine)
        figures = {name: math.fsum(of) / len(of) for name in MEAN if (of := self._known(name))}
        figures |= {name: max(of) for name in LARGEST if (of := self._known(name))}
        figures |= {name: math.fsum(of) for name in SUM if (of := self._known(name))}
        if figures["seconds_per_step"] > 0:
            figures["samples_per_second"] = samples_per_step / figures["seconds_per_step"]
        return {name: float(f"{value:.5g}") for name, value in figures.items()}

    def warnings(self, figures: Mapping[str, float]) -> list[str]:
        """What the last reading tells a person to look at, each thing once a run.

        The first reading warns of nothing: compilers and loaders were starting.

        Args:
            figures: that reading.
        """
        if self._readings < 2:
            return []
        found = {
            about: line for about, line in advice(figures, self._everywhere, self.config) if about not in self._said
        }
        self._said |= found.keys()
        return list(found.values())

    def _known(self, name: str) -> list[float]:
        return [value for value in self._everywhere[name] if not math.isnan(value)]

    def _gather(self, mine: Mapping[str, float]) -> dict[str, list[float]]:
        """Of each figure every process's value, NaN where it has none, by one message."""
        table = torch.zeros(self.runtime.world, len(FIGURES), dtype=torch.float64)
        table[self.runtime.rank] = torch.tensor([mine.get(name, math.nan) for name in FIGURES], dtype=torch.float64)
        if self.runtime.group is not None:
            dist.all_reduce(table, group=self.runtime.group)
        return dict(zip(FIGURES, table.T.tolist(), strict=True))

    def _memory(self) -> dict[str, float]:
        if self.runtime.device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info()
        peak = torch.cuda.max_memory_allocated()
        elsewhere = total - free - torch.cuda.memory_reserved()  # the context, and other programs
        return {
            "peak_memory_gb": peak / 1e9,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
            "memory_share": (elsewhere + peak) / total,
            "allocator_retries": float(torch.cuda.memory_stats().get("num_alloc_retries", 0)),
        }

    def _know_the_peak(self) -> None:
        """Count the operations of a step, measure what the device could do, and say both."""
        config, runtime = self.config, self.runtime

        def count() -> tuple[int, int] | str:
            try:
                late = step_flops(config, self.network, step=max(joins_at(config), self._step))
                early = step_flops(config, self.network, step=self._step) if self._step < joins_at(config) else late
            except Exception as error:  # no figure is worth a run
                return f"{type(error).__name__}: {error}"
            return early, late

        counted = runtime.on_main(count)
        if isinstance(counted, str):
            self.say(f"warning: the arithmetic of a step cannot be counted ({counted}); utilization is left out.")
            return
        self._of_a_step = counted
        self._peak = peak_flops_per_second(runtime.device, bf16=uses_bf16(config, runtime))
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.say(
            f"a step computes {counted[1] / 1e12:.3g} TFLOP in each process; matrix products here reach "
            f"{self._peak / 1e12:.3g} TFLOP/s, the 100 % of utilization"
        )

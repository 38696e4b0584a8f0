"""What training costs beside its networks: the loop's own time a step, and checkpoints.

python -m bench.loop_overhead [--out FILE]

The loop trains a single weight, so that nearly all of a step is the loop's: agreement of the processes, telemetry, the
watch, the log with TensorBoard. With a line of the log every 10 steps, as by default, and with hardly any; alone, and
as two processes over gloo. Beside it stands such a step without the loop, and the loop without telemetry. A figure is
the median over groups of 10 steps, after the first `WARM`.

A checkpoint is that of the paper's autoencoder with its discriminators and AdamW's moments. Training stands still while
it is copied, into memory that the first one sets up; it is written while training goes on. Takes a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bench import units
from bench.ranks import among
from bench.scaling import SUBJECTS, step_time
from decovae.files import write_text
from decovae.losses.objective import Loss, VAEObjective
from decovae.losses.perceptual import NONE
from decovae.machine import describe
from decovae.runtime import Runtime
from decovae.training import loop
from decovae.training.checkpoints import Best, Checkpoints, RunState
from decovae.training.config import RunConfig
from decovae.training.parallel import prepare_module
from decovae.training.presets import PAPER
from decovae.training.stage import Batch
from decovae.training.step import Step
from decovae.training.vae import VAENetworks

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
NAME = "loop-cpu.json"

STEPS, WARM, LINE = 600, 100, 10
"""Steps of a run, those before anything counts, and those between two lines of the log."""

CHECKPOINT_EVERY = 1_000
"""Steps between two checkpoints, over which their cost is spread."""

RARELY = 10**9


class NoWork:
    """A stage of one weight, whose loss is that weight; it notes when the loop asks for a batch."""

    best = Best("nothing", higher=True)

    def __init__(self, config: RunConfig, runtime: Runtime) -> None:
        torch.manual_seed(config.seed)
        network = nn.Linear(1, 1, bias=False)
        prepare_module(network, runtime, config)
        self.networks: dict[str, nn.Module] = {"nothing": network}
        self.learning_rates = {"nothing": config.optimizer.learning_rate}
        self.inputs: dict[str, str] = {}
        self.size = config.data.batch_size
        self.asked: list[float] = []

    def begin(self, folder: Path) -> None:
        """Nothing has to be there."""

    def batches(self, position: int, *, steps: int) -> Iterator[Batch]:
        """Ones."""
        image = torch.ones(self.size, 1)
        subjects = ["nobody"] * self.size
        for first in itertools.count(position, self.size):
            self.asked.append(time.perf_counter())
            positions = torch.arange(first, first + self.size)
            yield {"image": image, "subject": subjects, "position": positions}

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Loss]]:
        """The weight."""
        total = self.networks["nothing"](batch["image"]).mean()
        yield "nothing", Loss(total, {"nothing": total.detach()})

    def validate(self, step: int, folder: Path, autocast: AbstractContextManager[Any]) -> dict[str, Any]:
        """Always the same."""
        return {"nothing": 0.0}

    def summary(self, validations: list[dict[str, Any]]) -> dict[str, Any]:
        """Nothing."""
        return {}

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Nobody wants it."""


class Silent:
    """Stands in for telemetry, and does not measure."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def phase(self, *_: Any) -> AbstractContextManager[None]:
        """Nothing begins."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backward alone."""
        loss.backward()

    def read(self, *_: Any) -> dict[str, float]:
        """No figures."""
        return {}

    def warnings(self, *_: Any) -> list[str]:
        """No warnings."""
        return []

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def seconds_a_step(runtime: Runtime, folder: Path, log_every: int, telemetry: bool) -> float:
    """Of the loop, with a stage that does nothing."""
    config = RunConfig(
        out=folder / f"run-{log_every}-{telemetry}",
        steps=STEPS,
        log_every=log_every,
        validate_every=RARELY,
        checkpoint_every=RARELY,
        precision="fp32",
        compile="off",
        device="cpu",
    )
    runtime.on_main(lambda: config.folder.mkdir(parents=True))
    stage = NoWork(config, runtime)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not telemetry:
            stack.enter_context(mock.patch.object(loop, "Telemetry", Silent))
        loop.train(stage, config, runtime, config.folder)
    return _a_step(stage.asked)


def _a_step(asked: Sequence[float]) -> float:
    """Seconds between two requests for a batch: the median of means over `LINE` steps."""
    marks = asked[WARM::LINE]
    return statistics.median(after - before for before, after in itertools.pairwise(marks)) / LINE


def seconds_without_loop(runtime: Runtime) -> float:
    """Of the step alone: forward, backward, the gradient's norm and AdamW of one weight."""
    config = RunConfig(steps=STEPS, precision="fp32", compile="off", device="cpu")
    stage = NoWork(config, runtime)
    step, batches = Step(stage, config, runtime), stage.batches(0, steps=STEPS)
    for number in range(STEPS):
        step.gradients(batches, number)
        step.update(number)
    return _a_step(stage.asked)


def loop_seconds(runtime: Runtime, folder: Path) -> dict[str, float]:
    """A line of the result."""
    return {
        "loop": seconds_a_step(runtime, folder, LINE, telemetry=True),
        "loop_without_lines": seconds_a_step(runtime, folder, RARELY, telemetry=True),
        "loop_without_telemetry": seconds_a_step(runtime, folder, LINE, telemetry=False),
        "step_without_loop": seconds_without_loop(runtime),
    }


def checkpoint_seconds(runtime: Runtime, folder: Path) -> dict[str, Any]:
    """Checkpoints of the paper's run: the first, and the median of those after it."""
    config = replace(PAPER, precision="fp32", compile="off", device="cpu", memory="none")
    networks = VAENetworks(config, runtime, VAEObjective(replace(config.loss, perceptual_network=NONE)))
    step = Step(networks, config, runtime)
    for optimizer in step.optimizers.values():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    checkpoints = Checkpoints(
        folder,
        runtime,
        modules=networks.networks,
        optimizers=step.optimizers,
        averages=step.averages,
        keep=2,
        keep_best=1,
        best=Best("psnr", higher=True),
    )
    blocking, writing = [], []
    for number in range(1, 5):
        state = RunState(step=number, position=number, skipped=0, samples_per_step=1, best=None)
        begun = time.perf_counter()
        checkpoints.save(state, None)
        copied = time.perf_counter()
        checkpoints.wait()
        blocking.append(copied - begun)
        writing.append(time.perf_counter() - copied)
    newest = max(folder.glob("step-*"))
    checkpoints.close()
    return {
        "parameters": sum(p.numel() for network in networks.networks.values() for p in network.parameters()),
        "bytes": sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()),
        "blocking_first": blocking[0],
        "blocking": statistics.median(blocking[1:]),
        "background": statistics.median(writing[1:]),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Two tables: the loop, and a checkpoint."""
    names = {
        "loop": "the loop, a line of the log every 10 steps",
        "loop_without_lines": "the loop, hardly any lines",
        "loop_without_telemetry": "the loop without telemetry, a line every 10 steps",
        "step_without_loop": "the step without the loop",
    }
    worlds = list(result["loop"])
    lines = [["a step of one weight", *(f"{world} process{'es' * (world != '1')}" for world in worlds)]]
    lines.append(["---", *["---:"] * len(worlds)])
    lines += [[title, *(units.seconds(result["loop"][w][key]) for w in worlds)] for key, title in names.items()]
    found = result["checkpoint"]
    rows = [
        ["a checkpoint of the paper's autoencoder", units.size(found["bytes"])],
        ["---", "---:"],
        ["training stands still", units.seconds(found["blocking"])],
        ["the same, for the first", units.seconds(found["blocking_first"])],
        ["written meanwhile", units.seconds(found["background"])],
        *(
            [f"of a step's time, one in {CHECKPOINT_EVERY:,} steps of {units.seconds(step)} ({name})", f"{share:.2%}"]
            for name, (step, share) in found["share"].items()
        ),
    ]
    return "\n\n".join("\n".join(f"| {' | '.join(line)} |" for line in table) for table in (lines, rows))


def shares(blocking: float) -> dict[str, tuple[float, float]]:
    """Of a step that is as fast as a card could be, what checkpoints add: the step's seconds, and their share."""
    from bench.campaign.predict import CARDS

    found = {}
    for card in CARDS:
        least = step_time(SUBJECTS[0], card).least
        found[f"{card.name} at its published rate"] = (least, blocking / CHECKPOINT_EVERY / least)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / NAME)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        times = {str(world): among(world, loop_seconds, Path(folder) / str(world)) for world in (1, 2)}
        checkpoint = among(1, checkpoint_seconds, Path(folder) / "checkpoints")
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": describe(),
        "steps": STEPS - WARM,
        "loop": times,
        "checkpoint": {**checkpoint, "share": shares(checkpoint["blocking"])},
    }
    write_text(arguments.out, json.dumps(result, indent=1) + "\n")
    print(markdown(result))


if __name__ == "__main__":
    main()

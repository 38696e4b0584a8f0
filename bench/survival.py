"""Whether a run that is killed at any moment comes out as if nothing had happened.

python -m bench.survival [--trials 50] [--processes 1 2] [--seed 0] [--out bench/results/survival-cpu.json]

One undisturbed run of train/vae.py for each number of processes is the reference. In each trial the same run is
started, all its processes are killed with SIGKILL at a moment that is drawn, or that is aimed into the write of a
checkpoint, and it is started again until it ends: sometimes it is killed twice. Then its weights, its pictures, every
figure of its log but speeds, and its summary are compared with the reference's, bit by bit. Writes what every trial
was, when it was killed and in what; exits with 1 where one differs. Half a minute a trial on two CPU cores.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.processes import ROOT, environment, free_port
from decovae.files import load_safetensors
from decovae.machine import describe
from decovae.training.telemetry import OF_SPEED

NAME = "survival-cpu.json"

STEPS, VALIDATE_EVERY, CHECKPOINT_EVERY = 8, 4, 2

OPTIONS = (
    "quickstart --data.grid 32 36 32 --data.patch 24 24 24 --data.cohort-size 5 --data.cohort-shape 32 36 32 "
    "--model.channels 4 8 --model.groups 2 --loss.slice-fraction 0.05 --loss.adversarial-warmup 0 --device cpu "
    "--optimizer.ema-decay 0.9 --data.workers 1 --log-every 1 "
    f"--steps {STEPS} --validate-every {VALIDATE_EVERY} --checkpoint-every {CHECKPOINT_EVERY}"
).split()
"""A run of seconds with every part of a long one."""

AIMS = {"moment": 3, "line": 4, "write": 3}
"""What a kill is aimed at, and how often: a moment between start and end, one after a line of the log, a checkpoint
that is being written."""

LONGEST = 900.0
"""Seconds after which a run has failed."""

POLL = 0.001


@dataclass(frozen=True)
class Kill:
    """One SIGKILL to all processes of a run.

    Attributes:
        aim: as in `AIMS`.
        seconds: after the start.
        inside: what the run was at, as its folder tells.
        step: the last one in its log.
    """

    aim: str
    seconds: float
    inside: str
    step: int


@dataclass(frozen=True)
class Trial:
    """A run that was killed, and how it came out.

    Attributes:
        processes: it ran in.
        kills: in order.
        difference: the first one from the reference, or None.
    """

    processes: int
    kills: tuple[Kill, ...]
    difference: str | None


class Run:
    """A run's processes, one group of the system: they are killed at once.

    Args:
        folder: the run's.
        processes: to start; they find each other as torchrun's do, but nobody looks after them.
        log: file that their output is appended to.
    """

    def __init__(self, folder: Path, processes: int, log: Path) -> None:
        self.since = time.monotonic()
        self.processes: list[subprocess.Popen[bytes]] = []
        port = free_port()
        with log.open("ab") as output:
            for rank in range(processes):
                group = self.processes[0].pid if self.processes else 0
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "train/vae.py", *OPTIONS, "--out", str(folder)],
                        cwd=ROOT,
                        env={**environment(), "OMP_NUM_THREADS": "1", **place_of(rank, processes, port)},
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        preexec_fn=partial(os.setpgid, 0, group),
                    )
                )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since

    @property
    def ended(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def wait(self) -> list[int]:
        """The processes' exit codes, once all have ended.

        Raises:
            subprocess.TimeoutExpired: they take too long.
        """
        return [process.wait(max(1.0, LONGEST - self.seconds)) for process in self.processes]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.processes[0].pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def finish(folder: Path, processes: int, log: Path) -> float:
    """Run to the end; the seconds that it took.

    Raises:
        RuntimeError: it failed.
    """
    with Run(folder, processes, log) as run:
        codes = run.wait()
        if any(codes):
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-20:]
            raise RuntimeError(f"{folder}: ended with exit codes {codes}:\n" + "\n".join(said))
        return run.seconds


def kill_once(folder: Path, processes: int, log: Path, *, aim: str, seconds: float, draw: random.Random) -> Kill | None:
    """Start the run, and kill it as ``aim`` says; None if it ended before.

    Args:
        seconds: that an undisturbed run takes.
    """
    moment = draw.uniform(0.02, 0.95) * seconds
    line, later = draw.randint(0, STEPS + 1), draw.uniform(0, 0.1) * seconds
    write, into = draw.randint(1, STEPS // CHECKPOINT_EVERY), draw.choice((0.0, 0.002, 0.01, 0.03))
    reached: Callable[[], bool]
    if aim == "moment":
        reached, delay = (lambda: run.seconds > moment), 0.0
    elif aim == "line":
        before = _lines(folder)
        reached, delay = (lambda: _lines(folder) > min(before + line, 2 * STEPS)), later
    else:
        writes = _writes(folder)
        reached, delay = (lambda: next(writes) >= write), into
    with Run(folder, processes, log) as run:
        while not reached():
            if run.ended:
                return None
            time.sleep(POLL)
        time.sleep(delay)
        at = run.seconds
        if run.ended:
            return None
    return Kill(aim, round(at, 3), inside(folder), last_step(folder))


def inside(folder: Path) -> str:
    """What a run was at when it was killed, as its folder tells."""
    records = _records(folder)
    if list((folder / "checkpoints").glob("*.partial")):
        return "checkpoint write"
    if (folder / "summary.json").exists():
        return "end"
    if any("autoencoder.safetensors" in path.name for path in _entries(folder)):
        return "export"
    if not records:
        return "start"
    step = last_step(folder)
    validated = any(record["step"] == step and "validation/psnr" in record for record in records)
    return "validation" if step % VALIDATE_EVERY == 0 and not validated else "training"


def trial(folder: Path, processes: int, reference: Path, *, seconds: float, draw: random.Random) -> Trial:
    """Kill a run once or twice, let it end, and compare it with the reference."""
    kills: list[Kill] = []
    log = folder.with_suffix(".log")
    for _ in range(draw.choice((1, 1, 2))):
        (aim,) = draw.choices([*AIMS], [*AIMS.values()])
        kill = kill_once(folder, processes, log, aim=aim, seconds=seconds, draw=draw)
        if kill is not None:
            kills.append(kill)
    try:
        finish(folder, processes, log)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return Trial(processes, tuple(kills), str(error))
    return Trial(processes, tuple(kills), difference(reference, folder))


def trials(
    out: Path, *, count: int, processes: Sequence[int], seed: int, say: Callable[[str], None]
) -> Iterator[Trial]:
    """Trials in which a run was killed at least once, taking turns between numbers of processes.

    Args:
        out: folder for the runs; those that came out equal are removed.
        count: of the trials.
        processes: of the runs.
        seed: of what is drawn.
        say: is told what goes on.
    """
    references: dict[int, tuple[Path, float]] = {}
    for world in dict.fromkeys(processes):
        folder = out / f"reference-{world}"
        references[world] = folder, finish(folder, world, folder.with_suffix(".log"))
        say(f"reference, {world} processes: {references[world][1]:.1f} s")
    number = done = 0
    while done < count:
        world = processes[done % len(processes)]
        reference, seconds = references[world]
        folder = out / f"trial-{number:03d}"
        result = trial(folder, world, reference, seconds=seconds, draw=random.Random(f"{seed}:{number}"))
        number += 1
        if result.kills or result.difference is not None:
            done += 1
            told = ", then ".join(f"{kill.inside} after step {kill.step}" for kill in result.kills)
            say(f"{done} of {count}, {world} processes, killed in {told}: {result.difference or 'equal'}")
            yield result
        if result.difference is None:
            _remove(folder)


def difference(reference: Path, folder: Path) -> str | None:
    """The first difference between two finished runs, in words, or None."""
    advice = "it should be a run's export"
    expected, _ = load_safetensors(reference / "autoencoder.safetensors", advice=advice)
    found, _ = load_safetensors(folder / "autoencoder.safetensors", advice=advice)
    if expected.keys() != found.keys():
        return f"weights are named {sorted(found.keys() ^ expected.keys())[:3]}"
    for name, weight in expected.items():
        if weight.dtype != found[name].dtype or not torch.equal(_bits(weight), _bits(found[name])):
            return f"weight {name}"
    records = [_timeless(_records(path)) for path in (reference, folder)]
    for before, after in zip(*records, strict=False):
        if before != after:
            names = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
            return f"step {before['step']} of the log, {', '.join(sorted(names)[:3])}"
    if len(records[0]) != len(records[1]):
        return f"{len(records[1])} lines in the log, not {len(records[0])}"
    if (reference / "summary.json").read_bytes() != (folder / "summary.json").read_bytes():
        return "summary.json"
    pictures = [{path.name: path.read_bytes() for path in (run / "previews").iterdir()} for run in (reference, folder)]
    if pictures[0] != pictures[1]:
        return "pictures"
    kept = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (reference, folder)]
    return None if kept[0] == kept[1] else f"checkpoints {kept[1]}, not {kept[0]}"


def _bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous().reshape(-1).view(torch.uint8)


def _timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in OF_SPEED} for record in records]


def _records(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of a run's log."""
    with contextlib.suppress(FileNotFoundError):
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    return []


def _lines(folder: Path) -> int:
    return len(_records(folder))


def last_step(folder: Path) -> int:
    """The last step in a run's log; 0 where there is none."""
    return max((record["step"] for record in _records(folder)), default=0)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _writes(folder: Path) -> Iterator[int]:
    """How many checkpoints have been seen while they were written, each time it is asked for."""
    seen: set[str] = set()
    while True:
        seen |= {path.name for path in (folder / "checkpoints").glob("*.partial")}
        yield len(seen)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".log").unlink(missing_ok=True)


def place_of(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would tell a process of its place among others on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; the same draws differ in their moments")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / NAME)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="survival-") as folder:
        found = []
        for result in trials(
            Path(folder), count=options.trials, processes=options.processes, seed=options.seed, say=_say
        ):
            found.append(result)
            _write(options.out, found)
    equal = sum(result.difference is None for result in found)
    print(f"{equal} of {len(found)} runs came out as if nothing had happened: {options.out}")
    return 0 if equal == len(found) else 1


def _say(line: str) -> None:
    print(line, flush=True)


def _write(path: Path, found: Sequence[Trial]) -> None:
    insides = collections.Counter(kill.inside for result in found for kill in result.kills)
    content = {
        "date": datetime.date.today().isoformat(),
        "machine": describe(),
        "options": OPTIONS,
        "trials": len(found),
        "equal": sum(result.difference is None for result in found),
        "kills": dict(sorted(insides.items())),
        "each": [asdict(result) for result in found],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

"""Where the time of a training step goes: `train/vae.py quickstart` under torch.profiler, eager and compiled.

python -m bench.step_profile [--device cpu|cuda] [--out FILE]

Each mode is a run of its own, with two subjects of the template cohort and the discriminators from the first step on;
on a GPU it is the paper's preset. Telemetry's split is of steps that were not traced; operators are of a trace of other
steps, by their own time: what an operator calls counts as that one's.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.cold_start import MODES, SCRIPT, options_of
from bench.processes import ROOT, environment
from decovae.files import write_text
from decovae.machine import describe
from decovae.training.clock import PHASES

STEPS, FIRST, TRACED = 16, 9, 4
"""Steps of a run, the first that is traced, and how many are; the last four are neither."""

KINDS = {
    "clipping, AdamW, averages": r"^optimizer",
    "convolutions, backward": r"conv\w*_backward",
    "convolutions, forward": r"conv",
    "compiled regions": r"[Cc]ompiled|inductor",
    "this project's operators": r"^decovae",
    "norms": r"norm",
    "copies and layouts": r"copy|contiguous|clone|::to$|::cat$|pad",
    "Python between operators": rf"^({'|'.join(PHASES)})$",
}
"""What an operator counts as: the first kind whose pattern is in its name; anything else is OTHERS."""

OTHERS = "element-wise and other operators"

TOP = 15
"""Operators that are listed by name."""


def kind_of(name: str) -> str:
    """The kind of an operator of that name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), OTHERS)


def own_seconds(events: Iterable[Mapping[str, Any]]) -> tuple[Counter[str], Counter[str]]:
    """Seconds and calls of each operator and range of a trace, without what others inside it took.

    What happens inside the phase "optimizer" is named so: "optimizer: aten::lerp".

    Args:
        events: of a chrome trace, those with a duration, in microseconds.
    """
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    open_: dict[Any, list[tuple[float, str]]] = {}
    spans = [event for event in events if event.get("ph") == "X" and event.get("cat") in ("cpu_op", "user_annotation")]
    # What begins first is outside, and of what begins at once, what lasts longest.
    for event in sorted(spans, key=lambda event: (event["ts"], -event["dur"])):
        name, start, duration = event["name"], event["ts"], event["dur"]
        stack = open_.setdefault(event["tid"], [])
        while stack and stack[-1][0] <= start:
            stack.pop()
        if stack:
            outer = stack[-1][1]
            seconds[outer] -= duration / 1e6
            if outer.startswith("optimizer"):
                name = f"optimizer: {name}"
        seconds[name] += duration / 1e6
        calls[name] += 1
        stack.append((start + duration, name))
    return seconds, calls


def summarise(trace: Path, steps: int) -> dict[str, Any]:
    """Seconds a step of each kind and of the operators that take most, from a run's trace."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        seconds, calls = own_seconds(json.load(file)["traceEvents"])
    kinds: Counter[str] = Counter()
    for name, taken in seconds.items():
        kinds[kind_of(name)] += taken
    return {
        "kinds": {kind: taken / steps for kind, taken in kinds.most_common()},
        "operators": [
            {"name": name, "seconds": taken / steps, "calls": calls[name] / steps}
            for name, taken in seconds.most_common(TOP)
        ],
    }


def measure(mode: str, device: str, folder: Path) -> dict[str, Any]:
    """One run: the split of its steps, and what a trace of some says.

    Raises:
        RuntimeError: if the run fails, with its last lines.
    """
    out = folder / mode
    command = [
        *(sys.executable, str(SCRIPT), *options_of(device), "--compile", MODES[mode], "--out", str(out)),
        *f"--steps {STEPS} --log-every 4 --validate-every 1000 --checkpoint-every 1000".split(),
        *f"--telemetry.profile-at {FIRST} --telemetry.profile-steps {TRACED} --telemetry.utilization on".split(),
    ]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [record for record in records if "seconds_per_step" in record][-1]
    found = {
        "seconds_per_step": last["seconds_per_step"],
        "split": {name: last[f"seconds_{name}"] for name in PHASES},
        "utilization": last.get("utilization"),
        **summarise(out / "profile" / "rank0.json.gz", TRACED),
    }
    shutil.rmtree(out)
    return found


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The splits side by side, in Markdown: shares of a step, and below them shares of the traced time."""
    lines = [f"| | {' | '.join(found)} |", "|---|" + "---:|" * len(found)]
    lines.append("| a step | " + " | ".join(f"{mode['seconds_per_step']:.3f} s" for mode in found.values()) + " |")
    for name in PHASES:
        shares = [f"{mode['split'][name] / mode['seconds_per_step']:.1%}" for mode in found.values()]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    for kind in [*KINDS, OTHERS]:
        shares = [f"{mode['kinds'].get(kind, 0.0) / sum(mode['kinds'].values()):.1%}" for mode in found.values()]
        lines.append(f"| {kind} | {' | '.join(shares)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    out = given.out or ROOT / "bench" / "results" / f"step-profile-{given.device}.json"
    with tempfile.TemporaryDirectory() as folder:
        found = {mode: measure(mode, given.device, Path(folder)) for mode in MODES}
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": describe(),
        "options": options_of(given.device),
        "steps": {"traced": TRACED, "timed": STEPS - FIRST - TRACED + 1},
        "modes": found,
    }
    write_text(out, json.dumps(result, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()

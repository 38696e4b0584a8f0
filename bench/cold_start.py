"""What the first training step costs: `train/vae.py` with empty compile caches and with full ones, eager and compiled.

python -m bench.cold_start [--device cpu|cuda] [--minutes N] [--out FILE]

Each start is a process of its own, with Triton's, Inductor's and CUDA's caches in a fresh folder: once empty, then as
the first left them. On a GPU it trains the paper's preset (MAISI's autoencoder on 96³ patches), on a CPU the quick
start, both on two subjects of the template cohort, which are made before. Files have been read before too: what is cold
are the compilers' caches, not the disk. Prints seconds, and writes them with the machine if asked to.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.processes import ROOT, end, environment
from decovae.errors import InputError
from decovae.machine import describe

SCRIPT = ROOT / "train" / "vae.py"

IMPORTS = "import decovae.training.main, decovae.training.loop, decovae.training.vae"
"""What a run imports before it does anything."""

STEPS = 8
LATER = 4
"""The last of these steps count as later ones: after the first, cuDNN may still be choosing its algorithms."""

MODES = {"eager": "off", "compiled": "on"}
"""What ``--compile`` is in each mode."""

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "PYTORCH_KERNEL_CACHE_PATH")
"""Variables that name the folders in which compilers keep what they made."""


@dataclass(frozen=True)
class Start:
    """Seconds of one process.

    Attributes:
        until_first_step: from its start to the end of its first step: imports, data, networks, the validation before
            the first step, and that.
        first_step: the first step alone, its batch included.
        later_step: the median of later ones.
    """

    until_first_step: float
    first_step: float
    later_step: float


def options_of(device: str) -> list[str]:
    """The run: the paper's on a GPU, else the quick start, with its discriminators from the first step on."""
    return [
        "paper" if device == "cuda" else "quickstart",
        *f"--device {device} --data.cohort-size 2 --data.validation-fraction 0.5".split(),
        *"--loss.perceptual-network random --loss.adversarial-warmup 0".split(),
    ]


def measure(deadline: float, device: str = "auto", before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Cold and warm starts in every mode, as far as the deadline lets them.

    Args:
        deadline: seconds since the epoch; a start that runs then is stopped and left out, and says so.
        device: cuda, cpu, or auto for a GPU where there is one.
        before: what an earlier call returned: only modes of which a start is missing there are measured, both starts
            of them, as a warm one needs the caches of a cold one; a start that is not measured now stays.

    Returns:
        {"device", "options", "imports": seconds, "starts": {"eager": {"cold": …, "warm": …}, "compiled": …}, each as
        `Start`, "left_out": {"compiled, cold": reason}}.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options = options_of(device)
    before = before or {"imports": None, "starts": {}, "left_out": {}}
    known: dict[str, dict[str, dict[str, float]]] = before["starts"]
    missing = [mode for mode in MODES if len(known.get(mode, {})) < 2]
    if device == "cuda":
        missing.reverse()  # what is the default on the device comes first, lest time runs out
    starts = {mode: dict(known[mode]) for mode in MODES if mode in known}
    left_out: dict[str, str] = {}
    imports: float | None = before["imports"]
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        # The template cohort, and files in the system's memory.
        made = _start([*options, "--compile", "off"], where, "unused", deadline) if missing else None
        if isinstance(made, Start) and imports is None:
            imports = _imports(where)
        for mode in missing:
            for state in ("cold", "warm"):
                found = made
                if isinstance(made, Start):
                    found = _start([*options, "--compile", MODES[mode]], where, mode, deadline)
                if isinstance(found, Start):
                    starts.setdefault(mode, {})[state] = asdict(found)
                elif state not in starts.get(mode, {}):
                    left_out[f"{mode}, {state}"] = str(found)
    return {
        "device": device,
        "options": " ".join(options),
        "imports": imports,
        "starts": starts,
        "left_out": left_out,
    }


def _imports(where: Path) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, env=_environment(where, "unused"), check=True)
    return round(time.perf_counter() - begin, 2)


def _start(options: Sequence[str], where: Path, caches: str, deadline: float) -> Start | str:
    """Start a run and stop it after its last step; or a sentence on why it did not get there."""
    out = where / "run"
    shutil.rmtree(out, ignore_errors=True)
    # More steps than are waited for: after the last there is a validation.
    often = f"--steps {STEPS + 1000} --log-every 1 --validate-every 100000 --checkpoint-every 100000".split()
    command = [sys.executable, str(SCRIPT), *options, *often, "--out", str(out)]
    begin = time.time()
    if begin >= deadline:
        return "no time was left for it"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(where, caches), stdout=log, stderr=log, start_new_session=True
        )
        first: float | None = None
        steps: list[float] = []
        try:
            while len(steps) < STEPS:
                steps = _steps(out / "metrics.jsonl")
                if steps and first is None:
                    first = time.time() - begin
                if process.poll() is not None and len(_steps(out / "metrics.jsonl")) < STEPS:
                    log.seek(0)
                    last = [line for line in log.read().splitlines() if line.strip()][-1:]
                    return f"it ended with {process.returncode}{''.join(f': {line.strip()}' for line in last)}"
                if time.time() >= deadline:
                    return f"it took longer than the {time.time() - begin:.0f} s that were left"
                time.sleep(0.05)
        finally:
            end(process, politely=False)
    assert first is not None  # there are steps
    return Start(round(first, 2), steps[0], round(statistics.median(steps[STEPS - LATER : STEPS]), 4))


def _steps(metrics: Path) -> list[float]:
    """Seconds of the steps that a run has logged; a last line may be there in part."""
    if not metrics.exists():
        return []
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]
    records = [json.loads(line) for line in lines]
    return [record["seconds_per_step"] for record in records if "seconds_per_step" in record]


def _environment(where: Path, caches: str) -> dict[str, str]:
    """The caller's, with caches in a folder and importable from the checkout."""
    folders = {}
    for name in CACHES:
        folder = where / "caches" / caches / name.lower()
        folder.mkdir(parents=True, exist_ok=True)
        folders[name] = str(folder)
    return {**environment(), **folders, "DECOVAE_CACHE": str(where / "data")}


def markdown(result: dict[str, Any]) -> str:
    """A table with a row a start, and what is not in it."""
    from bench.campaign import table

    left_out = [f"{name} caches: not measured: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join([table.cold_start({"": result}), *left_out])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--minutes", type=float, default=20.0, help="how long all starts may take")
    parser.add_argument("--out", type=Path, help="a JSON file for the seconds and the machine")
    options = parser.parse_args(arguments)
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no CUDA device; use --device cpu or install a driver.")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = measure(time.time() + 60 * options.minutes, options.device)
    print(markdown(result))
    if options.out:
        record = {"date": datetime.date.today().isoformat(), "machine": describe(), **result}
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

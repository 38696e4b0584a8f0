"""What a campaign checks of the kernels: a tour of all of them, and the tests that a GPU is for."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.campaign.rows import Row, append, one_line, read_lines, read_rows, trim
from bench.processes import ROOT, end, environment

EXPRESSION = "gpu or device"
"""What ``pytest -m`` selects on a GPU: tests that need one, and tests that compute on one where there is one."""

FEW = (
    "tests/kernels/test_group_norm.py::test_same_input_same_bits",
    "tests/losses/test_latent_head.py",
)
"""Tests that stand for all of them on a CPU, where a campaign only tests itself."""

_LISTED = 100
"""Failures to name at most."""

_GRACE = 30
"""Seconds that a process has to end once it is interrupted."""


def run_tour(out: Path, deadline: float) -> dict[str, Any]:
    """Every kernel once against float64, with canaries; without a GPU as few cases as launch every kernel.

    Args:
        out: folder for ``tour.log``, what `bench.tour` prints.
        deadline: seconds since the epoch; it is stopped then, and the cases that had ended count.

    Returns:
        {"passed", "failed", "cases": how many there are, "kernels": names of those launched, "seconds", "complete":
        whether all were run, "failures": [{"test", "message"}]}, or {"available": False, "reason"} without Triton.
    """
    begin = time.time()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tour.json"
        command = [sys.executable, "-m", "bench.tour", "--canaries", "--out", str(file)]
        code, said = _run([*command, *([] if torch.cuda.is_available() else ["--quick"])], out / "tour.log", deadline)
        if code == 2:
            return {"available": False, "reason": said.removeprefix("error: ")}
        seen = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"cases": [], "kernels": []}
    wrong = [case for case in seen["cases"] if case["share"] is None or not case["share"] <= 1]
    failures = [{"test": case["name"], "message": one_line(case["error"] or "wrong result")} for case in wrong]
    complete = code in (0, 1) and len(seen["cases"]) == seen.get("chosen")
    if not complete and code is not None and not failures:
        failures.append({"test": "bench.tour", "message": f"it ended with {code}: {said}"})
    return {
        "passed": len(seen["cases"]) - len(wrong),
        "failed": len(failures),
        "cases": seen.get("chosen"),
        "kernels": seen["kernels"],
        "seconds": round(time.time() - begin, 1),
        "complete": complete,
        "failures": failures,
    }


def run_tests(out: Path, deadline: float, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the tests until the deadline, or what is left of them.

    Args:
        out: folder for ``tests.log``, what pytest prints, and ``tests.jsonl``, what became of each test.
        deadline: seconds since the epoch; tests are interrupted then, and those that had ended count.
        before: what an earlier call returned: tests that have ended are not repeated, but for those that failed once
            all have been run.

    Returns:
        {"expression", "passed", "failed", "skipped", "errors": of pytest as a whole, "seconds" of all calls,
        "complete": whether all were run, "failures": [{"test", "message"}]}; messages name no folders.
    """
    selection = ["tests", *_workers()] if torch.cuda.is_available() else FEW
    return run_pytest(selection, EXPRESSION, out, deadline, before)


def run_pytest(
    selection: Sequence[str], expression: str, out: Path, deadline: float, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The tests of a selection that match the expression, in a process of its own; otherwise as `run_tests`."""
    begin = time.time()
    out.mkdir(parents=True, exist_ok=True)
    rows = out / "tests.jsonl"
    if before is None:
        rows.unlink(missing_ok=True)
    trim(rows)
    repeat = before is not None and before["complete"]
    done = [row.id for row in read_rows(rows) if not (repeat and row.outcome == "failed")]
    with tempfile.TemporaryDirectory() as folder:
        without = Path(folder) / "done.txt"
        without.write_text("".join(f"{test}\n" for test in done), encoding="utf-8")
        plugin = ["-p", "bench.rows_plugin", f"--rows-out={rows}", f"--without={without}"]
        command = [sys.executable, "-m", "pytest", "-m", expression, *plugin, *selection]
        code, said = _run(command, out / "tests.log", deadline)
    trim(rows)
    if code is None:
        _take_back(rows)
    ended = read_rows(rows)
    failed = [row for row in ended if row.outcome == "failed"]
    failures = [{"test": row.id, "message": row.reason or "failed"} for row in failed[:_LISTED]]
    # 0: all passed; 1: some failed; 5: nothing was left to run. Anything else is a run that did not end by itself.
    broken = code not in (None, 0, 1, 5) or (code == 1 and not failed) or (code == 5 and not done)
    if broken:
        failures.append({"test": "pytest", "message": f"it ended with {code}: {said}"})
    return {
        "expression": expression,
        "passed": len([row for row in ended if row.outcome in ("ran", "measured")]),
        "failed": len(failed),
        "skipped": len([row for row in ended if row.outcome == "skipped"]),
        "errors": int(broken),
        "failures": failures,
        "seconds": round((before or {}).get("seconds", 0.0) + time.time() - begin, 1),
        "complete": code is not None and not broken,
    }


def _take_back(rows: Path) -> None:
    """Tests that ran when time was up did not fail."""
    last = {row.id: row for row in read_lines(rows)}
    for row in last.values():
        if row.outcome == "started":
            append(rows, Row(row.id, "stopped", finished=time.time()))


def _workers() -> list[str]:
    """As many as share a GPU with profit: tests mostly wait for compilers. Tests are dealt out one by one, since of a
    whole file pytest-xdist would begin the test again and again that ends its worker."""
    cores = os.cpu_count() or 1
    return ["-n", str(max(1, min(cores - 1, 6))), "--dist", "load"]


def _run(command: Sequence[str], log: Path, deadline: float) -> tuple[int | None, str]:
    """Exit code, None if it was ended at the deadline, and the last line that a command printed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        in_time = _waited(process, deadline)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return process.returncode if in_time else None, one_line(lines[-1]) if lines else "it said nothing"


def _waited(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Whether the process ended before the deadline; if not, it is interrupted, at last killed with its children."""
    try:
        process.wait(max(deadline - time.time(), 0.1))
        return True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        return False
    finally:
        end(process, politely=False)

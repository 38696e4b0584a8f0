"""The tests that a GPU is for, run as a part of a campaign: the kernels' and whatever needs CUDA."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parents[2]

EXPRESSION = "gpu or device"
"""What ``pytest -m`` selects on a GPU: tests that need one, and tests that compute on one where there is one."""

FEW = (
    "tests/kernels/test_group_norm.py::test_same_input_same_bits",
    "tests/losses/test_latent_head.py",
)
"""Tests that stand for all of them on a CPU, where a campaign only tests itself."""

_LISTED = 100
"""Failures to name at most."""

_LETTERS = 400
"""Of a failure's message."""

_GRACE = 30
"""Seconds that pytest has to write its report once it is interrupted."""


def run_tests(out: Path, deadline: float) -> dict[str, Any]:
    """Run them until the deadline.

    Args:
        out: the campaign's folder; what pytest prints goes to ``tests.log`` in it.
        deadline: seconds since the epoch; tests are interrupted then, and those that had ended count.

    Returns:
        {"expression", "passed", "failed", "skipped", "errors", "seconds", "complete": whether all were run,
        "failures": [{"test", "message"}]}; messages name no folders.
    """
    if torch.cuda.is_available():
        return run_pytest(["tests", *_workers()], EXPRESSION, out, deadline)
    return run_pytest(FEW, EXPRESSION, out, deadline)


def run_pytest(selection: Sequence[str], expression: str, out: Path, deadline: float) -> dict[str, Any]:
    """The tests of a selection that match the expression, in a process of its own; returns as `run_tests` does."""
    begin = time.time()
    out.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", expression, f"--junit-xml={report}", *selection]
        with (out / "tests.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": paths},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            in_time = _waited(process, deadline)
        found = read_report(report) if report.exists() else _nothing()
    # 0: all passed; 1: some failed. Anything else, and what no report tells of, is a run that did not end by itself.
    complete = in_time and process.returncode in (0, 1)
    return {"expression": expression, **found, "seconds": round(time.time() - begin, 1), "complete": complete}


def read_report(report: Path) -> dict[str, Any]:
    """Counts and failures from pytest's JUnit report; a test that fails and whose teardown fails is named twice."""
    found = _nothing()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        wrong = [child for child in case if child.tag in ("failure", "error")]
        found["failed"] += any(child.tag == "failure" for child in wrong)
        found["errors"] += any(child.tag == "error" for child in wrong)
        found["skipped"] += case.find("skipped") is not None
        found["passed"] += not wrong and case.find("skipped") is None
        for child in wrong:
            if len(found["failures"]) < _LISTED:
                found["failures"].append({"test": _name(case), "message": _message(child.get("message") or "")})
    return found


def _nothing() -> dict[str, Any]:
    return {"passed": 0, "failed": 0, "skipped": 0, "errors": 0, "failures": []}


def _name(case: ElementTree.Element) -> str:
    """The test's name as pytest takes it."""
    module = (case.get("classname") or "").replace(".", "/")
    return f"{module}.py::{case.get('name')}" if module else str(case.get("name"))


def _message(text: str) -> str:
    """On one line, without folders and addresses."""
    text = re.sub(r"(?:/[^\s/:'\"]+)+/", "", text)
    text = re.sub(r"0x[0-9a-f]{7,}", "…", " ".join(text.split()))
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1]}…"


def _workers() -> list[str]:
    """As many as share a GPU with profit: tests mostly wait for compilers. Tests are dealt out one by one, since of a
    whole file pytest-xdist would begin the test again and again that ends its worker."""
    cores = os.cpu_count() or 1
    return ["-n", str(max(1, min(cores - 1, 6))), "--dist", "load"]


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
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

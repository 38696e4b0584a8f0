"""Every Triton kernel under NVIDIA's compute-sanitizer: `bench.tour` once for each of its tools.

python -m bench.sanitize [--tools memcheck racecheck initcheck synccheck] [--minutes N] [--out FILE]

memcheck finds accesses out of bounds or misaligned, racecheck races in shared memory, initcheck reads of global memory
that nobody wrote, synccheck barriers that not all threads reach. The tool comes with the CUDA toolkit, or by
``pip install nvidia-cuda-sanitizer-api``. It slows kernels down a hundredfold, so this takes minutes. Prints a line a
tool; exits with 1 if one found an error in a kernel of this project or did not get through, with 0 if the tool or a
GPU is missing, which it says.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.processes import ROOT, end, environment
from decovae.errors import InputError

TOUR = [sys.executable, "-m", "bench.tour"]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PROGRAM = "compute-sanitizer"

_PRINTED = 2000
"""Reports to print at most; the summary counts them all."""

# "========= ERROR SUMMARY: 1 error", "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)"; another
# line that begins alike says how many errors were not printed.
_SUMMARY = re.compile(r"^=+ ERROR SUMMARY: (\d+) errors?$", re.MULTILINE)
_RACES = re.compile(r"^=+ RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)$", re.MULTILINE)
# "========= Invalid __global__ read of size 4 bytes", "=========     at _add_kernel+0x70 in group_norm_triton.py:41";
# older versions write "at 0x70 in …:41:_add_kernel". Races name both of their accesses after the words alone.
_REPORT = re.compile(r"^=+ (\S.*)\n=+ +(?:at|and) (.*)$", re.MULTILINE)
_NO_REPORTS = ("Saved host backtrace", "Host Frame", "Device Frame", "ERROR SUMMARY", "RACECHECK SUMMARY")


def find_program() -> Path | None:
    """The tool: on PATH, in the CUDA toolkit, or in this Python's packages."""
    found = shutil.which(PROGRAM)
    if found:
        return Path(found)
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    candidates = [toolkit / "bin" / PROGRAM, toolkit / PROGRAM / PROGRAM]
    candidates += sorted(packages.glob(f"*/bin/{PROGRAM}")) + sorted(packages.glob(f"*/{PROGRAM}/{PROGRAM}"))
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def missing() -> str | None:
    """Why there is nothing to check with, in a sentence; None if all is there."""
    if not torch.cuda.is_available():
        return "no CUDA device: kernels run in Triton's interpreter here, which compute-sanitizer cannot see."
    if find_program() is None:
        return "no compute-sanitizer: install the CUDA toolkit, or pip install nvidia-cuda-sanitizer-api."
    return None


def run(deadline: float, tools: Sequence[str] = TOOLS, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Check with each tool until the deadline.

    Args:
        deadline: seconds since the epoch; a tool that runs then is stopped, the ones after it are not begun.
        tools: their names.
        before: what an earlier call returned: tools that got through then are not run again.

    Returns:
        {"available": False, "reason": …}, or {"available": True, "version": …, "tools": {name: what it found},
        "not_reached": names} with, for each tool, ``errors`` in this project's kernels, ``elsewhere`` in others',
        ``warnings`` (racecheck's), ``kernels`` that were seen, ``seconds``, ``complete``, and ``reports``, the first
        lines of what was found.
    """
    reason = missing()
    program = find_program()
    earlier: dict[str, Any] = dict(before) if before is not None and before["available"] else {}
    if reason is not None or program is None:
        return earlier or {"available": False, "reason": reason}
    version, options = _about(program)
    known: dict[str, Any] = earlier.get("tools", {})
    todo = [tool for tool in tools if not known.get(tool, {}).get("complete")]
    found = dict(known)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tour.json"
        # Compiled before, so that the tools need not watch a compiler.
        status, output = _run([*TOUR, "--out", str(out)], deadline) if todo else (0, "")
        if status is None:
            todo = []
        elif todo and not out.exists():
            return earlier or {
                "available": False,
                "reason": f"bench.tour does not get through by itself: {_end(status, output)}.",
            }
        kernels = json.loads(out.read_text(encoding="utf-8"))["kernels"] if todo else []
        for tool in todo:
            if time.time() < deadline:
                found[tool] = _check(program, options, tool, kernels, deadline, out)
    ordered = {tool: found[tool] for tool in TOOLS if tool in found}
    return {
        "available": True,
        "version": version,
        "tools": ordered,
        "not_reached": [tool for tool in tools if tool not in found],
    }


def command(program: Path, options: str, tool: str, kernels: Sequence[str], out: Path) -> list[str]:
    """The command line of one tool.

    Args:
        program: compute-sanitizer.
        options: its help, by which its version is told: options were renamed and added over the years.
        tool: its name.
        kernels: names of the kernels to check.
        out: where the tour writes what it saw.
    """
    words = [str(program), "--tool", tool, "--target-processes", "application-only", "--print-limit", str(_PRINTED)]
    # initcheck has to see who writes memory, which are torch's kernels too; only newer ones do so past a filter.
    if tool != "initcheck" or "--initcheck-track-filtered-global-memory" in options:
        name = "--kernel-name" if "--kernel-name " in options else "--kernel-regex"
        for kernel in kernels:
            words += [name, f"kns={kernel}"]
    if tool == "memcheck":
        # Torch probes the driver with calls that fail; and allocations side by side would hide what leaves one.
        words += ["--report-api-errors", "no", "--padding", "512"]
    return [*words, *TOUR, "--out", str(out)]


def parse(tool: str, output: str, kernels: Sequence[str]) -> dict[str, Any] | None:
    """What a tool's output says; None if it has no summary, so that the tool did not get through.

    Args:
        tool: its name.
        output: all that it printed.
        kernels: names of this project's kernels: errors in others count as ``elsewhere``.
    """
    pattern = _RACES if tool == "racecheck" else _SUMMARY
    summaries = pattern.findall(output)
    if not summaries:
        return None
    total, warnings = (int(summaries[-1][0]), int(summaries[-1][1])) if tool == "racecheck" else (int(summaries[-1]), 0)
    reports: Counter[str] = Counter()
    elsewhere = 0
    for what, where in _REPORT.findall(output):
        if any(what.strip().startswith(word) for word in _NO_REPORTS):
            continue
        if any(re.search(rf"\b{re.escape(kernel)}", f"{what} {where}") for kernel in kernels):
            reports[_without_addresses(f"{what.strip()}, {where.strip()}")] += 1
        else:
            elsewhere += not what.lower().startswith("warning")
    elsewhere = min(elsewhere, total)
    return {
        "errors": total - elsewhere,
        "elsewhere": elsewhere,
        "warnings": warnings,
        "reports": [f"{count} × {text}" for text, count in reports.most_common(20)],
    }


def _without_addresses(text: str) -> str:
    """Without what differs between threads and runs, and without folders."""
    text = re.sub(r"0x[0-9a-f]{7,}", "…", text)
    return re.sub(r"(?:/[^\s/:]+)+/", "", text)


def _about(program: Path) -> tuple[str, str]:
    """Its version, and its help."""
    version, options = (
        subprocess.run([program, word], capture_output=True, text=True, check=False).stdout
        for word in ("--version", "--help")
    )
    match = re.search(r"Version (\S+)", version)
    return (match[1] if match else version.strip().splitlines()[-1] if version.strip() else "unknown"), options


def _check(
    program: Path, options: str, tool: str, kernels: Sequence[str], deadline: float, out: Path
) -> dict[str, Any]:
    out.unlink(missing_ok=True)
    begin = time.time()
    status, output = _run(command(program, options, tool, kernels, out), deadline)
    found = parse(tool, output, kernels)
    seen = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"kernels": [], "ended": False}
    complete = status is not None and found is not None and seen["ended"]
    if found is None:
        found = {"errors": None, "elsewhere": None, "warnings": None, "reports": [_end(status, output)]}
    return {**found, "kernels": seen["kernels"], "seconds": round(time.time() - begin, 1), "complete": complete}


def _end(status: int | None, output: str) -> str:
    """How a command ended that did not do what it should."""
    if status is None:
        return "it was out of time"
    lines = [line.strip("= ") for line in output.splitlines() if line.strip("= ")]
    telling = [line for line in lines if "error" in line.lower()] or lines
    return f"it ended with {status}" + "".join(f": {_without_addresses(line)}" for line in telling[-1:])


def _run(words: Sequence[str], deadline: float) -> tuple[int | None, str]:
    """Exit status, None if it was stopped at the deadline, and all output of a command and its children."""
    # Without torch's caching of allocations, each tensor is an allocation of its own, whose ends the tool knows.
    variables = {**environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            list(words), cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        status: int | None = None
        try:
            status = process.wait(max(deadline - time.time(), 0.1))
        except subprocess.TimeoutExpired:
            pass
        finally:
            end(process, politely=False)
        output.seek(0)
        return status, output.read()


def lines(result: dict[str, Any]) -> list[str]:
    """The result for people to read."""
    if not result["available"]:
        return [f"not checked: {result['reason']}"]
    found = [f"compute-sanitizer {result['version']}"]
    for name, tool in result["tools"].items():
        errors = "no summary" if tool["errors"] is None else f"{tool['errors']} errors"
        more = "".join(f", {tool[key]} {word}" for key, word in (("warnings", "warnings"), ("elsewhere", "elsewhere")))
        found.append(
            f"{name}: {errors}{more if tool['errors'] is not None else ''}; {len(tool['kernels'])} kernels, "
            f"{tool['seconds']:.0f} s{'' if tool['complete'] else ', not complete'}"
        )
        found += [f"    {report}" for report in tool["reports"]]
    return found + [f"{name}: not reached" for name in result["not_reached"]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print, and write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), help=", ".join(TOOLS))
    parser.add_argument("--minutes", type=float, default=60.0, help="how long all of them may take")
    parser.add_argument("--out", type=Path, help="a JSON file for what was found")
    options = parser.parse_args(arguments)
    try:
        if unknown := [tool for tool in options.tools if tool not in TOOLS]:
            raise InputError(f"--tools {' '.join(unknown)}: no such tool; choose from {', '.join(TOOLS)}.")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = run(time.time() + 60 * options.minutes, options.tools)
    print("\n".join(lines(result)))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not result["available"]:
        return 0
    clean = all(tool["complete"] and not tool["errors"] for tool in result["tools"].values())
    return 0 if clean and not result["not_reached"] else 1


if __name__ == "__main__":
    sys.exit(main())

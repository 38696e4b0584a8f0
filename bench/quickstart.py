"""What decorrelation does to the quickstart's latents: one run for each of none, sid and vad, from one seed.

python -m bench.quickstart [--out FILE] [--runs FOLDER] [-- OPTION …]

Options after ``--`` go to every run; the runs are kept in ``--runs``, if given. Writes the last validation, the time
and the peak memory of each run with the machine they were measured on, and prints them as a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from decovae.machine import describe

ROOT = Path(__file__).resolve().parents[1]
LOSSES = ("none", "sid", "vad")


def run(deco: str, folder: Path, options: list[str]) -> dict[str, Any]:
    """Train in a process of its own; its summary with seconds and peak memory."""
    command = [sys.executable, "train/vae.py", "quickstart", "--deco", deco, "--out", str(folder), *options]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(os.waitstatus_to_exitcode(status))
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {
        **summary,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "quickstart-cpu.json")
    parser.add_argument("--runs", type=Path, help="folder to keep the runs in")
    parser.add_argument("options", nargs="*", help="options of train/vae.py, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(deco, (arguments.runs or Path(folder)) / deco, arguments.options) for deco in LOSSES]
    result = {"date": datetime.date.today().isoformat(), "machine": describe(), "runs": runs}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("| deco | PSNR before → after | mean abs. Pearson | effective rank | time | peak memory |")
    print("|---|---|---|---|---|---|")
    for row in runs:
        print(
            f"| {row['deco']} | {row['psnr_before_training']:.1f} → {row['psnr']:.1f} dB | {row['pearson']:.3f} "
            f"| {row['effective_rank']:.2f} | {row['seconds']:.0f} s | {row['peak_memory_gb']:.1f} GB |"
        )


if __name__ == "__main__":
    main()

"""Does Table 1 hold over seeds? python -m bench.seeds [--runs FOLDER] [--seeds 42 43 44] [--out FILE]

The autoencoders of `decovae study quickstart`, trained from several seeds on the same data. Figures are those that a
run ends with, of the held-out subjects. What is trained already is not trained again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path

import torch

from decovae.machine import describe
from decovae.report.study import DECOS, PLANS, StudyOptions, cells
from decovae.report.study_run import Record, Runner

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("cosine_similarity", "pearson", "effective_rank", "psnr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench-seeds", help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "seeds-cpu.json")
    arguments = parser.parse_args()
    options = StudyOptions(PLANS["quickstart"], arguments.runs, seeds=tuple(arguments.seeds))
    trainings = [cell for cell in cells(options) if cell.tool == "train/vae.py"]
    cores = torch.get_num_threads()
    record = Record(arguments.runs, {"plan": "quickstart"})
    Runner(arguments.runs, record, jobs=cores, processes=1, threads=1).run(trainings)
    rows = {}
    for deco in DECOS:
        folders = [arguments.runs / f"{deco}-seed{seed}" / "vae" for seed in arguments.seeds]
        summaries = [json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in folders]
        rows[deco] = {name: [summary[name] for summary in summaries] for name in FIGURES}
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": describe(),
        "data": "template cohort",
        "options": list(options.plan.vae),
        "seeds": arguments.seeds,
        "figures": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("| deco | " + " | ".join(FIGURES) + " |")
    print("|---" * (len(FIGURES) + 1) + "|")
    for deco, row in rows.items():
        shown = (f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}" for values in row.values())
        print(f"| {deco} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()

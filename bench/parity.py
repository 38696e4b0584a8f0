"""Whether training with fused blocks is training without them: the loss curves of one seed, plain and fused.

python -m bench.parity [--steps N] [--out FOLDER] [-- OPTION …]

Four runs of train/vae.py that differ in nothing but arithmetic: plain torch in float32, plain torch in bfloat16, and
the fused blocks in bfloat16, balanced and tight. What bfloat16 alone does to the curve is the distance between the
first two; the fused curves should lie as near to the first. Options after ``--`` go to every run, ``--device cuda``
for example. Writes parity-DEVICE.json with the L1 of every step, and parity-DEVICE.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from decovae.machine import describe

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "plain, float32"
VARIANTS = {
    REFERENCE: ("none", "fp32"),
    "plain, bfloat16": ("none", "bf16"),
    "balanced, bfloat16": ("balanced", "bf16"),
    "tight, bfloat16": ("tight", "bf16"),
}


def curve(memory: str, precision: str, steps: int, options: list[str]) -> list[float]:
    """The reconstruction loss of every step of a run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = f"train/vae.py quickstart --steps {steps} --log-every 1 --memory {memory} --precision {precision}"
        command += f" --validate-every {steps} --checkpoint-every {steps} --out {folder}/run"
        subprocess.run([sys.executable, *command.split(), *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "l1" in row]
    return [row["l1"] for row in rows]


def distance(values: list[float], reference: list[float]) -> float:
    """Root mean square of the differences, as a share of the mean of the reference."""
    squares = [(a - b) ** 2 for a, b in zip(values, reference, strict=True)]
    return float(statistics.fmean(squares) ** 0.5 / statistics.fmean(reference))


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The curves, and their differences from the reference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    styles = dict(zip(curves, ("-", "-", "--", ":"), strict=True))
    reference = curves[REFERENCE]
    for name, values in curves.items():
        above.plot(values, styles[name], label=name, linewidth=1)
        below.plot([a - b for a, b in zip(values, reference, strict=True)], styles[name], label=name, linewidth=1)
    above.set(ylabel="L1", yscale="log", title="One seed, quickstart: plain torch and fused blocks")
    below.set(ylabel=f"difference from {REFERENCE}", xlabel="step")
    above.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("options", nargs="*", help="options of train/vae.py, after --")
    arguments = parser.parse_args()
    curves = {
        name: curve(memory, precision, arguments.steps, arguments.options)
        for name, (memory, precision) in VARIANTS.items()
    }
    distances = {name: distance(values, curves[REFERENCE]) for name, values in curves.items()}
    machine: dict[str, Any] = describe()
    device = "gpu" if "gpu" in machine else "cpu"
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "steps": arguments.steps,
        "relative_rms_difference_of_l1": distances,
        "curves": curves,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"parity-{device}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    draw(curves, arguments.out / f"parity-{device}.png")
    print("| run | L1 at the end | RMS difference from plain float32 |\n|---|---:|---:|")
    for name, share in distances.items():
        print(f"| {name} | {curves[name][-1]:.4f} | {share:.2%} |")


if __name__ == "__main__":
    main()

"""Measure which configuration of every kernel is fastest on this card: `python -m bench.tune`.

    python -m bench.tune [--minutes N] [--only KERNEL …] [--out FILE] [--write]
    python -m bench.tune --tiny [--only KERNEL …] [--out FILE]

First comes the upsampling convolution's cost model, `cost` among the kernels, then those that take most of a training
step.
A candidate takes the place of today's configuration only if it computes the same and is faster by more than the noise
(`bench.tune.judge` has the rule). FILE keeps every timing, and the same command goes on from it; with --write what was
chosen becomes the kernels' data for this card's architecture. Without a GPU, or with --tiny, every candidate runs once
in Triton's interpreter against plain torch instead; nothing is chosen then. Exit code 1: a candidate failed there, or
the GPU was lost; 2: a wrong option.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="begin no class after so many")
    parser.add_argument("--only", nargs="+", metavar="KERNEL", help="these alone")
    parser.add_argument("--out", type=Path, help="JSON file of all timings; the same command goes on from it")
    parser.add_argument("--write", action="store_true", help="make what was chosen the kernels' data")
    parser.add_argument("--tiny", action="store_true", help="check the candidates in Triton's interpreter")
    options = parser.parse_args(arguments)
    options.tiny = options.tiny or not torch.cuda.is_available()
    if options.tiny:
        # Triton reads it when it is first imported, which importing the kernels does.
        os.environ["TRITON_INTERPRET"] = "1"
    from bench.tune.command import run
    from decovae.errors import InputError, RunError

    try:
        return run(options)
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Encode the cohort of `tests.generation.cohort` into a folder, slowly: a process that a test kills."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.generation.cohort import NoiseVolumes, encode

if __name__ == "__main__":
    encode(Path(sys.argv[1]), NoiseVolumes(pause=0.05))

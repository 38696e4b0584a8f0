"""What a campaign measures first: its chapters in the order of their importance, as data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SHARES = {"tour": 0.1, "tests": 0.15, "cold_start": 0.12, "sanitizer": 0.2}
"""Of the minutes: the most that a check takes from the rows. What it leaves, rows get."""

PATIENCE = {"gpu": 1.0, "cpu": 4.0, "tiny": 1.0}
"""How often a chapter's limit a row may take at a scale: two cores compile and compute slowly."""


@dataclass(frozen=True)
class Chapter:
    """Rows that run in one process, one after the other.

    Attributes:
        name: for `--only`, and of the log.
        what: it measures, in words.
        patterns: regular expressions found in the rows' ids; rows run in the order of the first one that fits.
        seconds: the most that a row may take, with compiling and counting; then it is ended, and the next one runs.
        first: whether it comes before the tests.
    """

    name: str
    what: str
    patterns: tuple[str, ...]
    seconds: float
    first: bool = False

    def place(self, row: str) -> int | None:
        """Where in the chapter a row belongs: the number of its pattern; None if to another chapter."""
        return next((place for place, pattern in enumerate(self.patterns) if re.search(pattern, row)), None)


# No row of an eager chapter has "compiled" in its name: those are chapters of their own, as each takes minutes.
_EAGER = r"(?!.*compiled)"
# MONAI's norms loop over their groups in Python, which may take a compiler longer than anybody waits.
_PEERS = r"(?!.*monai.*compiled)"

CHAPTERS = (
    Chapter(
        "autoencoder",
        "training step of the autoencoder, eager",
        tuple(rf"test_blocks\.py::test_training_step\[{_EAGER}{name}" for name in ("ours", "plain", "monai", "")),
        240,
        first=True,
    ),
    Chapter(
        "norm-act",
        "GroupNorm and SiLU, bfloat16, forward and backward, eager",
        tuple(
            rf"test_norm_act\[{_EAGER}(?=.*bfloat16)(?=.*forward\+backward){case}"
            for case in ("level0.*channels-last", "level0", "")
        ),
        90,
        first=True,
    ),
    Chapter(
        "losses",
        "VAD at the shapes of training, of whole latents and of the largest latent, eager",
        tuple(rf"test_loss\[{_EAGER}{shape}.*VAD" for shape in ("paper", "whole", "large", "")),
        120,
        first=True,
    ),
    Chapter("decoding", "decoding of a latent, eager", (rf"::test_decoding\[{_EAGER}",), 180),
    Chapter(
        "generation",
        "a volume in 30 steps and decoding, and its sampling, eager",
        (rf"::test_(?:a_)?volume\w*\[{_EAGER}", rf"test_generation\.py::.*\[{_EAGER}", rf"::test_sampling\[{_EAGER}"),
        240,
    ),
    Chapter(
        "whole-step",
        "whole training step, with losses, discriminator and optimizers, eager",
        (rf"test_step\.py::.*\[{_EAGER}",),
        400,
    ),
    Chapter("flow", "training step of the flow, eager", (rf"test_flow\.py::test_training_step\[{_EAGER}",), 400),
    Chapter(
        "compiled",
        "the same, compiled, but for MONAI's: what decides targets first",
        (
            rf"test_norm_act\[{_PEERS}level0.*bfloat16.*channels-last.*forward\+backward.*compiled",
            rf"test_norm_act\[{_PEERS}.*bfloat16.*forward\+backward.*compiled",
            rf"test_loss\[{_PEERS}paper.*VAD-forward\+backward.*compiled",
            rf"test_loss\[{_PEERS}paper.*VAD.*compiled",
            rf"test_loss\[{_PEERS}.*VAD.*compiled",
            r"test_generation\.py::.*\[.*ours.*compiled",
            r"::test_sampling\[.*ours.*compiled",
            r"test_step\.py::.*\[.*ours.*compiled",
            r"test_flow\.py::test_training_step\[.*ours.*compiled",
            r"test_blocks\.py::test_training_step\[.*plain.*compiled",
            rf"test_blocks\.py::test_training_step\[{_PEERS}.*compiled",
            rf"::test_decoding\[{_PEERS}.*compiled",
            rf"test_(?:generation|flow|step)\.py::.*\[{_PEERS}.*compiled",
        ),
        600,
    ),
    Chapter(
        "sweep",
        "batch and patch size up to the memory's limit",
        (rf"test_sweep\.py::{_PEERS}.*-1-", rf"test_sweep\.py::{_PEERS}"),
        240,
    ),
    Chapter(
        "blocks",
        "residual blocks and upsampling",
        (rf"::test_residual_block\[{_PEERS}", rf"::test_upsampling\w*\[{_PEERS}"),
        300,
    ),
    Chapter(
        "monai-compiled",
        "MONAI's, compiled, some of which may take longer than they are given",
        (r"test_blocks\.py::test_training_step\[.*monai.*compiled", r"\[.*monai.*compiled"),
        600,
    ),
    Chapter("rest", "all other rows", (r"",), 600),
)


def sort(rows: Iterable[str], chapters: Sequence[Chapter] = CHAPTERS) -> dict[str, list[str]]:
    """Rows by the name of the first chapter that takes them, each chapter's in the order of its patterns.

    Raises:
        ValueError: no chapter takes a row.
    """
    found: dict[str, list[tuple[int, str]]] = {chapter.name: [] for chapter in chapters}
    for row in rows:
        for chapter in chapters:
            place = chapter.place(row)
            if place is not None:
                found[chapter.name].append((place, row))
                break
        else:
            raise ValueError(f"no chapter for {row}")
    return {name: [row for _, row in sorted(places, key=lambda pair: pair[0])] for name, places in found.items()}

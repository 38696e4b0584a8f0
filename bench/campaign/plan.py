"""What a campaign measures first: its chapters in the order of their importance, as data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CHECKS_SHARE = 0.25
"""Of the minutes: the most that tests on the GPU may take."""

COLD_START_SHARE, SANITIZER_SHARE = 0.12, 0.2
"""Of the minutes: kept for what comes after the rows, and begun earlier if the rows end earlier."""

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
    """

    name: str
    what: str
    patterns: tuple[str, ...]
    seconds: float

    def place(self, row: str) -> int | None:
        """Where in the chapter a row belongs: the number of its pattern; None if to another chapter."""
        return next((place for place, pattern in enumerate(self.patterns) if re.search(pattern, row)), None)


# No row of an eager chapter has "compiled" in its name: those are a chapter of their own, as each takes minutes.
_EAGER = r"(?!.*compiled)"

CHAPTERS = (
    Chapter(
        "autoencoder",
        "training step of the autoencoder, eager",
        tuple(rf"test_blocks\.py::test_training_step\[{_EAGER}{name}" for name in ("ours", "plain", "monai", "")),
        240,
    ),
    Chapter(
        "norm-act",
        "GroupNorm and SiLU, bfloat16, channels-last, forward and backward",
        (rf"test_norm_act\[{_EAGER}(?=.*bfloat16)(?=.*channels-last)(?=.*forward\+backward)",),
        90,
    ),
    Chapter(
        "losses",
        "VAD at the shapes of training, of whole latents and of the largest latent, eager",
        tuple(rf"test_loss\[{_EAGER}{shape}.*VAD" for shape in ("paper", "whole", "large", "")),
        120,
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
        240,
    ),
    Chapter(
        "compiled",
        "the same, compiled",
        (
            r"test_blocks\.py::test_training_step\[.*compiled",
            r"test_norm_act\[.*bfloat16.*channels-last.*forward\+backward.*compiled",
            r"test_loss\[paper.*VAD.*compiled",
            r"::test_decoding\[.*compiled",
            r"::test_(?:a_)?volume\w*\[.*compiled",
            r"test_generation\.py::.*compiled",
            r"::test_sampling\[.*compiled",
            r"test_step\.py::.*compiled",
            r"test_loss\[.*VAD.*compiled",
        ),
        600,
    ),
    Chapter(
        "sweep", "batch and patch size up to the memory's limit", (r"test_sweep\.py::.*-1-", r"test_sweep\.py::"), 240
    ),
    Chapter("flow", "training step of the flow", (r"test_flow\.py::test_training_step\[",), 600),
    Chapter("blocks", "residual blocks and upsampling", (r"::test_residual_block\[", r"::test_upsampling"), 300),
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

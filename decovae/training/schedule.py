"""What a step uses that depends on nothing but its number: the learning rate and the random state.

Neither has a state to save: a checkpoint's step restores both.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch


def learning_rate_factor(
    step: int, *, steps: int, warmup: int, schedule: Literal["cosine", "polynomial"] = "cosine"
) -> float:
    """Linear rise over ``warmup`` steps times a fall from 1 at step 0 to 0 at ``steps``.

    The fall is half a cosine, or the square of the share of steps that are left.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if schedule == "polynomial":
        return rise * (1 - step / steps) ** 2
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set torch's generators for a step: a pure function of the run's seed, the step and the rank.

    Nothing of this package draws from them in a step, for a rank's noise would depend on how many there are: see
    `decovae.data.streams`. It is for what others' code draws, such as a network's dropout: a resumed run repeats that
    on as many processes as before.
    """
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state))

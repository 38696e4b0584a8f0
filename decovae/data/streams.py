"""The independent random streams of a run's seed: a sample's draws are a function of seed, stream and its position.

So they do not depend on which process makes them, in which batch, or how many processes there are.
"""

from __future__ import annotations

import numpy as np

# The numbers are part of what a seed means: never reuse one.
ORDER, CROP, AUGMENTATION, POSTERIOR, SLICES, LATENT, NOISE, TIME, DROPOUT, FOREGROUND = range(10)


def sequence(seed: int, stream: int, number: int) -> np.random.SeedSequence:
    """What a generator for one number (a position, an epoch) of a stream starts from."""
    return np.random.SeedSequence(seed, spawn_key=(stream, number))


def generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """A generator of its own for one number of a stream."""
    return np.random.Generator(np.random.PCG64(sequence(seed, stream, number)))


def stream_seed(seed: int, stream: int) -> int:
    """A seed below 2⁶³ that stands for a whole stream, for what tells positions apart by itself."""
    return int(np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1, np.uint64)[0] >> 1)

"""The latent head's own stream of normal numbers: a pure function of (seed, offset) and of a sample's number.

Counter-based (Philox4x32-10; Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"): the four normals of
channels 4g … 4g+3 of sample s come from key `seed` and counter (s mod 2³², s div 2³², g, offset). So the noise does not
depend on launch configuration, memory layout, device, or how many samples are drawn at once.
"""

from __future__ import annotations

import math

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def philox(counter: list[torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """Four words of 32 random bits for every counter; all words are int64 tensors with values below 2³²."""
    a, b, c, d = counter
    k, m = key
    for _ in range(_ROUNDS):
        # The product wraps at 64 bits, with the right bits; its sign, spread by the shift, is masked off.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = ((second >> 32) & _WORD) ^ b ^ k
        c = ((first >> 32) & _WORD) ^ d ^ m
        b, d = second & _WORD, first & _WORD
        k, m = (k + _KEY_STEPS[0]) & _WORD, (m + _KEY_STEPS[1]) & _WORD
    return [a, b, c, d]


def normals(seed: torch.Tensor, offset: int, first: int, samples: int, channels: int) -> torch.Tensor:
    """Standard normals (channels, samples), float32, of samples first … first + samples − 1.

    `seed` is one int64 on the device to draw on. By Box and Muller from 24 bits a word: |value| stays below 5.9.
    """
    sample = torch.arange(first, first + samples, device=seed.device)
    groups = torch.arange(-(-channels // 4), device=seed.device)[:, None]
    counter = [sample & _WORD, sample >> 32, groups, torch.full_like(groups, offset)]
    words = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
    drawn = []
    for i in (0, 2):
        radius = (-2 * _uniform(words[i]).log()).sqrt()
        angle = _uniform(words[i + 1]) * (2 * math.pi)
        drawn += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(drawn, dim=1).flatten(0, 1)[:channels]


def _uniform(word: torch.Tensor) -> torch.Tensor:
    """Into (0, 1], float32."""
    return ((word >> 8).float() + 0.5) * 2**-24

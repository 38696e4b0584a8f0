"""How close a flow's samples are to real volumes, as sets, and whether they are copies of its training volumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decovae.evaluation.distances import MOST_SLICES
from decovae.evaluation.tools import SetMeasures, Tools, add_seconds, measure_set, thumbnails_of
from decovae.evaluation.volume_sets import RealVolumes, SampleVolumes
from decovae.metrics.memorisation import SPACE, Memorisation, memorisation

FEW_HELD_OUT = 20
"""Held-out subjects below which their nearest distances say little."""


class Generation(NamedTuple):
    """Measures of both sets, the nearest training volumes of the samples, and seconds by part."""

    real: SetMeasures
    generated: SetMeasures
    copies: Memorisation
    seconds: dict[str, float]


def measure_generation(
    real: RealVolumes, samples: SampleVolumes, tools: Tools, *, training: Sequence[int], held_out: Sequence[int]
) -> Generation:
    """Measure samples against real volumes, on all processes, which get the same.

    Everything of real volumes, those that were held out or trained on too, is of what `real` makes of them.

    Args:
        real: what samples are compared with, by the samples' own way to the grid; see `RealVolumes.through`.
        samples: of one folder, at least two.
        tools: what to measure with.
        training, held_out: indices, in the collection behind `real`, of the volumes that the flow was trained on, and
            of those that nobody was; neither is empty.

    Raises:
        InputError: a volume cannot be read, or lies elsewhere.
    """
    of_real = measure_set(real, tools, title="Real volumes", subset=MOST_SLICES)
    generated = measure_set(samples, tools, title="Samples", subset=MOST_SLICES)
    rest = sorted({*training, *held_out} - {*real.indices})
    thumbnails = dict(zip(real.indices, of_real.thumbnails, strict=True))
    others = thumbnails_of(replace(real, indices=rest), tools, title="Other volumes")
    thumbnails |= dict(zip(rest, others, strict=True))

    def of(indices: Sequence[int]) -> Tensor:
        return torch.stack([thumbnails[index] for index in indices])

    copies = tools.runtime.on_main(lambda: memorisation(of(training), of(held_out), generated.thumbnails))
    seconds = dict(of_real.seconds)
    add_seconds(seconds, generated.seconds)
    return Generation(of_real, generated, copies, seconds)


def memorisation_entry(
    copies: Memorisation, samples: Sequence[str], training: Sequence[str], held_out: int, *, others: str | None
) -> dict[str, Any]:
    """What `evaluation.json` says of nearest training volumes.

    Args:
        copies: what was found.
        samples: names of the samples.
        training: subjects of the training volumes.
        held_out: how many subjects were held out.
        others: what the flow was trained on, if not on these volumes.
    """
    notes = []
    if held_out < FEW_HELD_OUT:
        subjects = "subject is" if held_out == 1 else "subjects are"
        notes.append(f"only {held_out} {subjects} held out: the threshold is coarse")
    if others is not None:
        notes.append(f"the flow was trained on latents of other volumes ({others}), which were not looked at")
    return {
        "space": SPACE,
        "samples": copies.samples,
        "held_out": copies.held_out,
        "nearest": [training[place] for place in copies.nearest],
        "threshold": copies.threshold,
        "suspicious": [samples[place] for place in copies.suspicious],
        "ratio": copies.ratio,
        "note": "; ".join(notes) or None,
    }

"""How far two sets of slices are apart, as `evaluation.json` says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decovae.evaluation.slice_sets import SliceSet
from decovae.metrics.fidelity import density_coverage, kernel_distance, precision_recall
from decovae.metrics.frechet import frechet_distance
from decovae.metrics.slice_features import PLANES, SliceNetwork

MOST_SLICES = 2000
"""Of a plane and a set, for measures that compare every slice with every other."""

NEIGHBOUR = 5
"""The farthest that a measure asks for: sets need more slices than this."""

FEW_SLICES = "no more slices than features: the covariances are singular and the distance is biased upwards"


def frechet(networks: Sequence[SliceNetwork], real: SliceSet, generated: SliceSet) -> dict[str, Any]:
    """Fréchet distances by network: of each plane, and their mean.

    Args:
        networks: those that the sets were measured with.
        real: the reference.
        generated: what is measured, samples or reconstructions.
    """
    found = {}
    for network in networks:
        pairs = {plane: (real.moments[network.name, plane], generated.moments[network.name, plane]) for plane in PLANES}
        distances = {plane: frechet_distance(*pair) for plane, pair in pairs.items()}
        counts = [[pair[side].count for pair in pairs.values()] for side in (0, 1)]
        real_slices, generated_slices = (sum(sizes) / len(sizes) for sizes in counts)
        found[network.name] = {
            "title": network.title,
            "proxy": network.proxy,
            **distances,
            "average": sum(distances.values()) / len(distances),
            "features": network.features,
            "slices": {"real": round(real_slices), "generated": round(generated_slices)},
            "note": FEW_SLICES if min(map(min, counts)) <= network.features else None,
        }
    return found


def fidelity(networks: Sequence[SliceNetwork], real: SliceSet, generated: SliceSet) -> dict[str, Any]:
    """Precision, recall, density, coverage and kernel distance by network, means over planes.

    Of slices through the middle halves of the volumes. Networks are left out whose sets are too small for neighbours.
    """
    found = {}
    for network in networks:
        rows = []
        for plane in PLANES:
            first, second = real.subset[network.name, plane], generated.subset[network.name, plane]
            if min(len(first), len(second)) <= NEIGHBOUR:
                break
            near, dense = precision_recall(first, second), density_coverage(first, second)
            rows.append(
                {
                    "precision": near.precision,
                    "recall": near.recall,
                    "density": dense.density,
                    "coverage": dense.coverage,
                    "kid": kernel_distance(first, second),
                    "slices": min(len(first), len(second)),
                }
            )
        if len(rows) == len(PLANES):
            means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
            found[network.name] = {"proxy": network.proxy, **means, "slices": round(means["slices"])}
    return found

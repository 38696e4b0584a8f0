"""What is known of a latent space's channels, as `analysis.json` keeps it: Table 1 and Figures 1b, 2 and 3."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decovae.errors import InputError
from decovae.files import write_text

ANALYSIS = "analysis.json"
CHANNELS = "channels.csv"
VERSION = 1
"""Of the file's format."""

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Embedding:
    """Latent codes in two dimensions.

    Attributes:
        what: a sentence on the codes.
        perplexity: t-SNE's.
        points: x and y of each code.
    """

    what: str
    perplexity: float
    points: Matrix


@dataclass(frozen=True)
class Analysis:
    """Measures of C latent channels; every voxel of every latent's μ is a sample of them.

    Attributes:
        date: when they were measured, YYYY-MM-DD.
        decovae: the version that measured.
        machine: see `decovae.machine.describe`.
        run: name of the folder that was analysed.
        stage: of the run: vae, decoder, flow; latents where only their folder was given.
        deco: the autoencoder's decorrelation loss; None where the run does not tell.
        data: a sentence on the volumes.
        split: training, validation or all.
        latents: how many there are.
        codes: voxels of all of them, n.
        cosine_similarity, pearson: mean absolute values off the diagonal, 0 to 1; cosines are not centred.
        effective_rank: 1 to C.
        explained_variance: share of each principal component, descending, (C,).
        channel_mean, channel_variance: (C,); the variance is unbiased.
        cosine_matrix: absolute cosine similarities, (C, C).
        correlation_matrix: Pearson correlations with their signs, (C, C).
        tsne: a picture of some codes, or None.
    """

    date: str
    decovae: str
    machine: Mapping[str, Any]
    run: str
    stage: str
    deco: str | None
    data: str
    split: str
    latents: int
    codes: int
    cosine_similarity: float
    pearson: float
    effective_rank: float
    explained_variance: tuple[float, ...]
    channel_mean: tuple[float, ...]
    channel_variance: tuple[float, ...]
    cosine_matrix: Matrix
    correlation_matrix: Matrix
    tsne: Embedding | None

    @property
    def channels(self) -> int:
        """C."""
        return len(self.channel_mean)

    def as_dict(self) -> dict[str, Any]:
        """The analysis in JSON's types."""
        return {"kind": "analysis", "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Analysis:
        """The analysis that `as_dict` gave, or JSON made of it.

        Raises:
            KeyError, TypeError, ValueError: `entry` is no such thing, or another version's.
        """
        if entry["kind"] != "analysis" or entry["version"] != VERSION:
            raise ValueError(f"{entry['kind']} of version {entry['version']}, not analysis of version {VERSION}")
        fields = {name: entry[name] for name in cls.__dataclass_fields__}
        for name in ("explained_variance", "channel_mean", "channel_variance"):
            fields[name] = tuple(float(value) for value in entry[name])
        for name in ("cosine_matrix", "correlation_matrix"):
            fields[name] = _matrix(entry[name])
        if (tsne := entry["tsne"]) is not None:
            fields["tsne"] = Embedding(str(tsne["what"]), float(tsne["perplexity"]), _matrix(tsne["points"]))
        return cls(**fields)


def _matrix(rows: Any) -> Matrix:
    return tuple(tuple(float(value) for value in row) for row in rows)


def read_analysis(path: Path) -> Analysis:
    """The analysis in an `analysis.json`.

    Raises:
        InputError: it cannot be read, or is of another version.
    """
    try:
        return Analysis.from_dict(json.loads(path.read_bytes()))
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: is no analysis that can be read ({reason}); run decovae analyze again.") from error


def write_analysis(analysis: Analysis, folder: Path) -> None:
    """Write `analysis.json`, and `channels.csv` with a row for each channel and principal component.

    Raises:
        OSError: the folder cannot be written.
    """
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["channel", "mean", "variance", "component", "explained_variance"])
    for place in range(analysis.channels):
        writer.writerow(
            [
                f"C{place + 1}",
                analysis.channel_mean[place],
                analysis.channel_variance[place],
                f"PC{place + 1}",
                analysis.explained_variance[place],
            ]
        )
    text = json.dumps(analysis.as_dict(), indent=1, ensure_ascii=False) + "\n"
    write_text(folder / CHANNELS, rows.getvalue())
    write_text(folder / ANALYSIS, text)

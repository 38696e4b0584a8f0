"""The page's pictures: Figures 1b, 2 and 3 of the latents, 4 of reconstructions, 5 of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from decovae.errors import InputError
from decovae.evaluation.analysis import Analysis
from decovae.evaluation.figures import draw_cosine, draw_tsne, draw_variance, png
from decovae.report.images import Scan, difference_picture, grey_picture, png_uri, read_scan
from decovae.report.material import PHASE_NAMES, PHASES, kept_volumes, sample_files, subjects
from decovae.report.models import Model, Phase

SAMPLES_SHOWN = 4


@dataclass(frozen=True)
class Picture:
    """An image: its address, what it shows for those who cannot see it, and a line under it."""

    source: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class LatentFigure:
    """A figure of the paper, drawn of the models here, in so many panels side by side, or 0 for a single one."""

    title: str
    caption: str
    picture: Picture
    panels: int


@dataclass(frozen=True)
class PictureRow:
    """Pictures of one model."""

    name: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Comparison:
    """One subject: the original, and of every model what it made of it."""

    subject: str
    original: Picture
    rows: Sequence[PictureRow]


def latent_figures(models: Sequence[Model]) -> list[LatentFigure]:
    """Figures 1b, 2 and 3 of the models that were analysed; none where none was.

    Raises:
        InputError: an analysis lacks what a figure shows.
    """
    analyses = {model.name: _analysis(model) for model in models if model.analysis is not None}
    if not analyses:
        return []
    cosines = "; ".join(f"{name} {each.cosine_similarity:.3f}" for name, each in analyses.items())
    shares = "; ".join(
        f"{name} {', '.join(f'{100 * share:.1f} %' for share in each.explained_variance)}"
        for name, each in analyses.items()
    )
    codes = next((each.tsne.what.rstrip(".") for each in analyses.values() if each.tsne is not None), "no codes")
    drawn = (
        (
            "Figure 1b",
            f"t-SNE of latent codes: {codes}.",
            draw_tsne(analyses),
            f"Scatter plots: {', '.join(analyses)}.",
            len(analyses),
        ),
        (
            "Figure 2",
            "Absolute cosine similarity between latent channels; off the diagonal, lighter is better.",
            draw_cosine(analyses),
            f"Matrices of channel similarities. Mean off the diagonal: {cosines}.",
            len(analyses),
        ),
        (
            "Figure 3",
            "Share of the latent variance that each principal component explains; the dotted line is an even share.",
            draw_variance(analyses),
            f"Bars of explained variance. Components from the first on: {shares}.",
            0,
        ),
    )
    return [
        LatentFigure(title, caption, Picture(png_uri(png(figure, title=title, dpi=144)), f"{title}. {alt}"), panels)
        for title, caption, figure, alt, panels in drawn
    ]


def comparisons(models: Sequence[Model], *, most: int = 1) -> list[Comparison]:
    """Figure 4, for the subjects that most models kept.

    Raises:
        InputError: a volume cannot be read.
    """
    found = []
    for subject, path in list(subjects(models).items())[:most]:
        rows = [PictureRow(model.name, list(_reconstructions(model, subject))) for model in models]
        original = Picture(
            grey_picture(read_scan(path)), f"Original of {subject}: axial, coronal and sagittal slice.", "original"
        )
        found.append(Comparison(subject, original, [row for row in rows if row.pictures]))
    return found


def sample_rows(models: Sequence[Model]) -> tuple[list[PictureRow], str]:
    """Figure 5: the first samples of every model, and a sentence on seeds and decoders; rows may be none.

    Raises:
        InputError: a volume cannot be read.
    """
    rows, seeds, phases = [], set(), set()
    for model in models:
        phase = _last_phase(model)
        if phase is None:
            continue
        samples = model.samples(phase)
        seed = None if samples is None else samples.seed
        pictures = [
            Picture(
                grey_picture(read_scan(path)),
                f"Synthetic sample {number} of {model.name}, seed {seed}: axial, coronal and sagittal slice.",
                f"sample {number}",
            )
            for number, path in enumerate(sample_files(model, phase)[:SAMPLES_SHOWN])
        ]
        rows.append(PictureRow(model.name, pictures))
        seeds.add(seed)
        phases.add(PHASE_NAMES[phase])
    seed_text = " and ".join(str(seed) for seed in sorted(seeds, key=str))
    same = f"all from seed {seed_text}" if len(seeds) == 1 else f"from the seeds {seed_text}"
    return rows, f"The first samples of each flow, {same}, decoded {' or '.join(sorted(phases))}."


def _analysis(model: Model) -> Analysis:
    try:
        return Analysis.from_dict(model.analysis or {})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"The analysis of {model.name} lacks {error}; run decovae analyze again.") from error


def _reconstructions(model: Model, subject: str) -> Iterator[Picture]:
    for phase in PHASES:
        for entry in kept_volumes(model, phase):
            if entry.subject != subject:
                continue
            original, reconstruction = read_scan(entry.original), read_scan(entry.reconstruction)
            quality = "" if entry.psnr is None else f", {entry.psnr:.2f} dB"
            name = f"{model.name}, {PHASE_NAMES[phase]}"
            yield Picture(
                grey_picture(reconstruction),
                f"Reconstruction of {subject} by {name}.",
                f"{PHASE_NAMES[phase]}{quality}",
            )
            yield _difference(original, reconstruction, name, subject)


def _difference(original: Scan, reconstruction: Scan, name: str, subject: str) -> Picture:
    try:
        source = difference_picture(original, reconstruction)
    except ValueError as error:
        raise InputError(f"{subject}, {name}: {error}; run decovae evaluate again.") from error
    return Picture(source, f"Absolute difference of the reconstruction by {name} from the original.", "difference")


def _last_phase(model: Model) -> Phase | None:
    return next((phase for phase in reversed(PHASES) if sample_files(model, phase)), None)

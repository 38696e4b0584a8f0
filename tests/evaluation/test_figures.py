"""Figures 1b, 2 and 3 show the numbers that they are of, for one model or several."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from decovae.evaluation.analysis import Analysis, Embedding
from decovae.evaluation.figures import draw_cosine, draw_tsne, draw_variance, png

DRAW = [draw_cosine, draw_variance, draw_tsne]


def analysis(channels: int = 4, codes: int = 20, seed: int = 0) -> Analysis:
    """Of numbers that mean nothing."""
    draw = np.random.default_rng(seed)
    shares = np.sort(draw.dirichlet(np.ones(channels)))[::-1]
    matrix = tuple(tuple(row) for row in draw.random((channels, channels)).tolist())
    points = tuple(tuple(row) for row in draw.normal(size=(codes, 2)).tolist())
    return Analysis(
        date="2026-01-02",
        decovae="0",
        machine={},
        run="vae",
        stage="vae",
        deco="vad",
        data="noise",
        split="all",
        latents=3,
        codes=30,
        cosine_similarity=0.25,
        pearson=0.5,
        effective_rank=2.5,
        explained_variance=tuple(shares.tolist()),
        channel_mean=(0.0,) * channels,
        channel_variance=(1.0,) * channels,
        cosine_matrix=matrix,
        correlation_matrix=matrix,
        tsne=Embedding("codes", 30.0, points),
    )


@pytest.mark.parametrize("draw", DRAW)
@pytest.mark.parametrize("count", [1, 4])
def test_every_figure_is_a_picture_with_all_titles(
    draw: Callable[[Mapping[str, Analysis]], Figure], count: int
) -> None:
    models = {f"model {number}": analysis(seed=number) for number in range(count)}
    figure = draw(models)
    content = png(figure, title="what it shows")
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    assert image.info["Title"] == "what it shows"
    legends = [text for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()]
    texts = " ".join([*(axes.get_title() for axes in figure.axes), *(text.get_text() for text in legends)])
    assert all(title in texts for title in models)


def test_bars_are_as_high_as_the_shares() -> None:
    models = {"a": analysis(seed=1), "b": analysis(seed=2)}
    (axes,) = draw_variance(models).axes
    for bars, model in zip(axes.containers, models.values(), strict=True):
        heights = [bar.get_height() for bar in bars]
        np.testing.assert_allclose(heights, 100 * np.array(model.explained_variance))


def test_matrices_share_one_scale() -> None:
    models = {"a": analysis(seed=1), "b": analysis(seed=2)}
    for axes, model in zip(draw_cosine(models).axes, models.values(), strict=True):
        (image,) = axes.images
        assert image.get_clim() == (0, 1)
        np.testing.assert_array_equal(image.get_array(), model.cosine_matrix)


def test_clouds_share_one_scale_that_holds_them() -> None:
    wide = analysis()
    assert wide.tsne is not None
    wide = replace(wide, tsne=replace(wide.tsne, points=((50.0, 0.0), (-10.0, 3.0))))
    first, second = draw_tsne({"narrow": analysis(), "wide": wide}).axes
    assert first.get_xlim() == second.get_xlim() == first.get_ylim()
    assert first.get_xlim()[1] > 50


def test_a_model_without_an_embedding_says_so() -> None:
    first, second = draw_tsne({"with": analysis(), "without": replace(analysis(), tsne=None)}).axes
    assert [text.get_text() for text in first.texts] == []
    assert [text.get_text() for text in second.texts] == ["no t-SNE"]


@pytest.mark.parametrize("channels", [1, 16])
@pytest.mark.parametrize("draw", DRAW)
def test_few_and_many_channels(draw: Callable[[Mapping[str, Analysis]], Figure], channels: int) -> None:
    assert png(draw({"one": analysis(channels), "other": analysis(4)}), title="x")


@pytest.mark.parametrize("draw", DRAW)
def test_no_models_are_refused(draw: Callable[[Mapping[str, Analysis]], Figure]) -> None:
    with pytest.raises(ValueError, match="at least one model"):
        draw({})

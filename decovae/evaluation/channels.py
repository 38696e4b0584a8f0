"""The channels of a store of latents, from one read of it: their moments, and some of its voxels' codes."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import decovae
from decovae import machine
from decovae.errors import InputError
from decovae.evaluation.analysis import Analysis, Embedding, Matrix
from decovae.evaluation.together import gathered
from decovae.generation.latents import LatentStore
from decovae.generation.progress import Progress
from decovae.losses.moments import ChannelMoments, channel_moments, normalized
from decovae.metrics.latents import analyze_latents
from decovae.runtime import Runtime

PERPLEXITY = 30.0
FEWEST_CODES = 5
"""That an embedding can be made of."""


class Read(NamedTuple):
    """What one read of the latents gives: moments of μ's channels, and codes (n, C), float32, in order of voxels."""

    moments: ChannelMoments
    codes: Tensor


def places_of(store: LatentStore, split: str) -> list[int]:
    """Latents of a side of the split, or of both ("all").

    Raises:
        InputError: there are none.
    """
    chosen = {"training": store.training, "validation": store.validation}.get(split, list(range(len(store.records))))
    if not chosen:
        raise InputError(f"--split {split}: {store.folder} holds no such latents; choose another split.")
    return chosen


def read_channels(
    store: LatentStore, places: Sequence[int], runtime: Runtime, *, codes: int = 0, seed: int = 0
) -> Read:
    """Moments of the channels over all voxels of some latents, and codes drawn uniformly from these voxels.

    Memory holds one latent, its moments and the codes. Neither result depends on how many processes there are: moments
    are merged in the order of `places`, and which voxels give a code is drawn beforehand, for their number is known.

    Args:
        store: the latents.
        places: which of them, at least one.
        runtime: the processes, all of which call this and get the same.
        codes: how many to draw, without replacement; all voxels where there are fewer.
        seed: of the draw.

    Raises:
        InputError: a file of the store is damaged; names it.
    """
    voxels = math.prod(store.space.shape)
    total = voxels * len(places)
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(codes, total), replace=False, shuffle=False))

    def read() -> list[tuple[int, tuple[Tensor, Tensor]]]:
        mine, found = range(runtime.rank, len(places), runtime.world), []
        with Progress("Reading latents", len(mine), visible=runtime.main) as progress:
            for turn in mine:
                mu, _ = store.read(places[turn])
                first, last = np.searchsorted(drawn, [turn * voxels, (turn + 1) * voxels])
                here = torch.from_numpy(drawn[first:last] - turn * voxels)
                part = channel_moments(mu[None].double()).packed, mu.flatten(1)[:, here].T.contiguous()
                found.append((turn, part))
                progress.advance()
        return found

    parts = gathered(runtime, read)
    moments = reduce(ChannelMoments.merge, (ChannelMoments(packed, voxels) for packed, _ in parts))
    return Read(moments, torch.cat([part for _, part in parts]))


def analyze_store(
    store: LatentStore,
    runtime: Runtime,
    *,
    run: str,
    stage: str,
    deco: str | None,
    split: str = "all",
    codes: int = 2000,
    seed: int = 0,
) -> Analysis:
    """The analysis of a store's latents, on every process.

    Args:
        store: the latents.
        runtime: the processes.
        run, stage, deco: see `Analysis`.
        split: training, validation or all.
        codes: for t-SNE; 0 for none.
        seed: of their draw, and of t-SNE.

    Raises:
        InputError: a file of the store is damaged, or there are no latents in the split.
    """
    places = places_of(store, split)
    moments, drawn = read_channels(store, places, runtime, codes=codes, seed=seed)
    use = analyze_latents(moments)
    about_zero = moments.scatter + moments.count * torch.outer(moments.mean, moments.mean)
    return Analysis(
        date=datetime.date.today().isoformat(),
        decovae=decovae.__version__,
        machine=machine.describe(),
        run=run,
        stage=stage,
        deco=deco,
        data=store.space.data,
        split=split,
        latents=len(places),
        codes=int(moments.count),
        cosine_similarity=use.cosine_similarity,
        pearson=use.pearson,
        effective_rank=use.effective_rank,
        explained_variance=tuple(use.explained_variance.tolist()),
        channel_mean=tuple(moments.mean.tolist()),
        channel_variance=tuple(moments.covariance.diagonal().tolist()),
        cosine_matrix=_matrix(normalized(about_zero).abs()),
        correlation_matrix=_matrix(moments.correlation),
        tsne=runtime.on_main(lambda: embed(drawn, seed=seed)),
    )


def embed(codes: Tensor, *, seed: int) -> Embedding | None:
    """t-SNE of voxels' codes, (n, C), as they are: channels are not rescaled. None for fewer than 5 codes.

    It starts from the first two principal components, so that embeddings of similar latents look alike.
    """
    if len(codes) < FEWEST_CODES:
        return None
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(codes) - 1) / 3)
    dimensions = min(2, codes.shape[1])
    engine = TSNE(dimensions, perplexity=perplexity, init="pca", random_state=seed)
    points = engine.fit_transform(codes.numpy())
    if dimensions < 2:
        points = np.pad(points, ((0, 0), (0, 1)))
    what = f"{len(codes):,} voxels' codes of μ, drawn uniformly, channels not rescaled"
    return Embedding(what, perplexity, _matrix(torch.from_numpy(points).double()))


def _matrix(rows: Tensor) -> Matrix:
    return tuple(tuple(round(value, 6) for value in row) for row in rows.tolist())

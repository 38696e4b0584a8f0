"""Latent measures against numpy and against cases with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings

from decovae import analyze_latents
from decovae.losses.moments import channel_moments
from tests.channel_cases import DEVICE, Case, cases

pytestmark = pytest.mark.device


def off_diagonal_mean(matrix: np.ndarray) -> float:
    return float(np.abs(matrix[~np.eye(len(matrix), dtype=bool)]).mean())


@settings(max_examples=40, deadline=None)
@given(case=cases(dtypes=(torch.float32, torch.bfloat16), offsets=(0.0, 3.0)))
def test_measures_equal_their_definitions(case: Case) -> None:
    z = case.latent()
    samples = z.double().movedim(1, 0).flatten(1).cpu().numpy()
    assume((samples != samples[:, :1]).any(axis=1).all())  # numpy has no correlation for a constant channel
    analysis = analyze_latents(z)
    eigenvalues = np.linalg.eigvalsh(np.atleast_2d(np.cov(samples)))[::-1].clip(0)
    shares = eigenvalues / eigenvalues.sum()
    nonzero = shares[shares > 0]
    assert analysis.effective_rank == pytest.approx(math.exp(-(nonzero * np.log(nonzero)).sum()), rel=1e-5)
    np.testing.assert_allclose(analysis.explained_variance.numpy(), shares, atol=1e-6)
    if case.channels > 1:
        unit = samples / np.linalg.norm(samples, axis=1, keepdims=True)
        assert analysis.cosine_similarity == pytest.approx(off_diagonal_mean(unit @ unit.T), abs=1e-6)
        assert analysis.pearson == pytest.approx(off_diagonal_mean(np.corrcoef(samples)), abs=1e-6)


def test_known_answers() -> None:
    independent = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], device=DEVICE)
    analysis = analyze_latents(independent)
    assert analysis.pearson == analysis.cosine_similarity == 0
    assert analysis.effective_rank == pytest.approx(2)
    assert analysis.explained_variance.tolist() == pytest.approx([0.5, 0.5])

    copies = independent[:, :1].expand(-1, 3)
    analysis = analyze_latents(copies)
    assert analysis.pearson == pytest.approx(1)
    assert analysis.effective_rank == pytest.approx(1)

    # Means count in the cosine and not in the correlation.
    analysis = analyze_latents(independent + 100)
    assert analysis.pearson == pytest.approx(0, abs=1e-9)
    assert analysis.cosine_similarity == pytest.approx(1, abs=1e-3)


def test_one_channel_has_no_similarity() -> None:
    analysis = analyze_latents(torch.randn(5, 1, 3, device=DEVICE))
    assert analysis.pearson == analysis.cosine_similarity == 0
    assert analysis.effective_rank == 1
    assert analysis.explained_variance.tolist() == [1]


def test_constant_latents_use_no_rank() -> None:
    analysis = analyze_latents(torch.full((4, 3, 2), 0.1, device=DEVICE))
    assert analysis.effective_rank == analysis.pearson == 0
    assert analysis.explained_variance.tolist() == [0, 0, 0]


def test_non_finite_latents_show() -> None:
    for channels in (1, 3):
        z = torch.randn(4, channels, 5, device=DEVICE)
        z[0, -1, 0] = torch.nan
        analysis = analyze_latents(z)
        measures = (analysis.cosine_similarity, analysis.pearson, analysis.effective_rank)
        assert all(math.isnan(measure) for measure in measures)
        assert analysis.explained_variance.isnan().all()


def test_volume_by_volume_equals_all_at_once() -> None:
    z = Case(6, 4, (5, 4, 3), torch.float32, "contiguous", 3.0, seed=2).latent()
    first, *rest = z.split(1)
    moments = channel_moments(first)
    for volume in rest:
        moments = moments.merge(channel_moments(volume))
    streamed, whole = analyze_latents(moments), analyze_latents(z)
    assert streamed.pearson == pytest.approx(whole.pearson, rel=1e-6)
    assert streamed.cosine_similarity == pytest.approx(whole.cosine_similarity, rel=1e-6)
    assert streamed.effective_rank == pytest.approx(whole.effective_rank, rel=1e-6)
    torch.testing.assert_close(streamed.explained_variance, whole.explained_variance, rtol=1e-5, atol=0)


def test_wrong_input_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="int64"):
        analyze_latents(torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="list"):
        analyze_latents([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 1"):
        analyze_latents(torch.zeros(1, 2))

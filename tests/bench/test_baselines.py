"""What the losses are measured against computes the same losses, and the counts count."""

from __future__ import annotations

import functools

import pytest
import torch

import decovae
from bench import baselines, measure

CPU = torch.device("cpu")


@pytest.mark.parametrize("formulation", baselines.FORMULATIONS)
@pytest.mark.parametrize("shape", [(50, 3), (5, 3, 7), (2, 4, 3, 5, 7)])
@pytest.mark.parametrize("loss", ["sid_loss", "covariance_loss", "variance_loss", "vad_loss"])
def test_formulations_equal_the_losses(loss: str, shape: tuple[int, ...], formulation: str) -> None:
    mu = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.7
    plain = functools.partial(getattr(baselines, loss.removesuffix("_loss")), of=baselines.FORMULATIONS[formulation])
    torch.testing.assert_close(plain(mu), getattr(decovae, loss)(mu), rtol=1e-9, atol=0)


def test_operators_inside_a_custom_operator_count() -> None:
    @torch.library.custom_op("decovae_bench_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x.add(x).clone()

    @torch.library.custom_op("decovae_bench_test::opaque", mutates_args=("x",))
    def opaque(x: torch.Tensor) -> None:
        pass

    x = torch.ones(3)
    assert measure.operators(lambda: twice(x)) == 2
    assert measure.operators(lambda: x.matmul(x).exp()) == 2  # matmul is composite: one dot
    assert measure.operators(lambda: opaque(x)) == 1


def test_peak_is_what_is_alive_at_once_beyond_the_result() -> None:
    x = torch.ones(1 << 16)

    def run() -> torch.Tensor:
        doubled = x * 2  # freed only after the next two exist
        return (doubled + 1) + (doubled + 2)

    assert measure.memory(run, CPU, x.nbytes) == (3 * x.nbytes, None)


def test_floor_counts_reads_and_the_gradient() -> None:
    mu = torch.ones(2, 3, 5, dtype=torch.bfloat16)
    assert measure.bytes_moved_floor(mu.nbytes, "forward") == 60
    assert measure.bytes_moved_floor(mu.nbytes, "forward+backward") == 180

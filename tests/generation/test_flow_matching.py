"""The path from noise to data, the times on it, and the loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decovae.generation.flow_matching import TimeSchedule, bridge, flow_matching_loss, target

VOXELS = 32 * 64 * 32


def test_the_path_leads_from_noise_to_data_at_the_target_s_velocity() -> None:
    noise, data = torch.randn(2, 3, 4, 2, 2, 2).unbind(0)
    assert torch.equal(bridge(noise, data, torch.zeros(3)), noise)
    assert torch.equal(bridge(noise, data, torch.ones(3)), data)
    early, late = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.7, 0.9])
    moved = bridge(noise, data, late) - bridge(noise, data, early)
    torch.testing.assert_close(moved, (late - early).view(3, 1, 1, 1, 1) * target(noise, data))
    torch.testing.assert_close(bridge(noise, data, torch.tensor(0.4))[0], bridge(noise, data, late)[0])


def test_times_are_monai_s_rectified_flow_s() -> None:
    """Its scheduler, with no rounding to whole timesteps, rounds them to 16 bits and transforms with a scale of 1."""
    from monai.networks.schedulers.rectified_flow import RFlowScheduler

    scheduler = RFlowScheduler(use_discrete_timesteps=False, use_timestep_transform=True)
    scheduler.set_timesteps(30, input_img_size_numel=VOXELS)
    times = TimeSchedule(scale=1.0).times(30, VOXELS)
    torch.testing.assert_close(1000 * (1 - times[:-1]), scheduler.timesteps.double(), rtol=1e-3, atol=0)


def test_steps_fill_the_path_and_are_finest_near_noise() -> None:
    for steps in (1, 2, 30):
        times = TimeSchedule().times(steps, VOXELS)
        assert times.dtype == torch.float64
        assert len(times) == steps + 1
        assert times[0] == 0
        assert times[-1] == 1
        assert (times.diff() > 0).all()
    assert (times.diff().diff() > 0).all()  # each step is longer than the one before
    even = TimeSchedule(scale=1.0, base_voxels=VOXELS).times(30, VOXELS)
    torch.testing.assert_close(even, torch.linspace(0, 1, 31, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least one step"):
        TimeSchedule().times(0, VOXELS)


def test_drawn_times_have_the_schedule_s_distribution_and_its_quantiles() -> None:
    """With noise level s = 1 − t uniform before the transform, P(t < T) = 1 − u where r u / (1 + (r − 1) u) = 1 − T."""
    schedule = TimeSchedule()
    ratio = 1.4 * (VOXELS / 32**3) ** (1 / 3)
    count = 20_000
    drawn = schedule.draw(torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), VOXELS)
    assert drawn.dtype == torch.float32
    ordered = drawn.double().sort().values
    level = 1 - ordered
    share = 1 - level / (ratio - (ratio - 1) * level)
    expected = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    # Kolmogorov's bound: above 1.95/√n once in a thousand seeds.
    assert (share - expected).abs().max() < 1.95 / count**0.5

    quantiles = schedule.quantiles(count, VOXELS)
    assert quantiles.dtype == torch.float32
    level = 1 - quantiles.double()
    torch.testing.assert_close(1 - level / (ratio - (ratio - 1) * level), expected, rtol=0, atol=1e-6)


def test_a_drawn_time_is_a_function_of_its_own_number() -> None:
    uniforms = torch.rand(8, dtype=torch.float64)
    drawn = TimeSchedule().draw(uniforms, VOXELS)
    torch.testing.assert_close(torch.cat([TimeSchedule().draw(part, VOXELS) for part in uniforms.split(3)]), drawn)
    assert TimeSchedule().draw(uniforms[:0], VOXELS).shape == (0,)


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"scale": float("nan")}, {"base_voxels": 0}, {"distribution": "x"}])
def test_a_schedule_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="a time schedule has"):
        TimeSchedule(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_loss_is_each_sample_s_error_of_velocity(norm: str) -> None:
    noise, data = torch.randn(2, 3, 4, 2, 3, 2).unbind(0)
    t = torch.tensor([0.2, 0.5, 0.9])

    def off_by(x: Tensor, times: Tensor, condition: Tensor | None = None) -> Tensor:
        assert torch.equal(times, t)
        torch.testing.assert_close(x, bridge(noise, data, t))
        off = torch.tensor([0.0, 1.0, -3.0]) if condition is None else condition[:, 0]
        return data - noise + off.view(3, 1, 1, 1, 1)

    expected = torch.tensor([0.0, 1.0, 9.0 if norm == "l2" else 3.0])
    losses = flow_matching_loss(off_by, data, noise, t, norm=norm)  # type: ignore[arg-type]
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected)
    losses = flow_matching_loss(off_by, data, noise, t, norm=norm, condition=torch.ones(3, 1))  # type: ignore[arg-type]
    torch.testing.assert_close(losses, torch.ones(3))


def test_a_loss_of_16_bit_velocities_is_float32() -> None:
    data = torch.zeros(2, 1, 2, 2, 2)
    loss = flow_matching_loss(lambda x, t: x.bfloat16(), data, torch.ones_like(data), torch.zeros(2))
    assert loss.dtype == torch.float32
    assert loss.tolist() == [4.0, 4.0]


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="'l2' or 'l1', not 'l3'"):
        flow_matching_loss(lambda x, t: x, torch.zeros(1), torch.zeros(1), torch.zeros(1), norm="l3")  # type: ignore[arg-type]

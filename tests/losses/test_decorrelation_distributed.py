"""Statistics across ranks equal those of one process that has the whole batch."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from decovae import LatentHead, channel_statistics, sid_loss, vad_loss
from decovae.losses.moments import channel_moments
from tests.ranks import spawn

SIZES = (3, 1, 2)  # volumes a rank, uneven
WORLD = len(SIZES)


def volumes() -> torch.Tensor:
    data = torch.randn(sum(SIZES), 2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    return data + torch.arange(sum(SIZES)).view(-1, 1, 1, 1, 1)  # the ranks' means differ


def encoder() -> nn.Module:
    torch.manual_seed(1)
    return nn.Conv3d(2, 3, 1)


def check_rank(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    check_first_call(rank)
    pair = dist.new_group([0, 1])
    world = dist.group.WORLD
    batch = volumes().split(SIZES)[rank]

    for group, members in ((pair, (0, 1)), (world, (0, 1, 2))):
        if rank not in members:
            with pytest.raises(ValueError, match="not in the process group"):
                sid_loss(batch, group=group)
            continue
        together = torch.cat([volumes().split(SIZES)[member] for member in members])
        for loss in (sid_loss, vad_loss):
            single = encoder()
            truth = loss(single(together))
            truth.backward()

            model = DistributedDataParallel(encoder(), process_group=group)
            value = loss(model(batch), group=group)
            value.backward()
            torch.testing.assert_close(value, truth, rtol=1e-6, atol=1e-7)
            for parameter, expected in zip(model.parameters(), single.parameters(), strict=True):
                assert (parameter.grad - expected.grad).norm() <= 1e-6 * (1 + expected.grad.norm())

        ours, theirs = channel_statistics(batch, group=group), channel_statistics(together)
        assert ours.count == theirs.count
        torch.testing.assert_close(ours.mean, theirs.mean)
        torch.testing.assert_close(ours.correlation, theirs.correlation)

    # A rank may have nothing in a batch, and a constant channel stays uncorrelated across ranks.
    batch = batch[:0] if rank == 0 else batch
    batch[:, 1] = 0.1
    moments = channel_moments(batch, group=world)
    together = volumes()[SIZES[0] :].clone()
    together[:, 1] = 0.1
    torch.testing.assert_close(moments.covariance, channel_moments(together).covariance, rtol=1e-5, atol=1e-9)
    assert (moments.correlation[1] == 0).all()

    # The same bits on every rank.
    copies = [torch.empty_like(moments.scatter) for _ in range(WORLD)]
    dist.all_gather(copies, moments.scatter)
    assert all(torch.equal(copy, moments.scatter) for copy in copies)

    # From moments that were gathered before, the same loss.
    batch = volumes().split(SIZES)[rank]
    torch.testing.assert_close(vad_loss(channel_moments(batch, group=world)), vad_loss(volumes()), rtol=1e-6, atol=0)

    value = torch.compile(sid_loss, fullgraph=True, backend="aot_eager")(volumes().split(SIZES)[rank], group=world)
    torch.testing.assert_close(value, sid_loss(volumes()), rtol=1e-6, atol=1e-7)

    check_latent_head(rank, batch)
    check_fsdp(batch)
    check_disagreement(rank)
    dist.destroy_process_group()


def check_latent_head(rank: int, batch: torch.Tensor) -> None:
    """Its moments are the joint batch's, its gradient the world size times the joint loss's; noise stays local."""
    together = volumes().requires_grad_()
    (truth,) = torch.autograd.grad(vad_loss(together), [together])
    mu = batch.clone().requires_grad_()
    z, _, moments = LatentHead(group=dist.group.WORLD)(mu, torch.zeros_like(mu), seed=rank)
    assert z.shape == mu.shape
    torch.testing.assert_close(moments.packed, channel_moments(volumes()).packed, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(vad_loss(moments), [mu])
    torch.testing.assert_close(gradient, WORLD * truth.split(SIZES)[rank], rtol=1e-5, atol=1e-8)


def check_fsdp(batch: torch.Tensor) -> None:
    """FSDP2 averages as DDP does; its shards together are the gradient of one process on the whole batch."""
    for loss in (sid_loss, vad_loss):
        single = encoder()
        truth = loss(single(volumes()))
        truth.backward()

        model = fully_shard(encoder(), mesh=init_device_mesh("cpu", (WORLD,)))
        value = loss(model(batch), group=dist.group.WORLD)
        value.backward()
        torch.testing.assert_close(value, truth, rtol=1e-6, atol=1e-7)
        for parameter, expected in zip(model.parameters(), single.parameters(), strict=True):
            assert isinstance(parameter.grad, DTensor)
            assert (parameter.grad.full_tensor() - expected.grad).norm() <= 1e-6 * (1 + expected.grad.norm())


def check_disagreement(rank: int) -> None:
    """Ranks with different C: the same sentence on each, whoever changed; and the group works again afterwards."""
    world = dist.group.WORLD
    agreed = torch.randn(5, 3)
    sid_loss(agreed, group=world)
    for channels in ((3, 3, 4), (2, 4, 3), (20, 3, 3)):
        listed = ", ".join(f"rank {r} has {c}" for r, c in enumerate(channels))
        with pytest.raises(ValueError, match=f"same number of channels: {listed}"):
            sid_loss(torch.randn(5, channels[rank]), group=world)
        assert sid_loss(agreed, group=world).isfinite()
    assert sid_loss(torch.randn(5, 7), group=world).isfinite()  # all change together


def check_first_call(rank: int) -> None:
    """A group whose ranks never agreed on anything yet."""
    with pytest.raises(ValueError, match="rank 0 has 2, rank 1 has 5, rank 2 has 2"):
        vad_loss(torch.randn(4, 5 if rank == 1 else 2), group=dist.group.WORLD)


def run_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    try:
        check_rank(rank, store)
    except BaseException:
        traceback.print_exc()
        raise


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo")
def test_uneven_ranks_equal_one_process(tmp_path: Path) -> None:
    spawn(run_rank, (str(tmp_path / "store"),), world=WORLD)

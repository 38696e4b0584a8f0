"""Fused networks train the same under DistributedDataParallel and sharded with FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from decovae import unfuse
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from tests.ranks import spawn

CONFIG = AutoencoderConfig(channels=(4, 8), residual_blocks=1, groups=2, latent_channels=2)
WORLD = 2


def network() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(CONFIG)


def images() -> Tensor:
    return torch.rand(WORLD, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, image: Tensor) -> list[Tensor]:
    reconstruction, latent = model(image, sample=False)
    (reconstruction.float().square().mean() + latent.kl).backward()
    found = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in found]


def check_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    expected = gradients(network(), images())
    mine = images()[rank : rank + 1]
    for grad, truth in zip(gradients(DistributedDataParallel(network()), mine), expected, strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-4, atol=1e-5)

    mesh = init_device_mesh("cpu", (WORLD,))
    for policy, tolerance in ((MixedPrecisionPolicy(), 1e-5), (MixedPrecisionPolicy(param_dtype=torch.bfloat16), 0.1)):
        model = network()
        # Whole rows, and single blocks and convolutions of a row.
        for part in (model.encoder, *model.decoder.blocks):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        largest = max(float(truth.abs().max()) for truth in expected)
        for grad, truth in zip(gradients(model, mine), expected, strict=True):
            torch.testing.assert_close(grad, truth, rtol=0, atol=tolerance * max(largest, 1))
        with pytest.raises(ValueError, match="was fused and then made a FSDP"):
            unfuse(model)
    dist.destroy_process_group()


def test_fused_networks_train_on_several_ranks(tmp_path: Path) -> None:
    spawn(check_rank, (str(tmp_path / "store"),), world=WORLD)

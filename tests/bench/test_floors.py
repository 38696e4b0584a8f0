"""The floors count what their text says, and products as torch counts them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.floors import Counting, Floor
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.blocks import Downsample, ResidualBlock, Upsample

X = (2, 8, 4, 6, 4)
ELEMENTS = 2 * 8 * 4 * 6 * 4
FORWARD, BOTH = Counting(2, backward=False), Counting(2, backward=True)


def counted(run: Callable[[Tensor], Tensor], x: tuple[int, ...], *, backward: bool, input_gradient: bool = True) -> int:
    """Operations that torch counts."""
    features = torch.randn(x).requires_grad_(backward and input_gradient)
    with FlopCounterMode(display=False) as count:
        y = run(features)
        if backward:
            y.sum().backward()
    return int(count.get_total_flops())


def test_norm_and_activation_move_three_and_five() -> None:
    assert FORWARD.norm_act(X) == Floor(3 * 2 * ELEMENTS, 0)
    assert BOTH.norm_act(X) == Floor(8 * 2 * ELEMENTS, 0)


def test_a_block_moves_its_passes() -> None:
    plain = ResidualBlock(8, 8, groups=4, eps=1e-6)
    wider = ResidualBlock(8, 16, groups=4, eps=1e-6)
    assert FORWARD.residual_block(plain, X)[0].bytes_moved == (1 + 2 + 2 + 1) * 2 * ELEMENTS
    assert BOTH.residual_block(plain, X)[0].bytes_moved == (6 + 3 + 3 + 3 + 3 + 1) * 2 * ELEMENTS
    # x for the statistics, the first convolution and the sum; h and y, twice as wide, three times.
    assert FORWARD.residual_block(wider, X) == (
        Floor((1 + 1 + 1) * 2 * ELEMENTS + 3 * 2 * 2 * ELEMENTS, counted(wider, X, backward=False)),
        (2, 16, 4, 6, 4),
    )


def test_statistics_of_what_a_subject_writes_are_free() -> None:
    block, convolution = ResidualBlock(8, 8, groups=4, eps=1e-6), torch.nn.Conv3d(8, 8, 3, padding=1)
    for counting, passes in ((FORWARD, 5 + 2), (BOTH, 5 + 13 + 2 + 3)):
        floor, _ = counting.row([convolution, block], X)
        assert floor.bytes_moved == passes * 2 * ELEMENTS
    alone, _ = BOTH.row([block], X)
    assert alone == BOTH.residual_block(block, X)[0]
    end = [convolution, torch.nn.GroupNorm(4, 8), convolution]
    assert FORWARD.row(end, X)[0].bytes_moved == (2 + 0 + 2) * 2 * ELEMENTS


def test_products_are_those_that_torch_counts() -> None:
    for block in (ResidualBlock(8, 8, groups=4, eps=1e-6), ResidualBlock(8, 16, groups=4, eps=1e-6)):
        assert FORWARD.residual_block(block, X)[0].flops == counted(block, X, backward=False)
        assert BOTH.residual_block(block, X)[0].flops == counted(block, X, backward=True)
    assert BOTH.row([Downsample(8)], X)[0].flops == counted(Downsample(8), X, backward=True)


def test_upsampling_multiplies_an_eighth() -> None:
    floor, y = BOTH.row([Upsample(8)], X)
    assert y == (2, 8, 8, 12, 8)
    assert 8 * floor.flops == counted(Upsample(8), X, backward=True)
    assert floor.bytes_moved == (1 + 8 + 2 + 8) * 2 * ELEMENTS


def test_an_autoencoder_is_its_blocks() -> None:
    config = AutoencoderConfig(channels=(4, 8), residual_blocks=1, groups=2)
    model, image = Autoencoder(config, memory=None), (2, 1, 4, 4, 8)
    upsampling = BOTH.row([Upsample(8)], (2, 8, 2, 2, 4))[0].flops

    def there_and_back(x: Tensor) -> Tensor:
        mu, log_variance = model.encode(x)
        return model.decode(mu + log_variance)

    whole = counted(there_and_back, image, backward=True, input_gradient=False)
    assert BOTH.autoencoder(model, image).flops == whole - 7 * upsampling
    encoder, features = FORWARD.row(model.encoder.blocks, image)
    decoding = FORWARD.decoder(model, (2, 4, 2, 2, 4))
    read, written = math.prod(features), 2 * math.prod((2, 4, 2, 2, 4))
    whole_floor = FORWARD.autoencoder(model, image).bytes_moved
    assert whole_floor - encoder.bytes_moved - decoding.bytes_moved == 2 * (read + written)
    assert 0 < decoding.flops < FORWARD.autoencoder(model, image).flops
    assert decoding.bytes_moved < FORWARD.autoencoder(model, image).bytes_moved

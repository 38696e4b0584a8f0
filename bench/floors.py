"""The least that the convolutional blocks can move and multiply, counted from shapes.

Counted is one pass over memory for what cannot share one: a group's statistics need all of it before its first element
is normalised, and so do the sums in the norm's gradient. What a pass can do on the way is free: shift, scale, SiLU, a
bias, the residual sum, statistics of what it writes, both gradients of a convolution. So

- norm + act alone reads x twice and writes its result; backward reads x and the gradient twice and writes one: 3 + 5;
- a norm before a convolution has its statistics from the pass that writes x, and reads x once only where x comes from
  outside; backward reads x and the gradient once more, the sums being free too, and writes one: 0 or 1, and 3;
- a convolution reads its input and writes its output; backward reads both sides and writes the input's gradient: 2 + 3;
- the sum of a residual block reads x, and backward the gradient (with a shortcut also x) once more;
- the two convolutions from features to a latent's mean and log σ² read the features, and write their gradient, once;
- upsampling and convolution read x and write eight times as many voxels; backward reads both and writes the gradient.

Products are those of the convolutions, forward once and backward twice; those of the upsampling convolution are what
exchanging the two leaves, an eighth. Parameters, losses and the latent's sampling are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from decovae.models.autoencoder import Autoencoder
from decovae.models.blocks import Downsample, ResidualBlock, Upsample

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Floor:
    """Bytes to be moved, and floating-point operations of matrix products."""

    bytes_moved: int = 0
    flops: int = 0

    def __add__(self, other: Floor) -> Floor:
        return Floor(self.bytes_moved + other.bytes_moved, self.flops + other.flops)


@dataclass(frozen=True)
class Counting:
    """Floors of blocks on features of shape (N, C, D, H, W), for one size of element.

    Args:
        itemsize: bytes of an element of the features.
        backward: count forward and backward, not forward alone.
    """

    itemsize: int
    backward: bool

    def norm_act(self, x: Shape) -> Floor:
        """GroupNorm and SiLU, alone."""
        return self._moved(3 * math.prod(x), 5 * math.prod(x))

    def residual_block(self, block: ResidualBlock, x: Shape, *, alone: bool = True) -> tuple[Floor, Shape]:
        """Two norms and convolutions, the sum, perhaps a shortcut; alone, or behind what wrote `x`."""
        conv1, conv2 = _convolution(block.conv1), _convolution(block.conv2)
        total = self._norm(x, first=alone)
        first, inner = self.convolution(conv1, x)
        second, y = self.convolution(conv2, inner)
        total += first + self._norm(inner) + second
        if isinstance(block.nin_shortcut, nn.Identity):
            return total + self._moved(math.prod(x), math.prod(y)), y
        side = self._multiplied(_convolution(block.nin_shortcut), y)
        return total + self._moved(math.prod(x), math.prod(y) + math.prod(x)) + side, y

    def convolution(self, conv: nn.Conv3d, x: Shape, *, input_gradient: bool = True) -> tuple[Floor, Shape]:
        """A convolution that keeps the size, or divides it by its stride."""
        y = (x[0], conv.out_channels, *(size // step for size, step in zip(x[2:], conv.stride, strict=True)))
        if input_gradient:
            moved = self._moved(math.prod(x) + math.prod(y), 2 * math.prod(x) + math.prod(y))
        else:
            moved = self._moved(math.prod(x) + math.prod(y), math.prod(x) + math.prod(y))
        return moved + self._multiplied(conv, y, gradients=1 + input_gradient), y

    def upsampling(self, conv: nn.Conv3d, x: Shape) -> tuple[Floor, Shape]:
        """Trilinear interpolation to twice the size and a convolution."""
        y = (x[0], conv.out_channels, *(2 * size for size in x[2:]))
        moved = self._moved(math.prod(x) + math.prod(y), 2 * math.prod(x) + math.prod(y))
        return moved + self._multiplied(conv, x), y

    def row(self, blocks: Iterable[nn.Module], x: Shape, *, input_gradient: bool = True) -> tuple[Floor, Shape]:
        """Blocks of the autoencoder one after the other."""
        total = Floor()
        for index, block in enumerate(blocks):
            if isinstance(block, nn.GroupNorm):
                part = self._norm(x, first=index == 0)
            elif isinstance(block, ResidualBlock):
                part, x = self.residual_block(block, x, alone=index == 0)
            elif isinstance(block, Upsample):
                part, x = self.upsampling(_convolution(block), x)
            elif isinstance(block, Downsample):
                part, x = self.convolution(_convolution(block), x)
            else:
                part, x = self.convolution(_convolution(block), x, input_gradient=index > 0 or input_gradient)
            total += part
        return total, x

    def autoencoder(self, model: Autoencoder, image: Shape) -> Floor:
        """Encoding and decoding an image that needs no gradient."""
        encoder, features = self.row(model.encoder.blocks, image, input_gradient=False)
        mean, latent = self.convolution(_convolution(model.quant_conv_mu), features)
        # Its features were read for the mean already, and both gradients end in one.
        log_variance = self._moved(math.prod(latent), math.prod(latent)) + Floor(flops=mean.flops)
        return encoder + mean + log_variance + self.decoder(model, latent)

    def decoder(self, model: Autoencoder, latent: Shape) -> Floor:
        """Decoding a latent."""
        return self.row([model.post_quant_conv, *model.decoder.blocks], latent)[0]

    def _norm(self, x: Shape, *, first: bool = False) -> Floor:
        return self._moved(first * math.prod(x), 3 * math.prod(x))

    def _moved(self, forward: int, backward: int) -> Floor:
        return Floor(self.itemsize * (forward + self.backward * backward))

    def _multiplied(self, conv: nn.Conv3d, places: Shape, *, gradients: int = 2) -> Floor:
        """The products of a convolution at as many places as there are voxels of this shape."""
        voxels = places[0] * math.prod(places[2:])
        return Floor(flops=2 * voxels * conv.weight.numel() * (1 + self.backward * gradients))


def _convolution(module: nn.Module) -> nn.Conv3d:
    return next(layer for layer in module.modules() if isinstance(layer, nn.Conv3d))

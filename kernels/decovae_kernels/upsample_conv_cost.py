"""Which way an upsampling convolution takes: predicted seconds of a training step, the same on every run.

The direct way convolves at high resolution: 8·27·C_in·C_out multiply-adds a low-resolution voxel forward, twice that
backward. The factorised way needs an eighth of them, and moves its 27 products of C_out channels in return.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a kind of device does in a second, and what the two ways ask of it besides matrix products.

    Products, convolutions: multiply-adds count as 2, by the dtype's bytes an element.
    Bandwidth: bytes; per channel and voxel of low resolution, forward and backward together, the direct way reads or
    writes `direct_moves` elements and the factorised way `factorised_moves`. Lanes: instructions of single threads;
    the factorised way's kernels issue `instructions` of them per channel and voxel.
    """

    products: dict[int, float]
    convolutions: dict[int, float]
    bandwidth: float
    direct_moves: float
    factorised_moves: float
    lanes: float
    instructions: float

    def direct(self, in_channels: int, out_channels: int, voxels: int, element: int) -> float:
        """Predicted seconds of forward and backward."""
        # Convolutions work on 8 channels at a time.
        padded = -(-in_channels // 8) * 8, -(-out_channels // 8) * 8
        arithmetic = 3 * direct_flops(*padded, voxels) / self.convolutions[element]
        moved = self.direct_moves * voxels * (in_channels + out_channels) / 2 * element
        return arithmetic + moved / self.bandwidth

    def factorised(self, in_channels: int, out_channels: int, voxels: int, element: int) -> float:
        """Predicted seconds of forward and backward."""
        arithmetic = 3 * factorised_flops(in_channels, out_channels, voxels) / self.products[element]
        moved = self.factorised_moves * voxels * out_channels * element
        return arithmetic + moved / self.bandwidth + self.instructions * voxels * out_channels / self.lanes


# Both GPUs' figures are the published ones times a plausible share (0.7 of the matrix rate for large products, 0.6 for
# convolutions, 0.85 of the bandwidth, 0.7 of the issue rate), not measurements. Moves: the direct way writes the
# upsampled tensor (8 elements a voxel) and reads it, twice; its gradient, and that of the output, twice. The factorised
# way writes 27 products and reads them; their gradients once and twice. Instructions are counted in the machine code.
_GPU_MOVES = {"direct_moves": 88.0, "factorised_moves": 27.0 * 5 + 24, "instructions": 4000.0}
_RTX_3090 = Machine(
    products={2: 0.7 * 71e12, 4: 0.7 * 35.6e12},
    convolutions={2: 0.6 * 71e12, 4: 0.6 * 35.6e12},
    bandwidth=0.85 * 936e9,
    lanes=0.7 * 82 * 128 * 1.7e9,
    **_GPU_MOVES,
)
# Products in float32, convolutions in TF32, as torch's defaults have it.
_H200 = Machine(
    products={2: 0.7 * 989e12, 4: 0.7 * 67e12},
    convolutions={2: 0.6 * 989e12, 4: 0.6 * 495e12},
    bandwidth=0.85 * 4.8e12,
    lanes=0.7 * 132 * 128 * 1.8e9,
    **_GPU_MOVES,
)
# Fitted to measured times of one thread of a server processor with AVX-512; ways on more threads compare alike.
_CPU = Machine(
    products={4: 90e9, 8: 45e9},
    convolutions={4: 105e9, 8: 52e9},
    bandwidth=10e9,
    direct_moves=92.0,
    factorised_moves=550.0,
    lanes=1.0,
    instructions=0.0,
)


def direct_flops(in_channels: int, out_channels: int, voxels: int) -> int:
    """Of the forward pass; multiply-adds count as 2, `voxels` are those of low resolution."""
    return 8 * factorised_flops(in_channels, out_channels, voxels)


def factorised_flops(in_channels: int, out_channels: int, voxels: int) -> int:
    """Of the forward pass; the sums after the products, like every other addition, are not counted."""
    return 2 * 27 * in_channels * out_channels * voxels


def chosen(x: torch.Tensor, out_channels: int, triton: bool) -> str:
    """Which of "direct" and "factorised" for `x` (N, C_in, D, H, W), by shape, dtype and kind of device alone."""
    if x.device.type == "cuda" and not triton:
        # Sums over the products that wait for memory at every step: nothing is gained.
        return "direct"
    machine = _machine(x.device, triton)
    volumes, in_channels, depth, height, width = x.shape
    # In plain torch the factorised way computes half precision in float32.
    element = x.element_size() if triton else max(x.element_size(), 4)
    figures = in_channels, out_channels, volumes * depth * height * width, element
    return "factorised" if machine.factorised(*figures) < machine.direct(*figures) else "direct"


def _machine(device: torch.device, triton: bool) -> Machine:
    if not triton:
        return _CPU
    # Tensors without memory that stand for a GPU's stand for a workstation's.
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] >= 9:
        return _H200
    return _RTX_3090

"""New latents and images from a flow: sample i depends on (seed, i), not on what is made beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from decovae.data.volumes import Shape, times
from decovae.errors import InputError
from decovae.generation.conditioning import guided_velocity
from decovae.generation.flow_file import FlowDescription
from decovae.generation.solvers import TOLERANCE, evaluations, integrate
from decovae.models.autoencoder import Autoencoder
from decovae.models.flow_unet import FlowUNet
from decovae.models.weights import encoder_fingerprint
from decovae.threads import one_thread
from decovae_kernels import norm_conv

Precision = Literal["fp32", "bf16"]


def sample_noise(seed: int, index: int, channels: int, shape: Shape) -> Tensor:
    """The noise that sample `index` of `seed` starts from: (channels, *shape), float32, standard normal, on the CPU.

    A function of its arguments alone, of the same bits on every machine.

    Raises:
        ValueError: `seed` or `index` is negative.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index are at least 0, not {seed} and {index}")
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(index,))))
    return torch.from_numpy(generator.standard_normal((channels, *shape), dtype=np.float32))


def check_decoder(autoencoder: Autoencoder, description: FlowDescription, name: str) -> None:
    """Refuse an autoencoder that a flow's latents were not made by.

    Args:
        autoencoder: to decode with.
        description: of the flow.
        name: what the message calls the autoencoder.

    Raises:
        InputError: its channels, its compression or its encoder are not those of the flow's latents.
    """
    space, config = description.space, autoencoder.config
    if config.latent_channels != space.channels:
        raise InputError(
            f"{name}: has latents of {config.latent_channels} channels, the flow of {space.channels}; "
            "give the autoencoder that the flow was trained on."
        )
    grid = tuple(config.compression * size for size in space.shape)
    if grid != space.grid:
        raise InputError(
            f"{name}: decodes the flow's latents to a grid of {times(grid)} voxels, not {times(space.grid)}; "
            "give the autoencoder that the flow was trained on."
        )
    fingerprint = encoder_fingerprint(autoencoder)
    if fingerprint != space.encoder:
        raise InputError(
            f"{name}: has the encoder {fingerprint[:8]}…, the flow's latents are of the encoder {space.encoder[:8]}…; "
            "give the autoencoder that the flow was trained on, or that one with a fine-tuned decoder."
        )


class Sampler:
    """A flow and a decoder on a device.

    On the CPU everything is computed a sample at a time on one thread, where both the batch and the number of threads
    would change the last bits of convolutions: a sample is then the same to the bit whatever is made beside it. On a
    GPU it is the same to rounding. The state of the differential equation is float32 in either precision.

    Args:
        flow: in evaluation mode; moved to the device, in place.
        description: of that flow.
        autoencoder: in evaluation mode; moved to the device, in place.
        device: where to compute.
        solver: one of `decovae.generation.solvers.SOLVERS`.
        steps: of the solver; dopri5 takes as many as its tolerance needs.
        tolerance: of dopri5.
        guidance: weight of classifier-free guidance; 1 follows the condition as trained.
        precision: of the networks: "bf16" is autocast, except in the decoder's last norm and convolution: these are
            in float32, because an image rounded to bfloat16 would have steps of 1/256 below 1, and 1/128 above.
        compile: compile the flow, on a GPU with CUDA graphs; it then sees batches of one size only, filled up.

    Raises:
        InputError: an unknown solver.
        ValueError: `steps` below 1.
    """

    def __init__(
        self,
        flow: FlowUNet,
        description: FlowDescription,
        autoencoder: Autoencoder,
        *,
        device: torch.device | str = "cpu",
        solver: str = "euler",
        steps: int = 30,
        tolerance: float = TOLERANCE,
        guidance: float = 1.0,
        precision: Precision = "fp32",
        compile: bool = False,
    ) -> None:
        evaluations(solver, steps)
        self.device = torch.device(device)
        self.space = description.space
        self.solver, self.tolerance, self.guidance, self.precision = solver, tolerance, guidance, precision
        self.times = description.schedule.times(steps, math.prod(self.space.shape))
        self.compiled = compile
        self.autoencoder = autoencoder.to(self.device)
        flow.to(self.device)
        if self.device.type == "cuda":  # where cuDNN's 3D convolutions would otherwise turn each input round and back
            for module in (autoencoder, flow):
                module.to(memory_format=torch.channels_last_3d)
        self._network = torch.compile(flow, mode="reduce-overhead", dynamic=False) if compile else flow

    @property
    def alone(self) -> bool:
        """Whether samples are computed one at a time: on the CPU, and by dopri5, whose steps suit a single one."""
        return self.device.type == "cpu" or self.solver == "dopri5"

    def latents(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """Where the flow takes noise.

        Args:
            noise: (N, C, d, h, w), float32, on any device.
            condition: (K,), a row of conditions for all; None for none.

        Returns:
            Latents to decode, no longer standardised: (N, C, d, h, w), float32, on the sampler's device.
        """
        return self.space.restore(self._solved(noise, condition, self.times))

    def noises(self, latents: Tensor, condition: Tensor | None = None) -> Tensor:
        """Where latents come from: the same equation backwards in time, an inverse of `latents` up to solver error.

        Args:
            latents: (N, C, d, h, w), float32, not standardised, on any device.
            condition: (K,), a row of conditions for all; None for none.

        Returns:
            (N, C, d, h, w), float32, on the sampler's device.
        """
        return self._solved(self.space.standardize(latents), condition, self.times.flip(0))

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """The image of a latent (C, d, h, w): (1, D, H, W), float32, on the CPU."""
        batch = latent[None].to(self.device)
        with self._bits(), self._autocast():
            half = self.precision == "bf16"
            image = _decode_smoothly(self.autoencoder, batch) if half else self.autoencoder.decode(batch)
        return image[0].float().cpu()

    @torch.no_grad()
    def _solved(self, start: Tensor, condition: Tensor | None, times: Tensor) -> Tensor:
        start = start.to(self.device, torch.float32)
        condition = None if condition is None else condition.to(self.device)
        with self._bits(), self._autocast():
            parts = start.split(1) if self.alone else (start,)
            ends = [
                integrate(
                    lambda x, t: self._velocity(x, t, condition),
                    part,
                    times,
                    solver=self.solver,
                    tolerance=self.tolerance,
                )
                for part in parts
            ]
        return torch.cat(ends)

    def _velocity(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        rows = None if condition is None else condition.expand(x.shape[0], -1)
        velocity = guided_velocity(self._network, x, t, rows, self.guidance).float()
        return velocity.clone() if self.compiled else velocity  # the next replay of the graph writes over its output

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @contextmanager
    def _bits(self) -> Iterator[None]:
        if self.device.type == "cpu":
            with one_thread():
                yield
        else:
            yield


def _decode_smoothly(autoencoder: Autoencoder, latent: Tensor) -> Tensor:
    """What `autoencoder.decode` returns under autocast, but for the last norm and convolution, which are in float32."""
    *blocks, norm, last = autoencoder.decoder.blocks
    features: Tensor = autoencoder.post_quant_conv(latent)
    for block in blocks:
        features = block(features)
    with torch.autocast(features.device.type, enabled=False):
        norm, convolution = cast(nn.GroupNorm, norm), cast(nn.Conv3d, last.get_submodule("conv.conv"))
        affine = norm.weight, norm.bias, norm.num_groups, norm.eps
        image, _ = norm_conv(features.float(), *affine, convolution.weight, convolution.bias, silu=False)
    return image

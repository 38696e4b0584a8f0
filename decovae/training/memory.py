"""How much GPU memory training and inference will take, without running them and without a GPU.

The networks run on fake tensors, which have shapes and no content, while `MemoryTracker` follows what would be alive.
Predicted is what PyTorch's allocator hands out (``torch.cuda.max_memory_allocated``), eager, on one GPU. Not in it are
the CUDA context and the allocator's fragmentation, together often 0.5 to 1.5 GiB, workspaces of cuDNN, and what
torch.compile rearranges: leave a tenth of a card free.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.training.live_memory import CUDA_BLOCK, MemoryTracker, SavedForBackward
from decovae.training.pretended_cuda import Nowhere, pretended_cuda

if TYPE_CHECKING:
    from decovae.training.config import VAEConfig

MemoryMode = Literal["balanced", "tight", "none"]
Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class AutoencoderMemory:
    """Predicted bytes of an autoencoder on one GPU.

    Attributes:
        parameters: weights, float32.
        gradients: their gradients.
        optimizer: AdamW's two moments of each.
        saved: what a forward keeps for backward, parameters and `weight_casts` left out.
        weight_casts: copies of weights in autocast's dtype that are kept for backward too.
        training_peak: most at once in a step of forward and backward with a reconstruction loss, the four above and the
            batch included.
        encode_peak: most at once while the batch is encoded without gradients, weights and batch included.
        decode_peak: the same for decoding its latent.
    """

    parameters: int
    gradients: int
    optimizer: int
    saved: int
    weight_casts: int
    training_peak: int
    encode_peak: int
    decode_peak: int


def predict_memory(
    config: AutoencoderConfig,
    shape: tuple[int, int, int],
    *,
    batch: int = 1,
    memory: MemoryMode = "balanced",
    precision: Precision = "bf16",
) -> AutoencoderMemory:
    """What the autoencoder takes on a GPU, by itself: seconds, and nothing is run.

    Args:
        config: shape of the autoencoder.
        shape: voxels (D, H, W) of a patch or a volume, multiples of ``config.compression``.
        batch: volumes at once.
        memory: what its blocks keep for backward, see `decovae.fuse`; "none" means torch's own operators.
        precision: bf16 autocast, or float32 throughout.

    Raises:
        ValueError: a shape that the autoencoder cannot take, or an unknown ``memory``.
    """
    volume = (batch, config.image_channels, *shape)
    with _counting() as tracker:
        model = Autoencoder(config, memory=None if memory == "none" else memory)
        parameters = tracker.current
        image = torch.empty(volume)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        tracker.reset_peak()
        with torch.no_grad(), autocast:
            latent = model.encode(image)[0]
        encode_peak = tracker.peak
        del image
        latent = latent.float()
        tracker.reset_peak()
        with torch.no_grad(), autocast:
            model.decode(latent)
        decode_peak = tracker.peak
        del latent
        moments = [torch.zeros_like(parameter) for parameter in model.parameters() for _ in range(2)]
        optimizer = tracker.current - parameters
        image = torch.empty(volume)
        tracker.reset_peak()
        with autocast, SavedForBackward(model) as saved:
            reconstruction, distribution = model(image)
        loss = (reconstruction.float() - image).abs().mean() + distribution.kl
        del reconstruction, distribution
        loss.backward()
        training_peak = tracker.peak
        before = tracker.current
        model.zero_grad()
        gradients = before - tracker.current
        del moments
    return AutoencoderMemory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        saved=saved.activations,
        weight_casts=saved.weight_casts,
        training_peak=training_peak,
        encode_peak=encode_peak,
        decode_peak=decode_peak,
    )


def predict_training_peak(config: VAEConfig) -> int:
    """Most bytes alive at once in a training step of `VAEStage` on one GPU: what `predict_memory` predicts, and losses,
    perceptual features, discriminators, clipping, AdamW and moving averages as configured. Needs the ``train`` extra.

    Model, batch size, patch, memory mode and precision ("auto" is bf16) are the configuration's. The step is one in
    which the discriminators take part, and not the first, so the optimizers' moments exist. It is predicted as it is
    without torch.compile. No weights are loaded, no volumes opened.

    Raises:
        ValueError: a patch that the networks cannot take.
    """
    from decovae.losses.objective import VAEObjective
    from decovae.training.step import Step
    from decovae.training.vae import VAENetworks

    optimizer = replace(config.optimizer, accumulation=min(config.optimizer.accumulation, 2))  # more change nothing
    precision = "bf16" if config.precision == "auto" else config.precision
    config = replace(config, optimizer=optimizer, precision=precision, compile="off", device="cpu", init=None)

    runtime = Nowhere(torch.device("cpu"))
    with _counting() as tracker:
        networks = VAENetworks(config, runtime, VAEObjective(config.loss, deco=config.deco, load=False))
        steps = Step(networks, config, runtime)
        for name, network in networks.networks.items():
            _have_moments(network, steps.optimizers[name])
        batch = {"image": torch.empty(config.data.batch_size, config.model.image_channels, *config.data.patch)}
        tracker.reset_peak()
        steps.gradients(repeat(batch), config.loss.adversarial_warmup)
        steps.update(config.loss.adversarial_warmup)
        return tracker.peak


def _have_moments(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Bring an optimizer to where it is after its first step, by one kernel for all parameters as on a GPU."""
    for group in optimizer.param_groups:
        group["fused"] = True
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextmanager
def _counting() -> Iterator[MemoryTracker]:
    """A tracker of what a GPU would allocate; torch's random state is afterwards what it was."""
    used = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=used), pretended_cuda(), MemoryTracker(granularity=CUDA_BLOCK) as tracker:
        yield tracker

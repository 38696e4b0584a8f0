"""What a training step computes, and what the device could: whose ratio is the utilisation (MFU).

Counted are the multiplications and additions of matrix products and convolutions, forward and backward, of all networks
of a step, as this project's operators do them: a fused upsampling has fewer than torch's. What `tight` memory computes
a second time does not count: it is no progress. The peak is the rate of a large matrix product on this device at the
start of the run, in the format that the networks are computed in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from decovae.rates import matrix_flops_per_second
from decovae.training.config import AdversarialConfig, DecoderConfig, FlowConfig, RunConfig, VAEConfig
from decovae.training.pretended_cuda import Nowhere, pretended_cuda


def peak_flops_per_second(device: torch.device, *, bf16: bool) -> float:
    """Operations a second of a large matrix product, measured: half a second."""
    if bf16:
        return matrix_flops_per_second("bfloat16", device)
    return matrix_flops_per_second("tf32" if device.type == "cuda" else "float32", device)


def step_flops(config: RunConfig, network: nn.Module, *, step: int) -> int:
    """Operations of one training step of one process, counted on fake tensors: nothing is run, or moved.

    Args:
        config: of a run whose stage exists: what it is given, such as latents, lies where it says.
        network: of a flow, whose conditions belong to its data.
        step: number of the step; discriminators join at one.
    """
    optimizer = replace(config.optimizer, accumulation=1)
    alone = replace(config, optimizer=optimizer, compile="off", precision="fp32", device="cpu")
    if isinstance(alone, AdversarialConfig) and alone.memory == "tight":
        alone = replace(alone, memory="balanced")
    one_batch = _flow_flops(alone, network) if isinstance(alone, FlowConfig) else _adversarial_flops(alone, step)
    return one_batch * config.optimizer.accumulation


def joins_at(config: RunConfig) -> int:
    """The step from which on a step computes more, as discriminators take part; 0 where none do."""
    if isinstance(config, AdversarialConfig) and config.loss.adversarial:
        return config.loss.adversarial_warmup
    return 0


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    used = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=used), pretended_cuda(), FlopCounterMode(display=False) as operations:
        yield operations


def _adversarial_flops(config: RunConfig, step: int) -> int:
    from decovae.losses.objective import VAEObjective
    from decovae.models.autoencoder import Autoencoder
    from decovae.models.weights import load_autoencoder
    from decovae.training.decoder import DecoderNetworks
    from decovae.training.finished import open_vae
    from decovae.training.step import Step
    from decovae.training.vae import VAENetworks

    assert isinstance(config, VAEConfig | DecoderConfig)
    shape = config.model if isinstance(config, VAEConfig) else load_autoencoder(open_vae(config.vae).weights).config
    runtime = Nowhere(torch.device("cpu"))
    with _counting() as operations:
        deco = config.deco if isinstance(config, VAEConfig) else "none"
        objective = VAEObjective(config.loss, deco=deco, load=False)
        if isinstance(config, VAEConfig):
            networks: VAENetworks | DecoderNetworks = VAENetworks(replace(config, init=None), runtime, objective)
        else:
            networks = DecoderNetworks(config, runtime, objective, Autoencoder(shape))
        batch = {"image": torch.empty(config.data.batch_size, shape.image_channels, *config.data.patch)}
        Step(networks, config, runtime).gradients(iter([batch]), step)
        return int(operations.get_total_flops())


def _flow_flops(config: FlowConfig, network: nn.Module) -> int:
    from decovae.generation.latents import open_latents
    from decovae.models.flow_unet import FlowUNet
    from decovae.training.finished import open_vae
    from decovae.training.latents import latents_of

    assert isinstance(network, FlowUNet)
    alone = Nowhere(torch.device("cpu"))
    space = open_latents(config.latents or latents_of(open_vae(config.vae), alone)).space
    fused = next(network.parameters()).device.type == "cuda"
    with _counting() as operations:
        counted = FlowUNet(config.model, network.latent_channels, network.conditions, fused=fused)
        latents = torch.empty(config.data.batch_size, network.latent_channels, *space.shape)
        conditions = torch.zeros(len(latents), len(network.conditions)) if network.conditions else None
        counted(latents, torch.full((len(latents),), 0.5), conditions).sum().backward()
        return int(operations.get_total_flops())

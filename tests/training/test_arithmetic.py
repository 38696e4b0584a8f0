"""The arithmetic that is counted without running is that of a step that runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from decovae.losses.objective import VAEObjective
from decovae.models.flow_unet import FlowUNet
from decovae.rates import matrix_flops_per_second
from decovae.runtime import Runtime
from decovae.training.arithmetic import joins_at, step_flops
from decovae.training.command_line import parse
from decovae.training.config import VAEConfig
from decovae.training.finished import open_vae
from decovae.training.latents import latents_of
from decovae.training.presets import DECODER_PRESETS, FLOW_PRESETS, VAE_PRESETS
from decovae.training.step import Step
from decovae.training.vae import VAENetworks
from tests.training.conftest import TINY, TINY_DECODER, TINY_FLOW, finished_vae

CPU = torch.device("cpu")


def tiny(*options: str) -> VAEConfig:
    return parse(VAE_PRESETS, [*TINY, "--loss.adversarial-warmup", "3", *options], default="quickstart")


def count(config: object, *, step: int = 5, network: nn.Module | None = None) -> int:
    return step_flops(config, network or nn.Identity(), step=step)  # type: ignore[arg-type]


def test_what_is_counted_is_what_a_step_computes() -> None:
    config = tiny("--loss.perceptual", "0", "--loss.adversarial-slices", "0")
    networks = VAENetworks(config, Runtime(CPU), VAEObjective(config.loss, deco=config.deco))
    batch = {"image": torch.rand(2, 1, 24, 24, 24)}
    with FlopCounterMode(display=False) as operations:
        Step(networks, config, Runtime(CPU)).gradients(iter([batch]), 3)
    random = torch.get_rng_state()
    assert count(config, step=3) == operations.get_total_flops()
    assert count(config, step=2) < count(config, step=joins_at(config))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.ones(1).sum().item() == 1  # no fake tensors are left


def test_recomputation_is_no_progress_and_batches_are() -> None:
    config = tiny("--loss.adversarial-volume", "0", "--loss.adversarial-slices", "0", "--loss.perceptual", "0")
    twice = replace(config, memory="tight", optimizer=replace(config.optimizer, accumulation=2))
    assert count(twice) == 2 * count(config)


def test_every_stage_is_counted(tmp_path: Path) -> None:
    vae = finished_vae(tmp_path / "vae")
    source = tiny()
    decoder = parse(DECODER_PRESETS, [*TINY_DECODER, "--vae", str(vae)], default="quickstart")
    decoder = replace(decoder, data=source.data)
    decoder = replace(decoder, loss=replace(decoder.loss, adversarial_volume=0, adversarial_slices=0, perceptual=0))
    assert count(decoder) > 0
    latents_of(open_vae(vae), Runtime(CPU))
    flow = parse(FLOW_PRESETS, [*TINY_FLOW, "--vae", str(vae)], default="quickstart")
    network = FlowUNet(flow.model, source.model.latent_channels)
    size = torch.ones(2, source.model.latent_channels, 16, 18, 16)
    with FlopCounterMode(display=False) as operations:
        network(size, torch.full((2,), 0.5)).sum().backward()
    assert count(flow, network=network) == operations.get_total_flops()


def test_measuring_the_peak_leaves_torch_as_it_was() -> None:
    precision, random = torch.get_float32_matmul_precision(), torch.get_rng_state()
    assert matrix_flops_per_second("float32", CPU) > 0
    assert torch.get_float32_matmul_precision() == precision
    assert torch.equal(torch.get_rng_state(), random)

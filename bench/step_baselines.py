"""The whole training step of the paper's autoencoder: this project's own, and the same in MONAI's parts; and its floor.

A step is an object that is called without arguments and changes its networks' weights once. Equal work: from the same
weights on the same image all give the same terms of the loss and the same gradients, up to rounding, where the noise of
the posterior is out of sight and all slices are looked at. All do: encoding, a draw of the posterior, decoding; L1,
the KL divergence, VAD, LPIPS on random slices, and both discriminators' judgement; backward into the autoencoder alone,
its gradient's norm clipped, AdamW; the discriminators on the same reconstruction and on the image, backward, their
gradient's norm clipped, AdamW.
The batch is on the device before: loading data is left out. LPIPS's weights are random, which costs the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from bench.baselines import FORMULATIONS, vad
from bench.block_baselines import monai_autoencoder
from bench.floors import Counting, Floor, Shape
from decovae.losses.objective import VAEObjective
from decovae.losses.perceptual import PerceptualLoss
from decovae.losses.slices import random_slices
from decovae.models.autoencoder import Autoencoder
from decovae.runtime import Runtime
from decovae.training.config import VAEConfig
from decovae.training.step import Step as TrainingStep
from decovae.training.vae import VAENetworks

Memory = Literal["balanced", "tight", "none"]
OPTIMIZER_PASSES = 8


class OurStep:
    """A step of this project's loop, as ``train/vae.py`` makes it.

    Args:
        config: the run's; its perceptual weights are not loaded.
        image: (N, 1, D, H, W), on the device where the step is to run.

    Attributes:
        networks: what is trained, by name.
        optimizers: theirs.
    """

    def __init__(self, config: VAEConfig, image: Tensor) -> None:
        runtime = Runtime(image.device)
        objective = VAEObjective(config.loss, deco=config.deco, load=False)
        networks = VAENetworks(config, runtime, objective)
        self.updates = TrainingStep(networks, config, runtime)
        self.step = config.loss.adversarial_warmup  # all terms are active from here on
        self.networks: dict[str, nn.Module] = networks.networks
        self.optimizers: dict[str, Optimizer] = dict(self.updates.optimizers)
        self.frozen: nn.Module = objective
        self.image = image

    def __call__(self) -> dict[str, Tensor]:
        terms = self.updates.gradients(repeat({"image": self.image}), self.step).terms
        self.updates.update(self.step)
        return terms


class MonaiStep:
    """The same step as users of MONAI write it, with its autoencoder, discriminators and adversarial loss.

    Four things are better than in MONAI's tutorials, so that nothing is measured but the networks: the discriminators
    are frozen while the autoencoder is judged, where the tutorials compute gradients that nobody uses, and laid out
    channels-last, as in this project; AdamW is the fused one where there is one; and convolutions run in bfloat16
    without a gradient scaler. The autoencoder's norms take no other layout than contiguous.

    Args:
        config: the run's, as for `OurStep`.
        image: (N, 1, D, H, W), on the device where the step is to run.
        checkpointed: use MONAI's checkpointing.
        float16: its autoencoder's norms write float16, and autocast is to that, also without a gradient scaler.

    Attributes:
        networks: what is trained, by name.
        optimizers: theirs.
    """

    def __init__(self, config: VAEConfig, image: Tensor, *, checkpointed: bool = False, float16: bool = False) -> None:
        from monai.losses import PatchAdversarialLoss
        from monai.networks.nets import PatchDiscriminator

        torch.manual_seed(config.seed)
        self.config, self.image, device = config, image, image.device
        self.dtype = torch.float16 if float16 else torch.bfloat16
        self.autoencoder = monai_autoencoder(config.model, checkpointed=checkpointed, float16=float16).to(device)
        gans = {
            name: PatchDiscriminator(
                spatial_dims=dimensions, channels=32, in_channels=1, num_layers_d=3, norm="INSTANCE"
            )
            for name, dimensions in (("volume", 3), ("slices", 2))
        }
        gans["volume"] = gans["volume"].to(memory_format=torch.channels_last_3d)
        gans["slices"] = gans["slices"].to(memory_format=torch.channels_last)
        self.discriminators = nn.ModuleDict(gans).to(device)
        self.networks: dict[str, nn.Module] = {"autoencoder": self.autoencoder, "discriminators": self.discriminators}
        self.frozen: nn.Module = PerceptualLoss(config.loss.perceptual_network, load=False).to(device)
        self.adversarial = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)
        settings = config.optimizer
        rates = {"autoencoder": settings.learning_rate, "discriminators": settings.discriminator_learning_rate}
        self.optimizers: dict[str, Optimizer] = {
            name: AdamW(
                network.parameters(),
                lr=rates[name],
                weight_decay=settings.weight_decay,
                eps=settings.eps,
                fused=device.type == "cuda",
            )
            for name, network in self.networks.items()
        }

    def __call__(self) -> dict[str, Tensor]:
        with self._autocast():
            self.discriminators.requires_grad_(False)
            total, terms, reconstruction, planes = self._generator()
        total.backward()
        self.discriminators.requires_grad_(True)
        norm = self._update("autoencoder")
        with self._autocast():
            judged, judgement = self._discriminator(reconstruction.detach(), planes)
        judged.backward()
        terms |= judgement
        norms = {"gradient_norm_autoencoder": norm, "gradient_norm_discriminators": self._update("discriminators")}
        return {"generator": total.detach(), **{name: term.detach() for name, term in terms.items()}, **norms}

    def _generator(self) -> tuple[Tensor, dict[str, Tensor], Tensor, list[tuple[Tensor, ...]]]:
        image, weights = self.image, self.config.loss
        reconstruction, mu, sigma = self.autoencoder(image)
        planes = random_slices(weights.slice_fraction, image, reconstruction, seed=self.config.seed)
        terms = {
            "l1": F.l1_loss(reconstruction.float(), image),
            "perceptual": self.frozen(planes),
            "adversarial_volume": self._judged("volume", [reconstruction], real=True, training=False),
            "adversarial_slices": self._judged("slices", [fake for _, fake in planes], real=True, training=False),
        }
        with torch.autocast(image.device.type, enabled=False):
            mu, variance = mu.float(), sigma.float().square()
            terms["kl"] = 0.5 * (mu.square() + variance - variance.log() - 1).mean()
            terms["deco"] = vad(mu, FORMULATIONS["channel-rows"])
        total = (
            weights.l1 * terms["l1"]
            + weights.kl * terms["kl"]
            + terms["deco"]
            + weights.perceptual * terms["perceptual"]
            + weights.adversarial_volume * terms["adversarial_volume"]
            + weights.adversarial_slices * terms["adversarial_slices"]
        )
        return total, terms, reconstruction, planes

    def _discriminator(
        self, reconstruction: Tensor, planes: list[tuple[Tensor, ...]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        seen = {
            "volume": ([self.image], [reconstruction]),
            "slices": ([real for real, _ in planes], [fake.detach() for _, fake in planes]),
        }
        terms = {
            f"discriminator_{name}": self._judged(name, real, real=True, training=True)
            + self._judged(name, fake, real=False, training=True)
            for name, (real, fake) in seen.items()
        }
        return self.config.loss.discriminator * torch.stack(list(terms.values())).sum(), terms

    def _judged(self, name: str, images: list[Tensor], *, real: bool, training: bool) -> Tensor:
        logits = [self.discriminators[name](image)[-1].float() for image in images]
        loss: Tensor = self.adversarial(logits, target_is_real=real, for_discriminator=training)
        return loss

    def _update(self, name: str) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.networks[name].parameters(), self.config.optimizer.clip_norm)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad(set_to_none=True)
        return norm

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.image.device.type, self.dtype, enabled=self.config.precision == "bf16")


Step = OurStep | MonaiStep


def step(name: str, config: VAEConfig, image: Tensor) -> Step:
    """A whole training step: "ours-balanced", "ours-tight", "plain…", "monai…" or "monai-checkpointed"; compiled as
    ``--compile on`` does it where an "ours" or "plain" ends so."""
    kind, _, mode = name.partition("-")
    if kind == "monai":
        return MonaiStep(config, image, checkpointed="checkpointed" in mode, float16="float16" in mode)
    memory = cast(Memory, "none" if kind == "plain" else mode.partition("-")[0])
    return OurStep(replace(config, memory=memory, compile="on" if mode.endswith("compiled") else "off"), image)


def held_bytes(done: Step) -> int:
    """What is there between two steps, after the first: parameters, the optimizers' moments, LPIPS, the image."""
    tensors = [done.image, *done.frozen.parameters(), *done.frozen.buffers()]
    for network, optimizer in zip(done.networks.values(), done.optimizers.values(), strict=True):
        tensors += [*network.parameters(), *network.buffers()]
        tensors += [value for state in optimizer.state.values() for value in state.values() if value.ndim > 0]
    return sum(tensor.nbytes for tensor in tensors)


@dataclass
class Passes:
    """Elements that convolutions and norms of a network see in a forward, and its products."""

    inside: int = 0
    outside: int = 0
    norms: int = 0
    flops: int = 0


def passes(network: nn.Module, run: Callable[[], object]) -> tuple[Passes, Passes]:
    """What a forward of a network sees, and of it what the convolutions see that take a single channel in."""
    total, first = Passes(), Passes()

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            for counted in (total, first) if module.in_channels == 1 else (total,):
                counted.inside += inputs[0].numel()
                counted.outside += output.numel()
                counted.flops += 2 * output.numel() // module.out_channels * module.weight.numel()
        elif isinstance(module, nn.modules.instancenorm._InstanceNorm):
            total.norms += output.numel()

    hooks = [module.register_forward_hook(count) for module in network.modules()]
    run()
    for hook in hooks:
        hook.remove()
    return total, first


@functools.cache
def floor(config: VAEConfig, image: Shape, *, itemsize: int) -> Floor:
    """The least that a step has to move and multiply, counted as in `bench.floors`.

    LPIPS sees image and reconstruction forward and sends a gradient to the second; so does a discriminator that judges
    for the autoencoder; one that learns sees both and needs no gradient of what goes in. A norm's backward moves three
    times its input. The optimizers read each gradient for the norm, and then, in float32,
    parameter, gradient and both moments, and write all but the gradient. LPIPS's heads, the losses and the slicing are
    left out.
    """
    from decovae.models.discriminators import Discriminators

    with torch.device("meta"), torch.no_grad():
        autoencoder, judges = Autoencoder(config.model, memory=None), Discriminators()
        batch = torch.empty(image)
        planes = [real for (real,) in random_slices(config.loss.slice_fraction, batch, seed=0)]
        features = PerceptualLoss(load=False).network.net
        seen, _ = passes(features, lambda: [features(plane.expand(-1, 3, -1, -1)) for plane in planes])
        judged, first = passes(judges, lambda: judges(batch, planes))
    both_sides = seen.inside + seen.outside
    elements = 3 * both_sides
    elements += 2 * (judged.inside + judged.outside) + 3 * judged.norms
    elements += 2 * (3 * judged.inside + 2 * judged.outside + 3 * judged.norms - first.inside)
    flops = 3 * seen.flops + 2 * judged.flops + 2 * (3 * judged.flops - first.flops)
    parameters = sum(p.numel() for network in (autoencoder, judges) for p in network.parameters())
    moved = itemsize * elements + OPTIMIZER_PASSES * torch.float32.itemsize * parameters
    return Counting(itemsize, backward=True).autoencoder(autoencoder, image) + Floor(moved, flops)

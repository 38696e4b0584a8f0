"""Stage 3: the flow from noise to standardised latents (Eq. 2)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from decovae.data import streams
from decovae.data.loading import Loader
from decovae.data.patches import visited
from decovae.errors import InputError
from decovae.files import write_atomically, writing
from decovae.generation.conditioning import drop_conditions, encode_conditions, fit_conditions
from decovae.generation.contact_sheet import save_contact_sheet
from decovae.generation.flow_file import FLOW, FlowDescription, save_flow, sha256
from decovae.generation.flow_matching import TimeSchedule, flow_matching_loss
from decovae.generation.latent_space import LatentSpace
from decovae.generation.latents import LatentStore
from decovae.generation.sampling import sample_noise
from decovae.generation.solvers import integrate
from decovae.losses.objective import Loss
from decovae.models.flow_unet import FlowUNet
from decovae.models.weights import WEIGHTS_FILE, load_autoencoder
from decovae.runtime import Runtime
from decovae.training.checkpoints import Best
from decovae.training.config import FlowConfig
from decovae.training.interruption import leave_signals_to_the_parent
from decovae.training.latents import latents_and_decoder
from decovae.training.noise import normal_noise, positions_of, uniforms
from decovae.training.parallel import prepare_module
from decovae.training.sampling import Batches
from decovae.training.stage import Batch

TIMES = 8
"""Fixed times at which a validation latent's loss is taken."""

VALIDATION_SEED = 20_000_000
"""Added to the run's seed for the noise of validation, which no sample is to share."""


class LatentSample(TypedDict):
    """One latent: μ and σ, (C, d, h, w) float32, its conditions (K,), whose it is, and where it stands."""

    mean: Tensor
    sigma: Tensor
    condition: Tensor
    subject: str
    position: int


class LatentDataset(Dataset[LatentSample]):
    """Training latents, one at each position 0, 1, 2, … without end, as patches are in `PatchDataset`."""

    def __init__(self, store: LatentStore, conditions: Tensor, *, seed: int) -> None:
        self.store, self.conditions, self.seed = store, conditions, seed
        self.rows = store.training

    def __getitem__(self, position: int) -> LatentSample:
        """The sample at `position`, at least 0; pure, so equal in every process."""
        row = self.rows[visited(position, len(self.rows), seed=self.seed)]
        mean, sigma = self.store.read(row)
        subject = self.store.records[row].subject
        condition = self.conditions[row]
        return {"mean": mean, "sigma": sigma, "condition": condition, "subject": subject, "position": position}


def standardized_for(space: LatentSpace, train_on: Literal["draws", "mean"]) -> LatentSpace:
    """The space with the standard deviation of what is trained on: that of μ, or of μ + σε."""
    return space if train_on == "mean" else replace(space, std=math.hypot(space.std, space.noise))


class FlowStage:
    """The flow's network, its loss, and its validation.

    Raises:
        InputError: if the latents cannot be had or do not fit the autoencoder, or a condition is no column of theirs.
    """

    best = Best("flow_loss", higher=False)

    def __init__(self, config: FlowConfig, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.store, self.weights = latents_and_decoder(config, runtime)
        self.space = space = standardized_for(self.store.space, config.train_on)
        if not self.store.validation:
            raise InputError(f"{self.store.folder}: holds no validation subjects; encode some.")
        columns = [{"subject": record.subject, **record.columns} for record in self.store.records]
        self.conditions = runtime.on_main(lambda: fit_conditions(config.conditions, columns, self.store.training))
        self.condition_rows = torch.stack([encode_conditions(self.conditions, row) for row in columns])
        self.inputs = {"latents": self._identity(), "autoencoder": sha256(self.weights)}
        self.schedule = TimeSchedule(scale=config.time_scale)
        self.voxels = math.prod(space.shape)
        torch.manual_seed(config.seed)
        self.network = FlowUNet(config.model, space.channels, self.conditions)
        prepare_module(self.network, runtime, config)
        self.networks: dict[str, nn.Module] = {"flow": self.network}
        self.learning_rates = {"flow": config.optimizer.learning_rate}
        decodes = runtime.main and config.preview.samples > 0
        self.autoencoder = runtime.place(load_autoencoder(self.weights)) if decodes else None

    def _identity(self) -> str:
        """A hash of all that a training sample depends on."""
        store = self.store
        rows = [(crc, record.split) for crc, record in zip(store.checksums, store.records, strict=True)]
        content = [store.space.as_dict(), rows, self.condition_rows.tolist()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def begin(self, folder: Path) -> None:
        """Keep the autoencoder: its run may move or be tuned before this one ends."""
        with writing(folder):
            write_atomically(folder / WEIGHTS_FILE, lambda file: file.write(self.weights.read_bytes()))

    def batches(self, position: int, *, steps: int) -> Iterable[Batch]:
        """This process's latents, from a position in the order of samples on."""
        config = self.config
        order = Batches(
            position,
            count=steps * config.optimizer.accumulation,
            size=config.data.batch_size,
            rank=self.runtime.rank,
            world=self.runtime.world,
        )
        return Loader(
            LatentDataset(self.store, self.condition_rows, seed=config.seed),
            order,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            device=self.runtime.device,
            at_start=leave_signals_to_the_parent,
        )

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Loss]]:
        """The flow matching loss at random times between the latents and fresh noise."""
        config, device = self.config, self.runtime.device
        positions = positions_of(batch, len(batch["mean"]))
        draw = partial(uniforms, seed=config.seed, positions=positions, device=device)
        mean = batch["mean"].to(device, non_blocking=True)
        latent = mean
        noise_of = partial(normal_noise, mean, seed=config.seed, first=positions[0])
        if config.train_on == "draws":
            latent = mean + batch["sigma"].to(device, non_blocking=True) * noise_of(stream=streams.LATENT)
        times = self.schedule.draw(draw(1, stream=streams.TIME)[:, 0], self.voxels)
        conditions = batch["condition"].to(device, non_blocking=True)
        dropped = draw(1 + conditions.shape[1], stream=streams.DROPOUT)
        conditions = drop_conditions(conditions, config.condition_dropout, dropped)
        loss = self._loss(latent, noise_of(stream=streams.NOISE), times, conditions)
        yield "flow", Loss(loss.mean(), {"flow_loss": loss.mean().detach()})

    def _loss(self, latent: Tensor, noise: Tensor, times: Tensor, conditions: Tensor) -> Tensor:
        return flow_matching_loss(
            self.network,
            self.space.standardize(latent),
            noise,
            times,
            norm=self.config.norm,
            condition=conditions.to(latent.device) if self.conditions else None,
        )

    def validate(self, step: int, folder: Path, autocast: AbstractContextManager[Any]) -> dict[str, Any]:
        """The loss of held-out latents, and of as many training latents, on fixed noise at fixed times."""
        held_out = self.store.validation
        seen = self.store.training[: len(held_out)]
        on_held_out, on_seen = self._losses_of(held_out, autocast), self._losses_of(seen, autocast)
        due = step % self.config.preview.every == 0 or step == self.config.steps
        if self.config.preview.samples and due:
            self._preview(step, folder, autocast)
        return {
            "flow_loss": on_held_out.mean().item(),
            "flow_loss_training": on_seen.mean().item(),
            "flow_loss_at_times": on_held_out.mean(0).tolist(),
        }

    def _losses_of(self, rows: list[int], autocast: AbstractContextManager[Any]) -> Tensor:
        """(rows, times), float64, the same on every process whatever their number."""
        device, space = self.runtime.device, self.space
        world, rank = self.runtime.world, self.runtime.rank
        times = self.schedule.quantiles(TIMES, self.voxels).to(device)
        draw = partial(sample_noise, self.config.seed + VALIDATION_SEED, channels=space.channels, shape=space.shape)
        found: list[tuple[int, Tensor]] = []
        for turn in range(-(-len(rows) // world)):
            # Sharded weights are gathered by all processes together: one without a latent repeats the last.
            place = turn * world + rank
            row = rows[min(place, len(rows) - 1)]
            first = row * (TIMES + 1)
            noise = torch.stack([draw(first + index) for index in range(TIMES)]).to(device)
            mean, sigma = (part.to(device) for part in self.store.read(row))
            latent = mean + sigma * draw(first + TIMES).to(device) if self.config.train_on == "draws" else mean
            latents = latent.expand(TIMES, *latent.shape)
            with autocast:
                losses = self._loss(latents, noise, times, self.condition_rows[row].expand(TIMES, -1))
            if place < len(rows):
                found.append((place, losses.double().cpu()))
        gathered = sorted(chain.from_iterable(self.runtime.gather(found)), key=lambda item: item[0])
        return torch.stack([losses for _, losses in gathered])

    def _preview(self, step: int, folder: Path, autocast: AbstractContextManager[Any]) -> None:
        """Sampled volumes, conditioned as the first held-out subjects are; sharded networks run on all processes."""
        config, space, device = self.config, self.space, self.runtime.device
        rows = [self.store.validation[i % len(self.store.validation)] for i in range(config.preview.samples)]
        conditions = self.condition_rows[rows].to(device) if self.conditions else None
        noise = [sample_noise(config.seed, i, space.channels, space.shape) for i in range(config.preview.samples)]
        times = self.schedule.times(config.preview.steps, self.voxels)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            with autocast:
                return self.network(x, t, conditions).to(x.dtype)

        latents = space.restore(integrate(velocity, torch.stack(noise).to(device), times, solver="euler"))

        def decode_and_save() -> None:
            assert self.autoencoder is not None  # the main process has it
            with autocast:
                volumes = [self.autoencoder.decode(latent[None])[0, 0].float().cpu().numpy() for latent in latents]
            picture = folder / "previews" / f"step-{step:08d}.png"
            with writing(picture):
                save_contact_sheet(volumes, picture, frame=space.frame.on_grid(space.grid), title=f"step {step}")

        self.runtime.on_main(decode_and_save)

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """``flow.safetensors``, beside the ``autoencoder.safetensors`` that turns its latents into volumes."""
        config = self.config
        description = FlowDescription(
            space=self.space,
            network=config.model,
            conditions=self.conditions,
            schedule=self.schedule,
            trained_on=config.train_on,
            steps=config.steps,
            seed=config.seed,
            condition_dropout=config.condition_dropout if self.conditions else 0.0,
        )
        save_flow(weights, description, folder / FLOW)

    def summary(self, validations: list[dict[str, Any]]) -> dict[str, Any]:
        """The last validation's losses, the first one's, and whose latents they were."""
        last, space = validations[-1], self.space
        return {
            "flow_loss": last["flow_loss"],
            "flow_loss_training": last["flow_loss_training"],
            "flow_loss_at_times": last["flow_loss_at_times"],
            "flow_loss_before_training": validations[0]["flow_loss"],
            "train_on": self.config.train_on,
            "encoder": space.encoder,
            "latents": str(self.store.folder),
            "latent_mean": space.mean,
            "latent_std": space.std,
            "latent_noise": space.noise,
            "data": space.data,
        }

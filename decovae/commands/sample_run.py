"""What ``decovae sample`` does once its options are known: load, make what is missing, draw the pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import decovae
from decovae.commands.sample import SampleConfig
from decovae.errors import InputError, RunError
from decovae.generation.conditioning import encode_conditions, parse_condition_options
from decovae.generation.flow_file import FlowDescription, FlowRun, load_flow, open_flow_run, sha256
from decovae.generation.interpolation import encoded_subject, fractions, noise_of, slerp
from decovae.generation.latent_space import LatentSpace
from decovae.generation.latents import open_latents
from decovae.generation.production import Task, produce, usual_batch
from decovae.generation.progress import Progress
from decovae.generation.sample_folder import begin_folder, draw_pictures, missing, versions
from decovae.generation.sampling import Precision, Sampler, check_decoder, sample_noise
from decovae.generation.solvers import evaluations
from decovae.generation.volumes_out import write_sample
from decovae.models.autoencoder import Autoencoder
from decovae.models.flow_unet import FlowUNet
from decovae.models.weights import load_autoencoder
from decovae.runtime import Runtime
from decovae.training.finished import open_vae

Result = TypeVar("Result")
Ends = tuple[Tensor, Tensor]

COMPILE_FROM = 3_000
"""Evaluations of the flow by a process from which on ``--compile auto`` compiles: compiling takes minutes, which a
hundred volumes of 30 steps repay."""

DOPRI5_EVALUATIONS = 50
"""What dopri5 is taken to need for a sample, which nobody knows before."""


@dataclass(frozen=True)
class Loaded:
    """All that a command line names, read and found to go together. `subjects` holds the μ of two, or None."""

    flow: FlowUNet
    description: FlowDescription
    autoencoder: Autoencoder
    row: dict[str, str]
    subjects: Ends | None
    settings: dict[str, Any]


def run(config: SampleConfig, runtime: Runtime) -> None:
    """Make the samples that are not there yet, on all processes, and then the pictures of all.

    Raises:
        InputError: a run, a decoder, latents or an output folder that cannot be used.
        RunError: a sample is not finite, memory runs out, or a file cannot be written.
    """
    files = runtime.on_main(lambda: open_flow_run(config.run))
    weights = runtime.on_main(lambda: _weights(config, files))
    precision = _precision(config, runtime)
    if config.compile == "on" and runtime.device.type != "cuda":
        raise InputError("--compile on: the flow is compiled for a GPU only; leave the option out.")
    loaded = _on_all(runtime, lambda: _load(config, files, weights, precision))
    folder, space = config.folder, loaded.description.space
    runtime.on_main(lambda: begin_folder(folder, loaded.settings))
    if not all(runtime.gather(folder.is_dir())):
        raise InputError(f"--out {folder}: not every node sees it; give a folder on storage that all nodes share.")

    condition = encode_conditions(loaded.description.conditions, loaded.row) if loaded.row else None

    @cache
    def ends() -> Ends:
        return _ends(config, sampler, loaded, condition, say=runtime.main)

    tasks = _samples(config, space) if config.interpolate is None else _path(config, ends)
    places = runtime.on_main(lambda: missing(folder, tasks))
    mine = [tasks[place] for place in places[runtime.rank :: runtime.world]]
    batch = config.batch_size or usual_batch(runtime.device)
    sampler = Sampler(
        loaded.flow,
        loaded.description,
        loaded.autoencoder,
        device=runtime.device,
        solver=config.solver,
        steps=config.solver_steps,
        tolerance=config.solver_tolerance,
        guidance=config.guidance,
        precision=precision,
        compile=_compiles(config, runtime, calls=-(-len(mine) // batch)),
    )
    facts = {
        **loaded.settings,
        "device": runtime.device.type,
        "training_data": space.data,
        "versions": versions(),
    }

    def make() -> None:
        if mine and config.interpolate:
            ends()  # here, where they are computed once, before several threads ask for them
        with Progress("Sampling", len(mine), visible=runtime.main) as progress:

            def finish(task: Task, image: Tensor) -> None:
                write_sample(image, space.frame, folder, task.name, label=task.label, facts={**task.facts, **facts})
                progress.advance()

            produce(sampler, mine, finish, condition=condition, batch=batch)

    _on_all(runtime, make)
    title = f"{len(tasks)} volumes of {loaded.settings['run']}, {config.solver}"
    animated = config.interpolate is not None

    def draw() -> list[Path]:
        return draw_pictures(folder, tasks, frame=space.frame, title=title, animated=animated) if runtime.main else []

    pictures = _on_all(runtime, draw)
    if runtime.main:
        print(f"{len(tasks)} synthetic volumes in {folder}, {len(places)} of them new.")
        print(f"Pictures: {', '.join(map(str, pictures))}")


def _weights(config: SampleConfig, files: FlowRun) -> Path:
    return files.autoencoder if config.decoder is None else open_vae(config.decoder, option="--decoder").weights


def _load(config: SampleConfig, files: FlowRun, weights: Path, precision: Precision) -> Loaded:
    flow, description = load_flow(files.flow)
    autoencoder = load_autoencoder(weights)
    check_decoder(autoencoder, description, str(weights))
    row = parse_condition_options(config.condition, description.conditions)
    settings: dict[str, Any] = {
        "run": files.folder.resolve().name,
        "flow_sha256": sha256(files.flow),
        "decoder": weights.resolve().parent.name,
        "autoencoder_sha256": sha256(weights),
    }
    subjects = None
    if config.interpolate is None:
        settings["seed"] = config.seed
    else:
        settings |= {"between": list(config.interpolate), "frames": config.path_frames}
    if config.interpolate is not None and config.latents is not None:
        store = open_latents(config.latents)
        first, second = (encoded_subject(store, description.space, subject) for subject in config.interpolate)
        subjects = first, second
        settings["latents"] = config.latents.resolve().name
    solver = {"tolerance": config.solver_tolerance} if config.solver == "dopri5" else {"steps": config.solver_steps}
    settings |= {"solver": config.solver, **solver, "condition": row, "guidance": config.guidance}
    settings |= {"precision": precision, "version": decovae.__version__}
    return Loaded(flow, description, autoencoder, row, subjects, settings)


def _precision(config: SampleConfig, runtime: Runtime) -> Precision:
    if config.precision == "auto":
        return "bf16" if runtime.device.type == "cuda" else "fp32"
    return config.precision


def _compiles(config: SampleConfig, runtime: Runtime, *, calls: int) -> bool:
    """Whether to compile the flow for so many solutions of its equation."""
    count = calls * (evaluations(config.solver, config.solver_steps) or DOPRI5_EVALUATIONS)
    pays = runtime.device.type == "cuda" and count >= COMPILE_FROM
    return config.compile == "on" or (config.compile == "auto" and pays)


def _samples(config: SampleConfig, space: LatentSpace) -> list[Task]:
    return [
        Task(
            f"sample-{index:05d}",
            f"seed {config.seed} sample {index}",
            partial(sample_noise, config.seed, index, space.channels, space.shape),
            {"sample": index},
        )
        for index in range(config.number or 0)
    ]


def _path(config: SampleConfig, ends: Callable[[], Ends]) -> list[Task]:
    """A task a frame; the ends of the path are asked for when the first noise is."""

    def noise(fraction: float) -> Tensor:
        return slerp(*ends(), fraction)

    first, second = config.interpolate or ("", "")
    return [
        Task(
            f"frame-{place:05d}",
            f"{first} to {second}: {fraction:.3f}",
            partial(noise, fraction),
            {"frame": place, "fraction": fraction},
        )
        for place, fraction in enumerate(fractions(config.path_frames))
    ]


def _ends(config: SampleConfig, sampler: Sampler, loaded: Loaded, condition: Tensor | None, *, say: bool) -> Ends:
    """The noises at both ends of a path."""
    first, second = config.interpolate or ("", "")
    if loaded.subjects is None:
        space = loaded.description.space
        noise, other = (sample_noise(int(seed), 0, space.channels, space.shape) for seed in (first, second))
        return noise, other
    found = [noise_of(sampler, latent, condition) for latent in loaded.subjects]
    if say:
        errors = " and ".join(f"{error:.2%}" for _, error in found)
        print(f"{first} and {second} come back from their noise within {errors} of a latent's standard deviation.")
    return found[0][0], found[1][0]


def _on_all(runtime: Runtime, action: Callable[[], Result]) -> Result:
    """What `action` returns, which every process runs; what it raises on one is raised on all, so that none waits."""
    results: list[Result] = []
    failure: InputError | RunError | None = None
    try:
        results.append(action())
    except (InputError, RunError) as error:
        failure = error
    except torch.OutOfMemoryError:
        failure = RunError("the device ran out of memory; give --batch-size 1, or --precision bf16.")
    except OSError as error:
        failure = RunError(f"{error.filename}: cannot be read or written ({error.strerror}).")
    for raised in runtime.gather(failure):
        if raised is not None:
            raised.on_all_processes = True
            raise raised
    return results[0]

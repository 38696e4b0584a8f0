"""What ``decovae sample`` does once its options are known: load, make what is missing, draw the pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from decovae.commands.sample import SampleConfig
from decovae.commands.sample_load import Ends, Loaded, decoder_of, latents_of, load
from decovae.errors import InputError, RunError
from decovae.generation.conditioning import encode_conditions
from decovae.generation.flow_file import open_flow_run
from decovae.generation.interpolation import fractions, noise_of, slerp
from decovae.generation.latent_space import LatentSpace
from decovae.generation.production import Task, decoding_bytes, produce, usual_batch
from decovae.generation.progress import Progress
from decovae.generation.sample_folder import begin_folder, draw_pictures, missing, versions
from decovae.generation.sampling import Precision, Sampler, sample_noise
from decovae.generation.solvers import evaluations
from decovae.generation.volumes_out import write_sample
from decovae.runtime import Runtime, raise_first

Result = TypeVar("Result")

COMPILE_FROM = 3_000
"""Evaluations of the flow by a process from which on ``--compile auto`` compiles: compiling takes minutes, which a
hundred volumes of 30 steps repay."""

CPU_OUT_OF_MEMORY = "DefaultCPUAllocator"
"""In torch's message where the CPU has no memory left, which has no type of its own."""

DOPRI5_EVALUATIONS = 50
"""What dopri5 is taken to need for a sample, which nobody knows before."""


def run(config: SampleConfig, runtime: Runtime) -> None:
    """Make the samples that are not there yet, on all processes, and then the pictures of all.

    Raises:
        InputError: a run, a decoder, latents or an output folder that cannot be used.
        RunError: a sample is not finite, memory runs out, or a file cannot be written.
    """
    files = runtime.on_main(lambda: open_flow_run(config.run))
    weights = runtime.on_main(lambda: decoder_of(config, files))
    latents = runtime.on_main(lambda: latents_of(config, files))
    precision = _precision(config, runtime)
    runtime.on_main(lambda: _check_compile(config, runtime))
    on_all = partial(_on_all, runtime, config)
    loaded = on_all(lambda: load(config, files, weights=weights, latents=latents, precision=precision))
    folder, space = config.folder, loaded.description.space
    runtime.on_main(lambda: begin_folder(folder, loaded.settings))
    seen = all(runtime.gather(folder.is_dir()))
    runtime.on_main(lambda: _check_shared(folder, seen))

    condition = encode_conditions(loaded.description.conditions, loaded.row) if loaded.row else None

    @cache
    def ends() -> Ends:
        return _ends(config, sampler, loaded, condition, say=runtime.main)

    tasks = _samples(config, space) if config.interpolate is None else _path(config, ends)
    places = runtime.on_main(lambda: missing(folder, tasks))
    mine = [tasks[place] for place in places[runtime.rank :: runtime.world]]
    volume_bytes = decoding_bytes(loaded.autoencoder.config, space.grid)
    batch = config.batch_size or usual_batch(runtime.device, volume_bytes)
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

    on_all(make, batch=batch)
    title = f"{len(tasks)} volumes of {loaded.settings['run']}, {config.solver}"
    animated = config.interpolate is not None

    def draw() -> list[Path]:
        return draw_pictures(folder, tasks, frame=space.frame, title=title, animated=animated) if runtime.main else []

    pictures = on_all(draw)
    if runtime.main:
        print(f"{len(tasks)} synthetic volumes in {folder}, {len(places)} of them new.")
        print(f"Pictures: {', '.join(map(str, pictures))}")


def _check_compile(config: SampleConfig, runtime: Runtime) -> None:
    if config.compile == "on" and runtime.device.type != "cuda":
        raise InputError("--compile on: the flow is compiled for a GPU only; leave the option out.")


def _check_shared(folder: Path, seen: bool) -> None:
    if not seen:
        raise InputError(f"--out {folder}: not every node sees it; give a folder on storage that all nodes share.")


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


def memory_advice(config: SampleConfig, device: str, batch: int) -> str:
    """What to do where memory ran out: take back the first option that asks for more than it must.

    Args:
        config: the options.
        device: "cpu" or "cuda".
        batch: samples that were made at once.
    """
    if batch > 1:
        return f"give a --batch-size below {batch}"
    if device == "cuda" and config.precision == "fp32":
        return "leave out --precision fp32"
    if config.compile == "on":
        return "leave out --compile on"
    if device == "cuda":
        return "nothing smaller can be asked for, so end what else uses the GPU (see nvidia-smi), or give --device cpu"
    return "nothing smaller can be asked for, so end what else uses the memory, or take a larger machine"


def _on_all(runtime: Runtime, config: SampleConfig, action: Callable[[], Result], *, batch: int = 1) -> Result:
    """What `action` returns, which every process runs; what it raises on one is raised on all, so that none waits."""
    results: list[Result] = []
    failure: InputError | RunError | None = None
    try:
        results.append(action())
    except (InputError, RunError) as error:
        failure = error
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or CPU_OUT_OF_MEMORY in str(error)):
            raise
        device = runtime.device.type
        name = "GPU" if device == "cuda" else "machine"
        failure = RunError(f"the {name} ran out of memory; {memory_advice(config, device, batch)}.")
    except OSError as error:  # one of write() names no file
        where = error.filename or config.folder
        failure = RunError(f"{where}: cannot be read or written ({error.strerror or error}).")
    raise_first(runtime.gather(failure))
    return results[0]

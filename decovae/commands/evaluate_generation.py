"""``decovae evaluate`` of a flow's run."""

from __future__ import annotations

from decovae.commands.evaluate import EvaluateConfig
from decovae.commands.evaluate_load import Evaluated, need_two, open_networks, open_split, tools_for
from decovae.data.volumes import times
from decovae.errors import InputError
from decovae.evaluation.distances import fidelity, frechet
from decovae.evaluation.generation import measure_generation, memorisation_entry
from decovae.evaluation.outputs import heading, partial_sentence, tissue_entry
from decovae.evaluation.runs import Run, autoencoder_behind
from decovae.evaluation.volume_sets import RealVolumes, SampleVolumes, choose_samples, open_samples
from decovae.generation.flow_file import FlowRun, load_flow, sha256
from decovae.generation.latent_space import LatentSpace
from decovae.models.weights import load_autoencoder
from decovae.runtime import Runtime
from decovae.training.volumes import describe


def evaluate_generation(config: EvaluateConfig, found: Run, files: FlowRun, runtime: Runtime) -> Evaluated:
    """Measure the samples of a folder, on all processes; nothing is written yet.

    Raises:
        InputError, RunError: as for `decovae.commands.evaluate_run.run`.
    """
    folder = runtime.on_main(lambda: choose_samples(config.run, config.samples))
    names, settings = runtime.on_main(
        lambda: open_samples(folder, flow_sha256=sha256(files.flow), number=config.number)
    )
    need_two(len(names[: config.limit]), what=str(folder), advice=f"make more with decovae sample {config.run} -n 16")
    space = load_flow(files.flow)[1].space
    source = runtime.on_main(lambda: autoencoder_behind(found))
    data = source.config.data
    if data.grid != space.grid:
        raise InputError(
            f"{config.run}: its flow makes volumes of {times(space.grid)} voxels, and {source.folder} was trained on "
            f"{times(data.grid)}: only volumes of one grid can be compared."
        )
    out = config.out if config.out is not None else folder / "evaluation"
    networks = open_networks(config, runtime, out)
    volumes, splits = open_split(source, runtime)
    limited = {name: indices[: config.limit] for name, indices in splits.items()}
    need_two(len(limited[config.real]), what=f"--real {config.real}", advice="give --real all")
    autoencoder = load_autoencoder(files.autoencoder).config
    tools = tools_for(config, runtime, space.grid, autoencoder=autoencoder, networks=networks)
    samples = SampleVolumes(folder, names[: config.limit], space)
    real = RealVolumes(volumes, limited[config.real], space.grid, through=space.frame)
    training, held_out = limited["training"], limited["validation"]
    done = measure_generation(real, samples, tools, training=training, held_out=held_out)
    used = {
        "real volumes": (len(real.indices), len(splits[config.real])),
        "samples": (len(samples.names), len(names)),
        "training volumes": (len(training), len(splits["training"])),
    }
    partial = partial_sentence(used, config.limit)
    subjects = [volumes.records[index].subject for index in training]
    evaluation = {
        **heading("generation", found, data=describe(data), grid=space.grid, seconds=done.seconds, partial=partial),
        "samples": folder.resolve().name,
        "decoder": settings.get("decoder"),
        "number": len(samples.names),
        "real": config.real,
        "real_volumes": len(real.indices),
        "real_note": _way(space),
        "solver": settings.get("solver"),
        "steps": settings.get("steps"),
        "seed": settings.get("seed"),
        "frechet": runtime.on_main(lambda: frechet(networks, done.real.slices, done.generated.slices)),
        "fidelity": runtime.on_main(lambda: fidelity(networks, done.real.slices, done.generated.slices)),
        "memorisation": memorisation_entry(
            done.copies,
            samples.names,
            subjects,
            len(held_out),
            others=space.data if space.data != describe(data) else None,
        ),
        "tissue": tissue_entry(
            {
                "real": list(zip(real.names, done.real.tissue, strict=True)),
                "generated": list(zip(samples.names, done.generated.tissue, strict=True)),
            }
        ),
    }
    rows = [{"set": "real", **row} for row in evaluation["tissue"]["sets"]["real"]]
    rows += [
        {"set": "generated", **row, "nearest": nearest, "distance": distance, "suspicious": row["volume"] in suspicious}
        for suspicious in [evaluation["memorisation"]["suspicious"]]
        for row, nearest, distance in zip(
            evaluation["tissue"]["sets"]["generated"],
            evaluation["memorisation"]["nearest"],
            evaluation["memorisation"]["samples"],
            strict=True,
        )
    ]
    return Evaluated(evaluation, rows, out)


def _way(space: LatentSpace) -> str | None:
    """A sentence on what was done to real volumes before they were measured; None for nothing."""
    if space.frame.shape == space.grid:
        return None
    return (
        f"real volumes went from the grid of {times(space.grid)} voxels to the {times(space.frame.shape)} that samples "
        "are written in, and back, as the samples did: so both are equally smoothed"
    )

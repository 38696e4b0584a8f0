"""``decovae evaluate`` of an autoencoder's or a decoder's run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from decovae.commands.evaluate import EvaluateConfig
from decovae.commands.evaluate_load import Evaluated, need_two, open_networks, open_split, tools_for, writing
from decovae.data.volumes import times
from decovae.errors import InputError
from decovae.evaluation.distances import frechet
from decovae.evaluation.outputs import forget_evaluation, heading, partial_sentence, tissue_entry
from decovae.evaluation.reconstruction import (
    MEASURES,
    Reconstructions,
    Reconstructor,
    keep_pair,
    kept_entries,
    measure_reconstructions,
)
from decovae.evaluation.runs import Run
from decovae.evaluation.volume_sets import RealVolumes
from decovae.losses.perceptual import NONE, RANDOM, PerceptualLoss
from decovae.metrics.bootstrap import mean_interval
from decovae.metrics.reconstruction import ms_ssim_scales
from decovae.models.weights import load_autoencoder
from decovae.runtime import Runtime
from decovae.training.finished import FinishedVAE
from decovae.training.volumes import describe

LEAST_GRID = 11
"""Voxels along every axis that SSIM's window needs."""


def evaluate_reconstruction(config: EvaluateConfig, found: Run, files: FinishedVAE, runtime: Runtime) -> Evaluated:
    """Reconstruct and measure volumes, on all processes; kept volumes are written, the rest is returned.

    Raises:
        InputError, RunError: as for `decovae.commands.evaluate_run.run`.
    """
    if config.samples is not None:
        raise InputError(f"--samples: {config.run} is the run of an autoencoder, not of a flow; leave the option out.")
    if config.number is not None:
        raise InputError(f"--number: {config.run} is the run of an autoencoder, which has no samples; give --limit.")
    data = files.config.data
    if min(data.grid) < LEAST_GRID:
        raise InputError(f"{config.run}: its grid is {times(data.grid)} voxels, and SSIM needs {LEAST_GRID} an axis.")
    out = config.out if config.out is not None else config.run / "evaluation"
    networks = open_networks(config, runtime, out)
    perceptual, note = runtime.on_main(lambda: _perceptual(config, files))
    volumes, splits = open_split(files, runtime)
    chosen = splits[config.split][: config.limit]
    need_two(len(chosen), what=f"--split {config.split}", advice="give --split all")
    autoencoder = runtime.place(load_autoencoder(files.weights)).eval()
    bf16 = config.precision == "bf16" or (config.precision == "auto" and runtime.device.type == "cuda")
    tools = tools_for(config, runtime, data.grid, autoencoder=autoencoder.config, networks=networks)
    real = RealVolumes(volumes, chosen, data.grid)
    reconstructor = Reconstructor(autoencoder, bf16, None if perceptual is None else runtime.place(perceptual))

    def keep(place: int, original: Tensor, reconstruction: Tensor) -> None:
        if place < config.keep_volumes:
            with writing(out):
                keep_pair(out, place, real.frame(place), real.names[place], original, reconstruction)

    if config.keep_volumes:
        runtime.on_main(writing(out)(lambda: forget_evaluation(out)))
    done = measure_reconstructions(real, reconstructor, tools, keep=keep)
    partial = partial_sentence({"volumes": (len(chosen), len(splits[config.split]))}, config.limit)
    evaluation = {
        **heading("reconstruction", found, data=describe(data), grid=data.grid, seconds=done.seconds, partial=partial),
        "split": config.split,
        "volumes": [
            {"subject": subject, "source": source, **row.measures}
            for subject, source, row in zip(real.names, real.sources, done.rows, strict=True)
        ],
        "measures": _intervals(real.names, done),
        "ms_ssim_scales": ms_ssim_scales(data.grid),
        "lpips_note": note,
        "frechet": runtime.on_main(lambda: frechet(networks, done.real, done.reconstructed)),
        "tissue": tissue_entry(
            {
                "real": [(name, row.real) for name, row in zip(real.names, done.rows, strict=True)],
                "reconstructed": [(name, row.reconstructed) for name, row in zip(real.names, done.rows, strict=True)],
            }
        ),
        "kept": kept_entries(real, done.rows, config.keep_volumes),
    }
    rows = [
        {
            **entry,
            **{f"{part}_ml": value for part, value in row.real.items()},
            **{f"{part}_ml_reconstructed": value for part, value in row.reconstructed.items()},
        }
        for entry, row in zip(evaluation["volumes"], done.rows, strict=True)
    ]
    return Evaluated(evaluation, rows, out)


def _intervals(subjects: Sequence[str], done: Reconstructions) -> dict[str, Any]:
    """Mean and confidence interval of each measure; None where there is none."""
    found: dict[str, Any] = {}
    for name in MEASURES:
        values = [row.measures[name] for row in done.rows]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            found[name] = None
            continue
        interval = mean_interval(known, subjects)
        found[name] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return found


def _perceptual(config: EvaluateConfig, files: FinishedVAE) -> tuple[PerceptualLoss | None, str | None]:
    """LPIPS's network, or why there is none."""
    trained_with = files.config.loss.perceptual_network
    network = trained_with if config.lpips is None else config.lpips
    if network == NONE:
        return None, "not asked for" if config.lpips else "the run used no perceptual network; give --lpips pretrained"
    if network == RANDOM:
        if config.lpips is not None:
            raise InputError("--lpips random: a distance of random features is no LPIPS; give pretrained or a file.")
        return None, "the run used random perceptual features, whose distance is no LPIPS; give --lpips pretrained"
    try:
        return PerceptualLoss(network), None
    except InputError as error:
        reason = str(error).partition(";")[0]
        if config.lpips is not None:
            raise InputError(
                f"--lpips {network}: {reason}; give none, pretrained, or the path of a squeezenet1_1 weights file."
            ) from error
        return None, f"{reason}; give --lpips with the path of a squeezenet1_1 weights file"

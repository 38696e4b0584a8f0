"""A study's folder as its runs, analyses and evaluations would leave it, without any of them being run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from decovae.data.frame import Frame
from decovae.data.template import cohort_affine
from decovae.data.volumes import Shape, affine_rows
from decovae.generation.volumes_out import nifti_bytes
from decovae.training.volumes import COHORT

SHAPE: Shape = (16, 18, 16)
DECOS = ("none", "cov", "sid", "vad")
SUBJECT = "sub-0007"
PLANES = ("axial", "coronal", "sagittal", "average")

MakeVolume = Callable[[int], np.ndarray]


def blob(seed: int, shape: Shape = SHAPE) -> np.ndarray:
    """A ball with waves in it, other ones for another seed."""
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    waves = 0.5 + 0.25 * np.sin((4 + seed % 3) * axes[0] + seed) * np.cos(5 * axes[1]) + 0.2 * axes[2]
    return np.where(radius < 0.8, waves, 0).clip(0, 1).astype(np.float32)


def write_study(
    out: Path,
    *,
    decos: Sequence[str] = DECOS,
    samples: int = 3,
    subject: str = SUBJECT,
    volume: MakeVolume = blob,
    measured: bool = True,
    flows: bool = True,
) -> Path:
    """Write a study with the runs vae, decoder and, with ``flows``, flow of every loss; with ``measured`` evaluated and
    analysed too."""
    for place, deco in enumerate(decos):
        folder = out / f"{deco}-seed42"
        vae = write_run(folder / "vae", "vae", deco=deco)
        decoder = write_run(folder / "decoder", "decoder", vae=str(vae.resolve()))
        flow = write_run(folder / "flow", "flow", vae=str(vae.resolve())) if flows else None
        for phase, run in (("before", vae), ("after", decoder)):
            if measured:
                write_reconstruction(run, place, phase, subject, volume)
            if flow is None:
                continue
            chosen = flow / "samples" / phase
            write_samples(chosen, flow, run, samples, lambda seed, place=place: blend(volume, place, seed))
            if measured:
                write_json(chosen / "evaluation" / "evaluation.json", generation(place, samples))
        if measured:
            write_json(vae / "analysis" / "analysis.json", analysis(deco, place))
    return out


def write_run(folder: Path, stage: str, **options: Any) -> Path:
    """A finished run; its weights are other bytes in every run."""
    data = {"batch_size": 2, "root": None, "grid": list(SHAPE), "patch": [8, 8, 8]}
    optimizer = {"learning_rate": 0.002}
    config = {"preset": "quickstart", "out": str(folder), "steps": 120, "seed": 42, "data": data, "stage": stage}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "optimizer": optimizer, **options}))
    summary = {"stage": stage, "steps": 120, "data": COHORT, "seed": 42, "preset": "quickstart"}
    write_json(folder / "summary.json", {**summary, "perceptual_network": "random"})
    lines = [json.dumps(record) for step in range(0, 121, 10) for record in _metrics(stage, step)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if stage == "flow":
        (folder / "flow.safetensors").write_bytes(str(folder).encode())
    weights = options["vae"] + "/autoencoder.safetensors" if stage == "flow" else ""
    content = Path(weights).read_bytes() if weights else str(folder).encode()
    (folder / "autoencoder.safetensors").write_bytes(content)
    return folder


def write_samples(folder: Path, flow: Path, decoder: Path, number: int, volume: MakeVolume) -> None:
    """What `decovae sample` leaves."""
    settings = {
        "run": flow.name,
        "flow_sha256": digest(flow / "flow.safetensors"),
        "decoder": decoder.name,
        "autoencoder_sha256": digest(decoder / "autoencoder.safetensors"),
        "seed": 42,
        "solver": "euler",
        "steps": 30,
    }
    write_json(folder / "samples.json", settings)
    for place in range(number):
        write_volume(folder / f"sample-{place:05d}.nii.gz", volume(place))


def write_reconstruction(run: Path, place: int, phase: str, subject: str, volume: MakeVolume) -> None:
    """What `decovae evaluate` leaves of an autoencoder."""
    original = volume(100)
    strength = 0.05 / (1 + place) * (1 if phase == "before" else 0.6)
    waves = np.sin(np.arange(original.size, dtype=np.float32).reshape(original.shape))
    write_volume(run / "evaluation" / "original-0.nii.gz", original)
    write_volume(
        run / "evaluation" / "reconstruction-0.nii.gz", (original + strength * waves * (original > 0)).clip(0, 1)
    )
    write_json(run / "evaluation" / "evaluation.json", reconstruction(place, phase, subject))


def write_volume(path: Path, volume: np.ndarray) -> None:
    """A NIfTI file over the template's box."""
    depth, height, width = volume.shape
    frame = Frame((depth, height, width), affine_rows(cohort_affine((depth, height, width))))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(nifti_bytes(volume.astype(np.float32), frame, label=path.name))


def reconstruction(place: int, phase: str, subject: str) -> dict[str, Any]:
    """An evaluation of reconstructions."""
    psnr = 24 + place + (phase == "after")
    means = {"psnr": psnr, "ssim": 0.8 + 0.03 * place, "ms_ssim": 0.9 + 0.01 * place}
    return {
        **common("reconstruction", place),
        "split": "validation",
        "volumes": [{"subject": subject, "source": "x", "psnr": psnr, "ssim": 0.8, "ms_ssim": 0.9, "lpips": None}] * 4,
        "measures": {
            **{name: {"mean": mean, "low": 0.98 * mean, "high": 1.01 * mean} for name, mean in means.items()},
            "lpips": None,
        },
        "ms_ssim_scales": 3,
        "lpips_note": "not measured: the pretrained weights are not at hand",
        "kept": [
            {
                "subject": subject,
                "original": "original-0.nii.gz",
                "reconstruction": "reconstruction-0.nii.gz",
                "psnr": psnr,
            }
        ],
        "tissue": tissue("reconstructed", place, 12),
    }


def generation(place: int, samples: int) -> dict[str, Any]:
    """An evaluation of samples."""
    random = np.random.default_rng(place)
    values = {"precision": 0.7, "recall": 0.2 + 0.1 * place, "density": 0.8, "coverage": 0.5, "kid": 0.0123}
    return {
        **common("generation", place),
        "samples": "after",
        "decoder": "decoder",
        "number": samples,
        "real": "all",
        "real_volumes": 24,
        "solver": "euler",
        "steps": 30,
        "seed": 42,
        "fidelity": {"random": {"proxy": True, **values, "slices": 512}},
        "memorisation": {
            "space": "Distances are Euclidean, between volumes averaged to blocks.",
            "samples": (0.9 + 0.2 * random.random(samples)).tolist(),
            "held_out": [1.01, 1.05, 1.09, 1.12, 1.17, 1.2],
            "nearest": ["sub-0001"] * samples,
            "suspicious": ["sample-00002"] if place == 1 else [],
            "ratio": 0.93,
            "note": None,
        },
        "tissue": tissue("generated", place, samples),
    }


def common(kind: str, place: int) -> dict[str, Any]:
    """What both evaluations have."""
    distances = {plane: 2.5 - 0.3 * place + 0.1 * number for number, plane in enumerate(PLANES)}
    return {
        "kind": kind,
        "version": 1,
        "date": "2026-05-01",
        "decovae": "0.1.0",
        "machine": {"processor": "Test processor", "torch_threads": 1, "torch": "2.10", "python": "3.11"},
        "data": COHORT,
        "grid": list(SHAPE),
        "seconds": {"load": 1.0, kind: 8.25, "measure": 0.7, "features": 2.0},
        "partial": "12 of 40 volumes: --limit 12" if place == 1 else None,
        "frechet": {
            "random": {
                "title": "SqueezeNet 1.1 with random weights: a proxy for trained features.",
                "proxy": True,
                **distances,
                "features": 128,
                "slices": {"real": 384, "generated": 192},
                "note": None,
            }
        },
    }


def tissue(key: str, place: int, number: int) -> dict[str, Any]:
    """Volumes of tissues, fewer with less spread for later models."""

    def volumes(seed: int, count: int) -> list[dict[str, Any]]:
        random = np.random.default_rng(seed)
        means = {"csf": 320, "grey": 760, "white": 610}
        return [
            {"volume": str(number), **{name: mean + 40 * random.standard_normal() for name, mean in means.items()}}
            for number in range(count)
        ]

    sets = {"real": volumes(99, 24), key: volumes(place, max(2, number))}
    return {"method": "Mixture of three Gaussians on intensities.", "unit": "ml", "sets": sets}


def analysis(deco: str, place: int) -> dict[str, Any]:
    """An analysis of four channels."""
    off = (0.6, 0.3, 0.15, 0.08)[place % 4]
    matrix = (np.full((4, 4), off) + (1 - off) * np.eye(4)).tolist()
    shares = np.array([4.0 - place, 2.0, 1.5, 1.0])
    shares /= shares.sum()
    points = np.random.default_rng(place).normal(size=(300, 2)) * (4 + place)
    return {
        "kind": "analysis",
        "version": 1,
        "date": "2026-05-01",
        "decovae": "0.1.0",
        "machine": {"processor": "Test processor", "torch_threads": 1},
        "run": "vae",
        "stage": "vae",
        "deco": deco,
        "data": COHORT,
        "split": "all",
        "latents": 24,
        "codes": 110592,
        "cosine_similarity": off,
        "pearson": off,
        "effective_rank": float(np.exp(-(shares * np.log(shares)).sum())),
        "explained_variance": shares.tolist(),
        "channel_mean": [0.0] * 4,
        "channel_variance": [1.0] * 4,
        "cosine_matrix": matrix,
        "correlation_matrix": matrix,
        "tsne": {"what": "300 voxel codes of 24 latents", "perplexity": 30, "points": points.tolist()},
    }


def blend(volume: MakeVolume, place: int, seed: int) -> np.ndarray:
    """A sample: alike for the same seed, a little different for another model."""
    return (0.8 * volume(seed) + 0.05 * place * (volume(seed) > 0)).clip(0, 1)


def write_json(path: Path, content: Any) -> None:
    """A JSON file, and the folders to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _metrics(stage: str, step: int) -> list[dict[str, Any]]:
    fall = math.exp(-step / 40)
    records: list[dict[str, Any]] = []
    if step % 40 == 0:
        figures = {"psnr": 25 - 15 * fall, "ssim": 0.8 - 0.5 * fall, "effective_rank": 4 - 2 * fall, "flow_loss": fall}
        records.append({"step": step, **{f"validation/{name}": value for name, value in figures.items()}})
    if step:
        log = {"l1": fall, "kl": 3 * fall, "flow_loss": fall, "seconds_per_step": 0.3, "samples_per_second": 6.7}
        records.append({"step": step, **log})
    return records

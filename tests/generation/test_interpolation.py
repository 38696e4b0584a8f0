"""Paths between noises, between seeds and between encoded subjects."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from decovae import cli
from decovae.data.frame import Frame
from decovae.data.template import cohort_affine
from decovae.data.volumes import VolumeRecord, affine_rows
from decovae.generation.encoding import encode_volumes
from decovae.generation.interpolation import MARGIN, fractions, noise_of, save_animation, slerp
from decovae.generation.latents import LatentStore
from decovae.generation.volumes_out import to_frame
from decovae.runtime import Runtime
from tests.generation.flows import CHANNELS, GRID, LATENT, SOURCE, tiny_autoencoder, tiny_sampler, write_run


def test_the_arc_has_its_ends_to_the_bit_and_even_speed() -> None:
    generator = torch.Generator().manual_seed(0)
    start, end = (torch.randn(4, 5, 6, generator=generator) for _ in range(2))
    assert torch.equal(slerp(start, end, 0), start)
    assert torch.equal(slerp(start, end, 1.0), end)
    points = [slerp(start, end, fraction).double() for fraction in fractions(9)]
    for place, point in enumerate(points):
        expected = torch.lerp(start.double().norm(), end.double().norm(), place / 8)
        assert point.norm() == pytest.approx(expected.item(), rel=1e-5)
    units = [point / point.norm() for point in points]
    angles = [math.acos(float((a * b).sum())) for a, b in itertools.pairwise(units)]
    assert angles == pytest.approx([angles[0]] * 8, rel=1e-3)
    # A straight line would pass through the middle at 1/√2 of the length.
    assert points[4].norm() > 1.3 * torch.lerp(start, end, 0.5).norm()


def test_arcs_that_are_none() -> None:
    vector = torch.arange(1.0, 5)
    torch.testing.assert_close(slerp(vector, vector, 0.3), vector)
    torch.testing.assert_close(slerp(vector, 3 * vector, 0.5), 2 * vector)
    torch.testing.assert_close(slerp(vector, torch.zeros(4), 0.5), vector / 2)
    assert torch.isfinite(slerp(vector, -vector, 0.25)).all()
    with pytest.raises(ValueError, match="one shape"):
        slerp(vector, vector[:2], 0.5)
    assert fractions(3) == [0, 0.5, 1]
    with pytest.raises(ValueError, match="two ends"):
        fractions(1)


@pytest.mark.parametrize(("solver", "steps", "most"), [("heun", 20, 1e-3), ("euler", 30, 0.05)])
def test_a_latent_comes_back_from_its_noise(solver: str, steps: int, most: float) -> None:
    """Within the solver's error, which falls with its order: here 0.02 % and 2 % of a latent's standard deviation."""
    sampler = tiny_sampler(solver=solver, steps=steps)
    latent = 1.7 * torch.randn(CHANNELS, *LATENT, generator=torch.Generator().manual_seed(3)) + 0.1
    noise, error = noise_of(sampler, latent)
    again = sampler.latents(noise[None])[0]
    assert noise.shape == latent.shape
    assert error < most
    assert (again - latent).square().mean().sqrt().item() == pytest.approx(error * 1.7, rel=1e-5)


@dataclass(frozen=True)
class ThreeVolumes:
    """Three subjects of noise."""

    @property
    def records(self) -> list[VolumeRecord]:
        affine = affine_rows(cohort_affine(SOURCE))
        return [VolumeRecord(f"sub-{index}", f"memory:{index}", SOURCE, 0.0, 1.0, affine) for index in range(3)]

    def read(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).random(SOURCE, dtype=np.float32)


def encode(out: Path, seed: int = 0) -> LatentStore:
    return encode_volumes(
        tiny_autoencoder(seed),
        ThreeVolumes(),
        training=[0, 1],
        validation=[2],
        grid=GRID,
        out=out,
        runtime=Runtime(torch.device("cpu")),
        data="noise",
    )


def path(*arguments: object) -> int:
    return cli.main(["sample", *map(str, arguments), "--device", "cpu"])


def test_a_path_between_subjects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, store, out = write_run(tmp_path / "run"), encode(tmp_path / "latents"), tmp_path / "out"
    options = ("--solver", "heun", "--steps", 20, "--frames", 3, "--out", out)
    assert path(run, "--interpolate", "sub-2", "sub-0", "--latents", store.folder, *options) == 0
    assert "sub-2 and sub-0 come back from their noise within 0." in capsys.readouterr().out
    sampler = tiny_sampler()
    for frame, subject in ((0, 2), (2, 0)):
        reconstruction = to_frame(sampler.decode(store.read(subject)[0]), store.space.frame)
        volume = nib.load(out / f"frame-{frame:05d}.nii.gz").get_fdata()
        assert np.sqrt(np.mean((volume - reconstruction) ** 2)) < 0.01 * reconstruction.std()
    facts = json.loads((out / "frame-00001.json").read_text())
    assert facts["synthetic"] is True
    assert facts["between"] == ["sub-2", "sub-0"]
    assert (out / "interpolation.gif").exists()


def test_subjects_are_looked_for_where_the_flow_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, store = write_run(tmp_path / "run"), encode(tmp_path / "latents")
    (run / "summary.json").write_text(json.dumps({"latents": str(store.folder)}))
    options = ("--steps", 1, "--frames", 2)
    assert path(run, "--interpolate", "sub-2", "sub-0", *options, "--out", tmp_path / "default") == 0
    chosen = ("--latents", store.folder, "--out", tmp_path / "chosen")
    assert path(run, "--interpolate", "sub-2", "sub-0", *options, *chosen) == 0
    made, same = ((tmp_path / name / "frame-00001.nii.gz").read_bytes() for name in ("default", "chosen"))
    assert made == same
    capsys.readouterr()
    assert path(run, "--interpolate", 2, 0, *options) == 0  # seeds, though there are latents
    assert "come back from their noise" not in capsys.readouterr().out
    (run / "summary.json").write_text(json.dumps({"latents": "elsewhere"}))
    assert path(run, "--interpolate", "sub-2", "sub-0") == 2
    printed = capsys.readouterr().err
    assert "--interpolate sub-2 sub-0: not two seeds, and there are no latents elsewhere; give" in printed


def test_latents_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, store, other = write_run(tmp_path / "run"), encode(tmp_path / "latents"), encode(tmp_path / "other", seed=9)
    cases = (
        ("sub-0", other.folder, "are of the encoder"),
        ("sub-7", store.folder, "--interpolate sub-7: no such subject in"),
    )
    for subject, folder, sentence in cases:
        assert path(run, "--interpolate", "sub-1", subject, "--latents", folder) == 2
        assert sentence in capsys.readouterr().err
    damaged = next(store.folder.glob("latents-*"))
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(bytes(content))
    assert path(run, "--interpolate", "sub-0", "sub-2", "--latents", store.folder) == 2
    assert str(damaged) in capsys.readouterr().err


def test_every_picture_of_an_animation_says_synthetic(tmp_path: Path) -> None:
    volumes = [np.full((10, 12, 8), level) for level in (0.2, 0.5, 0.8)]
    frame = Frame((10, 12, 8), affine_rows(np.diag([2.0, 1.0, 3.0, 1.0])))
    save_animation(volumes, tmp_path / "a.gif", frame=frame, labels=["a", "b", "c"])
    save_animation(volumes, tmp_path / "b.gif", frame=frame, labels=["a", "b", "c"])
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    with Image.open(tmp_path / "a.gif") as animation:
        pictures = [np.asarray(picture.convert("L")) for picture in ImageSequence.Iterator(animation)]
        assert animation.info["loop"] == 0
    assert len(pictures) == 4
    assert all(picture[:MARGIN].max() > 200 for picture in pictures)
    assert [round(picture[-picture.shape[0] // 2, 5] / 255, 1) for picture in pictures] == [0.2, 0.5, 0.8, 0.5]
    with pytest.raises(ValueError, match="at least one frame"):
        save_animation([], tmp_path / "c.gif", frame=frame, labels=[])

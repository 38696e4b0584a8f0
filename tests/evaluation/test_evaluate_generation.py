"""`decovae evaluate` of a flow's run: sets compared, copies found, and every wrong input refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from decovae.commands.evaluate_table import print_evaluation
from decovae.data.patches import load_volume
from decovae.evaluation.volume_sets import SampleVolumes
from decovae.generation.flow_file import FLOW, load_flow, save_flow, sha256
from decovae.generation.volumes_out import write_sample
from decovae.metrics.frechet import feature_moments, frechet_distance
from decovae.metrics.slice_features import PLANES, random_network, volume_slices
from decovae.training.config import FlowConfig
from decovae.training.finished import open_vae
from decovae.training.run_folder import create_folder
from decovae.training.volumes import COHORT, open_volumes, split
from tests.evaluation.conftest import OPTIONS, finished_flow, finished_vae, sampled, sentence
from tests.evaluation.test_evaluate_reconstruction import GRID, evaluate, evaluation_in, without_times


@pytest.fixture
def flow(vae: Path, tmp_path: Path) -> Path:
    """A finished flow run with three samples."""
    run = finished_flow(vae, tmp_path / "flow")
    sampled(run)
    return run


def samples_of(flow: Path) -> Path:
    (folder,) = (flow / "samples").iterdir()
    return folder


def test_sets_are_compared(vae: Path, flow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(flow) == 0
    folder = samples_of(flow)
    found = evaluation_in(folder / "evaluation")
    assert (found["kind"], found["stage"], found["run"], found["deco"]) == ("generation", "flow", "flow", "vad")
    assert (found["data"], found["grid"], found["partial"]) == (COHORT, list(GRID), None)
    assert (found["number"], found["real"], found["real_volumes"]) == (3, "all", 5)
    assert (found["solver"], found["steps"], found["seed"]) == ("euler", 2, 42)
    assert found["samples"] == folder.name
    volumes = open_volumes(open_vae(vae).config.data)
    samples = SampleVolumes(folder, [f"sample-{number:05d}" for number in range(3)], load_flow(flow)[1].space)
    sides = [
        [load_volume(volumes, index, GRID).clamp(0, 1) for index in range(5)],
        [samples.load(place).clamp(0, 1) for place in range(3)],
    ]
    network = random_network()
    for plane in PLANES:
        features = [torch.cat([network(volume_slices(volume, plane)) for volume in side]) for side in sides]
        expected = frechet_distance(*map(feature_moments, features))
        assert found["frechet"]["random"][plane] == pytest.approx(expected, rel=1e-3)
    close = found["fidelity"]["random"]
    assert all(0 <= close[name] <= 1 for name in ("precision", "recall", "coverage"))
    assert close["slices"] == pytest.approx(3 * sum(GRID) / 6, abs=1)
    assert [row["volume"] for row in found["tissue"]["sets"]["generated"]] == list(samples.names)
    assert len(found["tissue"]["sets"]["real"]) == 5
    assert found["real_note"] is None  # samples are written on the grid
    assert "gFD (random, proxy)" in capsys.readouterr().out
    with (folder / "evaluation" / "volumes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["set"] for row in rows] == ["real"] * 5 + ["generated"] * 3


def test_real_volumes_written_as_samples_are_no_distance_away(tmp_path: Path) -> None:
    vae = finished_vae(tmp_path / "finer", [*OPTIONS[:-3], "22", "26", "20"])
    flow = finished_flow(vae, tmp_path / "flow")
    sampled(flow)
    volumes, space, folder = open_volumes(open_vae(vae).config.data), load_flow(flow)[1].space, samples_of(flow)
    for index in range(5):
        write_sample(load_volume(volumes, index, GRID), space.frame, folder, f"sample-{index:05d}", label="", facts={})
    assert evaluate(flow) == 0
    found = evaluation_in(folder / "evaluation")
    assert space.frame.shape == (22, 26, 20)
    assert found["frechet"]["random"]["average"] == pytest.approx(0, abs=1e-9)
    assert sorted(found["memorisation"]["samples"])[:4] == [0] * 4  # the training volumes; the fifth was held out
    real, generated = (found["tissue"]["sets"][kind] for kind in ("real", "generated"))
    for first, second in zip(real, generated, strict=True):
        assert {**first, "volume": None} == {**second, "volume": None}
    assert "16×20×16 voxels to the 22×26×20" in found["real_note"]


def test_as_many_samples_are_measured_as_asked_for(flow: Path) -> None:
    assert evaluate(flow, "-n", 2) == 0
    found = evaluation_in(samples_of(flow) / "evaluation")
    assert (found["number"], found["partial"]) == (2, None)
    assert [row["volume"] for row in found["tissue"]["sets"]["generated"]] == ["sample-00000", "sample-00001"]


def test_a_ratio_that_is_undefined_is_printed_as_such(flow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(flow) == 0
    found = evaluation_in(samples_of(flow) / "evaluation")
    found["memorisation"]["ratio"] = None
    capsys.readouterr()
    print_evaluation(found, flow)
    assert "undefined: held-out copies" in capsys.readouterr().out


def test_a_copied_training_volume_is_found(vae: Path, flow: Path) -> None:
    data = open_vae(vae).config.data
    volumes = open_volumes(data)
    training, _ = split(volumes, data)
    space, folder = load_flow(flow)[1].space, samples_of(flow)
    copied = load_volume(volumes, training[2], GRID)
    write_sample(copied, space.frame, folder, "sample-00001", label="", facts={})
    assert evaluate(flow) == 0
    found = evaluation_in(folder / "evaluation")["memorisation"]
    assert "sample-00001" in found["suspicious"]
    assert found["nearest"][1] == volumes.records[training[2]].subject
    assert found["samples"][1] < 0.1 * min(found["held_out"])
    assert len(found["samples"]) == 3
    assert found["note"] == "only 1 subject is held out: the threshold is coarse"


def test_the_memorisation_check_sees_all_training_volumes_whatever_is_compared(flow: Path, tmp_path: Path) -> None:
    assert evaluate(flow, "--out", tmp_path / "all") == 0
    assert evaluate(flow, "--real", "training", "--out", tmp_path / "training") == 0
    every, training = (evaluation_in(tmp_path / name) for name in ("all", "training"))
    assert (every["real_volumes"], training["real_volumes"]) == (5, 4)
    assert every["memorisation"] == training["memorisation"]
    assert every["frechet"] != training["frechet"]


def test_a_flow_on_other_volumes_is_noted(flow: Path) -> None:
    network, description = load_flow(flow)
    other = replace(description, space=replace(description.space, data="another cohort"))
    save_flow(network.state_dict(), other, flow / FLOW)
    path = samples_of(flow) / "samples.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "flow_sha256": sha256(flow / FLOW)}))
    assert evaluate(flow) == 0
    found = evaluation_in(samples_of(flow) / "evaluation")
    assert found["data"] == COHORT
    assert "trained on latents of other volumes (another cohort)" in found["memorisation"]["note"]


def test_a_limit_is_said(flow: Path) -> None:
    assert evaluate(flow, "--limit", 2) == 0
    found = evaluation_in(samples_of(flow) / "evaluation")
    assert found["partial"] == "2 of 5 real volumes and 2 of 3 samples and 2 of 4 training volumes: --limit 2"
    assert (found["number"], found["real_volumes"]) == (2, 2)


def test_what_is_kept_changes_nothing(flow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECOVAE_CACHE", str(tmp_path / "cache"))
    found = []
    for number, options in enumerate([["--no-cache"], [], []]):
        assert evaluate(flow, *options, "--out", tmp_path / str(number)) == 0
        found.append(without_times(evaluation_in(tmp_path / str(number))))
    assert found[0] == found[1] == found[2]
    assert len(list((tmp_path / "cache" / "features").rglob("*.safetensors"))) == 8


def one_sample(flow: Path) -> list[str]:
    for number in (1, 2):
        (samples_of(flow) / f"sample-{number:05d}.json").unlink()
    return []


def a_gap(flow: Path) -> list[str]:
    (samples_of(flow) / "sample-00001.json").unlink()
    return []


def too_many(flow: Path) -> list[str]:
    return ["--number", "4"]


def one_number(flow: Path) -> list[str]:
    return ["-n", "1"]


def a_store_of_its_own(flow: Path) -> list[str]:
    (flow / "config.yaml").unlink()
    create_folder(flow, FlowConfig(latents=flow.parent / "store"))
    return []


def no_samples(flow: Path) -> list[str]:
    (samples_of(flow) / "samples.json").unlink()
    return []


def two_folders(flow: Path) -> list[str]:
    sampled(flow, "--seed", "7", number=2)
    return []


def another_flow(flow: Path) -> list[str]:
    path = samples_of(flow) / "samples.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "flow_sha256": "0"}))
    return []


def another_grid(flow: Path) -> list[str]:
    path = samples_of(flow) / "sample-00001.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((5, 6, 7), np.float32), np.eye(4)), path)
    return []


def with_nan(flow: Path) -> list[str]:
    path = samples_of(flow) / "sample-00001.nii.gz"
    image = nib.load(path)
    voxels = np.asarray(image.dataobj).copy()
    voxels[3, 4, 5] = np.nan
    nib.save(nib.Nifti1Image(voxels, image.affine), path)
    return []


def damaged(flow: Path) -> list[str]:
    path = samples_of(flow) / "sample-00001.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    return []


def unfinished(flow: Path) -> list[str]:
    (flow / "summary.json").unlink()
    return []


def one_real(flow: Path) -> list[str]:
    return ["--real", "validation"]


def no_autoencoder(flow: Path) -> list[str]:
    (flow.parent / "vae").rename(flow.parent / "gone")
    return []


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (one_sample, "is 1 volume, and a covariance needs 2; make more with decovae sample"),
        (one_real, "--real validation is 1 volume, and a covariance needs 2; give --real all"),
        (a_gap, "sample-00001 is missing: run decovae sample … -n 3 again"),
        (too_many, "sample-00003 is missing: run decovae sample … -n 4 again"),
        (one_number, "a covariance needs at least 2 samples"),
        (a_store_of_its_own, "store, which lie in no run's folder"),
        (no_samples, "holds no samples; make some with decovae sample"),
        (two_folders, "holds several folders of samples; give one of them as --samples"),
        (another_flow, "was made by another flow"),
        (another_grid, "sample-00001.nii.gz: is 5×6×7 voxels, and the real volumes are 16×20×16"),
        (with_nan, "sample-00001.nii.gz: holds NaN or infinite intensities"),
        (damaged, "sample-00001.nii.gz is truncated or damaged"),
        (unfinished, "is not finished"),
        (no_autoencoder, "the run of the autoencoder behind it is gone"),
    ],
)
def test_what_cannot_be_evaluated(
    flow: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], list[str]], said: str
) -> None:
    options = harm(flow)
    capsys.readouterr()
    assert evaluate(flow, *options) == 2
    assert said in sentence(capsys)


def test_real_volumes_of_another_grid(flow: Path, vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished_vae(vae.parent / "other", ["--data.grid", "20", "20", "16", "--data.patch", "16", "20", "16"])
    config: dict[str, Any] = {"config": (vae.parent / "other" / "config.yaml").read_text()}
    (vae / "config.yaml").write_text(config["config"])
    capsys.readouterr()
    assert evaluate(flow) == 2
    assert "only volumes of one grid can be compared" in sentence(capsys)

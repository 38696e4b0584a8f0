"""Samples are read as the volumes that they were, and only those that can be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decovae.data.cohort import open_cohort
from decovae.data.frame import Frame
from decovae.data.patches import load_volume
from decovae.data.template import cohort_affine
from decovae.data.volumes import affine_rows
from decovae.errors import InputError
from decovae.evaluation.volume_sets import RealVolumes, SampleVolumes, choose_samples, open_samples
from decovae.generation.latent_space import LatentSpace
from decovae.generation.volumes_out import write_sample

SOURCE, GRID = (16, 20, 16), (8, 12, 8)
FRAME = Frame(SOURCE, affine_rows(cohort_affine(SOURCE)))
SPACE = LatentSpace("e", 4, (4, 6, 4), GRID, FRAME, 0.0, 1.0, 0.1, "noise")


def folder_of_samples(folder: Path, count: int = 2, **settings: Any) -> Path:
    for number in range(count):
        image = torch.rand(1, *GRID, generator=torch.Generator().manual_seed(number))
        write_sample(image, FRAME, folder, f"sample-{number:05d}", label="", facts={})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.json").write_text(json.dumps({"flow_sha256": "f", "run": "flow", **settings}))
    return folder


def smooth() -> torch.Tensor:
    """A volume on the grid that a finer grid can hold, 0 to 1."""
    axes = [torch.linspace(0, torch.pi, size).sin() for size in GRID]
    return torch.einsum("i,j,k->ijk", *axes)[None]


def test_a_sample_comes_back_to_the_grid(tmp_path: Path) -> None:
    write_sample(smooth(), FRAME, tmp_path, "sample-00000", label="", facts={})
    samples = SampleVolumes(tmp_path, ["sample-00000"], SPACE)
    volume = samples.load(0)
    assert volume.shape == (1, *GRID)
    assert volume.dtype == torch.float32
    torch.testing.assert_close(volume, smooth(), rtol=0, atol=0.12)  # averaged over voxels twice
    assert samples.frame(0) == FRAME.on_grid(GRID)


def test_real_volumes_are_those_of_training() -> None:
    volumes = open_cohort(3, seed=0, shape=SOURCE)
    real = RealVolumes(volumes, [2, 0], GRID)
    assert real.names == ["sub-0002", "sub-0000"]
    assert real.sources == ["template:2", "template:0"]
    assert torch.equal(real.load(0), load_volume(volumes, 2, GRID))
    matrix = real.frame(0).matrix
    box = np.prod(np.divide(SOURCE, GRID)) * np.linalg.det(cohort_affine(SOURCE)[:3, :3])
    assert np.linalg.det(matrix[:3, :3]) == pytest.approx(box)


def test_the_only_folder_of_samples_is_meant(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no samples; make some with decovae sample"):
        choose_samples(tmp_path, None)
    first = folder_of_samples(tmp_path / "samples" / "first")
    folder_of_samples(tmp_path / "samples" / "path", between=["1", "2"])
    assert choose_samples(tmp_path, None) == first
    second = folder_of_samples(tmp_path / "samples" / "second")
    with pytest.raises(InputError, match=f"give one of them as --samples: {first}, {second}"):
        choose_samples(tmp_path, None)
    assert choose_samples(tmp_path, second) == second
    with pytest.raises(InputError, match=r"--samples .*: no such folder"):
        choose_samples(tmp_path, tmp_path / "third")


def test_a_sample_of_a_real_volume_is_that_volume(tmp_path: Path) -> None:
    volumes = open_cohort(3, seed=0, shape=SOURCE)
    write_sample(load_volume(volumes, 1, GRID), FRAME, tmp_path, "sample-00000", label="", facts={})
    sample = SampleVolumes(tmp_path, ["sample-00000"], SPACE).load(0)
    real = RealVolumes(volumes, [1], GRID, through=FRAME)
    assert torch.equal(sample, real.load(0))
    assert not torch.allclose(sample, RealVolumes(volumes, [1], GRID).load(0), atol=1e-2)  # which resizing once is not
    assert real.frame(0) == RealVolumes(volumes, [1], GRID).frame(0)


def test_nothing_is_done_to_real_volumes_where_samples_are_written_on_the_grid() -> None:
    volumes = open_cohort(3, seed=0, shape=SOURCE)
    on_grid = FRAME.on_grid(GRID)
    assert torch.equal(RealVolumes(volumes, [1], GRID, through=on_grid).load(0), load_volume(volumes, 1, GRID))


def test_all_samples_or_the_first_are_opened_in_order(tmp_path: Path) -> None:
    folder_of_samples(tmp_path, 3, seed=7)
    names, settings = open_samples(tmp_path, flow_sha256="f")
    assert names == ["sample-00000", "sample-00001", "sample-00002"]
    assert settings["seed"] == 7
    assert open_samples(tmp_path, flow_sha256="f", number=2)[0] == names[:2]


@pytest.mark.parametrize("suffix", [".json", ".nii.gz"])
def test_a_gap_between_samples_is_refused(tmp_path: Path, suffix: str) -> None:
    folder_of_samples(tmp_path, 4)
    (tmp_path / f"sample-00002{suffix}").unlink()
    for number in (None, 3, 4):
        again = rf"sample-00002 is missing: run decovae sample … -n {number or 4} again"
        with pytest.raises(InputError, match=again):
            open_samples(tmp_path, flow_sha256="f", number=number)
    assert len(open_samples(tmp_path, flow_sha256="f", number=2)[0]) == 2


def test_more_samples_than_there_are_are_refused(tmp_path: Path) -> None:
    folder_of_samples(tmp_path, 3)
    with pytest.raises(InputError, match=r"sample-00003 is missing: run decovae sample … -n 5 again"):
        open_samples(tmp_path, flow_sha256="f", number=5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"flow_sha256": "other", "run": "elsewhere"}, "was made by another flow, elsewhere"),
        ({"between": ["1", "2"]}, "holds a path between two volumes"),
        (None, r"holds no samples \(no samples.json\)"),
        ("[]", "cannot be read"),
    ],
)
def test_what_are_no_samples_of_the_flow(tmp_path: Path, settings: Any, said: str) -> None:
    folder_of_samples(tmp_path, **(settings if isinstance(settings, dict) else {}))
    if settings is None:
        (tmp_path / "samples.json").unlink()
    elif isinstance(settings, str):
        (tmp_path / "samples.json").write_text(settings)
    with pytest.raises(InputError, match=said):
        open_samples(tmp_path, flow_sha256="f")


@pytest.mark.parametrize(
    "frame",
    [
        Frame((16, 20, 18), affine_rows(cohort_affine((16, 20, 18)))),
        Frame(SOURCE, affine_rows(cohort_affine(SOURCE) + np.diag([0.5, 0, 0, 0]))),
    ],
)
def test_another_grid_is_refused_by_name(tmp_path: Path, frame: Frame) -> None:
    write_sample(smooth(), frame, tmp_path, "sample-00000", label="", facts={})
    with pytest.raises(InputError, match=r"sample-00000\.nii\.gz: .* only volumes of one grid can be compared"):
        SampleVolumes(tmp_path, ["sample-00000"], SPACE).load(0)


def test_nan_is_refused_by_name(tmp_path: Path) -> None:
    image = smooth()
    image[0, 3, 3, 3] = torch.nan
    write_sample(image, FRAME, tmp_path, "sample-00000", label="", facts={})
    with pytest.raises(InputError, match=r"sample-00000\.nii\.gz: holds NaN or infinite intensities"):
        SampleVolumes(tmp_path, ["sample-00000"], SPACE).load(0)

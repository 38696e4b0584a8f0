"""What training takes from a store is what it takes from the files that the store was prepared from."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decovae import cli
from decovae.data.cohort import cohort_affine, open_cohort
from decovae.data.patches import PatchDataset
from decovae.data.store import open_store
from decovae.data.volumes import Shape
from decovae.errors import InputError
from decovae.preparation.candidates import Candidate
from decovae.preparation.volume import Preparation, prepare_volume
from decovae.preparation.writer import finish_store, write_volume
from decovae.runtime import Runtime
from decovae.training.config import DataConfig, VAEConfig
from decovae.training.finished import open_vae
from decovae.training.latents import latents_of
from decovae.training.patches import Patches
from decovae.training.presets import DECODER_PRESETS, QUICKSTART, VAE_PRESETS
from decovae.training.run_folder import check_folder, check_inputs, create_folder, read_inputs
from decovae.training.sampling import Batches
from decovae.training.volumes import inputs_of, open_volumes, remarks, split
from tests.data.files import ORIENTATIONS, write
from tests.data.test_patches import Noise
from tests.preparation.sources import brain
from tests.training.conftest import finished_vae, tiny_decoder_run, tiny_flow_run, tiny_run

CPU = Runtime(torch.device("cpu"))
FILES: Shape = (32, 36, 32)
GRIDS: tuple[Shape, ...] = ((32, 36, 32), (28, 44, 24))
PATCH: Shape = (24, 24, 24)
SUBJECTS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes as they come: integers, in files of several orientations, two sessions of the first subject."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECOVAE_CACHE", str(tmp_path_factory.getbasetemp() / "decovae-cache"))
        cohort = open_cohort(SUBJECTS + 1, seed=0, shape=FILES)
        root = tmp_path_factory.mktemp("files")
        for index, axes in enumerate((*ORIENTATIONS, "LPS")):
            voxels = np.asarray(cohort.read(index)).round().astype(np.int16)
            name = f"sub-{index % SUBJECTS:02d}/ses-{index // SUBJECTS}/T1w.nii{('', '.gz')[index % 2]}"
            write(root / name, voxels, axes=axes, affine=cohort_affine(FILES))
        return root


def store(folder: Path, out: Path, grid: Shape, columns: Sequence[Mapping[str, str]] = ()) -> Path:
    """A store of the volumes in a folder."""
    entries = []
    for place, path in enumerate(sorted(folder.rglob("*.nii*"))):
        source = path.relative_to(folder).as_posix()
        more = columns[place] if columns else {}
        prepared = prepare_volume(Candidate(source.split("/")[0], "", path, source, more), Preparation(grid=grid))
        write_volume(out, prepared)
        entries.append(prepared.entry)
    finish_store(out, entries, {}, grid=grid)
    return out


@pytest.fixture(scope="module", params=GRIDS, ids=["as stored", "resized"])
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A folder and its store."""
    return folder, store(folder, tmp_path_factory.mktemp("store"), request.param)


def batches(root: Path, data: DataConfig, *, seed: int = 42, position: int = 3) -> list[dict[str, Any]]:
    config = VAEConfig(data=replace(data, root=root), seed=seed)
    return list(Patches(config, CPU).batches(position, steps=6))


@pytest.mark.parametrize("foreground", [0.0, 0.6])
@pytest.mark.parametrize("augment", [False, True], ids=["plain", "augmented"])
def test_a_store_and_its_folder_give_the_same_batches(
    pair: tuple[Path, Path], augment: bool, foreground: float
) -> None:
    grid = open_store(pair[1]).grid
    data = DataConfig(grid=grid, patch=PATCH, augment=augment, foreground=foreground, workers=0)
    of_folder, of_store = (batches(root, data) for root in pair)
    assert len(of_store) == 6
    for mine, theirs in zip(of_store, of_folder, strict=True):
        assert mine["subject"] == theirs["subject"]
        assert torch.equal(mine["position"], theirs["position"])
        distance = (mine["image"] - theirs["image"]).abs()
        if augment:  # a contrast below 1 takes the root of what is near zero, and so of a rounding there
            assert distance.max() < 2e-2
            assert distance.mean() < 5e-5
        else:
            assert distance.max() < 2**-14


@pytest.mark.parametrize("stage", ["vae quickstart", "vae paper", "decoder quickstart", "decoder paper"])
def test_every_preset_s_loader_gives_the_same_batches(pair: tuple[Path, Path], stage: str) -> None:
    kind, preset = stage.split()
    _, config = (VAE_PRESETS if kind == "vae" else DECODER_PRESETS)[preset]
    data = replace(config.data, grid=open_store(pair[1]).grid, patch=PATCH, augmentation=config.data.augmentation)
    of_folder, of_store = (
        list(Patches(replace(config, data=replace(data, root=root)), CPU).batches(0, steps=1)) for root in pair
    )
    for mine, theirs in zip(of_store, of_folder, strict=True):
        assert mine["subject"] == theirs["subject"]
        assert (mine["image"] - theirs["image"]).abs().mean() < 5e-5


def test_a_store_and_its_folder_are_split_alike(pair: tuple[Path, Path]) -> None:
    splits = []
    for root in pair:
        data = DataConfig(root=root, grid=FILES, patch=PATCH, validation_fraction=0.3)
        volumes = open_volumes(data)
        splits.append([[volumes.records[index].subject for index in part] for part in split(volumes, data)])
    assert splits[0] == splits[1]
    assert len(set(splits[0][1])) == 2


def test_another_grid_than_the_store_s_works_and_is_remarked_on(pair: tuple[Path, Path]) -> None:
    grid = (24, 40, 32)
    data = DataConfig(root=pair[1], grid=grid, patch=PATCH, augment=False, workers=0)
    volumes = open_volumes(data)
    (remark,) = remarks(volumes, data)
    assert "24×40×32" in remark
    assert remarks(volumes, replace(data, grid=open_store(pair[1]).grid)) == []
    of_folder, of_store = (batches(root, data) for root in pair)
    for mine, theirs in zip(of_store, of_folder, strict=True):
        assert mine["subject"] == theirs["subject"]
        assert (mine["image"] - theirs["image"]).abs().mean() < 0.05  # resized twice, the brain is a little smoother


def test_a_store_of_volumes_smaller_than_the_patch_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=r"smaller than the patch 96×96×96"):
        open_volumes(DataConfig(root=pair[1]))


@given(
    volumes=st.integers(1, 7),
    size=st.integers(1, 4),
    worlds=st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=3),
    steps=st.integers(1, 12),
    first=st.integers(0, 20),
)
def test_ranks_share_each_epoch_without_duplicates_or_leftovers(
    volumes: int, size: int, worlds: list[int], steps: int, first: int
) -> None:
    """A run that is resumed with other numbers of processes, each time where the last one stopped."""
    dataset = PatchDataset(Noise(volumes, (2, 2, 2)), range(volumes), grid=(2, 2, 2), patch=(1, 1, 1), seed=5)
    position, seen = first, []
    for world in worlds:
        ranks = [Batches(position, count=steps, size=size, rank=rank, world=world) for rank in range(world)]
        for step in zip(*ranks, strict=True):
            seen += [(place, dataset[place].subject) for place in chain.from_iterable(step)]
        position += steps * size * world
    assert [place for place, _ in seen] == list(range(first, position))
    for epoch in range(-(-first // volumes), position // volumes):
        subjects = Counter(subject for place, subject in seen if place // volumes == epoch)
        assert subjects == {f"s{index}": 1 for index in range(volumes)}


def test_processes_take_what_one_would_have_taken(pair: tuple[Path, Path]) -> None:
    data = DataConfig(root=pair[1], grid=open_store(pair[1]).grid, patch=PATCH, workers=0, batch_size=4)
    alone = list(Patches(VAEConfig(data=data), CPU).batches(8, steps=2))
    config = VAEConfig(data=replace(data, batch_size=2))
    ranks = [Patches(config, Runtime(torch.device("cpu"), rank=rank, world=2)).batches(8, steps=2) for rank in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(whole["image"], torch.cat([part["image"] for part in parts]))


def manifest(folder: Path, out: Path, splits: Mapping[str, str]) -> Path:
    out.mkdir(exist_ok=True)
    path = out / "volumes.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "subject", "split"])
        for volume in sorted(folder.rglob("*.nii*")):
            subject = volume.relative_to(folder).parts[0]
            rows.writerow([volume, subject, splits[subject]])
    return path


@pytest.mark.parametrize("kind", ["manifest", "store"])
@pytest.mark.parametrize("validation", ["Dev", "train"])
def test_the_column_split_is_obeyed(folder: Path, tmp_path: Path, kind: str, validation: str) -> None:
    subjects = [f"sub-{index:02d}" for index in range(SUBJECTS)]
    said = dict(zip(subjects, ["TRAIN", validation, "test", "training", "train", "Test"], strict=True))
    if kind == "manifest":
        root = manifest(folder, tmp_path, said)
    else:
        paths = sorted(folder.rglob("*.nii*"))
        columns = [{"split": said[path.relative_to(folder).parts[0]]} for path in paths]
        root = store(folder, tmp_path, (24, 24, 24), columns)
    data = DataConfig(root=root, grid=(24, 24, 24), patch=PATCH, validation_limit=1)
    volumes = open_volumes(data)
    training, held_out = split(volumes, data)
    whose = [{volumes.records[index].subject for index in part} for part in (training, held_out)]
    trained = {"sub-00", "sub-01", "sub-03", "sub-04"}
    if validation == "Dev":
        assert whose == [trained - {"sub-01"}, {"sub-01"}]
    else:  # nobody is for validation: one of those for training is held out
        assert whose[0] | whose[1] == trained
        assert len(whose[1]) == 1
        assert not whose[0] & whose[1]


def test_a_column_that_leaves_nobody_to_train_on_is_an_error(folder: Path, tmp_path: Path) -> None:
    root = manifest(folder, tmp_path, {f"sub-{index:02d}": "test" for index in range(SUBJECTS)})
    data = DataConfig(root=root, grid=FILES, patch=PATCH)
    with pytest.raises(InputError, match=r"split.*no volume for training"):
        split(open_volumes(data), data)


def test_validations_look_at_no_more_subjects_than_asked_for(folder: Path, tmp_path: Path) -> None:
    said = {f"sub-{index:02d}": "train" if index < 2 else "validation" for index in range(SUBJECTS)}
    data = DataConfig(root=manifest(folder, tmp_path, said), grid=FILES, patch=PATCH, validation_limit=3)
    patches = Patches(VAEConfig(data=data), CPU)
    assert len({patches.volumes.records[index].subject for index in patches.validation}) == 3
    (note,) = patches.notes
    assert "1 more" in note
    assert "--data.validation-limit 3" in note


def test_every_command_takes_a_store(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Training, its decoder, encoding and the flow, sampling, and the measuring of reconstructions and samples."""
    options = ["--data.root", str(store(folder, tmp_path / "store", GRIDS[1]))]
    more = ["--data.foreground", "0.5", "--data.workers", "1", "--data.augment"]
    assert tiny_run(tmp_path / "run", [*options, *more]) == 0
    vae = finished_vae(tmp_path / "vae", [*options, "--data.validation-fraction", "0.3"])
    assert tiny_decoder_run(vae, tmp_path / "decoder") == 0
    assert cli.main(["encode", str(vae), "--leave-out-unusable", "--device", "cpu"]) == 0
    assert tiny_flow_run(vae, tmp_path / "flow") == 0
    assert cli.main(["sample", str(tmp_path / "flow"), "-n", "2", "--steps", "2", "--device", "cpu"]) == 0
    for run in (vae, tmp_path / "flow"):
        assert cli.main(["evaluate", str(run), "--device", "cpu"]) == 0
    assert capsys.readouterr().err.count("which are resized to --data.grid 32×36×32") >= 4


def test_a_run_is_not_resumed_with_another_store(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = store(folder, tmp_path / "store", FILES)
    options = ["--data.root", str(root), "--steps", "2"]
    assert tiny_run(tmp_path / "run", options) == 0
    (tmp_path / "run" / "summary.json").unlink()
    store(folder, root, FILES, [{"age": "70"}] * (SUBJECTS + 1))
    capsys.readouterr()
    assert tiny_run(tmp_path / "run", options) == 2
    assert "another store" in capsys.readouterr().err


def test_a_decoder_s_run_is_not_resumed_with_another_store(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root, run = tmp_path / "store", tmp_path / "run"
    vae = finished_vae(tmp_path / "vae", ["--data.root", str(store(folder, root, FILES))])
    assert tiny_decoder_run(vae, run) == 0
    assert (read_inputs(run) or {})["store"] == open_store(root).checksum
    (run / "summary.json").unlink()
    store(folder, root, FILES, [{"age": "70"}] * (SUBJECTS + 1))
    capsys.readouterr()
    assert tiny_decoder_run(vae, run) == 2
    assert "another store" in capsys.readouterr().err


def split_store(folder: Path, out: Path, *, validation: int) -> Path:
    """A store in which one subject is for validation and all others for training."""
    whose = [path.relative_to(folder).parts[0] for path in sorted(folder.rglob("*.nii*"))]
    columns = [{"split": "validation" if subject == f"sub-{validation:02d}" else "train"} for subject in whose]
    return store(folder, out, FILES, columns)


def trained_vae(root: Path, out: Path) -> Path:
    """A finished run that has noted its volumes."""
    vae = finished_vae(out, ["--data.root", str(root)])
    check_inputs(vae, inputs_of(open_volumes(open_vae(vae).config.data)))
    return vae


def test_no_step_takes_a_store_that_changed_for_the_one_trained_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Else subjects that the autoencoder was trained on would be validated on."""
    root = split_store(folder, tmp_path / "store", validation=1)
    vae = trained_vae(root, tmp_path / "vae")
    split_store(folder, root, validation=4)
    capsys.readouterr()
    for step in (
        lambda: cli.main(["evaluate", str(vae), "--device", "cpu"]),
        lambda: cli.main(["encode", str(vae), "--device", "cpu"]),
        lambda: cli.main(["encode", str(vae), "--device", "cpu", "--data.root", str(root)]),
        lambda: cli.main(["analyze", str(vae), "--device", "cpu"]),
        lambda: tiny_decoder_run(vae, tmp_path / "decoder"),
        lambda: tiny_flow_run(vae, tmp_path / "flow"),
    ):
        assert step() == 2
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert f"{root}: holds other volumes, or another split of them, than {vae} was trained on" in said
    other = root.rename(tmp_path / "other")
    options = ["--data.root", str(other), "--out", str(tmp_path / "latents"), "--device", "cpu"]
    assert cli.main(["encode", str(vae), *options]) == 0  # was asked for
    split_store(folder, root, validation=1)
    assert cli.main(["encode", str(vae), "--device", "cpu"]) == 0


def test_latents_are_shared_by_runs_of_one_store(folder: Path, tmp_path: Path) -> None:
    root = split_store(folder, tmp_path / "store", validation=1)
    vae = trained_vae(root, tmp_path / "vae")
    assert cli.main(["encode", str(vae), "--device", "cpu"]) == 0
    assert tiny_decoder_run(vae, tmp_path / "decoder") == 0
    assert latents_of(open_vae(tmp_path / "decoder"), CPU) == vae / "latents"
    (vae / "inputs.json").write_text('{"store": "of before"}')
    assert latents_of(open_vae(tmp_path / "decoder"), CPU) == tmp_path / "decoder" / "latents"


def test_latents_of_volumes_that_changed_in_a_store_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Whose bounds all are those of 16 bits, and whose shapes and places are those of before."""
    source, root = tmp_path / "files", tmp_path / "store"
    vae = finished_vae(tmp_path / "vae", ["--data.root", str(root), "--data.validation-fraction", "0.3"])
    for place, seeds in enumerate([(0, 1, 2), (0, 1, 2), (0, 1, 3)]):
        for index, seed in enumerate(seeds):
            write(source / f"sub-{index}.nii", brain(seed, FILES))
        store(source, root, FILES)
        capsys.readouterr()
        assert cli.main(["encode", str(vae), "--device", "cpu"]) == (2 if place == 2 else 0)
    assert "made of other volumes, volume of sub-2" in capsys.readouterr().err


def test_a_store_that_is_not_finished_is_no_folder_of_volumes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = store(folder, tmp_path / "store", FILES)
    vae = finished_vae(tmp_path / "vae", ["--data.root", str(root)])
    (root / "store.json").unlink()
    for options in ([], ["--leave-out-unusable"]):
        assert cli.main(["encode", str(vae), "--device", "cpu", *options]) == 2
        assert "not a finished store" in capsys.readouterr().err
    write(tmp_path / "files" / "volumes" / "ab" / "sub-1.nii", brain(1, FILES))
    assert len(open_volumes(DataConfig(root=tmp_path / "files", patch=PATCH)).records) == 1


def test_how_far_workers_work_ahead_may_change_and_the_share_of_brain_may_not(tmp_path: Path) -> None:
    create_folder(tmp_path, QUICKSTART)
    check_folder(tmp_path, replace(QUICKSTART, data=replace(QUICKSTART.data, prefetch=7)))
    with pytest.raises(InputError, match=r"data\.foreground=0\.0, not 0\.5"):
        check_folder(tmp_path, replace(QUICKSTART, data=replace(QUICKSTART.data, foreground=0.5)))

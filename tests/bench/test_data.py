"""Ways to patches are compared on equal terms: the same volumes, the same transforms, and only time that was worked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import data_peers, data_rates
from bench.data import QUICK, WHOLE, judged, main, write_files
from bench.data_costs import REPEATS, preparing_seconds
from bench.data_peers import KEY, cropping, loading, monai_dataset, scaling
from bench.data_rates import counted
from bench.data_tables import (
    NAME,
    PAIRS,
    PERSISTENT,
    crops_factor,
    markdown,
    memory_growth,
    preparing_factor,
    size_share,
)
from bench.page_cache import drop
from bench.readme import BLOCKS, Results
from decovae.data.augmentation import AugmentationConfig
from decovae.data.nifti import open_nifti
from decovae.data.patches import load_volume

WAYS = sorted({name for pairs in PAIRS.values() for pair in pairs.values() for name in pair})


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECOVAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_only_what_workers_do_in_turns_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers that need 3 s for each batch of 2, and 5 s more for their first three, give 4 patches in 3 s."""
    clock = iter([8.0, 8.0, 16.0, 16.0, 24.0, 24.0, 27.0, 27.0, 30.0, 30.0])
    monkeypatch.setattr(data_rates.time, "perf_counter", lambda: next(clock))
    crops, seconds = counted([None] * 10, WHOLE, least=10, seconds=0)
    assert crops / seconds == pytest.approx(4 / 3)


def test_batches_are_waited_for_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(second) for second in range(100))
    monkeypatch.setattr(data_rates.time, "perf_counter", lambda: next(clock))
    taken = []

    def batches() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    counted(batches(), WHOLE, least=3, seconds=10)
    assert len(taken) == 11


def test_both_sides_see_the_same_volume(tmp_path: Path) -> None:
    """As far as MONAI's resizing, which does not smooth where it shrinks, lets them."""
    [file] = write_files(tmp_path / "files", 1, QUICK.shape)
    theirs = monai_dataset([file], [*loading(QUICK.grid), *scaling()], None)[0][KEY]
    ours = load_volume(open_nifti(tmp_path / "files", patch=QUICK.patch), 0, QUICK.grid)
    assert theirs.shape == ours.shape

    def likeness(volume: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack([torch.as_tensor(theirs).flatten(), volume.flatten()]))[0, 1])

    assert likeness(ours) > 0.98
    assert all(likeness(ours) > likeness(ours.flip(axis)) for axis in (1, 2, 3))


def test_a_persistent_dataset_keeps_what_is_not_random(tmp_path: Path) -> None:
    files = write_files(tmp_path / "files", 2, QUICK.shape)
    fixed = [*loading(QUICK.grid), *scaling()]
    config = AugmentationConfig()
    random = data_peers.augmentation(config)
    for chain in ([*fixed, *random, *cropping(QUICK.patch)], [*fixed, *cropping(QUICK.patch), *random]):
        dataset = monai_dataset(files, chain, tmp_path / "cache")
        assert dataset[1][KEY].shape == (1, *QUICK.patch)
    [kept] = (tmp_path / "cache").iterdir()  # one for both orders, which agree up to there
    assert torch.load(kept, weights_only=True)[KEY].shape == (1, *QUICK.grid)


def test_preparing_is_timed_beside_its_parts(tmp_path: Path) -> None:
    found = preparing_seconds(write_files(tmp_path / "files", 1, QUICK.shape), QUICK.grid, tmp_path / "prepared")
    assert len(found) == REPEATS == 3
    assert min(found.values()) > 0
    assert not (tmp_path / "prepared").exists()


def rates(**changed: list[float]) -> dict[str, dict[str, list[float]]]:
    speed = {"warm": [100.0], "cold": [100.0]}
    slow = {"warm": [1.0], "cold": [1.0]}
    return {name: {**(speed if "from the store" in name else slow), **changed} for name in WAYS}


def test_the_worst_pair_and_state_decide() -> None:
    result = {"crops_per_second": rates()}
    assert (crops_factor(result, "reference"), crops_factor(result, "persistent")) == (100, 100)
    result["crops_per_second"][PERSISTENT]["cold"] = [90.0, 20.0, 10.0]
    assert (crops_factor(result, "reference"), crops_factor(result, "persistent")) == (100, 5)


@pytest.mark.parametrize("pairs", [PAIRS["persistent"], PAIRS["beside"]])
def test_both_of_a_pair_augment_or_neither(pairs: dict[str, tuple[str, str]]) -> None:
    assert all(("no augmentation" in ours) == ("no augmentation" in theirs) for ours, theirs in pairs.values())


def test_figures_that_targets_are_of() -> None:
    result = {
        "bytes": {"store": 50, "PersistentDataset": 100, "files": 10},
        "preparing_seconds_per_volume": {
            "preparing": 1.2,
            "loading and resampling": 1.0,
            "loading and resampling, MONAI": 3.0,
        },
        "worker_private_bytes": {"ours": {"100": 1000, "25252": 1500}, "MONAI": {"100": 1000, "25252": 9000}},
    }
    assert size_share(result) == 0.5
    assert preparing_factor(result) == pytest.approx(1.2)
    assert memory_growth(result) == 500


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One tiny run of everything, and what it printed below "printed"."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "probe").write_bytes(b"0")
    try:
        drop(folder / "probe")
    except RuntimeError:
        pytest.skip(f"{folder} is a file system in memory: nothing there is cold")
    (folder / "kept").mkdir()
    main(["--quick", "--out", str(folder / NAME), "--folder", str(folder / "kept")])
    assert not list((folder / "kept").iterdir())
    return {"folder": folder, **json.loads((folder / NAME).read_text(encoding="utf-8"))}


@pytest.mark.slow
def test_a_run_measures_every_way_and_every_target(whole: dict[str, Any]) -> None:
    assert set(WAYS) < set(whole["crops_per_second"])
    for found in whole["crops_per_second"].values():
        assert {len(found["warm"]), len(found["cold"])} == {QUICK.rounds}
        assert min(*found["warm"], *found["cold"]) > 0
    verdicts = judged(whole)
    assert len(verdicts) == 5
    assert all(verdict.outcome in ("met", "missed") for verdict in verdicts)


@pytest.mark.slow
def test_sizes_are_those_of_the_voxels(whole: dict[str, Any]) -> None:
    voxels = float(np.prod(QUICK.grid)) * QUICK.subjects
    assert whole["bytes"]["store"] > 2 * voxels
    assert whole["bytes"]["PersistentDataset"] > 4 * voxels


@pytest.mark.slow
def test_a_worker_keeps_hardly_more_of_more_volumes(whole: dict[str, Any]) -> None:
    few, many = QUICK.entries
    ours = whole["worker_private_bytes"]["ours"]
    assert abs(ours[str(many)] - ours[str(few)]) < 0.2 * ours[str(few)]


@pytest.mark.slow
def test_its_block(whole: dict[str, Any]) -> None:
    folder = whole["folder"]
    assert markdown(whole) in BLOCKS["data"](Results(folder, folder / "README.md"))


@pytest.mark.parametrize("subjects", ["13", "12"])
def test_too_few_subjects_are_refused(subjects: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--subjects", subjects])
    assert "more than 12, and an even number" in capsys.readouterr().err

"""Checkpoints: what they bring back, what is left of them by a kill, a full disk or damage, and which of them stay."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from decovae.errors import InputError, RunError
from decovae.runtime import Runtime
from decovae.training import checkpoint_storage, checkpoints
from decovae.training.checkpoint_files import MANIFEST, Damaged, check_files, entries, publish, read_manifest
from decovae.training.checkpoint_storage import Reader, read_tensors
from decovae.training.checkpoints import Best, Checkpoints, RunState
from decovae.training.ema import ExponentialMovingAverage
from tests.ranks import spawn

ALONE = Runtime(torch.device("cpu"))
ROOT = Path(__file__).resolve().parents[2]
PSNR = Best("psnr", True)


class Run:
    """A run of two small networks, whose steps depend on nothing but their number."""

    def __init__(
        self,
        folder: Path,
        runtime: Runtime = ALONE,
        *,
        shard: int | None = None,
        width: int = 5,
        seed: int = 0,
        keep: int = 2,
        best: Best = PSNR,
    ) -> None:
        torch.manual_seed(seed)
        first = nn.Sequential(nn.Conv3d(2, width, 3), nn.GroupNorm(1, width))
        second = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
        self.networks: dict[str, nn.Module] = {"autoencoder": first, "discriminators": second}
        for network in self.networks.values() if shard is not None else ():
            mesh = init_device_mesh("cpu", (runtime.world // shard, shard), mesh_dim_names=("replicate", "shard"))
            fully_shard(network, mesh=mesh)
        self.optimizers = {name: AdamW(network.parameters(), lr=0.01) for name, network in self.networks.items()}
        self.averages = {"autoencoder": ExponentialMovingAverage(first, 0.9)}
        self.checkpoints = Checkpoints(
            folder,
            runtime,
            modules=self.networks,
            optimizers=self.optimizers,
            averages=self.averages,
            keep=keep,
            keep_best=1,
            best=best,
        )

    def step(self, number: int, *names: str) -> None:
        for name in names or self.networks:
            for place, parameter in enumerate(self.networks[name].parameters()):
                parameter.grad = torch.sin(parameter.detach() * 7 + number + place)
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()
        self.averages["autoencoder"].update(number)

    def save(self, step: int, figure: float | None = None) -> None:
        self.checkpoints.save(RunState(step, 4 * step, 1, 4, figure), figure)

    def published(self, step: int, figure: float | None = None) -> Path:
        self.save(step, figure)
        self.checkpoints.wait()
        return self.checkpoints.folder / f"step-{step:08d}"

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint has to bring back, whole."""
        found: dict[str, Tensor] = {}
        for name, network in self.networks.items():
            found |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
            for key, parameter in network.named_parameters():
                for slot, value in self.optimizers[name].state.get(parameter, {}).items():
                    found[f"{name}.{key}.{slot}"] = value
        found |= {f"average.{key}": value for key, value in self.averages["autoencoder"].averages.items()}
        return {key: getattr(value, "full_tensor", lambda value=value: value)().clone() for key, value in found.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def quiet(_: str) -> None:
    pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_everything_comes_back_and_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step(0)
    run.step(1)
    run.published(2, 31.5)
    before = run.tensors()
    run.step(2)

    resumed = Run(tmp_path, seed=1)
    assert resumed.checkpoints.resume(quiet) == RunState(2, 8, 1, 4, 31.5)
    assert same(resumed.tensors(), before)
    resumed.step(2)
    assert same(resumed.tensors(), run.tensors())


def test_a_folder_without_checkpoints_is_the_start(tmp_path: Path) -> None:
    assert Run(tmp_path / "nothing").checkpoints.resume(quiet) is None


def test_an_optimiser_that_made_no_step_resumes_so(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step(0, "autoencoder")
    run.published(1)
    assert not run.optimizers["discriminators"].state
    resumed = Run(tmp_path, seed=1)
    resumed.step(0)  # what it has meanwhile goes
    resumed.checkpoints.resume(quiet)
    assert not resumed.optimizers["discriminators"].state
    assert same(resumed.tensors(), run.tensors())


def test_what_training_does_while_an_entry_is_written_is_not_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going_on = threading.Event()
    write_data = checkpoint_storage.Writer.write_data

    def late(self: Any, *arguments: Any) -> Any:
        assert going_on.wait(60)
        return write_data(self, *arguments)

    monkeypatch.setattr(checkpoint_storage.Writer, "write_data", late)
    run = Run(tmp_path)
    run.step(0)
    before = run.tensors()
    run.save(1)
    run.step(1)
    assert names(tmp_path) == [] or names(tmp_path) == ["step-00000001.partial"]
    going_on.set()
    run.checkpoints.wait()
    run.save(2)  # into the same copies
    run.step(2)
    run.checkpoints.wait()
    shutil.rmtree(tmp_path / "step-00000002")
    resumed = Run(tmp_path, seed=1)
    resumed.checkpoints.resume(quiet)
    assert same(resumed.tensors(), before)


def test_the_manifest_says_what_an_entry_holds(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step(0)
    entry = run.published(1, 30.0)
    manifest = read_manifest(entry)
    assert manifest["state"] == {"step": 1, "position": 4, "skipped": 1, "samples_per_step": 4, "best": 30.0}
    assert manifest["figure"] == {"metric": "psnr", "value": 30.0}
    assert manifest["networks"]["discriminators"] == 3 * 5 + 5 + 2 * 5
    assert set(manifest["files"]) == set(names(entry)) - {MANIFEST}
    check_files(entry, manifest["files"])
    weights = read_tensors(entry, "autoencoder.weights.")
    assert same(weights, run.networks["autoencoder"].state_dict())
    assert same(read_tensors(entry, "autoencoder.average."), run.averages["autoencoder"].averages)


@pytest.mark.parametrize(
    ("figures", "kept"),
    [
        ([None] * 5, [4, 5]),
        ([1.0, 9.0, 3.0, 2.0, 1.0], [2, 4, 5]),
        ([1.0, 9.0, float("nan"), 2.0, 10.0], [4, 5]),
        ([5.0, None, 5.0, None, None], [3, 4, 5]),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path: Path, figures: list[float | None], kept: list[int]) -> None:
    run = Run(tmp_path)
    for number, figure in enumerate(figures, start=1):
        run.published(number, figure)
    assert names(tmp_path) == [f"step-{number:08d}" for number in kept]


def test_the_best_may_be_the_lowest(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=1, best=Best("flow_loss", False))
    for number, figure in enumerate([3.0, 1.0, 2.0], start=1):
        run.published(number, figure)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_run_taken_up_earlier_removes_what_came_later(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=5)
    for number in (1, 2, 3, 4):
        run.published(number, float(number))
    run.published(2, 0.0)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert read_manifest(tmp_path / "step-00000002")["figure"]["value"] == 0.0


def test_an_old_entry_that_cannot_be_removed_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network drive a file that somebody reads holds its folder."""
    rmtree = shutil.rmtree

    def held(path: Path, ignore_errors: bool = False) -> None:
        if not path.name.endswith(".removed"):
            rmtree(path, ignore_errors)
        elif not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    run = Run(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", held)
        for step in range(1, 4):
            run.step(step)
            run.published(step)
        assert Run(tmp_path).checkpoints.resume(quiet) is not None
        assert names(tmp_path)[-1] == "step-00000003"
    Run(tmp_path).checkpoints.resume(quiet)
    assert names(tmp_path) == ["step-00000003"]


def truncated(entry: Path) -> None:
    file = next(entry.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-10])


def flipped(entry: Path) -> None:
    file = next(entry.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def without_a_file(entry: Path) -> None:
    next(entry.glob("*.distcp")).unlink()


def without_manifest(entry: Path) -> None:
    (entry / MANIFEST).unlink()


def half_a_manifest(entry: Path) -> None:
    path = entry / MANIFEST
    path.write_text(path.read_text()[:50])


def another_kind_of_manifest(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    manifest["files"] = dict.fromkeys(manifest["files"], 12)
    (entry / "manifest.json").write_text(json.dumps(manifest))


def without_metadata(entry: Path) -> None:
    (entry / ".metadata").unlink()


@pytest.mark.parametrize(
    "damage",
    [truncated, flipped, without_a_file, without_manifest, half_a_manifest, another_kind_of_manifest, without_metadata],
)
def test_a_damaged_entry_is_passed_over_and_said(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    run = Run(tmp_path)
    run.step(0)
    run.published(1)
    before = run.tensors()
    run.step(1)
    newest = run.published(2)
    damage(newest)
    said: list[str] = []
    resumed = Run(tmp_path, seed=1)
    assert resumed.checkpoints.resume(said.append) == RunState(1, 4, 1, 4, None)
    assert same(resumed.tensors(), before)
    assert len(said) == 1
    assert "step-00000002" in said[0]
    assert "\n" not in said[0]
    resumed.published(2)
    check_files(newest, read_manifest(newest)["files"])


def test_nothing_but_damage_is_said_and_left_alone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for number in (1, 2):
        truncated(run.published(number))
    said: list[str] = []
    with pytest.raises(InputError, match=r"step-00000002: cannot be resumed from .* remove ") as raised:
        Run(tmp_path).checkpoints.resume(said.append)
    assert raised.value.on_all_processes
    assert len(said) == 2
    assert len(entries(tmp_path)) == 2


def test_another_model_s_checkpoint_is_refused_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step(0)
    run.published(1)
    run.published(2)
    said: list[str] = []
    with pytest.raises(
        InputError, match=r"step-00000002: is of another model, autoencoder\.\S+ is 5.* there and 6.* here"
    ):
        Run(tmp_path, width=6).checkpoints.resume(said.append)
    fewer = Run(tmp_path)
    fewer.checkpoints.averages = {}
    with pytest.raises(InputError, match=r"autoencoder\.average\.\S+ is 5\S* there and missing here"):
        fewer.checkpoints.resume(said.append)
    assert not said


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


def test_a_pickle_in_the_place_of_the_description_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Run(tmp_path).published(1)
    (entry / ".metadata").write_bytes(pickle.dumps(Trap()))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Damaged, match="does not belong into a checkpoint"):
        Reader(entry).read_metadata()
    with pytest.raises(Damaged):
        read_tensors(entry, "autoencoder.")
    assert not (tmp_path / "trapped").exists()


def test_what_killed_processes_left_is_removed_or_put_back(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step(0)
    for number in (1, 2):
        run.published(number)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000003.partial")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000000.removed")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000001.replaced")
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000002.replaced")
    state = Run(tmp_path).checkpoints.resume(quiet)
    assert state is not None
    assert state.step == 2
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.published(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", _not_permitted)  # who may write anywhere is tested like everybody
        run.save(2)
        with pytest.raises(RunError, match=r"step-00000002: cannot be written \(Permission denied\)"):
            run.checkpoints.wait()
    assert names(tmp_path) == ["step-00000001"]


def _not_permitted(*_: object) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    run = Run(tmp_path / "checkpoints")
    run.save(1)
    with pytest.raises(RunError, match=r"step-00000001: cannot be written \(Not a directory\)"):
        run.checkpoints.wait()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, share: float) -> None:
    """A limit on the size of files stands for a disk that is full after a share of the file."""
    run = Run(tmp_path)
    run.step(0)
    entry = run.published(1)
    size = max(path.stat().st_size for path in entry.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * share), limits[1]))
    try:
        run.save(2)
        with pytest.raises(RunError) as raised:
            run.checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(raised.value).endswith(f"({os.strerror(errno.EFBIG)}); earlier checkpoints are kept.")
    assert run.checkpoints.failure is raised.value
    with pytest.raises(RunError):
        run.save(3)
    run.checkpoints.close()
    assert names(tmp_path) == ["step-00000001"]
    resumed = Run(tmp_path)
    assert resumed.checkpoints.resume(quiet) is not None


WRITES_FOR_EVER = """
import sys, torch
from pathlib import Path
from tests.training.test_checkpoints import Run
torch.set_num_threads(1)
run = Run(Path(sys.argv[1]), width=2000)
for step in range(1, 100_000):
    run.step(step)
    run.save(step, float(step % 7))
"""


def test_a_kill_leaves_whole_entries_only(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITES_FOR_EVER, str(tmp_path)], cwd=ROOT)
    try:
        while len(entries(tmp_path)) < 3 or not any(tmp_path.glob("*.partial/*.distcp")):
            assert process.poll() is None
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = entries(tmp_path)
    assert found
    for entry in found:
        check_files(entry, read_manifest(entry)["files"])
    resumed = Run(tmp_path, width=2000)
    state = resumed.checkpoints.resume(quiet)
    assert state is not None
    assert state.step == int(found[-1].name[5:])
    assert all(path.suffix == "" for path in tmp_path.iterdir())


def test_files_that_another_machine_wrote_elsewhere_are_missed(tmp_path: Path) -> None:
    partial = tmp_path / "step-00000001.partial"
    partial.mkdir()
    with pytest.raises(RunError, match="file system that all nodes of the run share"):
        publish(partial, tmp_path / "step-00000001", {"files": {"__1_0.distcp": {"bytes": 3, "crc32": 1}}})
    assert not (tmp_path / "step-00000001").exists()


@pytest.mark.slow
def test_any_number_of_processes_reads_what_any_other_wrote(tmp_path: Path) -> None:
    """By one process, by two and by four that hold parts, copies, or copies of parts."""
    alone = Run(tmp_path / "alone")
    alone.step(0)
    alone.published(1)
    torch.save(alone.tensors(), tmp_path / "expected.pt")
    spawn(_two, (tmp_path,), 2)
    spawn(_four, (tmp_path,), 4)
    for written in ("halves", "copies", "copies of halves"):
        resumed = Run(tmp_path / written, seed=2)
        assert resumed.checkpoints.resume(quiet) == RunState(1, 4, 1, 4, None)
        assert same(resumed.tensors(), alone.tensors())


def _two(rank: int, folder: Path) -> None:
    runtime = _joined(rank, 2, folder)
    _read_and_write(runtime, folder, shard=2, source="alone", target="halves")
    _read_and_write(runtime, folder, shard=1, source="halves", target="copies")
    _read_and_write(runtime, folder, shard=2, source="copies", target="again")
    _goes_on_as_one_does(runtime, folder / "again")
    _one_cannot_write(runtime, folder / "again")
    _one_is_gone(runtime, folder / "again")
    dist.destroy_process_group()


def _four(rank: int, folder: Path) -> None:
    runtime = _joined(rank, 4, folder)
    _read_and_write(runtime, folder, shard=2, source="halves", target="copies of halves")
    _read_and_write(runtime, folder, shard=4, source="copies of halves", target="quarters")
    dist.barrier()
    dist.destroy_process_group()


def _joined(rank: int, world: int, folder: Path) -> Runtime:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{world}", rank=rank, world_size=world)
    return Runtime(torch.device("cpu"), rank, rank, world, dist.group.WORLD)


def _read_and_write(runtime: Runtime, folder: Path, *, shard: int, source: str, target: str) -> None:
    run = Run(folder / source, runtime, shard=shard, seed=1)
    assert run.checkpoints.resume(quiet) == RunState(1, 4, 1, 4, None)
    assert same(run.tensors(), torch.load(folder / "expected.pt"))
    run.checkpoints.folder = folder / target
    run.save(1)
    for _ in range(20):  # the run's processes talk to each other meanwhile
        assert runtime.gather(runtime.rank) == list(range(runtime.world))
    run.checkpoints.wait()
    manifest = read_manifest(folder / target / "step-00000001")
    assert manifest["world"] == runtime.world
    assert {f"__{rank}_0.distcp" for rank in range(runtime.world)} <= manifest["files"].keys()


def _goes_on_as_one_does(runtime: Runtime, folder: Path) -> None:
    """With its parts of moments and averages; the steps are element by element, so that the bits are the same."""
    alone, parts = Run(folder, seed=2), Run(folder, runtime, shard=2, seed=3)
    for run in (alone, parts):
        run.checkpoints.resume(quiet)
        run.step(1)
    assert same(parts.tensors(), alone.tensors())


def _one_cannot_write(runtime: Runtime, folder: Path) -> None:
    """A disk that is full for one process ends the checkpoint for all."""
    run = Run(folder, runtime, shard=2)
    with pytest.MonkeyPatch.context() as patch:
        if not runtime.main:
            patch.setattr(checkpoint_storage.Writer, "write_data", _no_space)
        run.save(2)
        with pytest.raises(RunError, match=r"\(No space left on device\); earlier checkpoints are kept") as raised:
            run.checkpoints.wait()
    assert raised.value.on_all_processes
    dist.barrier()
    assert names(folder) == ["step-00000001"]


def _no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _one_is_gone(runtime: Runtime, folder: Path) -> None:
    """Who closes does not wait for a process that takes no part."""
    run = Run(folder, runtime, shard=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "PATIENCE", 0.1)
        if runtime.main:
            run.save(2)
        run.checkpoints.close()
    assert names(folder) in (["step-00000001"], ["step-00000001", "step-00000002.partial"])

"""Encoding: the encoder's μ and σ of every volume, in the same bytes however the work was cut up or stopped."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from decovae.data.patches import load_volume
from decovae.data.volumes import LeftOut, VolumeRecord
from decovae.errors import InputError, RunError
from decovae.generation import threads
from decovae.generation.encoding import commonest_frame
from decovae.generation.encoding_plan import planned_row
from decovae.generation.latents import LatentStore
from decovae.generation.shards import read_header, shard_path
from decovae.generation.side_by_side import volume_bytes, volumes_at_once
from decovae.losses.moments import channel_moments
from decovae.models.autoencoder import AutoencoderConfig
from decovae.models.weights import encoder_fingerprint
from decovae.runtime import Runtime, start_runtime
from tests.generation.cohort import (
    AFFINE,
    COUNT,
    GRID,
    LATENT,
    SHAPE,
    TRAINING,
    VALIDATION,
    NoiseVolumes,
    autoencoder,
    contents,
    encode,
)
from tests.ranks import spawn

ROOT = Path(__file__).resolve().parents[2]
FILES = ["autoencoder.safetensors", "index.json", *(f"latents-0000{number}.safetensors" for number in range(3))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    """The cohort, encoded without interruption."""
    return encode(tmp_path_factory.mktemp("whole") / "latents")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before
    torch.set_num_threads(before)


def test_a_row_of_volumes_without_a_checksum_is_what_it_was_before_there_was_one() -> None:
    (record,) = NoiseVolumes(1).records
    assert planned_row(record, "training")["volume"].keys() == {"shape", "low", "high", "affine"}
    assert planned_row(replace(record, sha256="ab"), "training")["volume"]["sha256"] == "ab"


def test_what_is_stored_is_what_the_encoder_says(whole: LatentStore) -> None:
    model, volumes = autoencoder(), NoiseVolumes()
    for index in (0, 7, 33, COUNT - 1):
        with torch.no_grad():
            mu, log_variance = model.encode(load_volume(volumes, index, GRID)[None])
        found = whole.read(index)
        for kept, exact in zip(found, (mu[0], (log_variance[0] / 2).exp()), strict=True):
            assert kept.dtype == torch.float32
            assert kept.shape == (4, *LATENT)
            torch.testing.assert_close(kept, exact, rtol=1e-3, atol=1e-5)
            assert torch.equal(kept, kept.half().float()), "16 bits"


def test_every_volume_is_there_in_the_order_of_the_volumes(whole: LatentStore) -> None:
    assert list(contents(whole.folder)) == FILES
    assert [record.subject for record in whole.records] == [f"s{i:02d}" for i in range(COUNT)]
    assert [record.source for record in whole.records] == [f"memory:{i}" for i in range(COUNT)]
    assert [record.columns["age"] for record in whole.records] == [str(40 + i) for i in range(COUNT)]
    assert whole.training == TRAINING
    assert whole.validation == VALIDATION
    assert [len(read_header(shard_path(whole.folder, number)).rows) for number in range(3)] == [16, 16, 3]


def test_the_space_is_described_by_float64_moments_of_the_training_split(whole: LatentStore) -> None:
    latents = [whole.read(index) for index in TRAINING]
    mu, sigma = (torch.stack(each).double() for each in zip(*latents, strict=True))
    space = whole.space
    assert space.mean == pytest.approx(mu.mean().item(), rel=1e-12)
    assert space.std == pytest.approx(mu.std(correction=0).item(), rel=1e-12)
    assert space.noise == pytest.approx(sigma.square().mean().sqrt().item(), rel=1e-12)
    torch.testing.assert_close(whole.moments.packed, channel_moments(mu).packed, rtol=1e-9, atol=1e-9)
    standardized = space.standardize(mu)
    assert standardized.mean().abs() < 1e-12
    assert standardized.std(correction=0).item() == pytest.approx(1, rel=1e-12)
    torch.testing.assert_close(space.restore(standardized), mu)
    assert (space.channels, space.shape, space.grid, space.data) == (4, LATENT, GRID, "noise")
    assert (space.frame.shape, space.frame.affine) == (SHAPE, AFFINE)
    assert space.encoder == encoder_fingerprint(autoencoder())


def test_precision_is_the_encoders(whole: LatentStore, tmp_path: Path) -> None:
    coarse = encode(tmp_path / "latents", precision="bf16")
    difference = (coarse.read(3)[0] - whole.read(3)[0]).abs().max().item()
    assert 1e-4 < difference / whole.space.std < 0.1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_show(whole: LatentStore, tmp_path: Path, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        encode(tmp_path / "latents")
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "latents") == contents(whole.folder)


@pytest.mark.gpu
def test_a_gpu_encodes_the_same_bytes_twice_and_nearly_what_the_cpu_does(whole: LatentStore, tmp_path: Path) -> None:
    runtime = Runtime(torch.device("cuda", 0))
    first, second = (encode(tmp_path / name, runtime=runtime, precision="fp32") for name in ("first", "second"))
    assert contents(first.folder) == contents(second.folder)
    for index in (0, 20):
        for mine, theirs in zip(first.read(index), whole.read(index), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0.01, atol=0.01 * whole.space.std)
    assert encode(tmp_path / "first", runtime=runtime).precision == "fp32", "that of what is there"
    assert encode(tmp_path / "third", runtime=runtime).precision == "bf16"


def _one_of_two(rank: int, port: int, out: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with start_runtime("cpu") as runtime:
        volumes = NoiseVolumes()
        store = encode(out, volumes, runtime)
        assert store.training == TRAINING
        (out.parent / f"seen-{rank}").write_text(" ".join(map(str, sorted(volumes.seen))))
        with pytest.raises(InputError, match="precision fp32, not bf16") as caught:
            encode(out, volumes, runtime, precision="bf16")
        assert caught.value.on_all_processes, "one of them is enough to print it"


def test_processes_do_not_show(whole: LatentStore, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    out.mkdir()
    contents_of_one = shard_path(whole.folder, 1).read_bytes()
    shard_path(out, 1).write_bytes(contents_of_one[:-1])  # damaged: it is made again, by one of them
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_one_of_two, (port, out), world=2)
    assert contents(out) == contents(whole.folder)
    seen = [[int(index) for index in (tmp_path / f"seen-{rank}").read_text().split()] for rank in range(2)]
    assert seen == [[*range(16), *range(32, COUNT)], [*range(16, 32)]], "each volume is encoded once"


class Stopping(NoiseVolumes):
    """Ctrl-C at the reading of volume 20, in the second of three shards."""

    def read(self, index: int) -> np.ndarray:
        if index == 20:
            raise KeyboardInterrupt
        return super().read(index)


def test_stopped_and_started_again_is_as_never_stopped(whole: LatentStore, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    with pytest.raises(KeyboardInterrupt):
        encode(out, Stopping())
    assert list(contents(out)) == [FILES[0], FILES[2]]
    finished = shard_path(out, 0).stat().st_mtime_ns
    volumes = NoiseVolumes()
    encode(out, volumes)
    assert contents(out) == contents(whole.folder)
    assert sorted(volumes.seen) == list(range(16, COUNT)), "what was done is not done again"
    assert shard_path(out, 0).stat().st_mtime_ns == finished


def test_killed_and_started_again_is_as_never_killed(whole: LatentStore, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    victim = subprocess.Popen([sys.executable, "-m", "tests.generation.encode_slowly", str(out)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while not shard_path(out, 0).exists():
            assert victim.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        victim.kill()
        victim.wait()
    assert not (out / "index.json").exists(), "it was killed in time"
    (out / ".latents-00001.safetensors.4711.1.partial").write_bytes(b"half")  # as a kill while it writes leaves it
    encode(out)
    assert contents(out) == contents(whole.folder)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "header", "row"])
def test_a_damaged_shard_is_made_again_and_no_other(whole: LatentStore, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "latents"
    encode(out)
    path = shard_path(out, 1)
    content = bytearray(path.read_bytes())
    content[{"header": 20, "row": -5}.get(damage, 0)] ^= 1
    path.write_bytes({"empty": b"", "cut": content[:-1]}.get(damage, bytes(content)))
    if damage == "missing":
        path.unlink()
    volumes = NoiseVolumes()
    encode(out, volumes)
    assert sorted(volumes.seen) == list(range(16, 32))
    assert contents(out) == contents(whole.folder)


def test_a_finished_folder_is_left_as_it_is(tmp_path: Path) -> None:
    encode(tmp_path / "latents")
    before, volumes = contents(tmp_path / "latents"), NoiseVolumes()
    encode(tmp_path / "latents", volumes)
    assert volumes.seen == []
    assert contents(tmp_path / "latents") == before


def test_other_columns_are_taken_over_without_encoding_again(whole: LatentStore, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    encode(out)
    before, volumes = contents(out), older(NoiseVolumes(), columns={"age": "42", "sex": "F"})
    store = encode(out, volumes)
    assert volumes.seen == []
    assert store.records[2].columns == {"age": "42", "sex": "F"}
    assert replace(store.records[2], columns={}) == replace(whole.records[2], columns={})
    assert [record.columns for record in store.records[3:]] == [record.columns for record in whole.records[3:]]
    after = contents(out)
    assert {name for name in after if after[name] != before.get(name)} == {"index.json"}
    encode(out)
    assert contents(out) == before


def test_other_columns_are_taken_over_where_encoding_was_stopped(tmp_path: Path) -> None:
    out = tmp_path / "latents"
    with pytest.raises(KeyboardInterrupt):
        encode(out, Stopping())
    volumes = older(NoiseVolumes(), columns={"sex": "F"})
    store = encode(out, volumes)
    assert sorted(volumes.seen) == list(range(16, COUNT))
    assert store.records[2].columns == {"sex": "F"}


def test_the_precision_of_what_is_there_is_kept(whole: LatentStore, tmp_path: Path) -> None:
    assert whole.precision == "fp32", "the CPU's own"
    out = tmp_path / "latents"
    encode(out, precision="bf16")
    before = contents(out)
    shard_path(out, 0).write_bytes(b"")  # another one says it too
    volumes = NoiseVolumes()
    store = encode(out, volumes)
    assert sorted(volumes.seen) == list(range(16))
    assert contents(out) == before
    assert store.precision == "bf16"
    with pytest.raises(InputError, match="of the precision bf16, not fp32;"):
        encode(out, precision="fp32")
    for number in range(3):
        shard_path(out, number).write_bytes(b"")
    with pytest.raises(InputError, match="no file of latents can be read: run decovae encode again"):
        _ = store.precision


@pytest.mark.parametrize(("memory", "most"), [(0.0, 1), (math.inf, 3)])
def test_volumes_side_by_side_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: float, most: int
) -> None:
    class Counting(NoiseVolumes):
        now, largest, lock = 0, 0, threading.Lock()

        def read(self, index: int) -> np.ndarray:
            with self.lock:
                self.now += 1
                self.largest = max(self.largest, self.now)
            time.sleep(0.02)
            with self.lock:
                self.now -= 1
            return super().read(index)

    monkeypatch.setattr(threads, "memory_bytes", lambda: memory)
    volumes, before = Counting(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        encode(tmp_path / "latents", volumes, training=list(range(12)), validation=[])
    finally:
        torch.set_num_threads(before)
    assert volumes.largest == most


def test_memory_is_shared_by_the_volumes_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    config, grid = AutoencoderConfig(), (128, 256, 128)
    each = volume_bytes(config, grid, on_cpu=True)
    assert each == 6 * 64 * 128 * 256 * 128 * 4
    assert volume_bytes(config, grid, on_cpu=False) == each // 64
    monkeypatch.setattr(torch, "get_num_threads", lambda: 100)
    runtime = Runtime(torch.device("cpu"))
    for volumes, processes, expected in ((0.5, 1, 1), (3.5, 1, 3), (3.5, 2, 1), (6.5, 2, 3), (99, 1, 8)):
        monkeypatch.setattr(threads, "memory_bytes", lambda volumes=volumes: volumes * 2 * each)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert volumes_at_once(runtime, config, grid) == expected
    monkeypatch.undo()
    assert threads.memory_bytes() > 2**27


def test_who_was_left_out_is_kept(tmp_path: Path) -> None:
    left_out = [LeftOut("s99", "there.nii", "The volume there.nii is an empty file.")]
    assert encode(tmp_path / "latents", left_out=left_out).left_out == left_out


def other_decoder() -> object:
    model = autoencoder()
    with torch.no_grad():
        model.decoder.blocks[0].conv.conv.bias.add_(1)
    return model


def older(volumes: NoiseVolumes, **changes: object) -> NoiseVolumes:
    volumes.records[2] = replace(volumes.records[2], **changes)
    return volumes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (lambda: {"model": autoencoder(1)}, r"latents: holds latents of the encoder [0-9a-f]{32}, not [0-9a-f]{32};"),
        (lambda: {"model": other_decoder()}, "holds latents for another decoder of the same encoder;"),
        (lambda: {"grid": (8, 8, 8)}, r"latents-00000.* of the grid \[8, 12, 8\], not \[8, 8, 8\];"),
        (lambda: {"precision": "bf16"}, "of the precision fp32, not bf16;"),
        (lambda: {"training": TRAINING[:-1]}, r"latents-00002.*: holds 3 latents, not 2;"),
        (
            lambda: {"training": TRAINING[:14], "validation": []},
            r"of other volumes, subject of s00 .* is s00, not s01;",
        ),
        (lambda: {"volumes": older(NoiseVolumes(), subject="x")}, r"subject of s02 \(memory:2\) is s02, not x;"),
        (lambda: {"volumes": older(NoiseVolumes(), high=2.0)}, r"volume of s02 \(memory:2\) is another;"),
        (
            lambda: {"training": [*TRAINING, 0], "validation": VALIDATION[1:]},
            "split of s00 .* is validation, not training;",
        ),
    ],
)
def test_latents_of_something_else_are_refused(whole: LatentStore, changes: object, sentence: str) -> None:
    before = contents(whole.folder)
    with pytest.raises(InputError, match=f"{sentence}.*give another folder, or remove this one.$"):
        encode(whole.folder, **changes())
    assert contents(whole.folder) == before


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(InputError, match=f"{tmp_path}: holds other files than latents, config.yaml for one"):
        encode(tmp_path)
    assert list(contents(tmp_path)) == ["config.yaml"]
    with pytest.raises(InputError, match=r"config\.yaml/latents: cannot be written"):
        encode(tmp_path / "config.yaml" / "latents")


def test_a_damaged_copy_of_the_autoencoder_is_named(tmp_path: Path) -> None:
    encode(tmp_path)
    (tmp_path / "autoencoder.safetensors").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"autoencoder\.safetensors is damaged: remove it and run decovae encode again"
    ):
        encode(tmp_path)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (math.nan, r"The latent of s20 \(memory:20\) is not finite"),
        (3e38, r"The latent of s20 \(memory:20\) (is not finite|reaches)"),
        (1e9, r"The latent of s20 \(memory:20\) reaches \|μ\| = \d.*, more than 16 bits hold"),
    ],
)
def test_a_latent_that_16_bits_do_not_hold_is_named(tmp_path: Path, value: float, sentence: str) -> None:
    class Spoilt(NoiseVolumes):
        def read(self, index: int) -> np.ndarray:
            return np.where(index == 20, np.float32(value), super().read(index))

    model = autoencoder()
    model.encoder = torch.nn.Conv3d(1, 4, 2, stride=2)  # without norms, which would take the size away
    with pytest.raises(RunError, match=sentence):
        encode(tmp_path, Spoilt(), model=model)


def test_a_collapsed_encoder_is_told(tmp_path: Path) -> None:
    model = autoencoder()
    with torch.no_grad():
        for parameter in model.quant_conv_mu.parameters():
            parameter.zero_()
    with pytest.raises(RunError, match="every latent is 0 everywhere; the encoder has collapsed"):
        encode(tmp_path, model=model)
    assert not (tmp_path / "index.json").exists()


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"grid \(8, 9, 8\): every axis must be a positive multiple of 2"):
        encode(tmp_path, grid=(8, 9, 8))
    for changes in ({"training": []}, {"training": [1, 1]}, {"validation": [1]}):
        with pytest.raises(ValueError, match="training is empty, or an index stands twice"):
            encode(tmp_path, **changes)
    assert contents(tmp_path) == {}


def test_the_commonest_frame_is_taken_up_to_rounding() -> None:
    def record(shift: float, shape: tuple[int, int, int] = SHAPE) -> VolumeRecord:
        moved = tuple((*row[:3], row[3] + shift) for row in AFFINE[:3])
        return VolumeRecord("s", "", shape, 0.0, 1.0, (*moved, AFFINE[3]))

    records = [record(9), record(0), record(1e-5), record(9, (9, 9, 9)), record(-1e-5)]
    frame, count = commonest_frame(records)
    assert (frame.shape, frame.affine, count) == (SHAPE, AFFINE, 3)
    assert commonest_frame(records[:2])[0].affine == records[0].affine
    with pytest.raises(ValueError, match="no records"):
        commonest_frame([])

"""`decovae encode`: from a finished run to latents, and every wrong input in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from decovae import cli
from decovae.commands import encode as command
from decovae.data.cohort import cohort_affine, open_cohort
from decovae.generation.latents import open_latents
from decovae.models.weights import encoder_fingerprint, load_autoencoder, save_autoencoder
from decovae.runtime import Runtime
from decovae.training.config import DataConfig, VAEConfig
from decovae.training.run_folder import create_folder
from decovae.training.volumes import COHORT, split
from tests.data.files import noise, write
from tests.generation.cohort import CONFIG, autoencoder, contents

ROOT = Path(__file__).resolve().parents[2]
DATA = DataConfig(grid=(8, 12, 8), patch=(8, 8, 8), cohort_size=20, cohort_shape=(12, 14, 10))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for all tests: the cohort is made once."""
    monkeypatch.setenv("DECOVAE_CACHE", str(tmp_path_factory.getbasetemp() / "encode-cache"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run, of an autoencoder that was not trained."""
    folder = tmp_path / "run"
    create_folder(folder, VAEConfig(data=DATA, model=CONFIG, out=folder))
    save_autoencoder(autoencoder().state_dict(), CONFIG, folder / "autoencoder.safetensors")
    (folder / "summary.json").write_text(json.dumps({"steps": 1}))
    return folder


def encode(run: Path, *options: str) -> int:
    return cli.main(["encode", str(run), "--device", "cpu", *options])


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """What standard error holds, if it is one line."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def torchrun(run: Path, *options: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*launch, "-m", "decovae.cli", "encode", str(run), "--device", "cpu", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_run_s_own_cohort_by_default(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode(run) == 0
    printed = capsys.readouterr().out
    store = open_latents(run / "latents")
    assert f"{run}/latents: 20 latents of 4×4×6×4, 18 for training and 2 for validation" in printed
    assert f"standard deviation {store.space.std:.4g}" in printed
    assert "effective rank" in printed
    assert "left out" not in printed
    assert "note" not in printed
    volumes = open_cohort(20, seed=0, shape=DATA.cohort_shape)
    assert (store.training, store.validation) == split(volumes, DATA)
    assert [record.subject for record in store.records] == [record.subject for record in volumes.records]
    assert store.space.data == COHORT
    assert store.space.frame.shape == DATA.cohort_shape
    np.testing.assert_array_equal(store.space.frame.matrix, cohort_affine(DATA.cohort_shape))
    assert store.space.encoder == encoder_fingerprint(load_autoencoder(run))


def test_two_processes_write_the_same_files_and_say_so_once(run: Path, tmp_path: Path) -> None:
    assert encode(run, "--out", str(tmp_path / "one")) == 0
    done = torchrun(run, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("20 latents of") == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_manifest_with_columns_and_several_frames(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(4):
        write(tmp_path / f"{index}.nii", noise((9, 10 + (index == 2), 11), seed=index), axes="LPS")
    manifest = tmp_path / "cohort.csv"
    manifest.write_text("path,subject,age\n" + "".join(f"{i}.nii,s{i},{40 + i}\n" for i in range(4)))
    assert encode(run, "--data.root", str(manifest), "--out", str(tmp_path / "latents")) == 0
    store = open_latents(tmp_path / "latents")
    assert [(record.subject, record.columns) for record in store.records] == [
        (f"s{i}", {"age": str(40 + i)}) for i in range(4)
    ]
    assert store.space.data == "cohort.csv"
    assert store.space.frame.shape == (9, 10, 11)
    training = [store.records[index].subject for index in store.training]
    assert ("differ from the commonest" in capsys.readouterr().out) is ("s2" in training)


def test_unusable_volumes_stop_it_or_are_left_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(4):
        write(tmp_path / "volumes" / f"s{index}.nii", noise(seed=index))
    (tmp_path / "volumes" / "s1.nii").write_bytes(b"")
    options = ["--data.root", str(tmp_path / "volumes"), "--out", str(tmp_path / "latents")]
    assert encode(run, *options) == 2
    assert "s1.nii is an empty file" in sentence(capsys)
    assert not (tmp_path / "latents").exists()
    assert encode(run, *options, "--leave-out-unusable") == 0
    printed = capsys.readouterr().out
    assert "left out: s1: " in printed
    assert "1 volumes left out, as" in printed
    store = open_latents(tmp_path / "latents")
    assert [record.subject for record in store.records] == ["s0", "s2", "s3"]
    assert [entry.subject for entry in store.left_out] == ["s1"]


def test_volumes_smaller_than_a_patch_are_encoded(run: Path, tmp_path: Path) -> None:
    for index in range(3):
        write(tmp_path / "volumes" / f"s{index}.nii", noise((7, 6, 5), seed=index))
    for name, options in (("all", []), ("usable", ["--leave-out-unusable"])):
        assert encode(run, "--data.root", str(tmp_path / "volumes"), "--out", str(tmp_path / name), *options) == 0
        assert len(open_latents(tmp_path / name).records) == 3


def test_precision_is_that_of_the_latents_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, expected in (((), "fp32"), (("--precision", "fp32"), "fp32")):
        assert encode(run, *options) == 0
        assert f"encoded in {expected}." in capsys.readouterr().out
    assert encode(run, "--precision", "bf16", "--out", str(run / "coarse")) == 0
    assert encode(run, "--out", str(run / "coarse")) == 0
    assert "encoded in bf16." in capsys.readouterr().out.splitlines()[-3]
    assert encode(run, "--out", str(run / "coarse"), "--precision", "fp32") == 2


def test_a_column_is_added_later(run: Path, tmp_path: Path) -> None:
    for index in range(4):
        write(tmp_path / f"{index}.nii", noise(seed=index))
    manifest, out = tmp_path / "cohort.csv", tmp_path / "latents"
    for header, rest in (("path,subject", ""), ("path,subject,sex", ",F")):
        manifest.write_text(header + "\n" + "".join(f"{i}.nii,s{i}{rest}\n" for i in range(4)))
        assert encode(run, "--data.root", str(manifest), "--out", str(out)) == 0
    assert [record.columns for record in open_latents(out).records] == [{"sex": "F"}] * 4


def unfinished(run: Path) -> None:
    (run / "summary.json").unlink()


def without_weights(run: Path) -> None:
    (run / "autoencoder.safetensors").unlink()


def damaged_weights(run: Path) -> None:
    (run / "autoencoder.safetensors").write_bytes(b"no weights")


def foreign_grid(run: Path) -> None:
    (run / "config.yaml").unlink()
    create_folder(run, VAEConfig(data=replace(DATA, grid=(8, 9, 8)), model=CONFIG))


@pytest.mark.parametrize(
    ("damage", "options", "expected"),
    [
        (unfinished, "", "is not finished"),
        (without_weights, "", "is not finished"),
        (damaged_weights, "", "not a readable safetensors file"),
        (foreign_grid, "", "every axis must be a positive multiple of 2"),
        (None, "--data.root nowhere", "nowhere does not exist"),
        (None, "--precision half", "--precision"),
        (None, "--data.rot here", "--data.rot: no such option, did you mean --data.root"),
        (None, "another", "another"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Path, capsys: pytest.CaptureFixture[str], damage: object, options: str, expected: str
) -> None:
    if callable(damage):
        damage(run)
    assert encode(run, *options.split()) == 2
    assert expected in sentence(capsys)
    assert not (run / "latents").exists()


def test_what_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        ([str(tmp_path / "nowhere")], "nowhere: no such folder"),
        ([str(tmp_path)], "holds no run"),
        ([], "RUN"),
    ):
        assert cli.main(["encode", *arguments]) == 2
        assert expected in sentence(capsys)


def test_the_run_s_folder_is_not_a_folder_of_latents(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode(run, "--out", str(run)) == 2
    assert "holds other files than latents, config.yaml for one" in sentence(capsys)


def test_ctrl_c_ends_with_a_sentence(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: object, runtime: Runtime) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_encode", interrupted)
    assert encode(run) == 130
    assert "the same command goes on from the last finished file" in sentence(capsys)


def test_options_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["encode", "--help"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "usage: decovae encode" in printed
    for option in ("RUN", "--data.root", "--out", "--leave-out-unusable", "--precision", "--device"):
        assert option in printed

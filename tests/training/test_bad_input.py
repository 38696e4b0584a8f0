"""Wrong input to the training command: one sentence that names it, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.training.conftest import tiny_run

GOOD = np.random.default_rng(0).random((32, 36, 32), dtype=np.float32)


def save(path: Path, volume: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
    return path


def nothing(root: Path) -> str:
    (root / "notes.txt").write_text("no volume")
    return "no .nii"


def truncated(root: Path) -> str:
    path = save(root / "b.nii.gz", GOOD)
    path.write_bytes(path.read_bytes()[:5000])
    return "b.nii.gz"


def not_nifti(root: Path) -> str:
    (root / "b.nii").write_bytes(b"GIF89a" * 100)
    return "b.nii"


def four_dimensional(root: Path) -> str:
    return save(root / "b.nii.gz", np.stack([GOOD, GOOD], -1)).name


def smaller_than_the_patch(root: Path) -> str:
    return save(root / "b.nii.gz", GOOD[:20]).name


def with_nan(root: Path) -> str:
    volume = GOOD.copy()
    volume[3, 4, 5] = np.nan
    return save(root / "b.nii.gz", volume).name


def constant(root: Path) -> str:
    return save(root / "b.nii.gz", np.ones_like(GOOD)).name


CASES = [nothing, truncated, not_nifti, four_dimensional, smaller_than_the_patch, with_nan, constant]


@pytest.mark.parametrize("case", CASES)
def test_bad_volumes(case: Callable[[Path], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "volumes"
    root.mkdir()
    if case is not nothing:
        save(root / "a.nii.gz", GOOD)
        save(root / "c.nii.gz", GOOD)
    named = case(root)
    refused(tmp_path, capsys, ["--data.root", str(root)], named, "volumes")


@pytest.mark.parametrize(
    ("content", "named"),
    [("file,age\na.nii.gz,3\n", "'path'"), ("path\na.nii.gz\ngone.nii.gz\n", "gone.nii.gz"), ("path\n", "no volumes")],
)
def test_bad_manifests(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, named: str) -> None:
    save(tmp_path / "a.nii.gz", GOOD)
    manifest = tmp_path / "cohort.csv"
    manifest.write_text(content)
    refused(tmp_path, capsys, ["--data.root", str(manifest)], named, "cohort.csv")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--lambda", "3"], "--lambda"),
        (["--deco", "pca"], "pca"),
        (["--data.root", "nowhere/at/all"], "nowhere/at/all"),
        (["--loss.perceptual-network", "weights.pth"], "weights.pth"),
        (["--device", "cuda"], "--device cuda"),
        (["--data.cohort-size", "1"], "left for training"),
    ],
)
def test_bad_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], named: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(tmp_path, capsys, options, named)


def test_a_folder_with_another_configuration_s_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert tiny_run(out, ["--steps", "1"]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert tiny_run(out, ["--steps", "1", "--deco", "sid"]) == 2
    message = capsys.readouterr().err.strip()
    assert "deco=vad, not sid" in message
    assert str(out) in message
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert tiny_run(out, ["--steps", "2"]) == 0
    (out / "summary.json").unlink()
    entry = next((out / "checkpoints").iterdir())
    for file in entry.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    assert tiny_run(out, ["--steps", "2"]) == 2
    assert entry.name in capsys.readouterr().err


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], *words: str) -> None:
    out = tmp_path / "run"
    assert tiny_run(out, options) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    assert "Traceback" not in message
    assert all(word in message for word in words), message
    assert not out.exists()

"""`decovae import`: a foreign flow as a run that can be sampled from."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from decovae import cli
from decovae.generation.flow_file import load_flow
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.flow_unet import FlowUNet, FlowUNetConfig
from tests.models.twins import perturbed

AUTOENCODER = AutoencoderConfig(channels=(32, 32), residual_blocks=1, latent_channels=3)
UNET = FlowUNetConfig(channels=(32, 32), attention=(False, True), residual_blocks=1, head_channels=16)
OPTIONS = "--grid 16 12 8 --spacing 1 1 1.5 --head-channels 16"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with foreign weights."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(Autoencoder(AUTOENCODER).state_dict(), tmp_path / "autoencoder.pt")
    unet = perturbed(FlowUNet(UNET, 3)).state_dict()
    torch.save({"unet_state_dict": unet, "scale_factor": torch.tensor(0.5), "epoch": 1}, tmp_path / "unet.pt")
    return tmp_path


def import_(arguments: str) -> int:
    """The command's exit code."""
    return cli.main(["import", *arguments.split()])


def test_an_imported_flow_is_sampled_from(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert import_(f"unet.pt --autoencoder autoencoder.pt {OPTIONS} --out run") == 0
    assert "a flow of latents 3×8×6×4, mean 0, std 2; decovae sample run" in capsys.readouterr().out
    _, description = load_flow(files / "run")
    assert description.space.grid == (16, 12, 8)
    assert (description.schedule.scale, description.space.std) == (1.0, 2.0)
    assert json.loads((files / "run" / "summary.json").read_text())["imported"]["flow"] == str(files / "unet.pt")
    assert cli.main("sample run -n 1 --steps 2 --device cpu --out samples".split()) == 0
    volume = nib.load(next((files / "samples").glob("*.nii.gz")))
    assert volume.shape == (16, 12, 8)
    np.testing.assert_allclose(volume.affine @ [7.5, 5.5, 3.5, 1], [0, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(volume.header.get_zooms(), [1, 1, 1.5])


def test_an_imported_flow_is_exported_again(files: Path) -> None:
    assert import_(f"unet.pt --autoencoder autoencoder.pt {OPTIONS} --out run") == 0
    assert cli.main("export run --format monai --out again.pt".split()) == 0
    before, after = (torch.load(files / name, weights_only=True) for name in ("unet.pt", "again.pt"))
    assert after["scale_factor"] == before["scale_factor"]
    assert all(torch.equal(after["unet_state_dict"][name], value) for name, value in before["unet_state_dict"].items())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            "unet.pt --autoencoder autoencoder.pt --grid 16 12 7 --spacing 1 1 1",
            "--grid 16×12×7: has to be multiples of 2",
        ),
        ("unet.pt --autoencoder autoencoder.pt --grid 16 12 0 --spacing 1 1 1", "has to be above 0 along every axis"),
        (f"autoencoder.pt --autoencoder autoencoder.pt {OPTIONS}", "holds no MAISI diffusion U-Net"),
        (f"unet.pt --autoencoder unet.pt {OPTIONS}", "holds no MAISI autoencoder"),
        (f"unet.pt --autoencoder other.pt {OPTIONS}", "is a flow of 3 channels, and other.pt makes latents of 4"),
        (f"unet.pt --autoencoder autoencoder.pt {OPTIONS} --modality 9", "--modality 9: it is told none"),
        (f"unet.pt --autoencoder autoencoder.pt {OPTIONS} --time-scale 0", "--time-scale 0: must be above 0."),
        (f"unet.pt --autoencoder autoencoder.pt {OPTIONS} --head-channels 0", "--head-channels 0: must be at least 1."),
        (f"unet.pt --autoencoder autoencoder.pt {OPTIONS} --head-channels 7", "head_channels=7 must divide"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    files: Path, arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Autoencoder(AutoencoderConfig(channels=(32, 32))).state_dict(), files / "other.pt")
    assert import_(f"{arguments} --out run") == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (files / "run").exists()


def test_nothing_is_overwritten(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "run").mkdir()
    (files / "run" / "mine").touch()
    assert import_(f"unet.pt --autoencoder autoencoder.pt {OPTIONS} --out run") == 2
    assert "--out run: holds something; give a new or an empty folder." in capsys.readouterr().err

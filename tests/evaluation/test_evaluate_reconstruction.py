"""`decovae evaluate` of an autoencoder's run: every figure again from its definition, and every wrong input refused."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from decovae import cli
from decovae.data.patches import load_volume
from decovae.data.volumes import Volumes
from decovae.errors import RunError
from decovae.evaluation.tools import Tools
from decovae.losses.perceptual import PerceptualLoss
from decovae.metrics import slice_features
from decovae.metrics.frechet import feature_moments, frechet_distance
from decovae.metrics.reconstruction import lpips, psnr
from decovae.metrics.slice_features import PLANES, random_network, volume_slices
from decovae.metrics.tissue import tissue_volumes
from decovae.models.weights import load_autoencoder
from decovae.training.finished import open_vae
from decovae.training.volumes import COHORT, open_volumes
from tests.evaluation.conftest import finished_vae, sentence

ROOT = Path(__file__).resolve().parents[2]
GRID = (16, 20, 16)


def evaluate(*arguments: object) -> int:
    """The command's exit code, on the CPU."""
    return cli.main(["evaluate", *map(str, arguments), "--device", "cpu"])


def evaluation_in(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return content


def without_times(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in evaluation.items() if name not in ("seconds", "machine")}


def pairs(vae: Path) -> tuple[Volumes, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The run's volumes, and each with its reconstruction, clipped to [0, 1], computed one by one."""
    run = open_vae(vae)
    autoencoder, volumes = load_autoencoder(run.weights), open_volumes(run.config.data)
    found = []
    for index in range(len(volumes.records)):
        volume = load_volume(volumes, index, GRID)
        with torch.no_grad():
            mean, _ = autoencoder.encode(volume[None])
            found.append((volume.clamp(0, 1), autoencoder.decode(mean)[0].clamp(0, 1)))
    return volumes, found


def test_figures_are_what_they_are_called(vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(vae, "--split", "all") == 0
    found, (volumes, expected) = evaluation_in(vae / "evaluation"), pairs(vae)
    assert (found["kind"], found["stage"], found["deco"], found["split"]) == ("reconstruction", "vae", "vad", "all")
    assert (found["data"], found["grid"], found["partial"]) == (COHORT, list(GRID), None)
    assert [row["subject"] for row in found["volumes"]] == [record.subject for record in volumes.records]
    assert [row["source"] for row in found["volumes"]] == [record.source for record in volumes.records]
    for row, (volume, reconstruction) in zip(found["volumes"], expected, strict=True):
        assert row["psnr"] == pytest.approx(psnr(reconstruction, volume), rel=1e-5)
        assert row["lpips"] is None
    values = [row["psnr"] for row in found["volumes"]]
    assert found["measures"]["psnr"]["mean"] == pytest.approx(np.mean(values))
    assert min(values) <= found["measures"]["psnr"]["low"] <= np.mean(values) <= found["measures"]["psnr"]["high"]
    assert found["measures"]["lpips"] is None
    assert "random perceptual features" in found["lpips_note"]
    for number, kind in enumerate(("real", "reconstructed")):
        (first, *_), row = expected, found["tissue"]["sets"][kind][0]
        tissue = tissue_volumes(first[number][0].numpy(), 91.0 * 182 * 218 / (16 * 20 * 16) * 2 / 1000)
        assert row["volume"] == "sub-0000"
        assert row["grey"] == pytest.approx(tissue.grey, rel=1e-3, abs=1e-2)
    printed = capsys.readouterr().out
    assert "rFD (random, proxy)" in printed
    assert COHORT in printed
    assert "No LPIPS" in printed


def test_the_distance_is_that_of_all_slices(vae: Path) -> None:
    assert evaluate(vae, "--split", "all", "--slice-every", 2) == 0
    found, (_, expected) = evaluation_in(vae / "evaluation")["frechet"], pairs(vae)
    assert list(found) == ["random"]
    network = random_network()
    assert found["random"]["title"] == network.title
    assert found["random"]["proxy"] is True
    distances = []
    for plane in PLANES:
        sides = [
            torch.cat([network(volume_slices(pair[side], plane, every=2)) for pair in expected]) for side in (0, 1)
        ]
        distances.append(frechet_distance(*map(feature_moments, sides)))
        assert found["random"][plane] == pytest.approx(distances[-1], rel=1e-3)
    assert found["random"]["average"] == pytest.approx(np.mean(distances), rel=1e-3)
    assert "biased upwards" in found["random"]["note"]  # 40 to 50 slices of 128 features


def test_kept_volumes_are_the_first_pairs(vae: Path) -> None:
    assert evaluate(vae, "--split", "training", "--keep-volumes", 2) == 0
    found = evaluation_in(vae / "evaluation")
    volumes, expected = pairs(vae)
    subjects = [record.subject for record in volumes.records]
    assert [kept["subject"] for kept in found["kept"]] == [row["subject"] for row in found["volumes"]][:2]
    for number, kept in enumerate(found["kept"]):
        volume, reconstruction = expected[subjects.index(kept["subject"])]
        for kind, image in (("original", volume), ("reconstruction", reconstruction)):
            assert kept[kind] == f"{kind}-{number}.nii.gz"
            stored = nib.load(vae / "evaluation" / kept[kind])
            np.testing.assert_allclose(np.asarray(stored.dataobj), image[0].numpy(), atol=1e-5)
            assert stored.header["descrip"].item().decode().startswith(f"{kind}: DeCo-VAE")
            assert kept["subject"] in stored.header["descrip"].item().decode()
        assert kept["psnr"] == found["volumes"][number]["psnr"]
    assert not (vae / "evaluation" / "original-2.nii.gz").exists()


def test_a_row_of_the_table_for_every_volume(vae: Path) -> None:
    assert evaluate(vae, "--split", "all", "--keep-volumes", 0) == 0
    with (vae / "evaluation" / "volumes.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = evaluation_in(vae / "evaluation")
    assert [float(row["psnr"]) for row in rows] == [row["psnr"] for row in found["volumes"]]
    assert [row["lpips"] for row in rows] == [""] * 5
    assert found["kept"] == []


def test_a_limit_is_said(vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(vae, "--split", "all", "--limit", 3) == 0
    found = evaluation_in(vae / "evaluation")
    assert len(found["volumes"]) == 3
    assert found["partial"] == "3 of 5 volumes: --limit 3"
    assert "Partial: 3 of 5 volumes: --limit 3." in capsys.readouterr().out
    assert evaluate(vae, "--split", "all", "--limit", 5) == 0
    assert evaluation_in(vae / "evaluation")["partial"] is None


def test_threads_and_processes_change_nothing(vae: Path, tmp_path: Path) -> None:
    assert evaluate(vae, "--split", "all", "--no-cache", "--out", tmp_path / "one") == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "decovae.cli", "evaluate"]
    options = [str(vae), "--split", "all", "--no-cache", "--out", str(tmp_path / "two"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *launch, *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rFD (random, proxy)") == 1
    one, two = (without_times(evaluation_in(tmp_path / name)) for name in ("one", "two"))
    # What is computed of the whole set at the end is computed by as many threads as there are.
    assert one.pop("frechet")["random"]["average"] == pytest.approx(two.pop("frechet")["random"]["average"], rel=1e-9)
    assert one == two
    kept = [(tmp_path / out / "reconstruction-0.nii.gz").read_bytes() for out in ("one", "two")]
    assert kept[0] == kept[1]


def test_feeding_a_device_from_one_thread_changes_nothing(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for on_cpu in (True, False):  # False is how a GPU is fed; the networks stay on the CPU
        monkeypatch.setattr(Tools, "on_cpu", on_cpu)
        assert evaluate(vae, "--split", "all", "--no-cache", "--out", tmp_path / str(on_cpu)) == 0
        found.append(without_times(evaluation_in(tmp_path / str(on_cpu))))
    assert found[0] == found[1]


def test_precision_is_that_of_the_autoencoder_alone(vae: Path, tmp_path: Path) -> None:
    found = []
    for precision in ("auto", "fp32", "bf16"):
        assert evaluate(vae, "--split", "all", "--precision", precision, "--out", tmp_path / precision) == 0
        found.append(evaluation_in(tmp_path / precision))
    auto, single, half = found
    assert auto["volumes"] == single["volumes"] != half["volumes"]
    assert half["measures"]["psnr"]["mean"] == pytest.approx(single["measures"]["psnr"]["mean"], abs=0.05)
    assert half["tissue"]["sets"]["real"] == single["tissue"]["sets"]["real"]


def test_originals_are_measured_once(vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECOVAE_CACHE", str(tmp_path / "cache"))
    seen: list[int] = []
    forward = slice_features.SliceNetwork.forward

    def counted(self: slice_features.SliceNetwork, slices: torch.Tensor) -> torch.Tensor:
        seen.append(len(slices))
        return forward(self, slices)

    monkeypatch.setattr(slice_features.SliceNetwork, "forward", counted)
    counts = []
    for options in ([], [], ["--no-cache"]):
        seen.clear()
        assert evaluate(vae, "--split", "all", *options) == 0
        counts.append(sum(seen))
    slices = 5 * sum(GRID)
    assert counts == [2 * slices, slices, 2 * slices]


def test_lpips_of_a_weights_file(vae: Path, tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    torch.save(squeezenet1_1(weights=None).state_dict(), tmp_path / "squeeze.pth")
    options = [
        "--data.grid",
        "32",
        "32",
        "32",
        "--data.patch",
        "32",
        "32",
        "32",
        "--data.cohort-shape",
        "16",
        "20",
        "16",
    ]
    larger = finished_vae(tmp_path / "larger", options)  # the network needs slices of more than 16 pixels
    assert evaluate(larger, "--split", "all", "--limit", 2, "--lpips", tmp_path / "squeeze.pth") == 0
    found = evaluation_in(larger / "evaluation")
    autoencoder, network = load_autoencoder(larger), PerceptualLoss(str(tmp_path / "squeeze.pth"))
    volumes = open_volumes(open_vae(larger).config.data)
    for index, row in enumerate(found["volumes"]):
        volume = load_volume(volumes, index, (32, 32, 32))
        with torch.no_grad():
            reconstruction = autoencoder.decode(autoencoder.encode(volume[None])[0])[0]
        assert row["lpips"] == pytest.approx(lpips(reconstruction, volume, network), rel=1e-4)
    assert found["measures"]["lpips"]["mean"] == pytest.approx(np.mean([row["lpips"] for row in found["volumes"]]))
    assert found["lpips_note"] is None


def unfinished(vae: Path) -> list[str]:
    (vae / "summary.json").unlink()
    return []


def no_config(vae: Path) -> list[str]:
    (vae / "config.yaml").unlink()
    return []


def option(*options: str) -> Callable[[Path], list[str]]:
    return lambda _: list(options)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (unfinished, "is not finished; run the command that began it again"),
        (no_config, "holds no run (no config.yaml)"),
        (option(), "--split validation is 1 volume, and a covariance needs 2; give --split all"),
        (option("--limit", "1"), "a covariance needs at least 2 volumes"),
        (option("--slice-every", "0"), "give 1 or more"),
        (option("--keep-volumes", "-1"), "give 0 or more"),
        (option("--samples", "x"), "not of a flow; leave the option out"),
        (option("--number", "2"), "which has no samples; give --limit"),
        (option("--features", "resnet"), "see --help"),
        (option("--split", "all", "--features", "radimagenet"), "and name it with --radimagenet FILE"),
        (option("--split", "all", "--radimagenet", "nothing.pt"), "nothing.pt"),
        (option("--split", "all", "--lpips", "random"), "is no LPIPS; give pretrained or a file"),
        (option("--split", "all", "--lpips", "nothing.pth"), "--lpips nothing.pth"),
    ],
)
def test_what_cannot_be_evaluated(
    vae: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], list[str]], said: str
) -> None:
    options = harm(vae)
    capsys.readouterr()
    assert evaluate(vae, *options) == 2
    assert said in sentence(capsys)
    assert not (vae / "evaluation" / "evaluation.json").exists()


def test_no_run_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(tmp_path / "nowhere") == 2
    assert "nowhere: no such folder" in sentence(capsys)


def test_a_folder_that_cannot_be_written(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for keep in (0, 1):
        assert evaluate(vae, "--split", "all", "--out", tmp_path / "file", "--keep-volumes", keep) == 2
        assert "cannot be written" in sentence(capsys)


@pytest.mark.parametrize("options", [["--radimagenet", "nothing.pt"], ["--out", "file"], ["--lpips", "nothing.pth"]])
def test_what_is_missing_is_said_before_volumes_are_opened(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    def opened(*_: object) -> None:
        raise AssertionError("volumes were opened")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("decovae.commands.evaluate_reconstruction.open_split", opened)
    assert evaluate(vae, "--split", "all", *options) == 2


def test_new_pictures_never_lie_beside_old_figures(vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, said = vae / "evaluation", RunError("out of memory")

    def fail(*_: object) -> None:
        raise said

    assert evaluate(vae, "--split", "all", "--keep-volumes", 0) == 0
    with monkeypatch.context() as patched:
        patched.setattr("decovae.commands.evaluate_reconstruction.keep_pair", fail)
        assert evaluate(vae, "--split", "all") == 1
    assert not list(out.iterdir())
    assert evaluate(vae, "--split", "all") == 0
    assert len(list(out.iterdir())) == 4


def test_a_decoder_that_diverged_is_named(vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from decovae.models.weights import save_autoencoder

    model = load_autoencoder(vae)
    with torch.no_grad():
        model.post_quant_conv.conv.weight.fill_(torch.nan)
    save_autoencoder(model.state_dict(), model.config, vae / "autoencoder.safetensors")
    capsys.readouterr()
    assert evaluate(vae, "--split", "all") == 1
    assert "The reconstruction of sub-0000 is not finite" in sentence(capsys)

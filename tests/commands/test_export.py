"""`decovae export`: what MONAI and this project make of the files is what the run was."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decovae import cli
from decovae.commands.export_run import _best, centre_latents
from decovae.errors import InputError
from decovae.generation.conditioning import encode_conditions
from decovae.generation.flow_file import load_flow, save_flow
from decovae.models.flow_unet import TIMESTEPS
from decovae.models.weights import load_autoencoder
from decovae.training.checkpoints import Best
from tests.generation.flows import AGE_AND_SEX, LATENT, describe, tiny_autoencoder, tiny_flow, write_run
from tests.training.conftest import TINY, TINY_FLOW
from tests.training.conftest import cache as _cache  # noqa: F401  # a fixture

STEPS = 4


def export(*arguments: object) -> int:
    """The command's exit code."""
    return cli.main(["export", *map(str, arguments)])


def built(file: Path, definition: str) -> Any:
    """What MONAI makes of a network file."""
    from monai.bundle import ConfigParser

    return ConfigParser(json.loads(file.read_text())).get_parsed_content(definition, instantiate=True)


def loaded(file: Path, definition: str, state: dict[str, Tensor]) -> nn.Module:
    network: nn.Module = built(file, definition)
    network.load_state_dict(state, strict=True)
    return network.eval()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished flow run with conditions."""
    return write_run(tmp_path / "run", AGE_AND_SEX)


def test_an_autoencoder_in_monai_is_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "maisi.pt"
    assert export(run / "autoencoder.safetensors", "--format", "monai", "--out", out) == 0
    assert "maisi.pt: AutoencoderKlMaisi, 0.0" in capsys.readouterr().out
    theirs = loaded(out.with_suffix(".json"), "autoencoder_def", torch.load(out, weights_only=True))
    ours = load_autoencoder(run)
    assert load_autoencoder(out).config == ours.config
    image = torch.rand(1, 1, 16, 20, 16)
    with torch.no_grad():
        reconstruction, mean, sigma = theirs(image)
        torch.testing.assert_close(mean, ours.encode(image)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sigma, (0.5 * ours.encode(image)[1]).exp(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs.decode(mean), ours(image, sample=False)[0], rtol=1e-4, atol=1e-5)
    assert reconstruction.shape == image.shape


@pytest.mark.parametrize("told", [{}, {"age": "63", "sex": "F"}])
@torch.no_grad()
def test_a_flow_in_monai_s_scripts_makes_the_same_volumes(
    run: Path, tmp_path: Path, told: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "flow.pt"
    options = ["--condition", *(f"{name}={value}" for name, value in told.items())] if told else []
    assert export(run, "--format", "monai", "--out", out, *options) == 0
    printed = capsys.readouterr().out
    assert f"follows age={told.get('age', 'unknown')} sex={told.get('sex', 'unknown')} and takes no" in printed
    checkpoint = torch.load(out, weights_only=True)
    network_file = out.with_suffix(".json")
    unet = loaded(network_file, "diffusion_unet_def", checkpoint["unet_state_dict"])
    state = torch.load(tmp_path / "flow-autoencoder.pt", weights_only=True)
    autoencoder = loaded(network_file, "autoencoder_def", state)
    scheduler = built(network_file, "noise_scheduler")

    flow, description = load_flow(run)
    row = encode_conditions(description.conditions, told)[None]
    latent, t = torch.randn(1, 4, *LATENT), torch.tensor([0.3])
    velocity = flow(latent, t, row)
    torch.testing.assert_close(unet(latent, TIMESTEPS * (1 - t)), velocity, rtol=1e-4, atol=1e-4)

    decoded = autoencoder.decode_stage_2_outputs(latent / checkpoint["scale_factor"])
    ours = load_autoencoder(run).decode(description.space.restore(latent))
    torch.testing.assert_close(decoded, ours, rtol=1e-4, atol=1e-4)

    voxels = latent[0, 0].numel()
    scheduler.set_timesteps(STEPS, input_img_size_numel=voxels)
    times = description.schedule.times(STEPS, voxels)[:-1]
    # MONAI keeps them in half precision.
    torch.testing.assert_close(scheduler.timesteps.double(), TIMESTEPS * (1 - times), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_moved_latents_change_no_reconstruction() -> None:
    model = tiny_autoencoder()
    image = torch.rand(1, 1, 8, 8, 8)
    mean, reconstruction = model.encode(image)[0], model(image, sample=False)[0]
    model.load_state_dict(centre_latents(model.state_dict(), 0.7))
    torch.testing.assert_close(model.encode(image)[0], mean - 0.7)
    torch.testing.assert_close(model(image, sample=False)[0], reconstruction)


def test_safetensors_are_read_here(run: Path, tmp_path: Path) -> None:
    assert export(run, "--out", tmp_path / "flow.safetensors") == 0
    assert load_flow(tmp_path / "flow.safetensors")[1] == load_flow(run)[1]
    assert export(tmp_path / "flow.safetensors", "--out", tmp_path / "again.safetensors") == 0
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "flow.safetensors").read_bytes()
    assert export(run / "autoencoder.safetensors", "--out", tmp_path / "autoencoder.safetensors") == 0
    assert (tmp_path / "autoencoder.safetensors").read_bytes() == (run / "autoencoder.safetensors").read_bytes()


def test_a_flow_without_its_autoencoder_cannot_go_to_monai(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_flow(tiny_flow().state_dict(), describe(tiny_autoencoder()), tmp_path / "flow.safetensors")
    assert export(tmp_path / "flow.safetensors", "--format", "monai", "--out", tmp_path / "a.pt") == 2
    assert "autoencoder.safetensors: no such weights file" in capsys.readouterr().err
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("RUN --out a.pt", "--out a.pt: a file for safetensors ends with .safetensors; name it so."),
        ("RUN --format monai --out a.safetensors", "ends with .pt; name it so."),
        ("nowhere --out a.safetensors", "nowhere: no such run or file"),
        ("RUN/flow.safetensors --out RUN/flow.safetensors", "is what is to be exported; give another file."),
        ("RUN/flow.safetensors --checkpoint best --out a.safetensors", "is a file; give the folder of a run."),
        ("RUN --checkpoint last --out a.safetensors", "--checkpoint last: give best, newest, or the number of a step."),
        ("RUN --checkpoint 3 --out a.safetensors", "holds no checkpoint; leave the option out."),
        ("RUN --condition age=3 --out a.safetensors", "--condition age=3: is for --format monai; leave it out."),
        ("RUN --condition hue=3 --format monai --out a.pt", "has no condition 'hue'"),
        (
            "RUN/autoencoder.safetensors --condition age=3 --format monai --out a.pt",
            "is no flow; leave the option out.",
        ),
        ("RUN/samples --out a.safetensors", "samples: holds no run (no config.yaml)"),
        ("RUN --out RUN/config.yaml/a.safetensors", "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Path, arguments: str, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    (run / "samples").mkdir()
    assert export(*arguments.replace("RUN", str(run)).split()) == (1 if "cannot be written" in sentence else 2)
    printed = capsys.readouterr().err
    assert sentence in printed
    assert len(printed.strip().splitlines()) == 1
    assert not list(run.parent.glob("a.*"))


# Checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of the three stages as they are before they end: checkpoints, and nothing exported."""
    from decovae.training.main import train_decoder, train_flow, train_vae

    root = tmp_path_factory.mktemp("trained")
    short = "--steps 2 --validate-every 1 --checkpoint-every 1 --loss.perceptual 0 --optimizer.ema-decay 0.5".split()
    flow = "--steps 2 --validate-every 1 --checkpoint-every 1 --preview.samples 0".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECOVAE_CACHE", str(tmp_path_factory.getbasetemp() / "decovae-cache"))
        runs = {name: root / name for name in ("vae", "decoder", "flow")}
        assert train_vae([*TINY, *short, "--out", str(runs["vae"])]) == 0
        assert train_decoder(["--vae", str(runs["vae"]), *short, "--device", "cpu", "--out", str(runs["decoder"])]) == 0
        assert train_flow(["--vae", str(runs["vae"]), *TINY_FLOW, *flow, "--out", str(runs["flow"])]) == 0
    return runs


@pytest.mark.parametrize("stage", ["vae", "decoder", "flow"])
def test_the_last_checkpoint_is_what_the_run_ended_with(trained: dict[str, Path], stage: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[stage], run)
    assert export(run, "--out", tmp_path / "end.safetensors") == 0
    (run / "summary.json").unlink()
    for name in ("newest", "2"):
        assert export(run, "--checkpoint", name, "--out", tmp_path / "checkpoint.safetensors") == 0
        assert (tmp_path / "checkpoint.safetensors").read_bytes() == (tmp_path / "end.safetensors").read_bytes()


def test_of_a_run_that_is_not_finished_a_checkpoint_is_asked_for(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained["vae"], run)
    (run / "summary.json").unlink()
    for options, words in {
        (): "is not finished; give --checkpoint newest",
        ("--checkpoint", "7"): "--checkpoint 7: there is none of that step; choose ",
    }.items():
        assert export(run, "--out", tmp_path / "a.safetensors", *options) == 2
        assert words in capsys.readouterr().err
    assert export(run, "--checkpoint", "best", "--out", tmp_path / "best.safetensors") == 0
    newest = sorted((run / "checkpoints").iterdir())[-1]
    damaged = next(newest.glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert export(run, "--checkpoint", "newest", "--out", tmp_path / "a.safetensors") == 2
    assert re.search(r"step-\d+: cannot be read \(.*\); give --checkpoint another one", capsys.readouterr().err)
    assert not (tmp_path / "a.safetensors").exists()


def test_the_best_is_by_the_figure_of_its_stage(tmp_path: Path) -> None:
    found = []
    for step, figure in ((1, 20.0), (2, 30.0), (3, None), (4, 25.0)):
        found.append(tmp_path / f"step-{step:08d}")
        found[-1].mkdir()
        noted = None if figure is None else {"metric": "psnr", "value": figure}
        manifest = {"step": step, "state": {}, "files": {}, "figure": noted}
        (found[-1] / "manifest.json").write_text(json.dumps(manifest))
    assert _best(found, Best("psnr", higher=True)) == found[1]
    assert _best(found, Best("psnr", higher=False)) == found[0]
    with pytest.raises(InputError, match=r"--checkpoint best: no checkpoint in .* was validated"):
        _best(found, Best("flow_loss", higher=False))

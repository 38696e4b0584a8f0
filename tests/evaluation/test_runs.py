"""What is behind a run is found as long as it is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from decovae.errors import InputError
from decovae.evaluation.runs import autoencoder_behind, open_run
from decovae.training.config import DecoderConfig, FlowConfig
from decovae.training.run_folder import create_folder
from tests.evaluation.conftest import finished_flow


def open_it(folder: Path) -> object:
    return open_run(folder, command="test")


def test_the_loss_and_the_autoencoder_behind_a_flow(vae: Path, tmp_path: Path) -> None:
    run = open_run(finished_flow(vae, tmp_path / "flow"), command="test")
    assert (run.name, run.config.stage, run.deco) == ("flow", "flow", "vad")
    assert autoencoder_behind(run).folder == vae.resolve()
    shutil.rmtree(vae)
    assert run.deco is None
    with pytest.raises(InputError, match="the run of the autoencoder behind it is gone"):
        autoencoder_behind(run)


def test_a_flow_on_latents_alone_belongs_to_the_run_that_holds_them(vae: Path, tmp_path: Path) -> None:
    flow = finished_flow(vae, tmp_path / "flow")
    (flow / "config.yaml").unlink()
    create_folder(flow, FlowConfig(latents=(vae / "latents").resolve()))
    run = open_run(flow, command="test")
    assert run.deco == "vad"
    assert autoencoder_behind(run).folder == vae.resolve()


def test_latents_in_a_folder_of_their_own_tell_of_no_run(vae: Path, tmp_path: Path) -> None:
    flow = finished_flow(vae, tmp_path / "flow")
    (flow / "config.yaml").unlink()
    create_folder(flow, FlowConfig(latents=tmp_path / "store" / "latents"))
    run = open_run(flow, command="test")
    assert run.deco is None
    with pytest.raises(InputError, match=r"lie in no run's folder, .* in its config.yaml, set vae to the folder"):
        autoencoder_behind(run)
    config = flow / "config.yaml"
    config.write_text(config.read_text().replace("vae: null", f"vae: {vae}"))
    assert autoencoder_behind(open_run(flow, command="test")).folder == vae


def test_the_loss_behind_a_tuned_decoder(vae: Path, tmp_path: Path) -> None:
    decoder = tmp_path / "decoder"
    create_folder(decoder, DecoderConfig(vae=vae.resolve()))
    for name in ("autoencoder.safetensors", "summary.json"):
        shutil.copy(vae / name, decoder / name)
    assert open_run(decoder, command="test").deco == "vad"


def test_what_is_no_run(vae: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"test .*/nothing: no such folder"):
        open_it(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"test .*/empty: holds no run \(no config.yaml\)"):
        open_it(tmp_path / "empty")
    (vae / "summary.json").unlink()
    with pytest.raises(InputError, match="is not finished; run the command that began it again"):
        open_it(vae)

"""`decovae sample` from its options to its files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from decovae import cli
from decovae.commands import sample_run
from decovae.commands.sample import SampleConfig
from decovae.commands.sample_run import memory_advice
from decovae.generation.flow_file import load_flow, save_flow
from decovae.generation.solvers import TOLERANCE
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from tests.generation.flows import AGE_AND_SEX, SOURCE, tiny_autoencoder, write_run, write_vae

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished flow run without conditions, to be sampled by one process."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return write_run(tmp_path / "run")


def sample(*arguments: object) -> int:
    """The command's exit code, on the CPU."""
    return cli.main(["sample", *map(str, arguments), "--device", "cpu"])


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder; what a killed process left half written is no file of its."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".partial"}


def command(*arguments: object, processes: int = 0) -> list[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    return [sys.executable, *start, "-m", "decovae.cli", "sample", *map(str, arguments), "--device", "cpu"]


def test_samples_do_not_depend_on_batch_processes_or_threads(run: Path, tmp_path: Path) -> None:
    options = (run, "-n", 4, "--steps", 2)
    assert sample(*options, "--out", tmp_path / "one") == 0
    assert sample(*options, "--out", tmp_path / "four", "--batch-size", 4) == 0
    together = subprocess.run(
        command(*options, "--out", tmp_path / "two", "--batch-size", 2, processes=2),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("4 synthetic volumes") == 1
    first = files(tmp_path / "one")
    assert first.keys() == {
        *(f"sample-{index:05d}{suffix}" for index in range(4) for suffix in (".nii.gz", ".json")),
        "samples.json",
        "contact-sheet.png",
    }
    assert files(tmp_path / "four") == first
    assert files(tmp_path / "two") == first
    volumes = [nib.load(tmp_path / "one" / f"sample-{index:05d}.nii.gz").get_fdata() for index in range(4)]
    assert all(np.abs(volumes[0] - other).max() > 1e-3 for other in volumes[1:])


def test_a_killed_sampling_goes_on_to_the_same_files(run: Path, tmp_path: Path) -> None:
    assert sample(run, "-n", 6, "--steps", 10, "--out", tmp_path / "whole") == 0
    out = tmp_path / "killed"
    slow = subprocess.Popen(
        command(run, "-n", 6, "--steps", 10, "--out", out, "--batch-size", 1), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while not (out / "sample-00001.json").exists() and slow.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    slow.send_signal(signal.SIGKILL)
    slow.wait()
    (out / "sample-00000.json").unlink()  # as if it had died between a volume and its sidecar
    kept = (out / "sample-00001.nii.gz").stat().st_mtime_ns
    assert sample(run, "-n", 6, "--steps", 10, "--out", out) == 0
    assert files(out) == files(tmp_path / "whole")
    assert (out / "sample-00001.nii.gz").stat().st_mtime_ns == kept


def test_more_samples_join_those_that_are_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(run, "-n", 2, "--steps", 2, "--seed", 7) == 0
    out = run / "samples" / "euler2-seed7"
    before = files(out)
    assert sample(run, "-n", 3, "--steps", 2, "--seed", 7) == 0
    assert "3 synthetic volumes" in capsys.readouterr().out
    after = files(out)
    assert all(after[name] == content for name, content in before.items() if name != "contact-sheet.png")
    assert len(after) == len(before) + 2


def test_every_sample_says_that_it_is_synthetic(run: Path, tmp_path: Path) -> None:
    vae = write_vae(tmp_path / "tuned", _with_other_decoder())
    out = tmp_path / "out"
    assert sample(run, "-n", 1, "--solver", "heun", "--steps", 2, "--decoder", vae, "--out", out) == 0
    image = nib.load(out / "sample-00000.nii.gz")
    assert bytes(image.header["descrip"]).startswith(b"synthetic: DeCo-VAE")
    assert b"seed 42 sample 0" in bytes(image.header["descrip"])
    facts = json.loads((out / "sample-00000.json").read_text())
    assert facts["synthetic"] is True
    assert "synthetic" in facts["notice"]
    known = {"seed": 42, "sample": 0, "run": "run", "decoder": "tuned", "solver": "heun", "steps": 2}
    assert known.items() <= facts.items()
    assert {"decovae", "torch", "monai", "python"} == facts["versions"].keys()
    assert facts["training_data"] == "random numbers"
    assert len(facts["flow_sha256"]) == len(facts["autoencoder_sha256"]) == 64
    assert sample(run, "-n", 1, "--solver", "heun", "--steps", 2, "--out", tmp_path / "own") == 0
    assert files(tmp_path / "own")["sample-00000.nii.gz"] != files(out)["sample-00000.nii.gz"]


def _with_other_decoder() -> Autoencoder:
    autoencoder = tiny_autoencoder()
    for parameter in autoencoder.decoder.parameters():
        parameter.data += 0.05
    return autoencoder


def test_conditions_and_guidance_reach_the_flow(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", AGE_AND_SEX)
    made = []
    for place, options in enumerate(
        ([], ["--condition", "sex=F"], ["--condition", "sex=F", "age=70"], ["--condition", "sex=F", "--guidance", "3"])
    ):
        out = tmp_path / str(place)
        assert sample(run, "-n", 1, "--steps", 2, "--out", out, *options) == 0
        made.append(files(out)["sample-00000.nii.gz"])
    assert len(set(made)) == 4
    assert json.loads((tmp_path / "2" / "sample-00000.json").read_text())["condition"] == {"sex": "F", "age": "70"}


def test_dopri5_takes_a_tolerance(run: Path, tmp_path: Path) -> None:
    for out, options in (("one", ["-n", 1]), ("two", ["-n", 2, "--batch-size", 2])):
        assert sample(run, *options, "--solver", "dopri5", "--tolerance", "0.01", "--out", tmp_path / out) == 0
    assert files(tmp_path / "one")["sample-00000.nii.gz"] == files(tmp_path / "two")["sample-00000.nii.gz"]
    facts = json.loads((tmp_path / "one" / "sample-00000.json").read_text())
    assert facts["tolerance"] == 0.01
    assert SampleConfig(run=run, solver="dopri5").solver_tolerance == TOLERANCE
    assert "steps" not in facts


def test_the_ends_of_a_path_are_the_seeds_own_samples(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "path"
    assert sample(run, "--interpolate", 3, 8, "--frames", 3, "--steps", 2, "--out", out) == 0
    volumes = [nib.load(out / f"frame-{index:05d}.nii.gz").get_fdata() for index in range(3)]
    for seed, volume in ((3, volumes[0]), (8, volumes[2])):
        assert sample(run, "-n", 1, "--seed", seed, "--steps", 2, "--out", tmp_path / str(seed)) == 0
        assert np.array_equal(nib.load(tmp_path / str(seed) / "sample-00000.nii.gz").get_fdata(), volume)
    assert np.abs(volumes[1] - volumes[0]).max() > 1e-3
    with Image.open(out / "interpolation.gif") as animation:
        assert animation.n_frames == 4  # there and back
        assert b"synthetic" in animation.info["comment"]
    assert json.loads((out / "frame-00001.json").read_text())["fraction"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("RUN", "-n is not given"),
        ("RUN -n 0", "-n 0: too few; say how many samples to make, at least 1."),
        ("RUN -n many", "-n"),
        ("-n 1", "required"),
        ("RUN -n 1 --solver rk4", "--solver rk4: no such solver; choose euler"),
        ("RUN -n 1 --steps 0", "--steps 0: must be at least 1."),
        ("RUN -n 1 --seed -1", "--seed -1: must be at least 0."),
        ("RUN -n 1 --batch-size 0", "--batch-size 0: must be at least 1."),
        ("RUN -n 1 --solver dopri5 --steps 5", "--steps 5: dopri5 chooses its own steps"),
        ("RUN -n 1 --solver dopri5 --tolerance 0", "--tolerance 0: must be above 0."),
        ("RUN -n 1 --tolerance 0.1", "--tolerance 0.1: is for --solver dopri5"),
        ("RUN -n 1 --compile on", "--compile on: the flow is compiled for a GPU only"),
        ("RUN -n 1 --frames 3", "--frames 3: is for --interpolate"),
        ("RUN -n 1 --guidance 2", "--guidance 2: there is no --condition to weigh"),
        ("RUN -n 1 --condition age=63", "--condition age=63: this flow was trained without conditions"),
        ("RUN -n 1 --interpolate 1 2", "-n 1: --interpolate makes --frames volumes"),
        ("RUN --interpolate 1 2 --frames 1", "--frames 1: must be at least 2."),
        ("RUN --interpolate sub-1 2", "--interpolate sub-1 2: not two seeds, and the run does not name the latents"),
        ("RUN --interpolate 1 2 --latents NOWHERE", "holds no latents"),
        ("RUN -n 1 --decoder NOWHERE", "--decoder NOWHERE: no such folder"),
        ("NOWHERE -n 1", "NOWHERE: no such folder; give the folder of a finished run of train/flow.py."),
        ("RUN -n 1 --devise cpu", "--devise: no such option, did you mean --device"),
    ],
)
def test_wrong_options_are_one_sentence(
    arguments: str, sentence: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _refused(arguments.replace("RUN", str(run)).split(), sentence, capsys)
    assert not (run / "samples").exists()


def _refused(arguments: list[object], sentence: str, capsys: pytest.CaptureFixture[str], code: int = 2) -> None:
    assert sample(*arguments) == code
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert len(printed.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("summary.json", "is not finished (no summary.json)"),
        ("config.yaml", "holds no run (no config.yaml)"),
        ("flow.safetensors", "is no run of a flow (no flow.safetensors)"),
        ("autoencoder.safetensors", "is no run of a flow (no autoencoder.safetensors)"),
    ],
)
def test_an_incomplete_run_is_refused(name: str, sentence: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / name).unlink()
    _refused([run, "-n", 1], sentence, capsys)


@pytest.mark.parametrize("name", ["flow.safetensors", "autoencoder.safetensors"])
def test_damaged_weights_are_refused(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: len(content) // 2])
    _refused([run, "-n", 1], "not a readable safetensors file", capsys)


def test_weights_of_something_else_are_no_flow(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "flow.safetensors").write_bytes((run / "autoencoder.safetensors").read_bytes())
    _refused([run, "-n", 1], "not a flow that this version of decovae can read", capsys)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (None, "has the encoder"),
        (AutoencoderConfig(channels=(4, 8), residual_blocks=1, groups=2, latent_channels=3), "latents of 3 channels"),
        (AutoencoderConfig(channels=(4, 8, 8), residual_blocks=1, groups=2), "to a grid of 32×40×32 voxels, not 16×20"),
    ],
)
def test_another_autoencoder_is_refused(
    config: AutoencoderConfig | None,
    sentence: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tiny_autoencoder(seed=5) if config is None else tiny_autoencoder(config=config)
    vae = write_vae(tmp_path / "other", other)
    _refused([run, "-n", 1, "--decoder", vae], sentence, capsys)
    (run / "autoencoder.safetensors").write_bytes((vae / "autoencoder.safetensors").read_bytes())
    _refused([run, "-n", 1], sentence, capsys)


def test_other_settings_do_not_mix_with_what_is_there(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert sample(run, "-n", 1, "--steps", 2, "--out", out) == 0
    capsys.readouterr()
    _refused([run, "-n", 1, "--steps", 3, "--out", out], "holds samples with steps=2, not 3", capsys)
    _refused([run, "-n", 1, "--steps", 2, "--seed", 1, "--out", out], "with seed=42, not 1", capsys)
    (out / "samples.json").write_text("{")
    _refused([run, "-n", 1, "--steps", 2, "--out", out], "samples.json: is damaged", capsys)
    (out / "samples.json").unlink()
    _refused([run, "-n", 1, "--steps", 2, "--out", out], "holds files but no samples.json", capsys)
    _refused([run, "-n", 1, "--steps", 2, "--out", run / "summary.json"], "is a file; give a folder", capsys)


@pytest.mark.parametrize(
    ("conditions", "sentence"),
    [
        (["height=2"], "--condition height=2: this flow has no condition 'height'"),
        (["age"], "--condition age: write NAME=VALUE"),
        (["age=old"], "--condition age=old: not a finite number"),
        (["sex=X"], "--condition sex=X: no such value"),
    ],
)
def test_wrong_conditions_are_refused(
    conditions: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _refused([write_run(tmp_path / "run", AGE_AND_SEX), "-n", 1, "--condition", *conditions], sentence, capsys)


def test_a_sample_that_is_not_finite_ends_the_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow, description = load_flow(run)
    state = flow.state_dict()
    state["out.2.conv.bias"].fill_(float("nan"))
    save_flow(state, description, run / "flow.safetensors")
    _refused([run, "-n", 2, "--out", tmp_path / "out"], "sample 0: its latent is not finite", capsys, code=1)
    assert not list((tmp_path / "out").glob("sample-*"))


def test_a_damaged_sample_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert sample(run, "-n", 1, "--steps", 1, "--out", out) == 0
    capsys.readouterr()
    (out / "sample-00000.nii.gz").write_bytes(b"\x1f\x8b")
    _refused([run, "-n", 1, "--steps", 1, "--out", out], "sample-00000.nii.gz: is damaged", capsys)
    (out / "sample-00000.nii.gz").unlink()
    assert sample(run, "-n", 1, "--steps", 1, "--out", out) == 0


def test_a_full_disk_is_one_sentence(run: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands in for the disk's: write() fails in the same way, and names no file."""
    script = """if True:
        import resource, signal, sys
        from decovae import cli
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        sys.exit(cli.main(["sample", *sys.argv[1:]]))
    """
    out = tmp_path / "out"
    options = (run, "-n", "1", "--steps", "1", "--device", "cpu", "--out", out)
    full = subprocess.run(
        [sys.executable, "-c", script, *options], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert full.returncode == 1
    assert full.stderr.strip().endswith(f"error: {out}: cannot be read or written (File too large).")
    assert [path.name for path in out.iterdir()] == ["samples.json"]


def test_memory_that_runs_out_is_one_sentence(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def produce(*_arguments: object, **_options: object) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(sample_run, "produce", produce)
    sentence = "the machine ran out of memory; give a --batch-size below 2."
    _refused([run, "-n", 1, "--out", tmp_path / "out", "--batch-size", 2], sentence, capsys, code=1)


def test_advice_on_memory_names_no_option_that_is_at_its_least() -> None:
    usual, exact = SampleConfig(run=Path("run")), SampleConfig(run=Path("run"), precision="fp32")
    assert memory_advice(usual, "cuda", 4) == "give a --batch-size below 4"
    assert memory_advice(exact, "cuda", 1) == "leave out --precision fp32"
    assert memory_advice(SampleConfig(run=Path("run"), compile="on"), "cuda", 1) == "leave out --compile on"
    for device in ("cuda", "cpu"):
        assert "nothing smaller can be asked for" in memory_advice(usual, device, 1)


def test_a_default_folder_is_named_after_what_is_not_default(tmp_path: Path) -> None:
    def name(**options: Any) -> str:
        return SampleConfig(run=tmp_path, **options).folder.name

    assert name() == name(steps=30, guidance=1.0) == "euler30-seed42"
    assert name(condition=("sex=F", "age = 63"), guidance=2.0) == "euler30-seed42-age=63-sex=F-guidance2"
    assert name(condition=("age=63", "sex=F"), guidance=2.0) == "euler30-seed42-age=63-sex=F-guidance2"
    assert name(decoder=tmp_path / "tuned") == "euler30-seed42-decoder-tuned"
    assert name(solver="dopri5", tolerance=TOLERANCE) == "dopri5-seed42"
    assert name(solver="dopri5", tolerance=0.01, precision="fp32") == "dopri5-tolerance0.01-seed42-fp32"
    assert name(interpolate=("1", "2"), frames=5, solver="heun") == "heun30-1-to-2-frames5"
    assert name(interpolate=("1", "2"), latents=tmp_path / "latents") == "euler30-1-to-2-latents-latents"
    odd = [name(condition=(f"site={site}",)) for site in ("a/b", "a:b", "é" * 200, "é" * 201)]
    assert len(set(odd)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9_.=-]{1,100}", entry) for entry in odd)


def test_other_options_go_to_a_folder_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", AGE_AND_SEX)
    assert sample(run, "-n", 1, "--steps", 1) == 0
    assert sample(run, "-n", 1, "--steps", 1, "--condition", "age=63", "sex=F", "--guidance", 2) == 0
    assert sample(run, "-n", 1, "--steps", 1, "--decoder", write_vae(tmp_path / "tuned", _with_other_decoder())) == 0
    assert len(list((run / "samples").iterdir())) == 3


def test_guidance_needs_a_flow_trained_with_dropout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", AGE_AND_SEX)
    flow, description = load_flow(run)
    save_flow(flow.state_dict(), replace(description, condition_dropout=0.0), run / "flow.safetensors")
    options = [run, "-n", 1, "--steps", 1, "--condition", "age=63"]
    sentence = "--guidance 2: the flow was trained without condition dropout"
    _refused([*options, "--guidance", 2], sentence, capsys)
    assert sample(*options) == 0


def test_what_all_processes_refuse_is_printed_once(run: Path) -> None:
    refused = subprocess.run(
        command(run, "-n", 1, "--compile", "on", processes=2), cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert refused.returncode != 0
    assert refused.stderr.count("--compile on: the flow is compiled for a GPU only") == 1


def test_the_frame_is_the_source_s(run: Path) -> None:
    assert sample(run, "-n", 1, "--steps", 1) == 0
    assert nib.load(run / "samples" / "euler1-seed42" / "sample-00000.nii.gz").shape == SOURCE

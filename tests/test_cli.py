"""The `decovae` command: what it prints and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from decovae import cli
from decovae.commands import info
from decovae.commands.info import InfoConfig
from decovae.training.config import VAEConfig

GIB = 2**30


def linear_peak(preset: VAEConfig, patch: tuple[int, int, int], batch: int, memory: str) -> int:
    """A step that takes 4, 2 or 1 kB a voxel."""
    depth, height, width = patch
    return batch * depth * height * width * {"none": 4096, "balanced": 2048, "tight": 1024}[memory]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split(maxsplit=1) for line in printed.splitlines()]
    assert all([name, command.purpose] in rows for name, command in cli.COMMANDS.items())


def test_a_command_explains_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["info", "--help"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "usage: decovae info" in printed
    assert all(option in printed for option in ("--memory-of", "--card-gib", "--batch"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("inform", f"inform: no such command; choose {' or '.join(cli.COMMANDS)}."),
        ("info --card-gib -3", "--card-gib -3: must be above 0."),
        ("info --card-gib nan", "--card-gib nan: must be above 0."),
        ("info --card-gb 3", "--card-gb: no such option, did you mean --card-gib"),
        ("info --card-gib much", "--card-gib"),
        ("info --batch 1 0", "--batch 1 0: batch sizes are at least 1."),
        ("info --batch", "--batch"),
        ("info --memory-of mine", "--memory-of"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err
    assert len(printed.err.strip().splitlines()) == 1


def test_info_from_end_to_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(info, "_peak", linear_peak)
    assert cli.main("info --memory-of quickstart --batch 1 --card-gib 24".split()) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert "kernels: " in printed
    assert "What patch fits a card of 24 GiB, training quickstart in bf16" in printed
    assert printed.count("160×192×160  ") == 3


def test_info_names_the_largest_patch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_peak", linear_peak)
    lines = list(info.largest_patches(InfoConfig(batch=(1, 2)), 9))
    rows = [line.split() for line in lines[1:-1]]
    assert [(row[1], row[3], row[4]) for row in rows] == [
        ("1,", "balanced", "128×256×128"),  # 8 GiB of the 8.1 that may be filled
        ("1,", "tight", "160×192×160"),
        ("1,", "none", "128×128×128"),
        ("2,", "balanced", "128×128×128"),
        ("2,", "tight", "128×256×128"),
        ("2,", "none", "96×96×96"),
    ]
    assert " 8.0 GiB" in lines[1]
    assert "none; 64×64×64 takes 1.0 GiB" in list(info.largest_patches(InfoConfig(batch=(1,)), 0.5))[3]


def test_cards_are_those_found_or_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert info.cards(InfoConfig(card_gib=11)) == [11]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert info.cards(InfoConfig()) == [info.USUAL_CARD]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    for name in ("command_line", "config", "presets"):
        monkeypatch.delitem(sys.modules, f"decovae.training.{name}", raising=False)
    for arguments in (["info"], ["info", "--card-gib", "24"]):
        assert cli.main(arguments) == 2
        printed = capsys.readouterr()
        assert "tyro is not installed; `pip install 'decovae[train]'` brings it." in printed.err
        assert (f"torch {torch.__version__}" in printed.out) is (arguments == ["info"])


def test_kernels_and_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DECOVAE_KERNELS", "auto")
    assert info.active_kernels().startswith("torch, because torch sees no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert info.active_kernels().startswith("Triton for CUDA tensors")
    monkeypatch.setenv("DECOVAE_KERNELS", "torch")
    assert info.active_kernels() == "torch everywhere, because of DECOVAE_KERNELS=torch"
    monkeypatch.setenv("DECOVAE_KERNELS", "triton")
    assert info.active_kernels() == "Triton everywhere, because of DECOVAE_KERNELS=triton"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert info.active_kernels().startswith("none can run: torch sees no CUDA device")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert info.active_kernels() == "none can run, because Triton is not installed"
    monkeypatch.setenv("DECOVAE_KERNELS", "fast")
    assert cli.main(["info"]) == 2
    assert "DECOVAE_KERNELS=fast: unknown; use one of auto, triton, torch." in capsys.readouterr().err


def test_bad_pairs_of_versions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert info.known_bad("2.9.1+cu128", (9, 10, 2)) is not None
    assert info.known_bad("2.9.1+cu128", (9, 15, 0)) is None
    assert info.known_bad("2.10.0", (9, 10, 2)) is None
    assert info.known_bad("2.9.0", None) is None
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    for number, version in {91002: (9, 10, 2), 8902: (8, 9, 2)}.items():
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda number=number: number)
        assert info.cudnn_version() == version
    monkeypatch.setattr(torch, "__version__", "2.9.0")
    monkeypatch.setattr(info, "cudnn_version", lambda: (9, 10, 2))
    assert any(line.startswith("warning: PyTorch 2.9.0 with cuDNN 9.10.2") for line in info.describe())


def test_the_command_itself_loads_nothing() -> None:
    program = "import sys, decovae.cli; sys.exit('torch' in sys.modules or 'tyro' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("arguments", [["--help"], ["info"]])
def test_a_command_whose_reader_has_gone_ends_quietly(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    program = "import sys; from decovae.cli import main; sys.exit(main(sys.argv[1:]))"  # as the installed script does
    done = subprocess.run([sys.executable, "-c", program, *arguments], stdout=writing, stderr=-1, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_preset_s_options_reach_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    from decovae.training import memory
    from decovae.training.presets import PAPER

    asked: list[VAEConfig] = []
    monkeypatch.setattr(memory, "predict_training_peak", lambda config: asked.append(config) or 1)
    assert info._peak(PAPER, (64, 64, 64), 2, "tight") == 1
    assert asked == [replace(PAPER, memory="tight", data=replace(PAPER.data, patch=(64, 64, 64), batch_size=2))]

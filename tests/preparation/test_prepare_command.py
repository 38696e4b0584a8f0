"""`decovae prepare`: its exit codes, what it prints, and every wrong input in one sentence."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from decovae import cli
from decovae.data.store import open_store, store_checksum
from tests.preparation.sources import make_mixed, make_volumes
from tests.preparation.test_kills import ROOT, done

OPTIONS = "--volume.grid 8 10 6 --workers 0 --no-pictures".split()


def run(source: Path, out: Path, *options: str) -> int:
    return cli.main(["prepare", str(source), "--out", str(out), *OPTIONS, *options])


def test_good_volumes_end_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_volumes(tmp_path / "source", 4)
    assert run(tmp_path / "source", tmp_path / "out", "--split.validation", "0.25") == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: 4 volumes of 4 subjects, of 4 found." in printed
    assert "train 3 volumes (3 subjects), validation 1 volume (1 subject)" in printed
    assert "left out" not in printed
    assert len(open_store(tmp_path / "out").records) == 4


def test_an_unexpected_exclusion_ends_with_3_unless_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_mixed(tmp_path / "source", 3)
    assert run(tmp_path / "source", tmp_path / "out") == 3
    printed = capsys.readouterr().out
    assert "left out because of problems: 4" in printed
    assert "4 left out for which no rule asked" in printed
    assert run(tmp_path / "source", tmp_path / "out", "--allow-excluded") == 0
    assert "left out because of problems: 4" in capsys.readouterr().out


def test_what_a_rule_asked_for_ends_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_volumes(tmp_path / "source", 3)
    (tmp_path / "table.csv").write_text("eid,p41270\n00,\"['G301', 'I10']\"\n01,\n02,[I64|C71]\n")
    table = ["--table.path", str(tmp_path / "table.csv")]
    assert run(tmp_path / "source", tmp_path / "out", *table, "--exclude.codes", "G30", "C70-C72") == 0
    printed = capsys.readouterr().out
    assert "left out by rules: 2" in printed
    assert "1 × rule C70-C72" in printed


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_volumes(tmp_path / "source", 3)
    out = tmp_path / "out"
    run(tmp_path / "source", out)
    capsys.readouterr()
    assert cli.main(["prepare", "--verify", str(out)]) == 0
    checksum = store_checksum(out)
    assert f"3 volumes, every file as it was written; checksum {checksum}" in capsys.readouterr().out
    assert cli.main(["prepare", "--verify", str(out), "--workers", "-1"]) == 2
    assert "--workers -1: give 0 or more." in capsys.readouterr().err
    assert cli.main(["prepare", "--verify", str(out), "--workers", "0"]) == 0
    damaged, lost, _ = sorted(out.rglob("*.npy"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    lost.unlink()
    (out / "volumes" / "stranger.npy").touch()
    assert cli.main(["prepare", "--verify", str(out)]) == 1
    printed = capsys.readouterr()
    assert all(str(path) in printed.out for path in (damaged, lost, out / "volumes" / "stranger.npy"))
    assert "3 files are not what they should be" in printed.err
    for path in (damaged, out / "volumes" / "stranger.npy"):
        path.unlink()
    assert run(tmp_path / "source", out) == 0, "as the advice says"
    assert store_checksum(out) == checksum
    assert cli.main(["prepare", "--verify", str(out)]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "Give the volumes and a folder for the store: decovae prepare SRC --out DIR."),
        ("source", "decovae prepare SRC --out DIR"),
        ("nothing --out out", "nothing does not exist"),
        ("source --out out --workers -1", "--workers -1"),
        ("source --out out --volume.grid 8 8", "--volume.grid"),
        ("source --out out --volume.grid 8 0 8", "grid"),
        ("source --out out --volume.limit-gib -1", "limit"),
        ("source --out out --volume.fit resample --volume.spacing 1 0 1", "spacing"),
        ("source --out out --volume.fitt resize", "did you mean --volume.fit"),
        ("source --out out --exclude.codes G3O", "G3O"),
        ("source --out out --split.validation 1.5", "--split.validation"),
        ("--verify nothing", "nothing"),
        ("source --verify out", "leave SRC and --out away"),
    ],
)
def test_a_wrong_input_is_one_sentence(
    tmp_path: Path, arguments: str, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_volumes(Path("source"), 2)
    assert cli.main(["prepare", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    assert sentence in printed.err
    assert not Path("out").exists()


def test_help_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["prepare", "--help"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    for option in ("SRC", "--out", "--verify", "--volume.grid", "--select.match", "--table.path", "--exclude.codes",
                   "--split.validation", "--workers", "--allow-excluded"):  # fmt: skip
        assert option in printed


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    make_volumes(tmp_path / "source", 30)
    with subprocess.Popen(
        [sys.executable, "-m", "decovae.cli", "prepare", str(tmp_path / "source"), "--out", str(tmp_path / "out"),
         "--volume.grid", "128", "128", "128", "--no-pictures", "--workers", "1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        until = time.monotonic() + 120
        while done(tmp_path / "out") < 2 and time.monotonic() < until:
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        printed, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed == ""
    assert complaint.strip().splitlines() == ["error: stopped; the same command goes on from the last finished volume."]
    assert 2 <= done(tmp_path / "out") < 30

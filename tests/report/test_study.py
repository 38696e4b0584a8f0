"""A study: its commands, and their running, resuming, failing and stopping. The commands are stand-ins."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from decovae import cli
from decovae.errors import InputError, RunError
from decovae.report import study_run
from decovae.report.study import DECOS, PLANS, Cell, StudyOptions, cells, command_list
from decovae.report.study_run import Record, Runner, unfinished

SCRIPT = """
import os, sys, time
out, wait, code = sys.argv[1:4]
print("works on", out, flush=True)
time.sleep(float(wait))
if code == "0":
    open(out, "w").write(str(time.time()))
sys.exit(int(code))
"""


@pytest.fixture(autouse=True)
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for train/vae.py that sleeps, writes a file and ends with a code."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "vae.py").write_text(SCRIPT)
    monkeypatch.setattr(study_run, "SCRIPTS", tmp_path)


def step(folder: Path, name: str, *after: str, wait: float = 0, code: int = 0, more: str = "") -> Cell:
    done = folder / name
    arguments = (str(done), str(wait), str(code), *([more] if more else []))
    return Cell(name, "train/vae.py", arguments, done, after)


def run(folder: Path, planned: list[Cell], *, jobs: int = 2) -> dict:
    Runner(folder, Record(folder, {}), jobs=jobs, processes=1, threads=1).run(planned)
    return json.loads((folder / "study.json").read_text())["cells"]


def written(folder: Path, name: str) -> float:
    return float((folder / name).read_text())


@pytest.mark.parametrize("plan", PLANS)
def test_every_step_comes_after_what_it_needs(plan: str) -> None:
    planned = cells(StudyOptions(PLANS[plan], Path("study"), seeds=(1, 2)))
    names = [cell.name for cell in planned]
    assert len(set(names)) == len(names) == 2 * len(DECOS) * 11
    for cell in planned:
        assert {names.index(name) for name in cell.after} < set(range(names.index(cell.name))) or not cell.after
        assert all(planned[names.index(name)].stage < cell.stage for name in cell.after)


def test_printed_commands_are_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main("study paper --data.root /data/t1 --out runs/p --print-commands".split()) == 0
    text = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "$LAUNCH train/vae.py paper --deco sid --data.root /data/t1 --out runs/p/sid-seed42/vae --seed 42" in text
    assert text.splitlines()[-1] == "decovae study paper --data.root /data/t1 --out runs/p"
    spaced = command_list(cells(StudyOptions(PLANS["paper"], Path("my study"))))
    assert "'my study/vad-seed42/vae'" in spaced


def test_steps_run_in_order_side_by_side_and_once(tmp_path: Path) -> None:
    planned = [step(tmp_path, "a", wait=0.3), step(tmp_path, "b", wait=0.3), step(tmp_path, "c", "a", "b")]
    record = run(tmp_path, planned)
    assert written(tmp_path, "c") > max(written(tmp_path, "a"), written(tmp_path, "b"))
    assert record["a"]["seconds"] >= 0.3
    assert record["a"]["peak_memory_gb"] > 0
    before = written(tmp_path, "a"), written(tmp_path, "c")
    run(tmp_path, planned)
    assert (written(tmp_path, "a"), written(tmp_path, "c")) == before


def test_what_is_gone_or_changed_is_made_again_with_all_that_needs_it(tmp_path: Path) -> None:
    planned = [step(tmp_path, "a"), step(tmp_path, "b"), step(tmp_path, "c", "a"), step(tmp_path, "d", "c")]
    run(tmp_path, planned)
    assert unfinished(planned, Record(tmp_path, {})) == []
    (tmp_path / "c").unlink()
    assert [cell.name for cell in unfinished(planned, Record(tmp_path, {}))] == ["c", "d"]
    run(tmp_path, planned)
    changed = [step(tmp_path, "a", more="--other"), *planned[1:]]
    assert [cell.name for cell in unfinished(changed, Record(tmp_path, {}))] == ["a", "c", "d"]
    run(tmp_path, changed[:1])  # stopped here: what needs it is older now
    assert [cell.name for cell in unfinished(changed, Record(tmp_path, {}))] == ["c", "d"]


def test_what_a_cluster_made_is_taken_as_it_is(tmp_path: Path) -> None:
    planned = [step(tmp_path, "a"), step(tmp_path, "b", "a")]
    for cell in planned:
        cell.done.write_text("0")
    assert unfinished(planned, Record(tmp_path, {})) == []


def test_a_failure_is_told_with_its_log_and_stops_the_rest(tmp_path: Path) -> None:
    planned = [step(tmp_path, "good", wait=60), step(tmp_path, "bad", code=3), step(tmp_path, "never", "bad")]
    since = time.monotonic()
    with pytest.raises(RunError, match=r"bad ended with exit code 3: works on .*bad\.log"):
        run(tmp_path, planned)
    assert time.monotonic() - since < 30
    assert not (tmp_path / "good").exists()
    assert not (tmp_path / "never").exists()


def test_a_signal_stops_what_runs(tmp_path: Path) -> None:
    planned = [step(tmp_path, "a", wait=60)]
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    since = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, planned)
    assert time.monotonic() - since < 30
    assert not (tmp_path / "a").exists()


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(InputError, match=r"study\.json: cannot be read"):
        Record(tmp_path, {})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--samples 1", "--samples 1: a Fréchet distance needs at least 2 volumes."),
        ("--deco sid sid", "--deco sid sid: name at least one, and none twice."),
        ("--deco both", "--deco"),
        ("--jobs 0", "--jobs 0: must be at least 1."),
        ("--radimagenet nowhere.pt", "--radimagenet nowhere.pt: no such file"),
        ('--flow-options="--steps \'3"', "--flow-options --steps '3: is no command line"),
        ("thorough", "thorough"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["study", *shlex.split(arguments), "--out", str(tmp_path / "study")]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert not (tmp_path / "study").exists()


def test_the_runner_finds_the_package_s_scripts() -> None:
    assert (Path(study_run.__file__).resolve().parents[2] / "train" / "vae.py").is_file()

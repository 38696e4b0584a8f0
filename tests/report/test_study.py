"""A study: its commands, and their running, resuming, failing and stopping. The commands are stand-ins."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from decovae import cli
from decovae.errors import InputError, RunError
from decovae.report import study_run
from decovae.report.study import DECOS, PLANS, Cell, StudyOptions, cells, command_list
from decovae.report.study_run import Record, Runner, to_run

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
    planned = cells(StudyOptions(PLANS[plan], Path("study"), 4, seeds=(1, 2)))
    names = [cell.name for cell in planned]
    further = 3 * (len(DECOS) - 1) * len(PLANS[plan].latent_seeds)
    assert len(set(names)) == len(names) == 2 * len(DECOS) * 11 + further
    for cell in planned:
        assert {names.index(name) for name in cell.after} < set(range(names.index(cell.name))) or not cell.after
        assert all(planned[names.index(name)].stage < cell.stage for name in cell.after)


def test_printed_commands_are_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main("study paper --data.root /data/t1 --out runs/p --print-commands".split()) == 0
    text = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "$LAUNCH train/vae.py paper --deco sid --data.root /data/t1 --out runs/p/sid-seed42/vae --seed 42" in text
    assert text.splitlines()[-1] == "decovae study paper --data.root /data/t1 --out runs/p"
    spaced = command_list(cells(StudyOptions(PLANS["paper"], Path("my study"), 4)))
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


def names_to_run(folder: Path, planned: list[Cell]) -> list[str]:
    return [cell.name for cell in planned if to_run(cell, Record(folder, {}))]


def test_what_is_gone_or_of_other_arguments_is_made_again(tmp_path: Path) -> None:
    planned = [step(tmp_path, "a"), step(tmp_path, "b"), step(tmp_path, "c", "a")]
    run(tmp_path, planned)
    assert names_to_run(tmp_path, planned) == []
    (tmp_path / "c").unlink()
    assert names_to_run(tmp_path, planned) == ["c"]
    run(tmp_path, planned)
    assert names_to_run(tmp_path, [step(tmp_path, "a", more="--other"), *planned[1:]]) == ["a"]


def test_a_result_of_others_than_there_are_now_is_never_passed_off(tmp_path: Path) -> None:
    """A training finds its run finished and says so: it would not notice that what it began from is another."""
    planned = [step(tmp_path, "a"), step(tmp_path, "c", "a")]
    run(tmp_path, planned)
    (tmp_path / "a").unlink()
    with pytest.raises(InputError, match="was made from results that are others now; remove that folder"):
        run(tmp_path, planned)
    with pytest.raises(InputError, match="others now"):  # nor the next time
        run(tmp_path, planned)
    (tmp_path / "c").unlink()
    run(tmp_path, planned)
    assert written(tmp_path, "c") > written(tmp_path, "a")


def test_a_command_that_left_its_result_as_it_was_outdates_nothing(tmp_path: Path) -> None:
    planned = [step(tmp_path, "a"), step(tmp_path, "c", "a")]
    run(tmp_path, planned)
    (tmp_path / "train" / "vae.py").write_text("")  # stands for a training that finds itself finished
    run(tmp_path, [step(tmp_path, "a", more="--data.workers 2"), planned[1]])
    assert names_to_run(tmp_path, planned[1:]) == []


def test_evaluations_are_made_again_when_what_they_measure_was(tmp_path: Path) -> None:
    evaluate = Cell("e", "decovae", ("evaluate", "run"), tmp_path / "e", ("a",))
    record = Record(tmp_path, {})
    run(tmp_path, [step(tmp_path, "a")])
    (tmp_path / "e").write_text("")
    record = Record(tmp_path, {})
    record.note(evaluate, seconds=1, peak_memory_gb=1)
    assert not to_run(evaluate, Record(tmp_path, {}))
    (tmp_path / "a").unlink()
    run(tmp_path, [step(tmp_path, "a")])
    assert to_run(evaluate, Record(tmp_path, {}))


def test_what_a_cluster_made_is_taken_as_it_is(tmp_path: Path) -> None:
    planned = [step(tmp_path, "a"), step(tmp_path, "b", "a")]
    for cell in reversed(planned):
        cell.done.write_text("0")
    assert names_to_run(tmp_path, planned) == []


def test_its_time_is_that_of_all_invocations(tmp_path: Path) -> None:
    run(tmp_path, [step(tmp_path, "a", wait=0.3)])
    first = json.loads((tmp_path / "study.json").read_text())["seconds"]
    run(tmp_path, [step(tmp_path, "a", wait=0.3), step(tmp_path, "b", wait=0.3)])
    assert json.loads((tmp_path / "study.json").read_text())["seconds"] >= first + 0.3


def test_two_studies_do_not_share_a_folder(tmp_path: Path) -> None:
    """Not even with a command that a killed study left behind."""
    with (tmp_path / ".lock").open("w") as file:
        left_behind = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(file.fileno(),)
        )
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        with pytest.raises(InputError, match="another decovae study"):
            run(tmp_path, [step(tmp_path, "a")])
    finally:
        left_behind.communicate(b"\n")
    run(tmp_path, [step(tmp_path, "a")])


def test_a_failure_is_told_with_its_log_and_stops_the_rest(tmp_path: Path) -> None:
    planned = [step(tmp_path, "good", wait=60), step(tmp_path, "bad", code=3), step(tmp_path, "never", "bad")]
    since = time.monotonic()
    with pytest.raises(RunError, match=r"bad ended with exit code 3: works on .*bad\.log"):
        run(tmp_path, planned)
    assert time.monotonic() - since < 30
    assert not (tmp_path / "good").exists()
    assert not (tmp_path / "never").exists()


def test_a_refused_input_is_told_as_the_command_told_it(tmp_path: Path) -> None:
    (tmp_path / "train" / "vae.py").write_text("""
import sys
print("error: the first attempt's sentence." if len(sys.argv) > 4 else "error: --steps 0: must be at least 1.")
print("what torchrun says behind it")
sys.exit(2)
""")
    for more, sentence in (("first", "the first attempt's sentence."), ("", "--steps 0: must be at least 1.")):
        with pytest.raises(InputError) as refused:
            run(tmp_path, [step(tmp_path, "a", more=more)])
        assert str(refused.value) == f"a: {sentence}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_what_runs(tmp_path: Path, number: signal.Signals) -> None:
    """Also where Ctrl-C is ignored by all that is started, as behind a shell's ``&``."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    planned = [step(tmp_path, "a", wait=60)]
    threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
    since = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, planned)
    finally:
        signal.signal(signal.SIGINT, before)
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
        ("--radimagenet nowhere.pt", "nowhere.pt: no such weights file"),
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

"""A study: its commands, and their running, resuming, failing and stopping. The commands are stand-ins."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from decovae import cli
from decovae.commands.study import StudyConfig, closing_lines, study_options
from decovae.errors import InputError, RunError
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.report import study_run
from decovae.report.study import DECOS, Cell, StudyOptions, cells, command_list
from decovae.report.study_plans import PLANS
from decovae.report.study_run import Record, Runner, to_run
from decovae.report.study_trainings import DECODING, ENCODING, TRAINING, TUNING, forecast, read_trainings
from decovae.training.config import VAEConfig
from decovae.training.pretended_cuda import pretended_cuda
from tests.report.fake_study import write_study

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
    return recorded(folder)["cells"]


def run_session(folder: Path, planned: list[Cell], *, ends_with: str | None = None, seconds: float = 60) -> list[str]:
    """Run for so many seconds, or until a file is there, however busy the machine is; the steps that are left."""
    runner = Runner(folder, Record(folder, {}), jobs=2, processes=1, threads=1)

    def watch() -> None:
        while ends_with is not None and not (folder / ends_with).exists():
            time.sleep(0.05)
        time.sleep(0.3)  # for the seconds that are counted
        runner.until = 0

    if ends_with is not None:
        (folder / ends_with).unlink(missing_ok=True)
        threading.Thread(target=watch, daemon=True).start()
    return [cell.name for cell in runner.run(planned, until=time.monotonic() + seconds)]


def recorded(folder: Path) -> dict:
    return json.loads((folder / "study.json").read_text())


def written(folder: Path, name: str) -> float:
    return float((folder / name).read_text())


def planned_by(plan: str, *seeds: int, **options: object) -> list[Cell]:
    chosen = PLANS[plan]
    return cells(StudyOptions(chosen, Path("study"), chosen.samples, seeds=seeds or (42,), **options))


@pytest.mark.parametrize("plan", PLANS)
def test_every_step_comes_after_what_it_needs(plan: str) -> None:
    planned = planned_by(plan, 1, 2)
    names = [cell.name for cell in planned]
    further = 3 * (len(DECOS) - 1) * len(PLANS[plan].latent_seeds)
    assert len(set(names)) == len(names) == 2 * len(DECOS) * (11 if PLANS[plan].generates else 6) + further
    for cell in planned:
        assert {names.index(name) for name in cell.after} < set(range(names.index(cell.name))) or not cell.after
        assert all(planned[names.index(name)].stage < cell.stage for name in cell.after)


@pytest.mark.parametrize("plan", PLANS)
def test_none_and_vad_come_first_and_seeds_of_table_1_alone_last(plan: str) -> None:
    names = [cell.name for cell in planned_by(plan)]
    turns = [
        (not name.partition("/")[0].endswith("42"), name.startswith("cov"), name.startswith(("sid", "cov")))
        for name in names
        if "seed42" in name or name.startswith(("none", "vad"))
    ]
    assert turns == sorted(turns)


@pytest.mark.parametrize("plan", PLANS)
def test_models_differ_in_loss_and_seed_alone(plan: str) -> None:
    """Above all they are trained for the same number of steps."""
    kinds: dict[str, set[tuple[str, ...]]] = {}
    for cell in planned_by(plan, 1, 2):
        model, _, kind = cell.name.partition("/")
        deco, _, seed = model.partition("-seed")
        options = iter(cell.arguments)
        rest = [option for option in options if option not in ("--deco", "--seed") or next(options) not in (deco, seed)]
        rest = [option.replace(model, "MODEL") for option in rest if option not in ("--tsne-codes", "0")]
        kinds.setdefault(kind, set()).add(tuple(rest))
    assert all(len(commands) == 1 for commands in kinds.values())


@pytest.mark.parametrize(("plan", "minutes", "least"), [("mini", 30, 25), ("mini-3h", 180, 150)])
def test_the_mini_reproduction_is_the_paper_s_network_in_the_time_it_is_for(
    plan: str, minutes: int, least: int
) -> None:
    planned = planned_by(plan)
    trainings = read_trainings(planned)
    vae, decoder, paper = trainings.vae, trainings.decoder, VAEConfig(preset="paper")
    assert decoder is not None
    assert trainings.flow is None
    assert (vae.model, vae.precision, vae.compile, vae.memory) == (AutoencoderConfig(), "auto", "auto", "balanced")
    assert (vae.data.grid, vae.data.patch, vae.data.batch_size) == ((128, 256, 128), (96, 96, 96), 2)
    assert decoder.data == vae.data
    shorter = {"kl": paper.loss.kl, "adversarial_warmup": 0}
    assert replace(vae.loss, **shorter) == paper.loss
    along = math.log(vae.steps / 400) / math.log(100_000 / 400)  # from the quickstart's steps to the paper's
    assert vae.loss.kl == pytest.approx(5e-3 * (5e-4 / 5e-3) ** along, rel=0.05)
    assert vae.loss.adversarial_warmup == vae.steps / 2
    assert vae.steps % vae.validate_every == 0
    seconds = forecast(planned, trainings)
    assert seconds is not None
    assert least < seconds / 60 <= minutes


def test_operations_of_the_forecast_are_those_of_the_network() -> None:
    """A training step is a forward and twice that again, and a little for LPIPS and discriminators."""

    def counted(shape: tuple[int, ...]) -> tuple[int, int]:
        with pretended_cuda(), FlopCounterMode(display=False) as operations, torch.no_grad():
            autoencoder = Autoencoder(memory="balanced")
            latent = autoencoder.encode(torch.empty(shape))[0]
            encoding = operations.get_total_flops()
            autoencoder.decode(latent)
        return encoding, operations.get_total_flops() - encoding

    assert counted((1, 1, 128, 256, 128)) == pytest.approx((ENCODING, DECODING), rel=1e-3)
    encoding, decoding = counted((2, 1, 96, 96, 96))
    assert 1 < TRAINING / (3 * (encoding + decoding)) < 1.05
    assert 1 < TUNING / (encoding + 3 * decoding) < 1.05


def test_what_was_not_counted_is_not_forecast() -> None:
    for planned in (planned_by("quickstart"), planned_by("mini", vae=("--model.channels", "4", "8"))):
        assert forecast(planned, read_trainings(planned)) is None


def test_printed_commands_are_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main("study paper --data.root /data/t1 --out runs/p --print-commands".split()) == 0
    text = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "$LAUNCH train/vae.py paper --deco sid --data.root /data/t1 --out runs/p/sid-seed42/vae --seed 42" in text
    assert text.splitlines()[-1] == "decovae study paper --data.root /data/t1 --out runs/p"
    assert cli.main("study mini --out runs/m --print-commands".split()) == 0
    text = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "--nproc_per_node 1" in text  # its batch is that of one process
    assert "train/flow.py" not in text
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


STOPPABLE = """
import os, signal, sys, time
out, deaf = sys.argv[1], int(sys.argv[2])
checkpoint = out + ".checkpoint"
def stop(*_):
    global deaf
    deaf -= 1
    if deaf < 0:
        open(checkpoint, "w").write("half")
        sys.exit(143)
signal.signal(signal.SIGTERM, stop)
open(out + ".ready", "w").close()
if not os.path.exists(checkpoint):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.05)
open(out, "w").write(str(time.time()))
"""
"""Is done only when it begins from its checkpoint, which it writes when it has been asked to stop often enough."""


def stoppable(folder: Path, name: str, *after: str, deaf: int = 0) -> Cell:
    (folder / "train" / "vae.py").write_text(STOPPABLE)
    return Cell(name, "train/vae.py", (str(folder / name), str(deaf)), folder / name, after)


def test_a_session_ends_in_time_and_the_next_goes_on(tmp_path: Path) -> None:
    planned = [stoppable(tmp_path, "a"), stoppable(tmp_path, "b", "a")]
    assert run_session(tmp_path, planned, ends_with="a.ready") == ["a", "b"]
    assert (tmp_path / "a.checkpoint").is_file()
    first = recorded(tmp_path)
    assert first["cells"] == {}
    assert list(first["unfinished"]) == ["a"]
    assert run_session(tmp_path, planned, ends_with="b.ready") == ["b"]  # from its checkpoint a is done at once
    second = recorded(tmp_path)
    assert second["cells"]["a"]["seconds"] > first["unfinished"]["a"]["seconds"] >= 0.3
    assert second["seconds"] >= first["seconds"] + 0.3
    assert run_session(tmp_path, planned) == []
    assert set(recorded(tmp_path)["cells"]) == {"a", "b"}
    assert recorded(tmp_path)["unfinished"] == {}


def test_time_spent_on_other_arguments_is_not_counted(tmp_path: Path) -> None:
    cell = stoppable(tmp_path, "a")
    assert run_session(tmp_path, [cell], ends_with="a.ready") == ["a"]
    content = recorded(tmp_path)
    content["unfinished"]["a"]["seconds"] = 1000.0
    (tmp_path / "study.json").write_text(json.dumps(content))
    assert run_session(tmp_path, [replace(cell, arguments=(*cell.arguments, "--other"))]) == []
    assert recorded(tmp_path)["cells"]["a"]["seconds"] < 1000


def test_no_time_runs_nothing(tmp_path: Path) -> None:
    planned = [step(tmp_path, "a"), step(tmp_path, "b", "a"), step(tmp_path, "c", "b")]
    run(tmp_path, planned[:2])
    assert run_session(tmp_path, planned, seconds=0) == ["c"]
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("deaf", [1, 9])
def test_what_does_not_stop_is_asked_again_and_ended_at_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaf: int
) -> None:
    monkeypatch.setattr(study_run, "PATIENCE", 1.0)
    since = time.monotonic()
    assert run_session(tmp_path, [stoppable(tmp_path, "a", deaf=deaf)], ends_with="a.ready") == ["a"]
    assert time.monotonic() - since < 30
    assert (tmp_path / "a.checkpoint").is_file() == (deaf == 1)


def test_a_failed_attempt_s_time_is_kept(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        run(tmp_path, [step(tmp_path, "a", wait=0.3, code=3)])
    assert recorded(tmp_path)["unfinished"]["a"]["seconds"] >= 0.3


def test_what_is_complete_has_tables_and_a_page_before_the_rest_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path / "study", decos=("none", "vad"), flows=False)
    (study / "sid-seed42" / "vae").mkdir(parents=True)
    (study / "sid-seed42" / "vae" / "config.yaml").write_text("stage: vae")  # in training
    command = ["study", "mini", "--perceptual", "random", "--minutes", "0", "--out", str(study)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    last = "Stopped after 0 minutes: 8 of 24 steps are done, 16 are not. The same command goes on."
    assert printed.splitlines()[-1] == last
    assert "To do: sid-seed42: vae, encode, analyze, decoder, evaluate-vae, evaluate-decoder" in printed
    written = {path.name for path in (study / "tables").iterdir()}
    assert written == {f"table{number}.{suffix}" for number in (1, 2, 4, 5) for suffix in ("csv", "md", "tex")}
    for suffix in ("md", "tex"):
        text = (study / "tables" / f"table2.{suffix}").read_text()
        assert "Not finished yet: DeCo-VAE (SID)." in text
        assert "gFD" not in text
    assert [table["number"] for table in recorded(study)["tables"]] == [1, 2, 4, 5]
    assert recorded(study)["steps"] == {"vae": 120, "decoder": 120}
    assert "nothing was generated" in (study / "report.html").read_text(encoding="utf-8")


def test_a_session_that_finished_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", "mini", "--perceptual", "random", "--minutes", "0", "--out", str(tmp_path / "study")]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "No run is finished so far" in printed
    assert "0 of 24 steps are done" in printed.splitlines()[-1]


def test_a_study_that_fails_leaves_the_tables_of_what_is_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path / "study", decos=("none",), flows=False)
    (tmp_path / "train" / "vae.py").write_text("import sys; sys.exit(3)")
    command = ["study", "mini", "--perceptual", "random", "--deco", "none", "vad", "--out", str(study)]
    assert cli.main(command) == 1
    assert "vad-seed42/vae ended with exit code 3" in capsys.readouterr().err
    assert "Not finished yet: DeCo-VAE (VAD)." in (study / "tables" / "table1.md").read_text()


def test_the_last_line_of_a_finished_study() -> None:
    assert closing_lines(planned_by("mini"), [], 5)[-1] == "Finished: all 24 steps are done."


def test_random_features_come_with_weights_that_suit_them() -> None:
    options = study_options(StudyConfig(plan="mini", perceptual="random", vae_options="--loss.perceptual 0.5"))
    trainings = read_trainings(cells(options))
    assert trainings.decoder is not None
    assert trainings.vae.loss.perceptual_network == trainings.decoder.loss.perceptual_network == "random"
    assert trainings.vae.loss.perceptual == 0.5  # what is said last holds
    assert trainings.vae.loss.adversarial_volume == 0.01
    assert trainings.decoder.loss.perceptual == 0.04


def test_weights_that_cannot_be_downloaded_are_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.models import SqueezeNet1_1_Weights

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(SqueezeNet1_1_Weights, "get_state_dict", no_network)
    assert cli.main(["study", "mini", "--out", str(tmp_path / "study")]) == 2
    printed = capsys.readouterr().err
    assert "no network); give --perceptual random" in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "study").exists()


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
        write_study(tmp_path, decos=("none",), flows=False)
        before = '{"seconds": 5, "cells": {}}'
        (tmp_path / "study.json").write_text(before)
        assert cli.main(["study", "mini", "--perceptual", "random", "--out", str(tmp_path)]) == 2
        assert (tmp_path / "study.json").read_text() == before
        assert not (tmp_path / "tables").exists()
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
        ("--minutes=-1", "--minutes -1: must not be negative."),
        ("mini --samples 4", "--samples 4: mini trains no flows; leave it out."),
        ('mini --flow-options="--steps 3"', "--flow-options --steps 3: mini trains no flows; leave it out."),
        ('mini --vae-options="--stepz 3"', "--stepz: no such option, did you mean --steps"),
        ('mini --decoder-options="--steps 0"', "--steps 0: must be at least 1."),
        ("mini --perceptual nowhere.pth", "nowhere.pth: no such perceptual weights file; give --perceptual random"),
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

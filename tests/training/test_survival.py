"""Runs that are killed come out as if nothing had happened: started again by hand, by torchrun, and on two hosts."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import survival
from bench.processes import ROOT, environment, free_port

CLUSTER = ROOT / "train" / "cluster"
LONGEST = 240.0

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[survival.Trial]]:
    """A folder with undisturbed runs of one and two processes, and how three killed ones came out."""
    out = tmp_path_factory.mktemp("survival")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECOVAE_CACHE", str(tmp_path_factory.getbasetemp() / "decovae-cache"))
        return out, list(survival.trials(out, count=3, processes=[1, 2, 2], seed=1, say=print))


@pytest.mark.slow
def test_a_killed_run_comes_out_as_if_nothing_had_happened(survived: tuple[Path, list[survival.Trial]]) -> None:
    _, trials = survived
    assert [trial.difference for trial in trials] == [None] * 3
    assert all(trial.kills for trial in trials)


def processes_of(agent: int) -> Iterator[tuple[int, int]]:
    """Rank and id of the training processes that a torchrun has now."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == agent:
                variables = dict(
                    line.split("=", 1) for line in (folder / "environ").read_text().split("\0") if "=" in line
                )
                yield int(variables["RANK"]), int(folder.name)


def start(command: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment(), "OMP_NUM_THREADS": "1", **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def until_under_way(agents: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Return once the run has written its first checkpoint and gone on."""
    deadline = time.monotonic() + LONGEST
    try:
        while survival.last_step(folder) < 3 or not list(folder.glob("checkpoints/step-????????")):
            assert all(agent.poll() is None for agent in agents)
            assert time.monotonic() < deadline
            time.sleep(0.02)
    except BaseException:
        for agent in agents:
            agent.terminate()
        raise


def kill_rank(rank: int, agents: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """End one training process of a run that is under way."""
    until_under_way(agents, folder)
    (pid,) = (pid for agent in agents for found, pid in processes_of(agent.pid) if found == rank)
    os.kill(pid, signal.SIGKILL)


def end(agents: list[subprocess.Popen[bytes]], logs: list[Path], *, code: int = 0) -> list[str]:
    """What torchruns said that ended by themselves, and with this exit code."""
    try:
        codes = [agent.wait(LONGEST) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    said = [log.read_text(errors="replace") for log in logs]
    assert codes == [code] * len(agents), "\n".join(said)
    return said


@pytest.mark.slow
def test_torchrun_starts_a_run_again_whose_process_was_killed(
    survived: tuple[Path, list[survival.Trial]], tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 --max-restarts 3 train/vae.py".split()
    agent = start([sys.executable, *launch, *survival.OPTIONS, "--out", str(run)], log)
    kill_rank(1, [agent], run)
    (said,) = end([agent], [log])
    assert "lost another process of this run" in said
    assert "Traceback" not in said
    assert survival.difference(survived[0] / "reference-2", run) is None


@pytest.mark.slow
def test_the_recipe_for_hosts_starts_a_run_again_whose_process_was_killed(
    survived: tuple[Path, list[survival.Trial]], tmp_path: Path
) -> None:
    """At a restart the two may change places."""
    run, logs = tmp_path / "run", [tmp_path / "host-0", tmp_path / "host-1"]
    agents = start_hosts(run, logs)
    kill_rank(1, agents, run)
    end(agents, logs)
    assert survival.difference(survived[0] / "reference-2", run) is None


@pytest.mark.slow
def test_a_scheduler_s_warning_stops_the_recipe_for_hosts_with_a_checkpoint(tmp_path: Path) -> None:
    """SIGUSR1 to each torchrun, as srun passes it on."""
    run, logs = tmp_path / "run", [tmp_path / "host-0", tmp_path / "host-1"]
    agents = start_hosts(run, logs, "--steps", "400")
    until_under_way(agents, run)
    for agent in agents:
        agent.send_signal(signal.SIGUSR1)
    said = "".join(end(agents, logs, code=1))  # torchrun's, whatever its processes' were
    (stopped,) = re.findall(r"Interrupted by SIGUSR1 at step (\d+); checkpoint written", said)
    assert (run / "checkpoints" / f"step-{int(stopped):08d}" / "manifest.json").is_file()
    assert not (run / "summary.json").exists()


def start_hosts(run: Path, logs: list[Path], *options: str) -> list[subprocess.Popen[bytes]]:
    """The torchruns of a run on as many hosts, which are this machine."""
    place = {"HEAD": "127.0.0.1", "INTERFACE": "lo", "ADDRESS": "127.0.0.1", "PORT": str(free_port())}
    return [
        start(
            [str(CLUSTER / "host.sh"), "train/vae.py", *survival.OPTIONS, "--out", str(run), *options],
            log,
            **place,
            NODE=str(node),
            PROCESSES="1",
            PYTHON=sys.executable,
        )
        for node, log in enumerate(logs)
    ]


SRUN = """#!/usr/bin/env bash
# As SLURM's: SIGUSR1 goes on to the task, and SIGTERM ends it at once.
while [[ "$1" == --* ]]; do shift; done
"$@" &
trap "kill -USR1 $!" USR1
trap "kill -KILL $!" TERM
while kill -0 $! 2> /dev/null; do wait $!; done
wait $!
"""

HOST = """#!/usr/bin/env bash
trap "touch checkpoint; exit 1" USR1 TERM
echo "$OMP_NUM_THREADS" > threads
echo $$ > task.part && mv task.part task
for _ in {1..600}; do sleep 0.1; done
"""

SCONTROL = """#!/usr/bin/env bash
[[ "$1" == requeue ]] && touch requeued || echo localhost
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The batch script in a cluster of stand-ins, its task running; files in ``tmp_path`` tell what happened."""
    host = tmp_path / "train" / "cluster" / "host.sh"
    host.parent.mkdir(parents=True)
    for path, text in ((host, HOST), (tmp_path / "srun", SRUN), (tmp_path / "scontrol", SCONTROL)):
        path.write_text(text)
        path.chmod(0o755)
    job = {"JOB_ID": "7", "JOB_NODELIST": "localhost", "NNODES": "1", "NODEID": "0", "CPUS_PER_TASK": "4"}
    variables = {
        **{f"SLURM_{name}": value for name, value in job.items()},
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "HEAD": "127.0.0.1",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    script = subprocess.Popen([CLUSTER / "slurm.sh", "train/vae.py"], env=variables, start_new_session=True)
    try:
        deadline = time.monotonic() + LONGEST
        while not (tmp_path / "task").exists():
            assert script.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield script
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
        script.wait()


def test_the_batch_script_stops_and_requeues_a_job_whose_time_is_nearly_over(
    slurm: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    slurm.send_signal(signal.SIGUSR1)
    assert slurm.wait(LONGEST) == 1
    assert (tmp_path / "checkpoint").exists()
    assert (tmp_path / "requeued").exists()
    assert int((tmp_path / "threads").read_text()) == 1, "four processes on four cores, half of them for loaders"


def test_the_batch_script_outlives_a_task_that_is_cancelled_and_leaves_it_alone(
    slurm: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    slurm.send_signal(signal.SIGTERM)
    os.kill(int((tmp_path / "task").read_text()), signal.SIGTERM)
    assert slurm.wait(LONGEST) == 1
    assert (tmp_path / "checkpoint").exists()
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_cluster_scripts_are_sound(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


@pytest.mark.parametrize("missing", ["HEAD", "NODE"])
def test_the_recipe_says_what_it_has_to_be_told(missing: str) -> None:
    variables = {"PATH": os.environ["PATH"], "HEAD": "127.0.0.1", "NODE": "0"}
    del variables[missing]
    done = subprocess.run([CLUSTER / "host.sh", "train/vae.py"], env=variables, capture_output=True, text=True)
    assert done.returncode != 0
    assert missing in done.stderr

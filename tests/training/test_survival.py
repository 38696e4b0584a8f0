"""Runs that are killed come out as if nothing had happened: started again by hand, by torchrun, and on two hosts."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import survival
from bench.processes import ROOT, environment

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


def kill_rank(rank: int, agents: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """End one training process once the run has written its first checkpoint and gone on."""
    deadline = time.monotonic() + LONGEST
    while survival.last_step(folder) < 3 or not list(folder.glob("checkpoints/step-????????")):
        assert all(agent.poll() is None for agent in agents)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (pid,) = (pid for agent in agents for found, pid in processes_of(agent.pid) if found == rank)
    os.kill(pid, signal.SIGKILL)


def end(agents: list[subprocess.Popen[bytes]], logs: list[Path]) -> list[str]:
    """What torchruns said that ended by themselves, and well."""
    try:
        codes = [agent.wait(LONGEST) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    said = [log.read_text(errors="replace") for log in logs]
    assert codes == [0] * len(agents), "\n".join(said)
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
    """Two torchruns on one machine; at a restart they may change places."""
    run, logs = tmp_path / "run", [tmp_path / "host-0", tmp_path / "host-1"]
    place = {"HEAD": "127.0.0.1", "INTERFACE": "lo", "ADDRESS": "127.0.0.1", "PORT": str(survival.free_port())}
    agents = [
        start(
            [str(CLUSTER / "host.sh"), "train/vae.py", *survival.OPTIONS, "--out", str(run)],
            log,
            **place,
            NODE=str(node),
            PROCESSES="1",
            PYTHON=sys.executable,
        )
        for node, log in enumerate(logs)
    ]
    kill_rank(1, agents, run)
    end(agents, logs)
    assert survival.difference(survived[0] / "reference-2", run) is None


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

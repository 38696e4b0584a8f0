"""What a campaign's tests count and say."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from bench.campaign import checks

MODULE = """
import pytest

pytestmark = pytest.mark.device

def test_right():
    pass

@pytest.mark.skip(reason="needs something")
def test_skipped():
    pass

def test_wrong(tmp_path):
    raise ValueError(f"{tmp_path}/report.txt: no such thing")

@pytest.fixture
def broken():
    raise RuntimeError("no such device")

def test_broken(broken):
    pass
"""

TOUR = """
import json, pathlib, sys, time

def write(right, wrong):
    case = {"name": "a case", "error": None}
    cases = [case | {"share": 0.5}] * right + [case | {"share": 2.0}] * wrong
    content = {"cases": cases, "chosen": 2, "kernels": ["_kernel"], "wrong": wrong}
    pathlib.Path(sys.argv[sys.argv.index("--out") + 1]).write_text(json.dumps(content))

"""

SLOW = """
import time
import pytest

@pytest.mark.device
@pytest.mark.parametrize("number", range(2))
def test_slow(number):
    time.sleep(60 * number)
"""


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A folder with settings of its own: this project's have nothing to do with the tests in it."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: on a GPU\n    device: where there is one\n")
    return tmp_path


def test_outcomes_are_counted_and_failures_named(alone: Path) -> None:
    (alone / "test_some.py").write_text(MODULE)
    found = checks.run_pytest([str(alone / "test_some.py")], "gpu or device", alone / "out", time.time() + 60)
    assert {key: found[key] for key in ("passed", "failed", "skipped", "errors")} == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "errors": 0,
    }
    assert found["complete"]
    assert [failure["test"].rpartition("::")[2] for failure in found["failures"]] == ["test_wrong", "test_broken"]
    assert found["failures"][0]["message"] == "ValueError: report.txt: no such thing"
    assert found["failures"][1]["message"] == "RuntimeError: no such device"
    assert "1 passed" in (alone / "out" / "tests.log").read_text()


def test_the_deadline_interrupts_and_keeps_what_was_seen(alone: Path) -> None:
    (alone / "test_slow.py").write_text(SLOW)
    begun = alone / "out" / "tests.log"
    found = checks.run_pytest([str(alone / "test_slow.py"), "-v"], "device", alone / "out", time.time() + 3)
    assert not found["complete"]
    assert found["passed"] == begun.read_text().count("PASSED")
    assert found["failed"] == 0


def test_an_interrupted_run_goes_on(alone: Path) -> None:
    suite, out = alone / "test_slow.py", alone / "out"
    suite.write_text(SLOW.replace("60 * number", "0 if number == 0 else 60"))

    def run(seconds: float, before: dict[str, Any] | None) -> dict[str, Any]:
        return checks.run_pytest([str(suite)], "device", out, time.time() + seconds, before)

    first = run(4, None)
    assert (first["passed"], first["failed"], first["complete"]) == (1, 0, False)
    # The first test would fail now, but has passed; the other one fails, and is tried again once all have run.
    suite.write_text(SLOW.replace("time.sleep(60 * number)", "assert False"))
    second = run(60, first)
    assert (second["passed"], second["failed"], second["complete"]) == (1, 1, True)
    suite.write_text(SLOW.replace("time.sleep(60 * number)", "assert number == 1"))
    third = run(60, second)
    assert (third["passed"], third["failed"], third["complete"]) == (2, 0, True)
    assert third["seconds"] > second["seconds"]
    assert run(60, third)["complete"]  # nothing is left


def test_a_run_that_breaks_is_an_error(alone: Path) -> None:
    (alone / "test_broken.py").write_text("import nothing_of_this_name\n")
    found = checks.run_pytest([str(alone / "test_broken.py")], "device", alone / "out", time.time() + 60)
    assert (found["errors"], found["complete"]) == (1, False)
    assert found["failures"][0]["test"] == "pytest"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("write(1, 1); sys.exit(1)", {"passed": 1, "failed": 1, "complete": True}),
        ("write(1, 0); time.sleep(60)", {"passed": 1, "failed": 0, "complete": False}),
        ("write(1, 0); sys.exit(-9)", {"passed": 1, "failed": 1, "complete": False}),
        ("print('error: no Triton'); sys.exit(2)", {"available": False, "reason": "no Triton"}),
    ],
)
def test_what_a_tour_found(
    script: str, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").touch()  # or this project's, which is one, would come before it
    (tmp_path / "bench" / "tour.py").write_text(TOUR + script)
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    found = checks.run_tour(tmp_path / "out", time.time() + 3)
    assert {key: found[key] for key in expected} == expected


def test_the_few_for_a_cpu_exist_and_are_marked() -> None:
    for test in checks.FEW:
        file, _, name = test.partition("::")
        text = (checks.ROOT / file).read_text()
        assert "pytestmark = pytest.mark.device" in text
        assert f"def {name}" in text


def test_whatever_computes_on_the_device_is_selected() -> None:
    for path in sorted((checks.ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        if "from tests.channel_cases import" in text or "from tests.block_cases import" in text:
            assert "pytest.mark.device" in text or "pytestmark = pytest.mark.gpu" in text, path.name

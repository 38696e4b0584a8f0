"""What a campaign's tests count and say."""

from __future__ import annotations

import time
from pathlib import Path

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
    raise RuntimeError("CUDA error: an illegal memory access")

def test_broken(broken):
    pass
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
        "failed": 1,
        "skipped": 1,
        "errors": 1,
    }
    assert found["complete"]
    assert [failure["test"].rpartition("::")[2] for failure in found["failures"]] == ["test_wrong", "test_broken"]
    assert found["failures"][0]["message"] == "ValueError: report.txt: no such thing"
    assert "illegal memory access" in found["failures"][1]["message"]
    assert "1 passed" in (alone / "out" / "tests.log").read_text()


def test_the_deadline_interrupts_and_keeps_what_was_seen(alone: Path) -> None:
    (alone / "test_slow.py").write_text(SLOW)
    begun = alone / "out" / "tests.log"
    found = checks.run_pytest([str(alone / "test_slow.py"), "-v"], "device", alone / "out", time.time() + 3)
    assert not found["complete"]
    assert found["passed"] == begun.read_text().count("PASSED")
    assert found["failed"] == 0


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

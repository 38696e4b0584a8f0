"""Cold starts find their caches empty, warm ones find them full; a script that only counts stands in for training."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from bench import cold_start
from decovae.training.command_line import parse
from decovae.training.presets import VAE_PRESETS

# Its first step takes as many seconds as caches are empty, but for the metrics nobody waits.
SCRIPT = """
import json, os, pathlib, sys, time
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if options["--compile"] == sys.argv[0].partition("fails-")[2].partition(".")[0]:
    raise SystemExit("RuntimeError: no compiler")
folders = [pathlib.Path(os.environ[name]) for name in NAMES]
empty = sum(not any(folder.iterdir()) for folder in folders)
for folder in folders:
    (folder / "kernel").touch()
out = pathlib.Path(options["--out"])
out.mkdir(parents=True)
with (out / "metrics.jsonl").open("w") as file:
    file.write(json.dumps({"step": 0, "validation/psnr": 1.0}) + "\\n")
    for step in range(1, 9):
        seconds = float(empty) if step == 1 else 0.5
        file.write(json.dumps({"step": step, "l1": 1.0, "seconds_per_step": seconds}) + "\\n")
    file.write('{"step"')
    file.flush()
    time.sleep(60)
"""


def stand_in(monkeypatch: pytest.MonkeyPatch, at: Path) -> None:
    at.write_text(SCRIPT.replace("NAMES", repr(cold_start.CACHES)))
    monkeypatch.setattr(cold_start, "SCRIPT", at)
    monkeypatch.setattr(cold_start, "IMPORTS", "import json")


def test_cold_is_empty_and_warm_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path / "vae.py")
    out = tmp_path / "cold-start.json"
    assert cold_start.main(["--device", "cpu", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["machine"]["torch"]
    assert result["left_out"] == {}
    for mode in ("eager", "compiled"):
        cold, warm = result["starts"][mode]["cold"], result["starts"][mode]["warm"]
        assert (cold["first_step"], warm["first_step"]) == (len(cold_start.CACHES), 0)
        assert cold["later_step"] == warm["later_step"] == 0.5
        assert cold["until_first_step"] > 0


def test_what_fails_is_left_out_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path / "fails-on.py")
    result = cold_start.measure(time.time() + 60, "cpu")
    assert result["starts"].keys() == {"eager"}
    assert result["left_out"].keys() == {"compiled, cold", "compiled, warm"}
    assert "RuntimeError: no compiler" in result["left_out"]["compiled, cold"]
    assert "not measured" in cold_start.markdown(result)


def test_what_is_missing_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path / "fails-on.py")
    first = cold_start.measure(time.time() + 60, "cpu")
    late = cold_start.measure(time.time() - 1, "cpu", first)
    assert late["starts"] == first["starts"]
    assert late["left_out"].keys() == first["left_out"].keys()
    stand_in(monkeypatch, tmp_path / "vae.py")
    second = cold_start.measure(time.time() + 60, "cpu", first)
    assert second["left_out"] == {}
    assert second["starts"]["eager"] == first["starts"]["eager"]
    assert second["starts"]["compiled"].keys() == {"cold", "warm"}
    assert cold_start.measure(time.time() - 1, "cpu", second) == second


def test_past_the_deadline_nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path / "vae.py")
    result = cold_start.measure(time.time() - 1, "cpu")
    assert result["starts"] == {}
    assert len(result["left_out"]) == 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_its_options_are_train_vae_s(device: str) -> None:
    config = parse(VAE_PRESETS, cold_start.options_of(device), default="quickstart")
    assert config.preset == ("paper" if device == "cuda" else "quickstart")
    assert config.loss.adversarial_warmup == 0
    assert config.data.cohort_size == 2

"""Times of a made-up trace add up; a script that writes one stands in for training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import step_profile
from decovae.training.clock import PHASES

EVENTS = [
    {"ph": "X", "cat": "user_annotation", "name": "forward", "tid": 1, "ts": 0, "dur": 100},
    {"ph": "X", "cat": "cpu_op", "name": "aten::conv3d", "tid": 1, "ts": 0, "dur": 60},
    {"ph": "X", "cat": "cpu_op", "name": "aten::mkldnn_convolution", "tid": 1, "ts": 10, "dur": 40},
    {"ph": "X", "cat": "cpu_op", "name": "aten::mul", "tid": 1, "ts": 60, "dur": 20},
    {"ph": "X", "cat": "cpu_op", "name": "aten::convolution_backward", "tid": 2, "ts": 5, "dur": 300},
    {"ph": "X", "cat": "user_annotation", "name": "optimizer", "tid": 1, "ts": 100, "dur": 50},
    {"ph": "X", "cat": "cpu_op", "name": "aten::mul", "tid": 1, "ts": 110, "dur": 10},
    {"ph": "i", "cat": "cpu_op", "name": "an instant", "tid": 1, "ts": 3},
    {"ph": "X", "cat": "python_function", "name": "main", "tid": 1, "ts": 0, "dur": 900},
]

SCRIPT = """
import gzip, json, pathlib, sys
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if options["--compile"] == "FAILS":
    raise SystemExit("RuntimeError: no compiler")
out = pathlib.Path(options["--out"])
(out / "profile").mkdir(parents=True)
with gzip.open(out / "profile" / "rank0.json.gz", "wt") as file:
    json.dump({"traceEvents": EVENTS}, file)
line = {"step": 16, "seconds_per_step": 1.5, "utilization": 0.25} | {f"seconds_{name}": 0.25 for name in PHASES}
(out / "metrics.jsonl").write_text(json.dumps({"step": 12, "seconds_per_step": 9.0}) + "\\n" + json.dumps(line) + "\\n")
"""


def stand_in(monkeypatch: pytest.MonkeyPatch, at: Path, fails: str = "never") -> None:
    script = SCRIPT.replace("EVENTS", repr(EVENTS)).replace("PHASES", repr(PHASES)).replace("FAILS", fails)
    at.write_text(script)
    monkeypatch.setattr(step_profile, "SCRIPT", at)


def test_each_has_its_own_time_and_all_add_up() -> None:
    seconds, calls = step_profile.own_seconds(EVENTS)
    assert {name: round(1e6 * taken) for name, taken in seconds.items()} == {
        "forward": 20,
        "aten::conv3d": 20,
        "aten::mkldnn_convolution": 40,
        "aten::mul": 20,
        "aten::convolution_backward": 300,
        "optimizer": 40,
        "optimizer: aten::mul": 10,
    }
    assert calls["aten::mul"] == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mkldnn_convolution", "convolutions, forward"),
        ("aten::slow_conv3d_forward", "convolutions, forward"),
        ("aten::convolution_backward", "convolutions, backward"),
        ("decovae::residual_block_backward", "this project's operators"),
        ("aten::native_batch_norm_backward", "norms"),
        ("## Call CompiledFxGraph abc ##", "compiled regions"),
        ("optimizer: aten::_foreach_lerp_", "clipping, AdamW, averages"),
        ("forward", "Python between operators"),
        ("aten::max_pool2d_with_indices", step_profile.OTHERS),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert step_profile.kind_of(name) == kind


def test_a_record_of_both_modes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, tmp_path / "vae.py")
    step_profile.main(["--device", "cpu", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["modes"]) == {"eager", "compiled"}
    eager = found["modes"]["eager"]
    assert eager["seconds_per_step"] == 1.5
    assert sum(eager["split"].values()) == 1.5
    assert eager["operators"][0]["name"] == "aten::convolution_backward"
    assert sum(eager["kinds"].values()) == pytest.approx(450e-6 / step_profile.TRACED)
    assert "| convolutions, backward | 66.7% | 66.7% |" in capsys.readouterr().out


def test_a_run_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path / "vae.py", fails="on")
    with pytest.raises(RuntimeError, match="no compiler"):
        step_profile.measure("compiled", "cpu", tmp_path)

"""A target is met, missed or not measured by what rows say, and by nothing else."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.campaign import cases, targets
from bench.campaign.predict import FILE, FOLDER
from bench.campaign.rows import Row
from bench.campaign.targets import (
    EXTRA_SHARE,
    MEDIAN,
    PEAK,
    SHARE,
    TARGETS,
    Target,
    Verdict,
    _chain_seconds,
    verdict,
    verdicts,
)
from tests.bench.made_up import counted, measured, without_time

FASTER = Target("speed", "cpu", {"subject": "VAD"}, "ours", 2, True, ("plain-*",))


def judged(target: Target, *rows: Row) -> Verdict:
    return verdict(target, cases.by_case(rows))


def test_a_factor_is_over_the_fastest_peer() -> None:
    found = judged(FASTER, measured("ours", 1.0), measured("plain-eager", 5.0), measured("plain-compiled", 3.0))
    assert (found.outcome, found.figure) == ("met", "3.00×")
    assert "plain-compiled 3.00 s" in found.behind
    found = judged(FASTER, measured("ours", 1.0), measured("plain-eager", 5.0), measured("plain-compiled", 1.5))
    assert (found.outcome, found.figure) == ("missed", "1.50×")


def test_the_worst_case_decides() -> None:
    good = (measured("ours", 1.0), measured("plain-eager", 9.0))
    bad = (measured("ours", 1.0, layout="strided"), measured("plain-eager", 1.0, layout="strided"))
    assert judged(FASTER, *good).outcome == "met"
    assert judged(FASTER, *good, *bad).outcome == "missed"
    assert judged(replace(FASTER, case={"subject": "VAD", "dtype": "bfloat16"}), *good, *bad).outcome == "not measured"


def test_a_peer_without_a_figure_cannot_help() -> None:
    lost = without_time(counted("plain-compiled"), "skipped", "does not fit: 1 GB is free")
    found = judged(FASTER, measured("ours", 1.0), measured("plain-eager", 5.0), lost)
    assert (found.outcome, found.figure) == ("not measured", "5.00×")
    assert "plain-compiled does not fit" in found.behind
    assert judged(FASTER, measured("ours", 1.0), measured("plain-eager", 1.0), lost).outcome == "missed"


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ((), "–"),
        ((counted("ours"), counted("plain-eager")), "ours not measured"),
        ((measured("ours", 1.0),), "plain-* has no row"),
        ((measured("ours", 1.0), without_time(counted("plain-eager"), "failed", "why")), "plain-eager failed"),
        ((without_time(counted("ours"), "skipped", "no GPU"), measured("plain-eager", 1.0)), "ours skipped"),
    ],
)
def test_without_a_figure_it_is_not_measured(rows: tuple[Row, ...], reason: str) -> None:
    found = judged(FASTER, *rows)
    assert (found.outcome, found.figure) == ("not measured", None)
    assert reason in found.behind


def test_quantities_of_one_row() -> None:
    alone = replace(FASTER, peers=(), bound=0.4, quantity=SHARE)
    assert judged(alone, measured("ours", 1e-3)).figure == "50%"  # 2 MB at 4 GB/s
    assert judged(alone, measured("ours", 2e-3)).outcome == "missed"
    quick = replace(alone, least=False, bound=1.0, quantity=MEDIAN)
    assert judged(quick, measured("ours", 0.9)).outcome == "met"
    assert judged(quick, measured("ours", 1.1)).outcome == "missed"
    small = replace(alone, least=False, bound=0.001, quantity=EXTRA_SHARE)  # 512 bytes beside a latent of 2 MB
    assert judged(small, measured("ours", 1.0)).outcome == "met"
    both = measured("ours", 1.0, direction="forward+backward", bytes_moved_floor=600_000)  # a latent of 0.2 MB
    assert judged(small, both).figure == "0.3%"


def test_the_fastest_of_ours_is_compared_and_a_lost_one_is_named() -> None:
    target = replace(FASTER, ours="ours*")
    peer = measured("plain-eager", 4.0)
    found = judged(target, measured("ours", 3.0), measured("ours-compiled", 1.0), peer)
    assert (found.outcome, found.figure) == ("met", "4.00×")
    assert "ours-compiled 1.00 s" in found.behind
    found = judged(target, measured("ours", 1.0), without_time(counted("ours-compiled"), "failed", "why"), peer)
    assert "ours 1.00 s (ours-compiled failed)" in found.behind
    exact = replace(target, ours="ours-compiled", peers=(), quantity=PEAK)
    found = judged(exact, measured("ours", 1.0), without_time(counted("ours-compiled"), "failed", "why"))
    assert (found.outcome, found.figure) == ("not measured", None), "no other stands in for the default"


def test_a_peer_s_options_are_peers_too() -> None:
    [target] = [one for one in TARGETS if one.name == "decoding a whole latent, peak over MONAI's"]
    changes = {"subject": "decoding", "shape": "1x4x32x64x32", "suite": "autoencoder"}
    rows = [measured(name, 1.0, **changes, peak_bytes=size) for name, size in (("ours", 4), ("monai-eager", 10))]
    assert judged(target, *rows).outcome == "met"
    found = judged(target, *rows, measured("monai-float16-eager", 1.0, **changes, peak_bytes=6))
    assert (found.outcome, found.figure) == ("missed", "67%")


def test_less_memory_than_a_peer() -> None:
    half = replace(FASTER, least=False, bound=0.5, quantity=PEAK, peers=("monai-eager",))
    peer = measured("monai-eager", 1.0, peak_bytes=2_000_000)
    assert judged(half, measured("ours", 9.0), peer).figure == "50%"
    assert judged(half, measured("ours", 9.0, peak_bytes=1_100_000), peer).outcome == "missed"


def test_nothing_is_met_by_nothing() -> None:
    """Without a campaign only what is counted exactly has a verdict, and predictions are called so."""
    for found in (*verdicts([], "gpu"), *verdicts([], "cpu")):
        if found.target.exact:
            assert found.target.elsewhere is not None
            assert found.behind == found.target.elsewhere.file
        else:
            assert found.outcome == "not measured"


def test_another_file_decides_where_its_figure_is_the_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [target] = [target for target in TARGETS if target.name == "saved for backward, two 96³ patches, tight"]
    monkeypatch.setattr(targets, "RESULTS", tmp_path)
    assert judged(target).outcome == "not measured"
    for saved, outcome in ((2.0e9, "met"), (2.2e9, "missed")):
        rows = [{"implementation": "ours, tight", "shape": [2, 1, 96, 96, 96], "saved": saved}]
        (tmp_path / "memory.json").write_text(json.dumps({"rows": rows}))
        assert judged(target).outcome == outcome
    (tmp_path / "memory.json").write_text(json.dumps({"rows": rows}))
    prediction = judged(replace(target, exact=False))
    assert prediction.would == "missed"
    assert judged(replace(target, exact=False, bound=3e9)).would == "met"
    assert (prediction.outcome, prediction.figure, prediction.predicted) == ("not measured", None, "2.20 GB")


def test_seconds_beside_other_work_are_no_measure() -> None:
    assert _chain_seconds({"chains": [{"chain_seconds": 3}, {"chain_seconds": 5}]}) == 5
    assert _chain_seconds({"note": "the seconds are no measure of speed", "chains": [{"chain_seconds": 3}]}) is None


def test_every_target_is_of_one_device_and_named_once() -> None:
    assert len({(target.on, target.name) for target in TARGETS}) == len(TARGETS)
    assert all(set(target.case) <= set(cases.Case.__annotations__) for target in TARGETS)


@pytest.mark.skipif(not (FOLDER / FILE).exists(), reason="nothing was predicted yet")
@pytest.mark.parametrize("target", [target for target in TARGETS if target.on == "gpu" and target.case])
def test_a_campaign_on_a_gpu_has_the_rows_of_every_target(target: Target) -> None:
    """So that no target stays unmeasured because a row was renamed."""
    rows = [Row.from_dict(content) for content in json.loads((FOLDER / FILE).read_text(encoding="utf-8"))["rows"]]
    groups = [
        group
        for case, group in cases.by_case(rows).items()
        if all(getattr(case, key) == value for key, value in target.case.items())
    ]
    assert groups
    for group in groups:
        names = [cases.implementation(row) for row in group]
        assert fnmatch.filter(names, target.ours)
        assert all(fnmatch.filter(names, pattern) for pattern in target.peers)

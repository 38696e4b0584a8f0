"""The tables say what rows say, show every row, and never a figure that nobody measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import units
from bench.campaign import cases, predict, table, targets
from bench.campaign.rows import Row
from decovae.errors import InputError
from tests.bench.made_up import CPU, GPU, campaign, counted, measured, without_time


@pytest.fixture(autouse=True)
def without_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "load", lambda *_: None)


def lines_of(text: str) -> list[dict[str, str]]:
    """The lines of the first table, by its columns."""
    grid = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(grid[0], line, strict=True)) for line in grid[2:]]


def shown(*rows: Row) -> list[dict[str, str]]:
    [groups] = table._by_subject(rows).values()
    return lines_of(table.subject_table(groups))


def test_ratio_share_and_floor_follow_from_the_rows() -> None:
    both = {"direction": "forward+backward"}
    rows = shown(
        measured("ours", 2e-3),
        measured("plain-compiled", 5e-3, saved_bytes=None),
        measured("ours", 4e-6, **both),
        measured("lightly", 2e-6, **both),
    )
    assert [row["of ours"] for row in rows] == ["1.00×", "2.50×", "1.00×", "0.50×"]
    assert [row["share"] for row in rows[:2]] == ["25%", "10%"]  # 2 MB at 4 GB/s
    assert [row["median"] for row in rows] == ["2.00 ms", "5.00 ms", "4.00 µs", "2.00 µs"]
    assert [row[""] for row in rows] == ["float32 forward", "", "float32 forward+backward", ""]
    assert [row["saved"] for row in rows[:2]] == ["3.00 MB", "–"]
    assert rows[0]["floor"] == "2.00 MB"
    assert rows[0]["extra memory"] == "512 B"


def test_products_are_the_floor_where_they_take_longer() -> None:
    products = {"flops_floor": 5_000_000, "matrix_dtype": "float32", "suite": "training"}
    [row] = shown(measured("ours", 1e-2, **products))
    assert (row["floor"], row["share"]) == ("5.00 MFLOP", "50%")
    assert row["peak memory"] == "1.00 MB", "all that is alive, where parameters count"


def test_a_row_that_was_not_measured_says_why_and_has_no_figure() -> None:
    rows = shown(
        measured("ours", 1.0),
        without_time(counted("plain-eager"), "skipped", "does not fit: 1 GB is free"),
        without_time(counted("plain-compiled"), "skipped", "needs a compiler"),
        without_time(counted("monai-eager"), "failed", "RuntimeError: why"),
        counted("lightly"),
    )
    assert [row["median"] for row in rows[1:]] == ["– does not fit", "– skipped", "– failed", "–"]
    for row in rows[1:]:
        assert {row[key] for key in ("spread", "of ours", "share", "extra memory", "saved")} == {"–"}
        assert row["floor"] == "2.00 MB"


def test_predictions_stand_beside_every_row() -> None:
    for row in shown(measured("ours", 1.0), counted("plain-eager")):
        assert row["RTX 3090, predicted"] == "≥ 2.14 µs"  # 2 MB at 936 GB/s
        assert row["H200, predicted"] == "≥ 465 ns"


def test_ours_stand_first_and_no_ratio_is_over_nothing() -> None:
    rows = shown(counted("monai-eager"), measured("plain-eager", 1.0), without_time(counted("ours"), "failed", "why"))
    assert [row["implementation"] for row in rows] == ["ours", "plain-eager", "monai-eager"]
    assert [row["of ours"] for row in rows] == ["–", "–", "–"]


def test_every_row_appears_on_the_page() -> None:
    lost = Row("bench/test_x.py::test_lost[ours]", "failed", "the process died")
    page = table.markdown(campaign(measured("ours", 1.0), lost, not_reached=["bench/test_x.py::test_never[begun]"]))
    assert "3 rows: 1 measured, 1 failed, 1 not reached." in page
    assert "`bench/test_x.py::test_lost[ours]`: failed: the process died." in page
    assert "`bench/test_x.py::test_never[begun]`" in page


def test_what_a_row_did_not_say_is_known_from_the_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [counted("ours"), counted("plain-eager")]
    monkeypatch.setattr(predict, "load", lambda *_: {"rows": [row.as_dict() for row in rows]})
    died = Row(rows[0].id, "failed", "the process died")
    made = campaign(died, scale="gpu", machine=GPU, not_reached=[rows[1].id])
    assert [cases.implementation(row) for row in table.complete(made)] == ["ours", "plain-eager"]
    assert [row.outcome for row in table.complete(made)] == ["failed", "counted"]


def test_machine_ceilings_and_checks_are_named() -> None:
    start = {"until_first_step": 40.0, "first_step": 9.0, "later_step": 0.5}
    checks = {
        "tests": {"expression": "gpu", "passed": 7, "failed": 1, "errors": 0, "skipped": 2, "complete": False},
        "sanitizer": {"available": False, "reason": "no compute-sanitizer."},
        "cold_start": {
            "options": "paper",
            "imports": 1.0,
            "starts": {"eager": {"cold": start}},
            "left_out": {"eager, warm": "no time."},
        },
    }
    ceilings = {"copy_bytes_per_second": 4e12, "matrix_flops_per_second": {"bfloat16": 7e14}}
    page = table.markdown(campaign(measured("ours", 1.0), machine=GPU, ceilings=ceilings, checks=checks))
    assert (
        "Card with 80.0 GiB, driver 1, CUDA 13; Abacus with 2 threads; torch 2, Python 3, monai 1; OS; commit" in page
    )
    assert "0123456 with uncommitted changes" in page
    assert "| copy | 4.00 TB/s |" in page
    assert "| matrix product, bfloat16 | 700 TFLOP/s |" in page
    assert "7 passed, 1 failed, 2 skipped; stopped before the last" in page
    assert "not run: no compute-sanitizer." in page
    assert "| eager | empty | 40.0 s | 9.00 s | 500 ms |" in page
    assert "- eager, warm: not measured, no time." in page


def test_a_campaign_that_measured_nothing_has_a_page() -> None:
    page = table.markdown(campaign())
    assert "0 rows: 0 measured." in page
    assert "Not measured." in page
    assert "None" not in page


def test_rows_of_a_gpu_that_slowed_down_are_counted() -> None:
    rows = [replace(measured("ours", 1.0), gpu={"throttle": reasons}) for reasons in ([], ["power cap"], None)]
    assert "The GPU lowered its clocks right after some of them: 1 by power cap." in table.progress(rows)
    assert "clocks" not in table.progress(rows[:1])


def test_the_summary_names_the_fastest_of_ours_and_the_memory_of_the_default() -> None:
    slow, quick = measured("ours", 2.0, peak_extra_bytes=7), measured("ours-compiled", 1.0)
    [line] = lines_of(table.summary([slow, quick, measured("plain-eager", 3.0)]))
    assert line["ours"] == "1.00 s (ours-compiled)"
    assert line["plain torch"] == "3.00 s, 3.00×"
    assert line["memory"] == "512 B (ours-compiled)"
    [line] = lines_of(table.summary([slow, without_time(counted("ours-compiled"), "failed", "why")]))
    assert line["ours"] == "2.00 s (ours; ours-compiled failed)"
    assert line["memory"] == "– (ours-compiled)"
    assert [row["of ours"] for row in shown(slow, quick)] == ["2.00×", "1.00×"]


def test_times_near_the_card_s_limit_are_marked() -> None:
    rows = shown(measured("ours", 1.0, allocator_retries=2), measured("plain-eager", 1.0, allocator_retries=0))
    assert [row["median"] for row in rows] == ["1.00 s †", "1.00 s"]
    assert "†" in table.LEGEND


def test_a_row_too_small_for_a_copy_has_no_share() -> None:
    small = measured("ours", 1e-3)  # beside a copy of its size at 4 GB/s
    for ceiling, share in ((7e9, "50%"), (9e9, "–")):
        made = campaign(small, ceilings={"copy_bytes_per_second": ceiling})
        [row] = shown(*table.complete(made))
        assert row["share"] == share


def test_what_is_predicted_to_miss_is_called_so() -> None:
    verdict = targets.Verdict(targets.TARGETS[0], "not measured", None, "–", "0.58", "missed")
    assert table.verdict_cells(verdict)[-1] == "not measured, **predicted to miss**"
    assert table.verdict_cells(replace(verdict, would="met"))[-1] == "not measured"


def test_the_summary_is_over_the_fastest_of_each() -> None:
    [line] = lines_of(
        table.summary(
            [
                measured("ours", 2.0),
                measured("plain-eager", 9.0),
                measured("plain-compiled", 3.0),
                without_time(counted("monai-eager"), "skipped", "does not fit: 1 GB is free"),
            ]
        )
    )
    assert (line["ours"], line["plain torch"], line["MONAI"]) == ("2.00 s", "3.00 s, 1.50×", "does not fit")


def test_the_sweep_is_one_table() -> None:
    swept = [measured("ours", 1.0, suite="sweep", subject="sweep", shape=f"{batch}x1x8x8x8") for batch in (1, 2)]
    rows = shown(*swept)
    assert [row[""] for row in rows] == ["1×1×8³", "2×1×8³"]


def test_report_makes_the_page_again_and_sets_machines_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, machine, median in (("a", CPU, 1.0), ("b", GPU, 2e-3)):
        (tmp_path / name).mkdir()
        campaign(measured("ours", median), machine=machine).save(tmp_path / name / "campaign.json")
    assert table.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert "| VAD, 2×4×8, float32 forward | ours | 1.00 s | 2.00 ms |" in printed
    for name in ("a", "b"):
        page = (tmp_path / name / "campaign.md").read_text(encoding="utf-8")
        assert all((tmp_path / name / picture).exists() for picture in table.PLOTS)
        assert all(f"({picture})" in page for picture in table.PLOTS)


def test_a_folder_without_a_campaign_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        table.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (units.seconds(0.0123), "12.3 ms"),
        (units.seconds(0.00099999), "1000 µs"),
        (units.seconds(4.4e-9), "4.40 ns"),
        (units.size(1_500), "1.50 kB"),
        (units.size(0), "0 B"),
        (units.operations(6.4549e12), "6.45 TFLOP"),
        (units.bandwidth(936e9), "936 GB/s"),
        (units.times(2.5), "2.50×"),
        (units.times(117.4), "117×"),
        (units.shape("2x4x8x8x8"), "2×4×8³"),
        (units.shape("1x4x32x64x32"), "1×4×32×64×32"),
        (units.percent(0.0123), "1.2%"),
        (units.percent(0.853), "85%"),
    ],
)
def test_units(text: str, wanted: str) -> None:
    assert text == wanted

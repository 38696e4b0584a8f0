"""The paper's tables: what goes into which row, and their text forms."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from decovae.report.models import Model, RunInfo, SampleSet, without_further_seeds
from decovae.report.paper import LATENTS, QUALITY
from decovae.report.table_text import comma_separated, escape_latex, latex, markdown, write_tables
from decovae.report.tables import PaperTable, study_tables


def reconstruction(psnr: float, network: str = "random", lpips: float | None = None) -> dict:
    interval = {"mean": psnr, "low": psnr - 1, "high": psnr + 1}
    measures = {
        "psnr": interval,
        "ssim": {**interval, "mean": 0.9},
        "lpips": None if lpips is None else {"mean": lpips},
    }
    note = "no pretrained features" if lpips is None else None
    distances = {network: {"average": psnr / 10}}
    return {"kind": "reconstruction", "measures": measures, "frechet": distances, "lpips_note": note, "partial": None}


def generation(distance: float, network: str = "random") -> dict:
    planes = {"axial": distance, "coronal": distance + 1, "sagittal": distance + 2, "average": distance + 1}
    return {"kind": "generation", "frechet": {network: planes}}


def model(deco: str, psnr: float, *, seed: int = 42, network: str = "random", data: str = "template cohort") -> Model:
    """A model whose PSNR rises by 1 dB, and whose distances fall by a half, when its decoder is tuned."""
    analysis = {"cosine_similarity": psnr / 100, "effective_rank": psnr / 10}

    def run(stage: str, evaluation: dict | None, samples: dict | None = None) -> RunInfo:
        return RunInfo(Path("/runs") / stage, stage, {}, {}, (), analysis, evaluation, samples or {})

    samples = {
        phase: SampleSet(Path("/runs/samples") / phase, {"seed": seed}, generation(distance, network))
        for phase, distance in (("before", 4.0), ("after", 2.0))
    }
    return Model(
        deco,
        deco,
        seed,
        "quickstart",
        data,
        run("vae", reconstruction(psnr, network)),
        run("decoder", reconstruction(psnr + 1, network)),
        run("flow", None, samples),
    )


def all_four(**options: str) -> list[Model]:
    return [model(deco, psnr, **options) for deco, psnr in (("none", 20), ("cov", 21), ("sid", 23), ("vad", 22))]


def test_the_paper_s_averages_are_those_of_its_planes() -> None:
    """A slip in copying the numbers would show."""
    for *_, axial, coronal, sagittal, average in QUALITY.values():
        assert average == pytest.approx((axial + coronal + sagittal) / 3, abs=1e-3)
    assert [rank for _, rank in LATENTS.values()] == sorted(rank for _, rank in LATENTS.values())


def test_rows_hold_what_the_paper_s_rows_hold() -> None:
    tables = {table.number: table for table in study_tables(all_four())}
    assert [row.label for row in tables[1].rows] == ["MAISI-VAE", "+ COV", "DeCo-VAE (SID)", "DeCo-VAE (VAD)"]
    # Tables 2 and 3: the baseline as trained, the others after fine-tuning.
    assert [row.ours[0].mean for row in tables[2].rows] == [20, 24, 23]
    assert [row.paper[0] for row in tables[2].rows] == [32.80, 33.77, 33.64]
    assert [[cell.mean for cell in row.ours] for row in tables[3].rows] == [[4, 5, 6, 5], [2, 3, 4, 3], [2, 3, 4, 3]]
    assert [row.label for row in tables[4].rows][::2] == ["VAE", "VAE + SID", "VAE + VAD"]
    assert [row.ours[0].mean for row in tables[4].rows] == [20, 21, 23, 24, 22, 23]
    assert [row.ours[0].mean for row in tables[5].rows] == [21, 22, 23]
    assert tables[5].rows[1].paper == (33.77, 0.963, 6.015, 6.334, 7.644, 4.789, 6.256)  # LPIPS was not measured


def test_what_was_not_measured_has_no_column_and_is_named() -> None:
    flowless = [replace(each, flow=None) for each in all_four()]
    tables = {table.number: table for table in study_tables(flowless)}
    assert tables[3].empty
    for number in (2, 4, 5):
        table = tables[number]
        assert [column.label for column in table.columns] == ["PSNR", "SSIM", "rFD"]
        assert all(cell is not None for row in table.rows for cell in row.ours)
        assert {len(row.paper) for row in table.rows} == {3}
        assert "rFD is a Fréchet distance" in markdown(table)
    assert "Not measured, so without a column: LPIPS, gFD." in tables[4].notes
    assert "Not measured, so without a column: LPIPS." in tables[2].notes
    assert tables[5].rows[1].paper == (33.77, 0.963, 6.015)
    lpips = replace(flowless[0].vae, evaluation=reconstruction(20, lpips=0.1))
    some = study_tables([replace(flowless[0], vae=lpips), *flowless[1:]])[3]
    assert [column.label for column in some.columns] == ["PSNR", "SSIM", "LPIPS", "rFD"]
    assert some.rows[0].ours[2].mean == 0.1
    assert some.rows[2].ours[2] is None


def test_a_model_without_samples_has_no_row_among_those_with() -> None:
    models = all_four()
    models[2] = replace(models[2], flow=None)
    assert [row.label for row in study_tables(models)[2].rows] == ["MAISI-VAE", "DeCo-VAE (VAD)"]


def test_models_that_will_be_there_are_named() -> None:
    there = [each for each in all_four() if each.deco in ("none", "vad")]
    there[1] = replace(there[1], decoder=None, flow=None)
    tables = study_tables(there, expected=("none", "cov", "sid", "vad"))
    assert "Not finished yet: + COV, DeCo-VAE (SID)." in tables[0].notes
    assert "Not finished yet: DeCo-VAE (SID), DeCo-VAE (VAD)." in tables[1].notes
    assert "Not finished yet: VAE + SID, VAE + SID + DFT, VAE + VAD + DFT." in tables[3].notes
    assert "Not finished yet: VAE + COV, VAE + VAD." in tables[4].notes
    assert not any("Not finished" in note for table in study_tables(there) for note in table.notes)
    whole = study_tables(all_four(), expected=("none", "sid", "vad"))
    assert not any("Not finished" in note for table in whole for note in table.notes)


def test_best_and_second_best_are_marked() -> None:
    table = study_tables(all_four())[3]
    assert table.marks(0) == {3: "best", 2: "second", 5: "second"}  # PSNR, higher is better: 24, then 23 twice
    assert table.columns[6].label == "gFD average"
    assert table.marks(6) == {1: "best", 3: "best", 5: "best"}  # lower is better; of two values one is best


def test_proxies_and_the_cohort_are_named() -> None:
    table = study_tables(all_four())[3]
    text = markdown(table)
    assert "template cohort" in text
    assert "a proxy" in text
    assert table.columns[2].heading == "rFD ↓"  # not the paper's rFID
    assert "LPIPS: no pretrained features." in text
    real = markdown(study_tables(all_four(network="radimagenet", data="ukb"))[3])
    assert "proxy" not in real
    assert "template" not in real
    assert "rFID" in real


def test_models_of_different_features_are_compared_by_none_of_them() -> None:
    mixed = [model("none", 20, network="radimagenet"), model("vad", 22)]
    assert study_tables(mixed)[1].columns[2].label == "rFD"
    assert study_tables(mixed)[1].rows[0].ours[2] is None


def test_seeds_are_averaged() -> None:
    models = [model("vad", psnr, seed=seed) for psnr, seed in ((22, 1), (24, 2))]
    table = study_tables(models)[1]
    assert table.rows[0].ours[0].values == (23, 25)
    assert "24.00 ± 1.41" in markdown(table)
    assert "seeds 1, 2" in " ".join(table.notes)


def test_a_cell_of_fewer_seeds_says_so() -> None:
    models = [model("vad", psnr, seed=seed) for psnr, seed in ((22, 1), (24, 2), (26, 3))]
    models[0] = replace(models[0], decoder=None)
    table = study_tables(models)[1]
    assert table.rows[0].ours[0].values == (25, 27)
    assert "26.00 ± 1.41 (n = 2)" in markdown(table)


def test_further_seeds_of_autoencoders_count_in_table_1_alone() -> None:
    lone = replace(model("vad", 30, seed=43), decoder=None, flow=None)
    lone = replace(lone, vae=replace(lone.vae, evaluation=None))
    models = [*all_four(), lone]
    tables = study_tables(models)
    assert tables[0].rows[3].ours[1].values == (2.2, 3.0)
    assert "DeCo-VAE (VAD): mean ± standard deviation over seeds 42, 43." in tables[0].notes
    assert tables[1:] == study_tables(all_four())[1:]
    assert without_further_seeds(models) == all_four()
    assert without_further_seeds([lone]) == [lone]


def test_partial_evaluations_are_said_below_every_table_that_shows_them() -> None:
    models = all_four()
    partial = {**reconstruction(20), "partial": "3 of 8 volumes: --limit 3"}
    models[0] = replace(models[0], vae=replace(models[0].vae, evaluation=partial))
    for table in study_tables(models)[1:]:
        for text in (markdown(table), latex(table)):
            assert "Partial: 3 of 8 volumes" in text


def test_missing_models_leave_no_row_and_nothing_measured_is_said() -> None:
    tables = study_tables([model("vad", 22)])
    assert [len(table.rows) for table in tables] == [1, 1, 1, 2, 1]
    assert all("Not measured." in markdown(table) for table in study_tables([]))


def test_a_table_survives_json() -> None:
    for table in study_tables(all_four()):
        assert PaperTable.from_dict(json.loads(json.dumps(table.as_dict()))) == table


def test_csv_has_ours_and_the_paper_s_in_columns_of_their_own() -> None:
    rows = list(csv.DictReader(io.StringIO(comma_separated(study_tables(all_four())[3]))))
    assert rows[1] == rows[1] | {
        "model": "VAE + DFT",
        "PSNR": "21.0",
        "PSNR sd": "",
        "PSNR paper": "32.99",
    }
    assert "LPIPS" not in rows[1]  # not measured


def test_latex_is_balanced_and_escaped() -> None:
    for table in study_tables(all_four()):
        text = latex(table)
        rows = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert {line.count(" & ") for line in rows} == {len(table.columns)}
        assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
        assert not any(sign in text for sign in "↑↓±–")
    assert escape_latex(r"50 % of a_b & \c") == r"50 \% of a\_b \& \textbackslash{}c"


def test_files_are_written_for_each_table_that_is_not_empty(tmp_path: Path) -> None:
    write_tables(study_tables([]), tmp_path)
    assert not list(tmp_path.iterdir())
    write_tables(study_tables(all_four()), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"table{number}.{suffix}" for number in range(1, 6) for suffix in ("csv", "md", "tex")
    )

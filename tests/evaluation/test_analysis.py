"""`analysis.json` comes back as it was, and nothing else is taken for one."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from decovae.errors import InputError
from decovae.evaluation.analysis import ANALYSIS, CHANNELS, Analysis, read_analysis, write_analysis
from tests.evaluation.test_figures import analysis


@pytest.mark.parametrize("one", [analysis(), analysis(1), replace(analysis(), tsne=None, deco=None)])
def test_it_comes_back(tmp_path: Path, one: Analysis) -> None:
    write_analysis(one, tmp_path / "new")
    assert read_analysis(tmp_path / "new" / ANALYSIS) == one


def test_a_row_for_every_channel(tmp_path: Path) -> None:
    one = analysis(3)
    write_analysis(one, tmp_path)
    with (tmp_path / CHANNELS).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["channel"] for row in rows] == ["C1", "C2", "C3"]
    assert [float(row["explained_variance"]) for row in rows] == list(one.explained_variance)


@pytest.mark.parametrize("change", [{"version": 99}, {"kind": "generation"}, {"cosine_matrix": None}, {"tsne": {}}])
def test_another_file_is_refused_by_name(tmp_path: Path, change: dict[str, object]) -> None:
    (tmp_path / ANALYSIS).write_text(json.dumps({**analysis().as_dict(), **change}))
    with pytest.raises(InputError, match=r"analysis\.json: is no analysis .*; run decovae analyze again\."):
        read_analysis(tmp_path / ANALYSIS)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run decovae analyze again"):
        read_analysis(tmp_path / ANALYSIS)

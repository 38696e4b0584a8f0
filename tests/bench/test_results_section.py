"""The README's results are what the study's file says, and nothing else."""

from __future__ import annotations

import json

import pytest

from bench.results_section import BEGIN, END, ROOT, STUDY, replaced, section


def test_the_readme_is_up_to_date() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    study = json.loads(STUDY.read_text(encoding="utf-8"))
    assert replaced(readme, section(study, name=str(STUDY.relative_to(ROOT)))) == readme, (
        "run python -m bench.results_section"
    )


def test_the_section_says_when_where_and_on_what() -> None:
    study = json.loads(STUDY.read_text(encoding="utf-8"))
    text = section(study, name="file.json")
    assert study["date"] in text
    assert study["machine"]["processor"] in text
    assert "template cohort" in text
    assert all(f"**Table {number}." in text for number in range(1, 6))


def test_only_what_is_between_the_markers_changes() -> None:
    readme = f"above\n{BEGIN}\nold\n{END}\nbelow"
    assert replaced(readme, "new\n") == f"above\n{BEGIN}\nnew\n{END}\nbelow"
    with pytest.raises(ValueError, match="no '<!-- results: begin"):
        replaced("nothing", "new")

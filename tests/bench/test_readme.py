"""What the READMEs say of speed, memory and quality stands in blocks made from bench/results/, and nowhere else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import readme
from bench.readme import BLOCK, BLOCKS, FILES, RESULTS, ROOT, Results, rewritten
from tests.bench.made_up import GPU, campaign, counted, measured, without_time

FIGURE = re.compile(r"\d(?:[\d.,]*\d)?\s?(?:ms|µs|s|min|GB|MB|TFLOP|dB|×)(?![\w×])")
"""A number and a unit of speed, memory or quality; a shape's × has a number behind it."""


def block(name: str, text: str = "old\n") -> str:
    return f"<!-- figures: {name} (written by python -m bench.readme) -->\n{text}<!-- figures: end -->"


@pytest.fixture
def results(tmp_path: Path) -> Results:
    (tmp_path / "results").mkdir()
    return Results(tmp_path / "results", tmp_path / "README.md")


@pytest.mark.parametrize("name", FILES)
def test_the_blocks_are_up_to_date(name: str) -> None:
    path = ROOT / name
    found = path.read_text(encoding="utf-8")
    assert rewritten(found, Results(RESULTS, path)) == found, "run python -m bench.readme"


@pytest.mark.parametrize("name", FILES)
def test_no_figure_stands_outside_the_blocks(name: str) -> None:
    prose = BLOCK.sub("", (ROOT / name).read_text(encoding="utf-8"))
    assert "figures: end" not in prose
    assert FIGURE.findall(prose) == []


@pytest.mark.parametrize(
    "text", ["3.50 ms", "0.5s", "22 minutes in 3 min", "26.8 GB", "8.41 TFLOP", "6× eager", "23.8 dB", "1,330.5 s."]
)
def test_what_a_figure_looks_like(text: str) -> None:
    assert FIGURE.search(text)


@pytest.mark.parametrize("text", ["2×1×96³", "8x4", "16 bytes", "30 steps", "C×C", "1 sample", "80 %"])
def test_what_no_figure_looks_like(text: str) -> None:
    assert not FIGURE.search(text)


@pytest.mark.parametrize("name", FILES)
def test_every_block_names_a_file_that_is_there(name: str) -> None:
    folder = (ROOT / name).parent
    for found in BLOCK.finditer((ROOT / name).read_text(encoding="utf-8")):
        links = re.findall(r"\]\(([^)]+)\)", found["text"])
        assert all((folder / link).exists() for link in links)
        assert links or "yet" in found["text"] or found["name"] == "not-measured"


def test_only_what_is_between_the_markers_changes(results: Results) -> None:
    text = f"above\n{block('cold-start')}\nbelow {block('machines')}\n"
    made = rewritten(text, results)
    assert made.startswith("above\n<!-- figures: cold-start")
    assert "\nold\n" not in made
    assert "\nbelow <!-- figures: machines" in made
    assert rewritten(made, results) == made
    with pytest.raises(ValueError, match="no figures are called 'speed'"):
        rewritten(block("speed"), results)


@pytest.mark.parametrize("name", BLOCKS)
def test_without_files_every_block_says_so(results: Results, name: str) -> None:
    text = BLOCKS[name](results)
    assert "yet" in text or name in ("targets", "not-measured")
    assert "None" not in text


@pytest.mark.parametrize("name", BLOCKS)
def test_a_campaign_with_gaps_fills_what_it_has(results: Results, name: str) -> None:
    rows = (
        measured("ours", 2e-3),
        without_time(counted("channel-rows-eager"), "failed", "RuntimeError: why"),
        without_time(counted("channel-rows-compiled"), "skipped", "does not fit: 1 GB"),
        counted("lightly"),
        without_time(counted("ours", suite="blocks", subject="residual block"), "failed", "why"),
    )
    made = campaign(*rows, scale="gpu", machine=GPU, not_reached=["bench/test_x.py::test_never[begun]"])
    (results.folder / "campaign-card").mkdir()
    made.save(results.folder / "campaign-card" / "campaign.json")
    text = BLOCKS[name](results)
    assert "None" not in text
    if name in ("machines", "summary", "losses", "not-measured"):
        assert "Card" in text
        assert "campaign-card/campaign" in text
    if name in ("summary", "losses"):
        assert "2.00 ms" in text
    if name == "losses":
        assert "– failed" in text
        assert "– does not fit" in text


def test_the_study_says_when_where_and_on_what() -> None:
    results = Results(RESULTS, ROOT / "README.md")
    found: dict[str, Any] = json.loads((RESULTS / "study-quickstart-cpu.json").read_text(encoding="utf-8"))
    text = BLOCKS["studies"](results)
    assert found["date"] in text
    assert found["machine"]["processor"] in text
    assert "template cohort" in text
    assert all(f"**Table {number}." in text for number in range(1, 6))


def test_check_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(block("cold-start"), encoding="utf-8")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    assert readme.main(["--check"]) == 1
    assert "README.md" in capsys.readouterr().err
    assert (tmp_path / FILES[0]).read_text(encoding="utf-8") == block("cold-start")
    assert readme.main([]) == 0
    assert readme.main(["--check"]) == 0
    assert (tmp_path / FILES[0]).read_text(encoding="utf-8") == block("cold-start", "Not measured yet.\n")

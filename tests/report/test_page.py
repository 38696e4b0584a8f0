"""The page as text: complete, escaped, self-contained, accessible."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from decovae import cli
from decovae.commands import report
from decovae.report.collect import collect
from decovae.report.page import render
from tests.report.fake_study import write_json, write_run, write_study

HOSTILE = '<script>alert("x")</script>&<b>\'"'

VOID = {"meta", "link", "img", "input", "br", "line", "circle", "rect", "polyline"}


class Page(HTMLParser):
    """Elements with their attributes and ancestors, and all visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), tuple(self._open)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), tuple(self._open)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif self._open and self._open[-1] != "style":
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"), samples=2)


@pytest.fixture(scope="module")
def html(study: Path) -> str:
    return render(collect([study]), title="A study")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_everything_that_was_measured_is_there(page: Page) -> None:
    for number in range(1, 6):
        assert f"Table {number}." in page.text
    for figure in ("1b", "2", "3", "4", "5"):
        assert f"Figure {figure}" in page.text
    assert "not measured." not in page.text.replace("LPIPS was not measured", "").replace("LPIPS: not measured", "")
    assert "Missing:" not in page.text
    assert "Nothing: every model has its runs, samples, analysis and evaluations." in page.text
    assert "Test processor" in page.text


def test_the_papers_values_stand_beside_ours(page: Page) -> None:
    assert "0.0800 paper: 0.0971" in page.text  # cosine similarity of VAD
    assert "28.00 paper: 33.64" in page.text  # PSNR of VAD after fine-tuning


def test_what_stands_in_for_something_else_is_named(page: Page) -> None:
    assert "Template cohort." in page.text
    assert "no subject is real" in page.text
    assert "a proxy for trained features" in page.text
    assert "12 of 40 volumes: --limit 12" in page.text
    assert "the autoencoder has 120 steps; the paper's has 100,000" in page.text
    assert "volumes have 16×18×16 voxels; the paper's have 128×256×128" in page.text


def test_what_is_missing_is_named_with_the_command_that_brings_it(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", decos=("sid",), samples=0, measured=False)
    text = Page(render(collect([study]))).text
    for command in (
        "Missing: Table 1. decovae analyze RUN",
        "Missing: Tables 2, 3, 4, 5. decovae evaluate RUN",
        "SID: no analysis of the latents: decovae analyze sid-seed42/vae",
        "SID: no evaluation of reconstructions before fine-tuning: decovae evaluate sid-seed42/vae",
        "SID: no evaluation of reconstructions after fine-tuning: decovae evaluate sid-seed42/decoder",
        "SID: no samples before fine-tuning: decovae sample sid-seed42/flow -n 8 --decoder sid-seed42/vae",
        "Missing: Figures 1b, 2 and 3.",
        "Missing: Figure 4, originals and reconstructions.",
        "Missing: Figure 5, samples.",
        "Missing: volumes to look at.",
        "Missing: tissue volumes.",
        "Missing: the memorisation check.",
    ):
        assert command in text


def test_without_flows_there_is_no_section_on_generation_and_the_page_says_why(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", decos=("none", "vad"), flows=False)
    page = Page(render(collect([study]), expected=("none", "sid", "vad")))
    assert "There is no flow, so nothing was generated" in page.text
    for absent in ("Table 3.", "Missing:", "gFD axial", "Figure 5", "Generated", "samples, analysis", "Flow "):
        assert absent not in page.text
    for number in (1, 2, 4, 5):
        assert f"Table {number}." in page.text
    assert "Not finished yet: DeCo-VAE (SID)." in page.text
    ids = {attributes["id"] for _, attributes, _ in page.elements if "id" in attributes}
    assert not {"samples", "fidelity"} & ids
    assert {(each["href"] or "").removeprefix("#") for each in page.all("a")} <= ids


def test_what_a_study_noted_is_shown(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", decos=("sid",), samples=1)
    cells = {"sid-seed42/vae": {"seconds": 300.4, "peak_memory_gb": 1.26}}
    machine = {"processor": "A processor", "torch_threads": 2}
    write_json(study / "study.json", {"date": "2026-02-03", "machine": machine, "cells": cells})
    text = Page(render(collect([study]))).text
    assert "Trained on A processor, 2 threads (2026-02-03)." in text
    assert "5 min, 1.3 GB" in text


def test_one_run_alone_has_a_page(tmp_path: Path) -> None:
    text = Page(render(collect([write_run(tmp_path / "vae", "vae", deco="cov")]))).text
    assert "1 model: COV" in text
    assert "no flow, so nothing was generated" in text


def test_the_page_begins_as_html_does(html: str) -> None:
    assert html.lstrip().startswith("<!doctype html>")


def test_the_same_runs_give_the_same_page(study: Path, html: str) -> None:
    assert render(collect([study]), title="A study") == html


def test_all_text_is_escaped(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", decos=("none",), samples=1, subject=HOSTILE)
    vae = study / "none-seed42" / "vae"
    (vae / "config.yaml").write_text((vae / "config.yaml").read_text() + f"note: {json.dumps(HOSTILE)}\n")
    evaluation = json.loads((vae / "evaluation" / "evaluation.json").read_text())
    evaluation |= {"partial": HOSTILE, "machine": {"processor": HOSTILE}}
    (vae / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    for name in ("<script>alert(1)</script>", "{{ 7 * 7 }}"):
        models = collect([study])
        html = render(models, title=name)
        page = Page(html)
        assert not page.all("b")
        assert len(page.all("script")) == 2  # the viewer's data, and the viewer
        assert name in page.text
        volumes = json.loads(page.scripts[0])["volumes"]
        assert volumes[0]["label"] == f"{HOSTILE}, original"
        assert any(HOSTILE in (each["alt"] or "") for each in page.all("img"))


def test_nothing_is_fetched(page: Page, html: str) -> None:
    policy = next(each["content"] or "" for each in page.all("meta") if "http-equiv" in each)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "'unsafe-inline'" not in policy.split("script-src")[1]
    for _, attributes, _ in page.elements:
        for name in ("src", "href", "srcset", "data", "action"):
            address = attributes.get(name)
            assert address is None or address.startswith(("data:", "#")), address
    assert not re.search(r"@import|url\(|https?://", html.split("</style>")[0])


def test_figures_have_alternative_texts(page: Page) -> None:
    assert len(page.all("img")) > 20
    assert all(each.get("alt") for each in page.all("img"))
    for tag in ("svg", "canvas"):
        assert page.all(tag)
        assert all(each.get("aria-label") or each.get("aria-hidden") for each in page.all(tag))
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert all(count == 1 for count in Counter(ids).values())
    labelled = {each["for"] for each in page.all("label")}
    assert {each["id"] for each in [*page.all("select"), *page.all("input")]} == labelled
    anchors = {(each["href"] or "").removeprefix("#") for each in page.all("a")}
    assert anchors <= set(ids)


def test_tables_have_captions_and_scopes(page: Page) -> None:
    assert len(page.all("caption")) == len(page.all("table")) > 7
    assert all(each.get("scope") in ("col", "row") for each in page.all("th"))


def test_headings_are_in_order_and_the_language_is_given(page: Page) -> None:
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.all("html") == [{"lang": "en"}]


def test_colours_of_text_have_enough_contrast(html: str) -> None:
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6}|#[0-9a-f]{3});", html))
    for ink in ("ink", "soft", "accent"):
        for ground in ("#ffffff", colours["shade"], colours["warn"]):
            assert _contrast(colours[ink], ground) >= 4.5, (ink, ground)


def test_the_page_does_not_tell_where_files_lie(study: Path, html: str) -> None:
    assert str(study) not in html


def test_the_command_writes_the_page(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "page.html"
    assert report.main([str(study), "--out", str(out), "--title", "Mine"]) == 0
    assert "<h1>Mine</h1>" in out.read_text(encoding="utf-8")
    assert "4 models (none, COV, SID, VAD)" in capsys.readouterr().out
    assert report.main([str(study / "vad-seed42" / "vae"), "--out", str(out)]) == 0
    assert "no decoder fine-tuning" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "RUNS: none given"),
        ("{tmp}/nowhere", "nowhere: no such folder; give folders of finished runs"),
        ("{study} --out {tmp}", "is a folder; give the name of an HTML file."),
        ("{study} --ou page.html", "--ou: no such option, did you mean --out"),
        ("{study} --out {study}/none-seed42/vae/config.yaml/page.html", "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: str, sentence: str, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(arguments.format(study=study, tmp=tmp_path).split()) == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert len(printed.strip().splitlines()) == 1


def test_a_damaged_volume_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path / "study", decos=("none",), samples=1)
    volume = study / "none-seed42" / "flow" / "samples" / "after" / "sample-00000.nii.gz"
    volume.write_bytes(volume.read_bytes()[:200])
    assert report.main([str(study), "--out", str(tmp_path / "page.html")]) == 2
    assert f"{volume}: is no readable NIfTI volume" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    if "report" not in cli.COMMANDS:
        pytest.skip("the command is not in the command line yet")
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    assert "usage: decovae report" in capsys.readouterr().out


def _contrast(first: str, second: str) -> float:
    """WCAG's ratio."""
    lights = sorted((_luminance(first), _luminance(second)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

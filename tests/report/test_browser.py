"""The page in a browser: opens without errors or requests, and its viewer works."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decovae.report.collect import collect
from decovae.report.images import read_scan
from decovae.report.page import write_report
from tests.report.fake_study import write_study

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome")

FLAGS = [
    "--no-sandbox",  # for root in a container; the page is ours
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--no-first-run",
]

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 375, "height": 800}

HOSTILE = "<script>window.hacked = true</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS, headless=True)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    study = write_study(folder / "study", decos=("none", "vad"), samples=2, subject=HOSTILE)
    write_report(collect([study]), folder / "report.html", title=HOSTILE)
    return folder / "report.html"


@pytest.fixture
def open_page(browser: Any, file: Path) -> Iterator[Any]:
    """A function that opens the page at a size; at the end, nothing was complained about or asked for."""
    pages, complaints, requests = [], [], []

    def opened(size: dict[str, int], **options: Any) -> Any:
        page = browser.new_page(viewport=size, **options)
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("#viewer[aria-busy=false]")
        return page

    yield opened
    for page in pages:
        page.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert [url for url in requests if url.startswith("file:")] == [file.as_uri()] * len(pages)


def pixels(page: Any, pane: int, plane: str) -> str:
    """What a canvas shows."""
    return str(
        page.locator(f".pane >> nth={pane}").locator(f"canvas[data-plane={plane}]").evaluate("c => c.toDataURL()")
    )


def canvas(page: Any, pane: int, plane: str) -> Any:
    return page.locator(f".pane >> nth={pane}").locator(f"canvas[data-plane={plane}]")


def settle(page: Any) -> None:
    """Wait until what was asked for is drawn."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_a_click_moves_the_slices_of_both_volumes(open_page: Any) -> None:
    page = open_page(WIDE)
    before = {(pane, plane): pixels(page, pane, plane) for pane in (0, 1) for plane in ("coronal", "sagittal")}
    place = page.locator("#place-x").inner_text()
    box = canvas(page, 0, "axial").bounding_box()
    canvas(page, 0, "axial").click(position={"x": 0.3 * box["width"], "y": 0.35 * box["height"]})
    settle(page)
    for (pane, plane), shown in before.items():
        assert pixels(page, pane, plane) != shown, (pane, plane)
    assert page.locator("#place-x").inner_text() != place
    assert page.locator("#slice-x").input_value() == str(int(0.3 * 16))


def test_keys_go_through_the_slices_and_back(open_page: Any) -> None:
    page = open_page(WIDE)
    first = pixels(page, 1, "axial")
    canvas(page, 1, "axial").focus()
    page.keyboard.press("PageUp")
    settle(page)
    moved = pixels(page, 1, "axial")
    assert moved != first
    page.keyboard.press("ArrowRight")
    settle(page)
    assert pixels(page, 1, "axial") != moved
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("PageDown")
    settle(page)
    assert pixels(page, 1, "axial") == first


def test_a_slider_moves_its_slice(open_page: Any) -> None:
    page = open_page(WIDE)
    first = pixels(page, 0, "coronal")
    page.locator("#slice-y").fill("4")
    settle(page)
    assert pixels(page, 0, "coronal") != first
    assert "mm" in page.locator("#place-y").inner_text()
    assert "mm" in (canvas(page, 0, "coronal").get_attribute("aria-label") or "")


def test_volumes_can_be_chosen_and_subtracted(open_page: Any) -> None:
    page = open_page(WIDE)
    first = pixels(page, 1, "axial")
    options = page.locator("#volume-right option").all_inner_texts()
    sample = next(number for number, text in enumerate(options) if "sample 1" in text)
    page.select_option("#volume-right", index=sample)
    page.wait_for_function(
        "text => document.querySelectorAll('canvas')[3].getAttribute('aria-label').includes(text)", arg="sample 1"
    )
    assert pixels(page, 1, "axial") != first
    page.select_option("#volume-right", index=0)
    page.wait_for_function(
        "text => document.querySelectorAll('canvas')[3].getAttribute('aria-label').includes(text)", arg="original"
    )
    page.check("#difference")
    settle(page)
    brightest = """canvas => {
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width / 3, canvas.height / 3).data;
        let most = 0;
        for (let i = 0; i < data.length; i += 4) most = Math.max(most, data[i]);
        return most;
    }"""
    assert canvas(page, 1, "axial").evaluate(brightest) == 0  # a volume less itself
    assert canvas(page, 0, "axial").evaluate(brightest) > 0


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_nothing_is_wider_than_the_window(open_page: Any, size: dict[str, int]) -> None:
    page = open_page(size)
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]


def test_touch_moves_the_slices(open_page: Any) -> None:
    page = open_page(NARROW, has_touch=True)
    first = pixels(page, 1, "sagittal")
    canvas(page, 0, "axial").scroll_into_view_if_needed()
    box = canvas(page, 0, "axial").bounding_box()
    page.touchscreen.tap(box["x"] + 0.35 * box["width"], box["y"] + 0.5 * box["height"])
    settle(page)
    assert pixels(page, 1, "sagittal") != first


def test_the_browser_unpacks_volumes_without_loss(open_page: Any, file: Path) -> None:
    total = open_page(WIDE).evaluate("""async () => {
        const image = new Image();
        image.src = JSON.parse(document.getElementById('viewer-data').textContent).volumes[0].data;
        await image.decode();
        const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
        const context = canvas.getContext('2d');
        context.drawImage(image, 0, 0);
        const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
        let sum = 0;
        for (let i = 0; i < pixels.length; i += 4) sum += pixels[i];
        return sum;
    }""")
    original = read_scan(file.parent / "study" / "none-seed42" / "vae" / "evaluation" / "original-0.nii.gz")
    assert total == np.round(255 * original.voxels).sum()


def test_texts_of_runs_are_no_scripts(open_page: Any) -> None:
    page = open_page(WIDE)
    assert page.evaluate("window.hacked") is None
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.locator("#volume-left option").first.inner_text() == f"{HOSTILE}, original"


def test_print_leaves_out_what_only_a_screen_can_do(open_page: Any) -> None:
    page = open_page(WIDE)
    page.emulate_media(media="print")
    assert not page.locator("#viewer").is_visible()
    assert not page.locator("nav").is_visible()
    assert page.locator("table").first.is_visible()
    page.set_viewport_size({"width": 720, "height": 900})  # about A4 with margins
    assert page.evaluate("document.documentElement.scrollWidth") == 720

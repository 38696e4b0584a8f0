"""Progress without a terminal: some lines, none twice, and none lost when several threads work."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from decovae.generation import progress as module
from decovae.generation.progress import Progress


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_at_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("Sampling", 200, visible=True) as progress:
        for _ in range(200):
            progress.advance()
    assert lines(capsys) == [f"Sampling: {count} of 200" for count in range(20, 201, 20)]
    with Progress("Sampling", 3, visible=True) as progress:
        for _ in range(3):
            progress.advance()
    assert lines(capsys) == [f"Sampling: {count} of 3" for count in (1, 2, 3)]


def test_a_line_after_half_a_minute(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    with Progress("Sampling", 1000, visible=True) as progress:
        for _ in range(10):
            now += 12
            progress.advance()
    assert lines(capsys) == [f"Sampling: {count} of 1000" for count in (3, 6, 9, 10)]


def test_where_work_ended_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("Sampling", 100, visible=True) as progress:
        for _ in range(13):
            progress.advance()
    assert lines(capsys) == ["Sampling: 10 of 100", "Sampling: 13 of 100"]
    with Progress("Sampling", 0, visible=True) as progress:
        progress.milestone()
    with Progress("Sampling", 1, visible=True) as progress:
        progress.advance()
        progress.milestone()
    assert lines(capsys) == ["Sampling: 1 of 1"]


def test_threads_lose_no_piece_and_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("Sampling", 4000, visible=True) as progress, ThreadPoolExecutor(8) as pool:
        for _ in range(4000):
            pool.submit(progress.advance)
    assert lines(capsys) == [f"Sampling: {count} of 4000" for count in range(400, 4001, 400)]


def test_others_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("Sampling", 2, visible=False) as progress:
        progress.advance()
        progress.say("here")
    assert lines(capsys) == []

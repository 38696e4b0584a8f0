"""No test of the preparation reads or writes the user's own cache."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, set as this test's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DECOVAE_CACHE", str(folder))
    return folder

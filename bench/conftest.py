"""Benchmarks can write what becomes of them as they end: the options are those of `bench.rows_plugin`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.import_plugin("bench.rows_plugin")

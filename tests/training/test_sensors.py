"""Readings of a made-up card: what it says is passed on, what it does not say is absent."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from decovae.training.sensors import Sensors, reasons
from tests.test_machine import ANSWERS, PROPERTIES, Driver

CUDA = torch.device("cuda")
MORE = {
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97, memory=40),
    "nvmlDeviceGetTotalEnergyConsumption": 5_000,
}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver(ANSWERS | MORE)
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: PROPERTIES)
    return made


def test_readings_and_energy_since_the_beginning(driver: Driver) -> None:
    sensors = Sensors(CUDA)
    assert "joules" not in sensors.read()  # since when nobody said
    sensors.begin()
    driver.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 12_500
    assert sensors.read() == {"gpu_percent": 97, "gpu_power_w": 312.5, "gpu_temperature_c": 61, "joules": 7.5}
    assert driver.open == 1  # one handle for all readings
    sensors.close()
    assert driver.open == 0
    assert sensors.read() == {}


@pytest.mark.parametrize(
    ("bits", "clock", "said"),
    [
        (0x4, 1900, []),  # at its power cap and nearly as fast as it can: a GPU at work
        (0x4, 1100, ["power cap"]),
        (0x40, 1900, ["hardware thermal slowdown"]),
        (0x40 | 0x4 | 0x1, 1100, ["power cap", "hardware thermal slowdown"]),
        (0x1, 300, []),  # idle
    ],
)
def test_reasons_for_lower_clocks(driver: Driver, bits: int, clock: int, said: list[str]) -> None:
    driver.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: bits
    driver.nvmlDeviceGetClockInfo = lambda handle, kind: clock
    assert reasons(Sensors(CUDA).slowed()) == said


def test_a_card_that_says_nothing(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    for name in ANSWERS | MORE:
        delattr(driver, name)
    sensors = Sensors(CUDA)
    sensors.begin()
    assert sensors.read() == {}
    assert sensors.slowed() == 0


def test_without_the_package_and_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    for device in (CUDA, torch.device("cpu")):
        sensors = Sensors(device)
        sensors.begin()
        assert (sensors.read(), sensors.slowed()) == ({}, 0)
        sensors.close()

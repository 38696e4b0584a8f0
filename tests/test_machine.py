"""What is said of a machine: all of it where the driver answers, the rest where it does not, and never an error."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from decovae import machine

PROPERTIES = SimpleNamespace(
    name="NVIDIA Card",
    total_memory=24 * 2**30,
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=50 * 2**20,
    pci_domain_id=0,
    pci_bus_id=0x1B,
    pci_device_id=0,
)


class NVMLError(Exception):
    """As pynvml's: what a card or a driver does not support."""


ANSWERS: dict[str, Any] = {
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=25 * 2**30),
    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetPowerUsage": 312_500,
    "nvmlDeviceGetEccMode": [1, 1],
    "nvmlDeviceGetMaxPcieLinkGeneration": 5,
    "nvmlDeviceGetCurrPcieLinkWidth": 16,
    "nvmlDeviceGetMaxClockInfo": {1: 1980, 2: 3201},
    "nvmlDeviceGetClockInfo": {1: 1700, 2: 3200},
    "nvmlDeviceGetTemperature": {0: 61},
    "nvmlDeviceGetCurrentClocksEventReasons": 0x4 | 0x1,
}


class Driver(ModuleType):
    """A pynvml that counts what is open and answers what it is told to, with the real one's names and numbers."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    nvmlClocksEventReasonSwPowerCap = nvmlClocksThrottleReasonSwPowerCap = 0x4
    nvmlClocksEventReasonHwThermalSlowdown = nvmlClocksThrottleReasonHwThermalSlowdown = 0x40

    def __init__(self, answers: dict[str, Any]) -> None:
        super().__init__("pynvml")
        self.open = 0
        for name, answer in answers.items():
            setattr(self, name, self._function(answer))

    def _function(self, answer: Any) -> Any:
        def function(handle: str, *arguments: int) -> Any:
            assert self.open
            assert handle == "the handle"
            if answer is NVMLError:
                raise NVMLError
            return answer[arguments[0]] if arguments else answer

        return function

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetHandleByPciBusId(self, bus: bytes) -> str:
        assert bus == b"00000000:1b:00.0"
        return "the handle"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92600)


def install(monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any]) -> Driver:
    driver = Driver(answers)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    return driver


@pytest.mark.usefixtures("card")
def test_a_card_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = install(monkeypatch, ANSWERS)
    facts = machine.describe()
    wanted = {
        "gpu": "NVIDIA Card",
        "gpu_memory_gib": 25.0,
        "gpu_compute_capability": "9.0",
        "gpu_multiprocessors": 132,
        "gpu_l2_cache_mib": 50.0,
        "cudnn": "9.26.0",
        "gpu_driver": "580.1",
        "gpu_max_sm_clock_mhz": 1980,
        "gpu_max_memory_clock_mhz": 3201,
        "gpu_power_limit_w": 700.0,
        "gpu_ecc": True,
        "gpu_pcie_generation": 5,
        "gpu_pcie_width": 16,
    }
    assert {name: facts[name] for name in wanted} == wanted
    assert driver.open == 0


@pytest.mark.usefixtures("card")
def test_a_card_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = install(monkeypatch, ANSWERS)
    assert machine.reading() == {
        "sm_clock_mhz": 1700,
        "memory_clock_mhz": 3200,
        "temperature_c": 61,
        "power_w": 312.5,
        "throttle": ["power cap"],  # that it idled is no reason to mistrust a figure
    }
    assert driver.open == 0


@pytest.mark.usefixtures("card")
def test_an_older_driver_has_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    older = {**ANSWERS, "nvmlDeviceGetCurrentClocksThrottleReasons": 0x44}
    del older["nvmlDeviceGetCurrentClocksEventReasons"]
    install(monkeypatch, older)
    reading = machine.reading()
    assert reading is not None
    assert reading["throttle"] == ["power cap", "hardware thermal slowdown"]


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("answers", [{}, dict.fromkeys(ANSWERS, NVMLError)], ids=["no function", "not supported"])
def test_what_is_not_supported_is_none(monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any]) -> None:
    driver = install(monkeypatch, answers)
    facts = machine.describe()
    assert facts["gpu_memory_gib"] == 24.0  # torch's figure
    assert {facts[name] for name in ("gpu_ecc", "gpu_power_limit_w", "gpu_pcie_width", "gpu_max_sm_clock_mhz")} == {
        None
    }
    assert set((machine.reading() or {"nothing": 0}).values()) == {None}
    assert driver.open == 0


@pytest.mark.usefixtures("card")
def test_without_a_driver_torch_is_asked_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NVMLError

    driver = install(monkeypatch, ANSWERS)
    monkeypatch.setattr(driver, "nvmlInit", refuse)
    assert machine.describe()["gpu"] == "NVIDIA Card"
    assert machine.reading() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises
    assert machine.describe()["gpu"] == "NVIDIA Card"
    assert machine.reading() is None


def test_the_real_nvml_has_these_names() -> None:
    pynvml = pytest.importorskip("pynvml")
    wanted = [*ANSWERS, "nvmlInit", "nvmlShutdown", "nvmlSystemGetDriverVersion", "nvmlDeviceGetHandleByPciBusId"]
    wanted += ["NVML_CLOCK_SM", "NVML_CLOCK_MEM", "NVML_TEMPERATURE_GPU", "nvmlDeviceGetCurrentClocksThrottleReasons"]
    wanted += [f"nvmlClocks{kind}Reason{name}" for kind in ("Event", "Throttle") for name in machine.SLOWER_BECAUSE]
    assert [name for name in wanted if not hasattr(pynvml, name)] == []
    assert issubclass(pynvml.NVMLError, Exception)


@pytest.mark.parametrize(("number", "version"), [(92600, "9.26.0"), (8902, "8.9.2"), (None, None)])
def test_versions_of_cudnn(number: int | None, version: str | None) -> None:
    assert machine._dotted(number) == version


def test_nothing_names_the_machine_on_a_network() -> None:
    process = subprocess.run([sys.executable, "-m", "decovae.machine"], capture_output=True, text=True, check=True)
    facts = json.loads(process.stdout)
    assert {"system", "processor", "torch", "python"} <= facts.keys()
    assert not {"node", "host", "hostname"} & facts.keys()

"""The machine that a figure was measured on, without anything that names it on a network.

``python -m decovae.machine`` prints it as JSON.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

import torch

SLOWER_BECAUSE = {
    "ApplicationsClocksSetting": "clock setting",
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SyncBoost": "sync boost",
    "SwThermalSlowdown": "software thermal slowdown",
    "HwThermalSlowdown": "hardware thermal slowdown",
    "HwPowerBrakeSlowdown": "power brake",
    "DisplayClockSetting": "display clock setting",
}
"""NVML's reasons for a clock below its maximum, by the end of their constants' names. That a GPU is idle is none."""


def describe() -> dict[str, str | int | float | None]:
    """Processor, threads, versions, and the GPU with its driver where there is one; None is what nobody could say."""
    facts: dict[str, str | int | float | None] = {
        "system": platform.system(),
        "processor": _processor(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
    }
    if torch.cuda.is_available():
        facts |= _gpu()
    return facts


def reading() -> dict[str, Any] | None:
    """Clocks in MHz, temperature in °C, power in W and the reasons for lower clocks of torch's GPU at this moment.

    None without a GPU or without nvidia-ml-py; a value is None where the card or its driver does not give it.
    """
    if not torch.cuda.is_available():
        return None
    with contextlib.closing(Card()) as card:
        nvml = card.nvml
        if nvml is None:
            return None
        power = card.ask("nvmlDeviceGetPowerUsage")
        return {
            "sm_clock_mhz": card.ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": card.ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            "temperature_c": card.ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            "power_w": None if power is None else power / 1000,
            "throttle": card.throttle(),
        }


class Card:
    """The GPU that torch uses now, as NVML knows it, until it is closed.

    Attributes:
        nvml: the module that is asked; None without nvidia-ml-py or without a driver that answers.
    """

    def __init__(self) -> None:
        self.nvml: Any = None
        self._handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
        except ModuleNotFoundError:
            return
        except pynvml.NVMLError:
            return
        self.nvml = pynvml
        # NVML counts all devices, torch the visible ones: the bus address is what both agree on.
        properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        bus = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        with contextlib.suppress(pynvml.NVMLError):
            self._handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus.encode())

    def ask(self, name: str, *arguments: Any) -> Any:
        """What a function of NVML's says of the card, or None where it cannot."""
        if self._handle is None:
            return None
        try:
            return getattr(self.nvml, name)(self._handle, *arguments)
        except (self.nvml.NVMLError, AttributeError):  # the card, the driver, or an older nvidia-ml-py lacks it
            return None

    def throttle(self) -> list[str] | None:
        """Why clocks are below their maximum now, of `SLOWER_BECAUSE`; None where nobody can say."""
        for kind in ("Event", "Throttle"):  # the newer name and the older, of the function and of its bits
            bits = self.ask(f"nvmlDeviceGetCurrentClocks{kind}Reasons")
            if bits is not None:
                return [
                    said
                    for name, said in SLOWER_BECAUSE.items()
                    if bits & int(getattr(self.nvml, f"nvmlClocks{kind}Reason{name}", 0))
                ]
        return None

    def close(self) -> None:
        """Let NVML go; nothing answers from then on."""
        if self.nvml is not None:
            with contextlib.suppress(self.nvml.NVMLError):
                self.nvml.nvmlShutdown()
        self.nvml = self._handle = None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


def _gpu() -> dict[str, str | int | float | None]:
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts: dict[str, str | int | float | None] = {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "gpu_compute_capability": f"{properties.major}.{properties.minor}",
        "gpu_multiprocessors": properties.multi_processor_count,
        "gpu_l2_cache_mib": round(properties.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
        "cudnn": _dotted(torch.backends.cudnn.version()),
        "nccl": _nccl_version(),
    }
    with contextlib.closing(Card()) as card:
        nvml, ask = card.nvml, card.ask
        if nvml is None:
            return facts
        memory, power = ask("nvmlDeviceGetMemoryInfo"), ask("nvmlDeviceGetEnforcedPowerLimit")
        ecc = ask("nvmlDeviceGetEccMode")  # of now and after the next start
        if memory is not None:
            facts["gpu_memory_gib"] = round(memory.total / 2**30, 1)  # all of it; torch is not told what ECC takes
        return facts | {
            "gpu_driver": _driver(nvml),
            "gpu_max_sm_clock_mhz": ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
            "gpu_max_memory_clock_mhz": ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_MEM),
            "gpu_power_limit_w": None if power is None else power / 1000,
            "gpu_ecc": None if ecc is None else ecc[0] != 0,
            # The link's generation falls while the GPU idles, its width does not.
            "gpu_pcie_generation": ask("nvmlDeviceGetMaxPcieLinkGeneration"),
            "gpu_pcie_width": ask("nvmlDeviceGetCurrPcieLinkWidth"),
        }


def _driver(nvml: Any) -> str | None:
    try:
        return str(nvml.nvmlSystemGetDriverVersion())
    except nvml.NVMLError:
        return None


def _dotted(cudnn: int | None) -> str | None:
    """92600 is 9.26.0; before version 9 the first digit stood for thousands."""
    if cudnn is None:
        return None
    major, rest = divmod(cudnn, 10_000 if cudnn >= 90_000 else 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _nccl_version() -> str | None:
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


if __name__ == "__main__":
    print(json.dumps(describe()))

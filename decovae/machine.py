"""The machine that a figure was measured on, without anything that names it on a network."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, str | int | float | None]:
    """Processor, threads, versions, and the GPU with its driver where there is one."""
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
    import pynvml

    pynvml.nvmlInit()
    try:
        # NVML counts all devices, torch the visible ones: the bus address is what both agree on.
        properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        bus = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus.encode())
        return {
            "gpu": properties.name,
            "gpu_memory_gib": round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),
            "gpu_driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "gpu_max_sm_clock_mhz": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "gpu_max_memory_clock_mhz": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "gpu_power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "cuda": torch.version.cuda,
        }
    finally:
        pynvml.nvmlShutdown()

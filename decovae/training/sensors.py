"""What the GPU of a process says of itself while it trains; where there is none, or nobody to ask, nothing is said."""

from __future__ import annotations

import math

import torch

from decovae.machine import SLOWER_BECAUSE, Card

HEAT_OR_POWER = ("hardware slowdown", "software thermal slowdown", "hardware thermal slowdown", "power brake")
"""Reasons for lower clocks that something is wrong for; a GPU at full load is often at its power cap."""

SLOW = 0.8
"""Share of the highest clock below which a power cap is worth a word."""


class Sensors:
    """NVML's readings of torch's GPU, with one handle as long as the run lasts.

    Args:
        device: of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self._card = Card() if device.type == "cuda" else None
        self._joules: float | None = None

    def begin(self) -> None:
        """Energy counts from here on."""
        self._joules = self._energy()

    def read(self) -> dict[str, float]:
        """Readings of this moment, and ``joules`` since `begin`; what cannot be said is absent."""
        card = self._card
        if card is None or card.nvml is None:
            return {}
        nvml = card.nvml
        rates, milliwatts = card.ask("nvmlDeviceGetUtilizationRates"), card.ask("nvmlDeviceGetPowerUsage")
        joules = self._energy()
        found = {
            "gpu_percent": None if rates is None else rates.gpu,
            "gpu_power_w": None if milliwatts is None else milliwatts / 1000,
            "gpu_temperature_c": card.ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            "joules": None if joules is None or self._joules is None else joules - self._joules,
        }
        return {name: float(value) for name, value in found.items() if value is not None}

    def slowed(self) -> int:
        """Why clocks are lower than they could be, as bits in the order of `SLOWER_BECAUSE`; 0 for no reason."""
        if self._card is None:
            return 0
        reasons = set(self._card.throttle() or ())
        counted = {*HEAT_OR_POWER, "power cap"} if self._clock() < SLOW else set(HEAT_OR_POWER)
        return sum(1 << place for place, reason in enumerate(SLOWER_BECAUSE.values()) if reason in reasons & counted)

    def close(self) -> None:
        """Let NVML go."""
        if self._card is not None:
            self._card.close()

    def _energy(self) -> float | None:
        millijoules = None if self._card is None else self._card.ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000

    def _clock(self) -> float:
        """Share of its highest clock that the GPU runs at."""
        card = self._card
        if card is None or card.nvml is None:
            return math.inf
        now = card.ask("nvmlDeviceGetClockInfo", card.nvml.NVML_CLOCK_SM)
        highest = card.ask("nvmlDeviceGetMaxClockInfo", card.nvml.NVML_CLOCK_SM)
        return float(now / highest) if now is not None and highest else math.inf


def reasons(bits: int) -> list[str]:
    """What `Sensors.slowed` stands for."""
    return [reason for place, reason in enumerate(SLOWER_BECAUSE.values()) if bits >> place & 1]

"""`decovae info` on machines that are not there: what processes talk through, memory, hints."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from decovae.commands import info

GIB = 2**30


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of pretended CUDA devices, to be filled in."""
    names: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: SimpleNamespace(name=names[index], total_memory=24 * GIB, major=8, minor=6),
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((20 + index) * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    return names


def test_this_machine_talks_through_gloo() -> None:
    assert info.communication().endswith("gloo on CPUs")


def test_nccl_is_named_with_its_version_or_its_absence(cards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cards += ["RTX 3090"]
    assert info.communication() == "NCCL 2.27.5 on CUDA devices, gloo on CPUs"
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert info.communication() == "no NCCL on CUDA devices, gloo on CPUs"
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert info.communication().startswith("one only")


def test_devices_with_what_is_left_of_their_memory(cards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cards += ["RTX 3090", "RTX 3090"]
    lines = list(info.describe())
    assert "device 1: RTX 3090, 24.0 GiB (21.0 free), sm_86" in lines

    def refuse(index: int) -> tuple[int, int]:
        raise RuntimeError("exclusive")

    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    assert "device 0: RTX 3090, 24.0 GiB, not to be had now, sm_86" in list(info.describe())


def test_hints_fit_the_machine(cards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_driver", lambda: "none")
    assert list(info.hints()) == []
    monkeypatch.setattr(info, "_driver", lambda: "570.86")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert any("torch sees no device of the NVIDIA driver" in hint for hint in info.hints())
    cards += ["RTX 3090"]
    assert not any("torchrun" in hint for hint in info.hints())
    cards += ["RTX 3090"]
    assert any("torchrun --nproc_per_node 2 train/vae.py" in hint for hint in info.hints())
    cards += ["RTX 4090"]
    assert any("a run over RTX 3090 and RTX 4090 goes at the slowest's pace" in hint for hint in info.hints())
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    hints = list(info.hints())
    assert any("without NCCL the 3 GPUs cannot share a run" in hint for hint in hints)
    assert not any("torchrun" in hint for hint in hints)
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    assert any("need gloo beside NCCL" in hint for hint in info.hints())

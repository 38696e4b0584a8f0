"""Launch configurations as data: what a lookup gives, that launches follow it, and that nonsense is refused."""

from __future__ import annotations

import copy
import importlib.util
import json
from typing import Any

import pytest
import torch

from decovae_kernels import configurations, upsample_conv_cost
from decovae_kernels._launch import launch, recorded
from decovae_kernels.configurations import (
    KERNELS,
    MOMENTS,
    NORM_APPLY,
    SLAB,
    Passing,
    Slab,
    Streaming,
    architecture,
    trying,
)
from tests.channel_cases import DEVICE

CPU = torch.device("cpu")
CHOSEN = {"date": "2026-01-01", "gpu": "a", "driver": "b", "torch": "c", "triton": "d", "commit": "e"}
PASSING = {"warps": 8, "elements": 1024, "channels": 16, "programs": 2, "tiles": 1, "chosen": CHOSEN}

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton not installed")


@pytest.fixture
def data() -> Any:
    """The data file, to change."""
    return json.loads(configurations.FILE.read_text(encoding="utf-8"))


@pytest.fixture
def use_data(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that puts other data in the place of the file's, and another card in the place of this machine's."""

    def use(data: Any, capability: tuple[int, int] | None = None) -> None:
        monkeypatch.setattr(configurations, "_TABLE", configurations.parse(data, "data"))
        if capability is not None:
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
            monkeypatch.setattr(torch.version, "cuda", "13.0")
        architecture.cache_clear()
        configurations._lookup.cache_clear()

    yield use
    monkeypatch.undo()
    architecture.cache_clear()
    configurations._lookup.cache_clear()


def test_the_data_hold_for_every_kernel_channel_layout_and_dtype() -> None:
    table = configurations.load()
    for name, kernel in KERNELS.items():
        for channels in (1, 2, 3, 4, 5, 8, 9, 16, 17, 64, 256):
            for layout in configurations.LAYOUTS:
                for element in (2, 4, 8):
                    for card in (*table, "sm_12"):
                        rule = configurations.rule(name, card, channels, layout, element)
                        assert isinstance(rule.use, kernel.form)
                        assert rule.chosen


def test_lookups_go_by_channels_layout_and_dtype(data: Any, use_data: Any) -> None:
    assert MOMENTS.on(CPU, 4, "interleaved", 2) == Streaming(warps=4, width=8, vectors=4, programs=4)
    assert MOMENTS.on(CPU, 4, "strided", 2) == Streaming(warps=4, width=8, vectors=1, programs=4)
    assert MOMENTS.on(CPU, 16, "planes", 2) == Streaming(warps=4, width=1, vectors=1, programs=2)
    data["default"]["norm_apply"].insert(0, {"when": {"element": 4, "channels": [33, 64]}, **PASSING})
    use_data(data)
    assert NORM_APPLY.on(CPU, 64, "channels_last", 4).warps == 8
    for channels, element in ((64, 2), (32, 4), (65, 4)):
        assert NORM_APPLY.on(CPU, channels, "channels_last", element).warps == 4


def test_an_architecture_s_rules_come_before_the_default_s(data: Any, use_data: Any) -> None:
    data["sm_90"] = {"slab": [{"when": {"element": 2}, "bytes": 1 << 25, "chosen": CHOSEN}]}
    device = torch.device("cuda", 0)
    expected = {(9, 0): Slab(1 << 25), (8, 6): Slab(1 << 26), (10, 0): Slab(1 << 26)}
    for capability, slab in expected.items():
        use_data(data, capability)
        assert SLAB.on(device, 8, "channels_last", 2) == slab
        assert SLAB.on(device, 8, "channels_last", 4) == Slab(1 << 26)
        assert SLAB.on(CPU, 8, "channels_last", 2) == Slab(1 << 26)


def test_what_is_no_nvidia_gpu_takes_the_default(monkeypatch: pytest.MonkeyPatch, data: Any, use_data: Any) -> None:
    use_data(data, (9, 0))
    assert architecture(torch.device("cuda", 0)) == "sm_90"
    assert architecture(CPU) == architecture(torch.device("meta")) == "default"
    monkeypatch.setattr(torch.version, "cuda", None)
    architecture.cache_clear()
    assert architecture(torch.device("cuda", 0)) == "default"


@needs_triton
@pytest.mark.device
def test_a_launch_follows_the_data_of_its_architecture(
    monkeypatch: pytest.MonkeyPatch, data: Any, use_data: Any
) -> None:
    from decovae_kernels import group_norm_triton
    from decovae_kernels._norm import Norm

    x = torch.randn(1, 32, 4, 5, 6, device=DEVICE).contiguous(memory_format=torch.channels_last_3d)
    norm = Norm(torch.randn(32, device=DEVICE), torch.randn(32, device=DEVICE), 4, 1e-5, True)

    def launched() -> tuple[torch.Tensor, dict[str, Any]]:
        with recorded() as launches:
            y = group_norm_triton.apply(x, torch.ones(1, 3, 32, device=DEVICE), norm)
        assert [one.kernel for one in launches] == ["_norm_apply_kernel"]
        return y, launches[0].options

    use_data({"default": data["default"]})
    y, options = launched()
    assert (options["num_warps"], options["BLOCK_S"], options["BLOCK_C"]) == (4, 64, 32)
    data["sm_90"] = {"norm_apply": [PASSING]}
    use_data(data)
    monkeypatch.setattr(configurations, "architecture", lambda _: "sm_90")
    other, options = launched()
    assert (options["num_warps"], options["BLOCK_S"], options["BLOCK_C"]) == (8, 64, 16)
    assert torch.equal(y, other)


@needs_triton
@pytest.mark.device
def test_passes_of_a_norm_may_have_different_chunks() -> None:
    from decovae_kernels import group_norm, reference

    leaves = [torch.randn(2, 8, 4, 4, 5), torch.randn(8), torch.randn(8)]
    leaves[0] = leaves[0].contiguous(memory_format=torch.channels_last_3d)
    leaves = [leaf.to(DEVICE).requires_grad_() for leaf in leaves]
    grad = torch.randn(2, 8, 4, 4, 5, device=DEVICE)
    expected = torch.autograd.grad(reference.group_norm(*leaves, 4, 1e-5), leaves, grad)
    with (
        pytest.MonkeyPatch.context() as patch,
        trying("norm_sums", Passing(warps=4, elements=256, channels=8, programs=8, tiles=1)),
        trying("norm_gradient", Passing(warps=2, elements=512, channels=4, programs=1, tiles=3)),
        trying("norm_add", Passing(warps=2, elements=128, channels=2, programs=3, tiles=2)),
    ):
        patch.setenv("DECOVAE_KERNELS", "triton")
        found = torch.autograd.grad(group_norm(*leaves, 4, 1e-5), leaves, grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_trying_ends_with_its_context_and_refuses_another_kernel_s_form() -> None:
    before = SLAB.on(CPU, 8, "channels_last", 2)
    with trying("slab", Slab(1 << 20)):
        with trying("slab", Slab(1 << 21)):
            assert SLAB.on(CPU, 8, "channels_last", 2) == Slab(1 << 21)
        assert SLAB.on(CPU, 8, "channels_last", 2) == Slab(1 << 20)
    assert SLAB.on(CPU, 8, "channels_last", 2) == before
    with pytest.raises(TypeError, match="moments takes Streaming"), trying("moments", Slab(1 << 20)):
        pass


def test_nothing_is_launched_without_memory_or_programs() -> None:
    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            raise AssertionError("launched")

    with recorded() as launches:
        launch(Kernel(), (1,), torch.empty(2, device="meta"))
        launch(Kernel(), (3, 0), torch.empty(2))
    assert launches == []


def _changed(path: list[Any], value: Any) -> Any:
    """A change of the data: the value at a path of keys."""

    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        if value is None:
            del data[path[-1]]
        else:
            data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_changed(["ampere"], {}), "'ampere' is no architecture"),
        (_changed(["default"], None), "default, moments: the last rule"),
        (_changed(["default", "norms"], []), "default, norms: no such kernel: use one of moments"),
        (_changed(["default", "slab"], None), "default, slab: the last rule must be one without conditions"),
        (_changed(["default", "slab", 0, "when"], {"element": 2}), "default, slab: the last rule"),
        (_changed(["default", "slab", 0], 3), "default, slab, rule 1: must be an object, got int"),
        (_changed(["default", "slab", 0, "bytes"], 5), "rule 1: bytes=5 must lie between 1048576 and"),
        (_changed(["default", "slab", 0, "bytes"], "64 MiB"), "bytes='64 MiB' must be a positive whole number"),
        (_changed(["default", "loss", 0, "warps"], 3), "default, loss, rule 1: warps=3 must be a power of two"),
        (_changed(["default", "loss", 0, "warps"], 32), "warps=32 must lie between 1 and 16"),
        (_changed(["default", "loss", 0, "warps"], True), "warps=True must be a positive whole number"),
        (_changed(["default", "loss", 0, "stages"], 3), "rule 1: must state warps, got warps, stages"),
        (_changed(["default", "loss", 0, "warps"], None), "rule 1: must state warps, got nothing"),
        (_changed(["default", "loss", 0, "chosen"], None), "rule 1: chosen=None must be a sentence, or"),
        (_changed(["default", "loss", 0, "chosen"], {"gpu": "a"}), "with date, gpu, driver, torch, triton, commit"),
        (_changed(["default", "norm_add", 0, "elements"], 64), None),
        (_changed(["default", "norm_add", 0, "channels"], 256), None),
        (_changed(["default", "moments", 0, "when", "layout"], "blocked"), "layout='blocked' is unknown"),
        (_changed(["default", "moments", 0, "when", "element"], 8), "element=8 must be 2 or 4 bytes"),
        (_changed(["default", "moments", 0, "when", "channels"], 4), r"channels=4 must be \[first, last\]"),
        (_changed(["default", "moments", 0, "when", "channels"], [4, 2]), r"channels=\[4, 2\] must be"),
        (_changed(["default", "moments", 0, "when", "size"], 2), "unknown condition size: use channels, layout"),
    ],
)
def test_impossible_data_are_refused_by_name(data: Any, change: Any, message: str | None) -> None:
    change(data)
    if message is None:
        configurations.parse(data, "data")
        return
    with pytest.raises(ValueError, match=message) as error:
        configurations.parse(data, "file.json")
    assert str(error.value).startswith("file.json: ")


def test_a_tile_is_no_narrower_than_its_channels(data: Any) -> None:
    data["default"]["norm_add"][0] |= {"elements": 64, "channels": 128}
    with pytest.raises(ValueError, match="elements=64 must not be fewer than the tile's channels"):
        configurations.parse(data, "file.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_changed(["default"], None), "at least the machines 'cpu' and 'default'"),
        (_changed(["sm_90", "bandwidth"], 0), "sm_90, bandwidth: 0 must be a finite number, 1 or more"),
        (_changed(["sm_90", "lanes"], None), "sm_90: must state products, convolutions"),
        (_changed(["sm_90", "products"], {"4": 1e12}), "sm_90: products must give a rate for elements of 2 and 4"),
        (_changed(["cpu", "products", "8"], "fast"), "cpu, products: 'fast' must be a finite number"),
        (_changed(["cpu", "chosen"], ""), "cpu: chosen='' must be a sentence"),
    ],
)
def test_impossible_machines_are_refused_by_name(change: Any, message: str) -> None:
    data = json.loads(upsample_conv_cost.FILE.read_text(encoding="utf-8"))
    upsample_conv_cost.parse(copy.deepcopy(data), "file.json")
    change(data)
    with pytest.raises(ValueError, match=message):
        upsample_conv_cost.parse(data, "file.json")


def test_the_cost_model_takes_the_machine_of_the_architecture(data: Any, use_data: Any) -> None:
    machines = upsample_conv_cost.machines()
    upsample_conv_cost._machine.cache_clear()
    try:
        for capability in ((9, 0), (8, 6), (7, 7)):
            use_data(data, capability)
            upsample_conv_cost._machine.cache_clear()
            expected = machines.get(f"sm_{capability[0]}{capability[1]}", machines["default"])
            assert upsample_conv_cost._machine(torch.device("cuda", 0), True) == expected
        assert upsample_conv_cost._machine(CPU, False) == machines["cpu"]
    finally:
        upsample_conv_cost._machine.cache_clear()

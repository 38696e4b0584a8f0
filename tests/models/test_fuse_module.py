"""What `fuse` does to a module, and what it leaves alone."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from decovae import fuse, unfuse
from decovae.models import blocks
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.fused import Carry, Fused
from tests.models.twins import monai_block, monai_twin

SMALL = AutoencoderConfig(channels=(4, 8), residual_blocks=1, groups=2)


def snapshot(module: nn.Module) -> list[tuple[str, type, dict[str, Any]]]:
    return [(name, type(layer), dict(layer.__dict__)) for name, layer in module.named_modules()]


def count(module: nn.Module) -> int:
    return sum(isinstance(layer, Fused) for layer in module.modules())


def pattern() -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv3d(4, 4, 3, padding=1))


def test_fuse_then_unfuse_leaves_the_module_as_it_was() -> None:
    model = monai_twin(SMALL)
    before, state = snapshot(model), model.state_dict()
    assert fuse(model, report=True)[0] is model
    assert count(model) > 8
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(isinstance(layer, cls) for layer, (_, cls, _) in zip(model.modules(), before, strict=True))
    assert unfuse(model) is model
    assert snapshot(model) == before


def test_fusing_twice_changes_the_options_alone() -> None:
    model = fuse(Autoencoder(SMALL, memory=None), memory="balanced", report=True)[0]
    classes = [type(layer) for layer in model.modules()]
    fuse(model, memory="tight", tile_bytes=7, report=True)
    assert [type(layer) for layer in model.modules()] == classes
    settings = [layer._fused_settings for layer in model.modules() if isinstance(layer, Fused)]
    assert {(setting.tight, setting.tile_bytes) for setting in settings} == {(True, 7)}


def test_the_autoencoder_fuses_itself_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    assert count(Autoencoder(SMALL)) == count(fuse(Autoencoder(SMALL, memory=None), report=True)[0]) > 8
    assert count(Autoencoder(SMALL, memory=None)) == 0
    assert capsys.readouterr().out == ""


def test_fuse_prints_or_returns_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(pattern(), nn.InstanceNorm3d(4), nn.ModuleList([nn.GroupNorm(2, 4)]))
    fuse(model)
    printed = capsys.readouterr().out
    assert "1 × norm → SiLU → convolution, at 0.2" in printed
    assert "1 × group norm in ModuleList, which is no known pattern, at 2.0" in printed
    report = fuse(model, report=True)[1]
    assert str(report) == printed.rstrip()
    assert report.replaced == [("0.2", "norm → SiLU → convolution")]
    assert [name for name, _ in report.left] == ["2.0"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_fused_and_apart(copied: Any) -> None:
    model = Autoencoder(SMALL, memory="tight")
    twin = copied(model)
    assert snapshot(unfuse(copied(twin)))[0][1] is Autoencoder
    assert [type(layer) for layer in twin.modules()] == [type(layer) for layer in model.modules()]
    image = torch.rand(1, 1, 4, 4, 4)
    assert torch.equal(twin(image, sample=False)[0], model(image, sample=False)[0])
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_a_pickle_loads_where_nothing_was_fused(tmp_path: Path) -> None:
    torch.save(fuse(pattern(), report=True)[0], tmp_path / "model.pt")
    script = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
print(type(model).__name__, model(torch.rand(1, 4, 3, 3, 3)).shape)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("FusedSequential torch.Size([1, 4, 3, 3, 3])")


@pytest.mark.parametrize("fused_first", [True, False])
def test_checkpoints_load_strictly_fused_or_not(fused_first: bool) -> None:
    source, target = monai_twin(SMALL), Autoencoder(SMALL, memory=None if fused_first else "balanced")
    if fused_first:
        fuse(source, report=True)
    target.load_state_dict(source.state_dict(), strict=True)
    source.load_state_dict(Autoencoder(SMALL).state_dict(), strict=True)


def test_hooks_of_blocks_are_called_and_may_replace_features() -> None:
    model, plain = Autoencoder(SMALL), Autoencoder(SMALL, memory=None)
    plain.load_state_dict(model.state_dict())
    seen: list[int] = []
    for network in (model, plain):
        network.encoder.blocks[1].register_forward_hook(lambda module, args, output: output * 2 + args[0])
        network.encoder.blocks[2].register_forward_pre_hook(lambda module, args: seen.append(len(args)))
    image = torch.rand(1, 1, 8, 8, 8)
    torch.testing.assert_close(model.encode(image)[0], plain.encode(image)[0], rtol=1e-4, atol=1e-5)
    assert seen == [1, 1]


def test_statistics_are_of_the_features_that_they_were_taken_of() -> None:
    carry, x = Carry(), torch.rand(2)
    assert carry.of(x) is None
    assert carry.put(x, torch.ones(1)) is x
    assert carry.of(x) is not None
    assert carry.of(x.clone()) is None
    x.mul_(2)
    assert carry.of(x) is None


def test_one_activation_may_stand_in_many_places() -> None:
    silu = nn.SiLU()
    norms, convolutions = [nn.GroupNorm(2, 4) for _ in range(2)], [nn.Conv3d(4, 4, 1) for _ in range(2)]
    model = nn.Sequential(norms[0], silu, convolutions[0], norms[1], silu, convolutions[1])
    x = torch.rand(1, 4, 2, 3, 4)
    expected = model(x)
    report = fuse(model, report=True)[1]
    assert [name for name, _ in report.replaced] == ["2", "5"]
    torch.testing.assert_close(model(x), expected)


def with_hook() -> nn.Module:
    block = blocks.ResidualBlock(4, 4, groups=2, eps=1e-6)
    block.conv1.conv.register_forward_hook(lambda module, args, output: None)
    return block


def with_checkpointing() -> nn.Module:
    block = blocks.ResidualBlock(4, 4, groups=2, eps=1e-6)
    block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return block


def with_spectral_norm() -> nn.Module:
    block = monai_block(4, 4, 2)
    parametrizations.spectral_norm(block.conv1.conv.conv)
    return block


def without_affine() -> nn.Module:
    block = blocks.ResidualBlock(4, 4, groups=2, eps=1e-6)
    block.norm2 = nn.GroupNorm(2, 4, affine=False)
    return block


def with_padding_mode() -> nn.Module:
    block = blocks.ResidualBlock(4, 4, groups=2, eps=1e-6)
    block.conv2.conv.conv = nn.Conv3d(4, 4, 3, padding=1, padding_mode="reflect")
    return block


def with_time_embedding() -> nn.Module:
    resnet = pytest.importorskip("diffusers.models.resnet")
    return resnet.TemporalResnetBlock(32, 32, temb_channels=4)


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.GroupNorm(2, 4), nn.Dropout(0.5), nn.SiLU(), nn.Conv3d(4, 4, 3))


def in_two_dimensions() -> nn.Module:
    return nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3))


def of_two_dimensions() -> nn.Module:
    autoencoderkl = pytest.importorskip("monai.networks.nets.autoencoderkl")
    return autoencoderkl.AEKLResBlock(2, 4, 2, 1e-6, 4)


def transposed() -> nn.Module:
    return monai_twin(SMALL, use_convtranspose=True).decoder.blocks[2]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(x)


class Mine(blocks.ResidualBlock):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_hook, "it has hooks"),
        (with_checkpointing, "its forward was replaced"),
        (with_spectral_norm, "ParametrizedConv3d is not torch's Conv3d"),
        (without_affine, "no weight and bias"),
        (with_padding_mode, "padding 'reflect'"),
        (with_time_embedding, "time embedding"),
        (with_dropout, "no SiLU after it, and Dropout"),
        (in_two_dimensions, "2D"),
        (of_two_dimensions, "2D"),
        (transposed, "transposed convolution"),
        (Attention, "group norm in Attention"),
        (partial(Mine, 4, 4, groups=2, eps=1e-6), "group norm in Mine"),
    ],
)
def test_what_cannot_be_fused_is_left_with_the_reason(make: Any, reason: str) -> None:
    module = make()
    before = snapshot(module)
    report = fuse(module, report=True)[1]
    assert snapshot(module) == before
    assert report.replaced == []
    assert reason in report.left[0][1]
    assert "left " in str(report)


def test_blocks_around_a_left_one_are_fused() -> None:
    cascade = blocks.Cascade(
        [blocks.ResidualBlock(4, 4, groups=2, eps=1e-6), Attention(), blocks.ResidualBlock(4, 4, groups=2, eps=1e-6)]
    )
    x = torch.rand(1, 4, 3, 4, 5)
    expected = cascade(x)
    _, report = fuse(cascade, report=True)
    assert [name for name, _ in report.replaced] == ["blocks.0", "blocks.2"]
    assert [name for name, _ in report.left] == ["blocks.1.norm"]
    torch.testing.assert_close(cascade(x), expected)


def test_a_part_unfused_still_runs_in_its_row() -> None:
    model = Autoencoder(SMALL)
    image = torch.rand(1, 1, 4, 4, 4)
    expected = model.encode(image)[0]
    for block in model.encoder.blocks:
        unfuse(block)
        torch.testing.assert_close(model.encode(image)[0], expected, rtol=1e-4, atol=1e-5)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="list"):
        fuse([pattern()])  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"memory='small'.*balanced, tight"):
        fuse(pattern(), memory="small")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tile_bytes=-1"):
        fuse(pattern(), tile_bytes=-1)
    with pytest.raises(ValueError, match="memory='small'"):
        Autoencoder(SMALL, memory="small")  # type: ignore[arg-type]

"""Weights of others: the layouts of their files, and what is refused."""

from __future__ import annotations

import ast
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decovae.errors import InputError
from decovae.files import load_tensors
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.weights import infer_config, load_autoencoder, load_initial, save_autoencoder, weights_file
from tests.models.twins import monai_twin, perturbed

ROOT = Path(__file__).resolve().parents[2]
SMALL = AutoencoderConfig(channels=(32, 32), residual_blocks=1)


def authors_checkpoint(autoencoder: nn.Module, discriminator: nn.Module) -> dict[str, Any]:
    """What the authors' training of the autoencoder and of its decoder saves, its optimisers after a step."""
    networks = {"g": autoencoder, "d": discriminator}
    optimizers = {name: torch.optim.AdamW(network.parameters(), eps=1e-6) for name, network in networks.items()}
    schedulers: dict[str, Any] = {}
    for name, network in networks.items():
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        schedulers[name] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[name], T_max=10)
        optimizers[name].step()
        schedulers[name].step()
    return {
        "autoencoder": autoencoder.state_dict(),
        "discriminator": discriminator.state_dict(),
        **{f"optimizer_{name}": optimizer.state_dict() for name, optimizer in optimizers.items()},
        **{f"scheduler_{name}": scheduler.state_dict() for name, scheduler in schedulers.items()},
        **{f"scaler_{name}": torch.amp.GradScaler("cpu").state_dict() for name in networks},
        "step": 1000,
        "best_val_loss": 0.25,
        "epoch": 3,
    }


def same(model: Autoencoder, state: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in found)


def test_the_authors_checkpoint_loads_from_among_optimisers_and_discriminator(tmp_path: Path) -> None:
    from monai.networks.nets import PatchDiscriminator

    twin = monai_twin(SMALL)
    discriminator = PatchDiscriminator(
        spatial_dims=3, num_layers_d=1, channels=4, in_channels=1, out_channels=1, norm="INSTANCE"
    )
    torch.save(authors_checkpoint(twin, discriminator), tmp_path / "model.pt")
    loaded = load_autoencoder(tmp_path / "model.pt")
    assert loaded.config == SMALL
    assert same(loaded, twin.state_dict())


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"unet_state_dict": state, "epoch": 1}])
def test_maisi_s_two_layouts_load(tmp_path: Path, wrap: Any) -> None:
    twin = perturbed(monai_twin(SMALL, norm_float16=True, num_splits=2))
    torch.save(wrap(twin.state_dict()), tmp_path / "autoencoder_v2.pt")
    assert same(load_autoencoder(tmp_path / "autoencoder_v2.pt"), twin.state_dict())


def test_of_several_the_first_least_deep_is_meant(tmp_path: Path) -> None:
    first, second, deep = (perturbed(Autoencoder(SMALL)).state_dict() for _ in range(3))
    torch.save({"history": {"before": deep}, "model": first, "ema": second}, tmp_path / "model.pt")
    loaded = load_autoencoder(tmp_path / "model.pt")
    assert same(loaded, first)


def test_norms_are_those_of_the_network_file(tmp_path: Path) -> None:
    twin = perturbed(monai_twin(replace(SMALL, groups=8, eps=1e-3)))
    torch.save(twin.state_dict(), tmp_path / "maisi.pt")
    assert load_autoencoder(tmp_path / "maisi.pt").config == SMALL
    definition = {"norm_num_groups": 8, "norm_eps": 1e-3}
    (tmp_path / "maisi.json").write_text(json.dumps({"autoencoder_def": definition}))
    assert load_autoencoder(tmp_path / "maisi.pt").config == replace(SMALL, groups=8, eps=1e-3)
    (tmp_path / "maisi.json").write_text("{")
    with pytest.raises(InputError, match=r"maisi\.json: cannot be read"):
        load_autoencoder(tmp_path / "maisi.pt")


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_what_others_pickled_is_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    torch.save({"model": Autoencoder(SMALL).state_dict(), "args": Trap(trap)}, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model\.pt: not a file of plain tensors"):
        load_autoencoder(tmp_path / "model.pt")
    assert not trap.exists()


def test_tensors_that_remember_a_volume_are_plain_ones(tmp_path: Path) -> None:
    from monai.data import MetaTensor
    from monai.utils.enums import SpaceKeys, TraceKeys

    factor = MetaTensor(
        torch.tensor(0.9), meta={"space": SpaceKeys.RAS, "affine": torch.eye(4), TraceKeys.CLASS_NAME: "x"}
    )
    torch.save({"scale_factor": factor}, tmp_path / "unet.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "unet.pt", weights_only=True)
    assert float(load_tensors(tmp_path / "unet.pt", advice="")["scale_factor"]) == pytest.approx(0.9)


def test_the_file_of_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"autoencoder\.safetensors: no such weights file"):
        weights_file(tmp_path)
    save_autoencoder(Autoencoder(SMALL).state_dict(), SMALL, tmp_path / "autoencoder.safetensors")
    assert weights_file(tmp_path) == tmp_path / "autoencoder.safetensors" == weights_file(weights_file(tmp_path))


def test_training_starts_from_the_weights_of_a_file(tmp_path: Path) -> None:
    source = perturbed(Autoencoder(SMALL))
    torch.save(source.state_dict(), tmp_path / "maisi.pt")
    model = Autoencoder(SMALL, memory=None)
    load_initial(model, tmp_path / "maisi.pt")
    assert same(model, source.state_dict())


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (
            AutoencoderConfig(channels=(32, 64), residual_blocks=1),
            "with channels=32 32, not 32 64; give --model.channels",
        ),
        (AutoencoderConfig(channels=(32, 32), residual_blocks=2), "--model.residual-blocks 1, or other weights"),
        (AutoencoderConfig(channels=(32, 32), residual_blocks=1, groups=8), "groups=32, not 8"),
    ],
)
def test_weights_of_another_shape_are_refused(tmp_path: Path, wanted: AutoencoderConfig, words: str) -> None:
    torch.save(Autoencoder(SMALL).state_dict(), tmp_path / "maisi.pt")
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        load_initial(Autoencoder(wanted), tmp_path / "maisi.pt")
    assert str(caught.value).startswith(f"--init {tmp_path / 'maisi.pt'}: ")


def test_levels_of_unequal_depth_are_no_autoencoder_of_ours() -> None:
    state = dict(Autoencoder(AutoencoderConfig(channels=(32, 32), residual_blocks=2)).state_dict())
    state["encoder.blocks.2.conv.conv.conv.weight"] = state.pop("encoder.blocks.2.conv1.conv.conv.weight")
    with pytest.raises(ValueError, match="where every level must have as many"):
        infer_config(state)


def test_nothing_that_is_shipped_unpickles_more_than_tensors() -> None:
    loads = []
    for folder in ("decovae", "kernels", "train", "bench", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if "torch.load(" in text:
                calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
                loads += [(path, call) for call in calls if ast.unparse(call.func) == "torch.load"]
    assert loads
    for path, call in loads:
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert options.get("weights_only") == "True", f"{path}:{call.lineno}"

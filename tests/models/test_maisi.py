"""A foreign U-Net at fixed inputs is the flow that is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decovae.errors import InputError
from decovae.models.autoencoder import AutoencoderConfig
from decovae.models.flow_unet import TIMESTEPS, FlowUNetConfig
from decovae.models.maisi import UNetInputs, autoencoder_definition, load_maisi_flow, unet_definition
from tests.models.twins import perturbed

CONFIG = FlowUNetConfig(channels=(32, 64), attention=(False, True), residual_blocks=1, head_channels=32)
CHANNELS = 3
SPACING = (0.94, 1.0, 1.36)


def monai_unet(**options: Any) -> nn.Module:
    from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi

    arguments = unet_definition(CONFIG, CHANNELS) | options
    arguments.pop("_target_")
    return perturbed(DiffusionModelUNetMaisi(**arguments)).eval()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2, CHANNELS, 4, 8, 4), torch.tensor([0.2, 0.7])


@torch.no_grad()
def difference(path: Path, inputs: UNetInputs, theirs: nn.Module, **told: Any) -> float:
    x, t = batch()
    found = load_maisi_flow(path, inputs).network(x, t)
    expected = theirs(x, TIMESTEPS * (1 - t), **told)
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_nvidia_s_checkpoint_told_spacing_and_modality(tmp_path: Path) -> None:
    from monai.data import MetaTensor

    theirs, path = monai_unet(include_spacing_input=True, num_class_embeds=16), tmp_path / "diff_unet.pt"
    content = {
        "epoch": 7,
        "loss": torch.tensor(0.1),
        "num_train_timesteps": TIMESTEPS,
        "scale_factor": MetaTensor(torch.tensor(0.8)),
        "unet_state_dict": theirs.state_dict(),
    }
    torch.save(content, path)
    told = {
        "spacing_tensor": 100 * torch.tensor([SPACING, SPACING]),
        "class_labels": torch.tensor([9, 9]),
    }
    assert difference(path, UNetInputs(spacing=SPACING, modality=9), theirs, **told) < 1e-5
    assert difference(path, UNetInputs(spacing=SPACING, modality=8), theirs, **told) > 1e-3
    assert difference(path, UNetInputs(spacing=(1, 1, 1), modality=9), theirs, **told) > 1e-3
    flow = load_maisi_flow(path, UNetInputs(spacing=SPACING, modality=9))
    assert flow.network.config == CONFIG
    assert (flow.mean, flow.std) == (0.0, pytest.approx(1.25))


def test_the_authors_checkpoint_told_spacing_and_a_number(tmp_path: Path) -> None:
    # The number's embedding stands behind the spacing's: in MONAI's network the latter can take the region's place.
    theirs = monai_unet(include_top_region_index_input=True, include_spacing_input=True)
    theirs.top_region_index_layer, theirs.spacing_layer = (
        perturbed(theirs._create_embedding_module(size, 128)) for size in (3, 1)
    )
    names = {"spacing_layer": "meta_layer", "top_region_index_layer": "spacing_layer"}
    state = {
        ".".join((names.get(first, first), *rest)): value
        for (first, *rest), value in ((name.split("."), value) for name, value in theirs.state_dict().items())
    }
    path = tmp_path / "model.pt"
    optimizer = torch.optim.Adam(theirs.parameters())
    content = {
        "unet": state,
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=9, power=2.0).state_dict(),
        "step": 100,
        "best_val_loss": 0.5,
        "num_train_timesteps": TIMESTEPS,
        "scale_factor": torch.tensor([0.5]),
        "global_mean": torch.tensor([-0.25]),
        "epoch": 1,
    }
    torch.save(content, path)
    told = {
        "top_region_index_tensor": 100 * torch.tensor([SPACING, SPACING]),
        "spacing_tensor": torch.tensor([[63.0], [63.0]]),
    }
    assert difference(path, UNetInputs(spacing=SPACING, meta=63.0), theirs, **told) < 1e-5
    flow = load_maisi_flow(path, UNetInputs(spacing=SPACING, meta=63.0))
    assert (flow.mean, flow.std) == (-0.25, 2.0)


def test_bare_weights_need_no_inputs(tmp_path: Path) -> None:
    theirs = monai_unet()
    torch.save({"module." + name: value for name, value in theirs.state_dict().items()}, tmp_path / "unet.pt")
    assert difference(tmp_path / "unet.pt", UNetInputs(spacing=SPACING), theirs) < 1e-5


@pytest.mark.parametrize(
    ("options", "inputs", "words"),
    [
        ({"num_class_embeds": 4}, UNetInputs(), "it is told --modality; give one"),
        ({"num_class_embeds": 4}, UNetInputs(modality=4), "--modality 4: it knows the numbers 0 to 3"),
        ({}, UNetInputs(modality=4), "--modality 4: it is told none; leave the option out"),
        ({}, UNetInputs(meta=4.0), "--meta 4.0: it is told none; leave the option out"),
        ({"include_spacing_input": True}, UNetInputs(), "it is told --spacing; give one"),
        ({"include_top_region_index_input": True}, UNetInputs(), "it is told the region of the body"),
        ({"resblock_updown": False}, UNetInputs(), "older DDPM networks do, which are no flows"),
        ({"num_res_blocks": (1, 2)}, UNetInputs(), "levels with [1, 2] residual blocks"),
        ({"include_fc": False}, UNetInputs(), "Missing key"),
    ],
)
def test_other_networks_are_refused_with_the_reason(
    tmp_path: Path, options: dict[str, Any], inputs: UNetInputs, words: str
) -> None:
    torch.save(monai_unet(**options).state_dict(), tmp_path / "unet.pt")
    with pytest.raises(InputError) as caught:
        load_maisi_flow(tmp_path / "unet.pt", inputs)
    assert str(caught.value).startswith(f"{tmp_path / 'unet.pt'}: not a flow's U-Net that can be read here: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"autoencoder": {"encoder.weight": torch.zeros(1)}}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="holds no MAISI diffusion U-Net"):
        load_maisi_flow(tmp_path / "model.pt")
    with pytest.raises(InputError, match="no such weights file"):
        load_maisi_flow(tmp_path / "nowhere.pt")
    torch.save({"unet_state_dict": monai_unet().state_dict(), "scale_factor": 0.0}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="scale_factor is 0"):
        load_maisi_flow(tmp_path / "model.pt")


def test_what_shapes_do_not_show_is_in_the_network_file(tmp_path: Path) -> None:
    theirs = monai_unet(norm_num_groups=8, num_head_channels=16)
    torch.save(theirs.state_dict(), tmp_path / "unet.pt")
    assert load_maisi_flow(tmp_path / "unet.pt").network.config == CONFIG
    definition = unet_definition(CONFIG, CHANNELS) | {"norm_num_groups": 8, "num_head_channels": [0, 16]}
    (tmp_path / "unet.json").write_text(json.dumps({"diffusion_unet_def": definition}))
    assert difference(tmp_path / "unet.pt", UNetInputs(), theirs) < 1e-5
    assert load_maisi_flow(tmp_path / "unet.pt", head_channels=8).network.config.head_channels == 8


def test_definitions_name_every_argument_that_shapes_the_networks() -> None:
    autoencoder = autoencoder_definition(AutoencoderConfig(channels=(8, 16, 16), groups=4, eps=1e-5))
    assert autoencoder["num_channels"] == [8, 16, 16]
    assert (autoencoder["norm_num_groups"], autoencoder["norm_eps"]) == (4, 1e-5)
    unet = unet_definition(FlowUNetConfig(), 4)
    assert unet["num_channels"] == [64, 128, 256, 512]
    assert unet["resblock_updown"]
    assert unet["include_fc"]

"""Where the perceptual features come from, and that they are what the lpips package computes with them."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from decovae.errors import InputError
from decovae.losses.perceptual import PerceptualLoss


@pytest.fixture(scope="module")
def squeezenet() -> dict[str, torch.Tensor]:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(3)
    state: dict[str, torch.Tensor] = squeezenet1_1(weights=None).state_dict()
    return state


@pytest.fixture
def planes() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return [(torch.rand(3, 1, 40, 36), torch.rand(3, 1, 40, 36)) for _ in range(3)]


def reference(state: dict[str, torch.Tensor], planes: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """LPIPS by the package itself, its trunk's layers overwritten one by one."""
    from lpips import LPIPS

    network = LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    for slice_ in (getattr(network.net, f"slice{number}") for number in range(1, 8)):
        for layer, module in slice_.named_children():
            prefix = f"features.{layer}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return float(sum(network(2 * a - 1, 2 * b - 1).mean() for a, b in planes))


def test_a_torchvision_file_gives_the_package_s_lpips(tmp_path: Path, squeezenet: dict, planes: list) -> None:
    torch.save(squeezenet, tmp_path / "squeezenet.pth")
    loss = PerceptualLoss(str(tmp_path / "squeezenet.pth"))
    assert loss.calibrated
    assert float(loss(planes)) == pytest.approx(reference(squeezenet, planes), rel=1e-5)


def test_a_whole_lpips_file_loads(tmp_path: Path, squeezenet: dict, planes: list) -> None:
    torch.save(squeezenet, tmp_path / "squeezenet.pth")
    first = PerceptualLoss(str(tmp_path / "squeezenet.pth"))
    torch.save(first.network.state_dict(), tmp_path / "lpips.pth")
    second = PerceptualLoss(str(tmp_path / "lpips.pth"))
    assert float(second(planes)) == float(first(planes))


def test_pretrained_weights_come_from_torchvision(
    monkeypatch: pytest.MonkeyPatch, squeezenet: dict, planes: list
) -> None:
    from torchvision.models import SqueezeNet1_1_Weights

    monkeypatch.setattr(SqueezeNet1_1_Weights, "get_state_dict", lambda *_, **__: squeezenet)
    assert float(PerceptualLoss("pretrained")(planes)) == pytest.approx(reference(squeezenet, planes), rel=1e-5)


def test_without_a_network_the_choices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import SqueezeNet1_1_Weights

    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr(SqueezeNet1_1_Weights, "get_state_dict", unreachable)
    with pytest.raises(InputError) as caught:
        PerceptualLoss("pretrained")
    assert all(word in str(caught.value) for word in ("--loss.perceptual-network", "random", "none", "path"))


def test_random_features_are_fixed_frozen_and_no_lpips(planes: list) -> None:
    before = torch.get_rng_state()
    first, second = PerceptualLoss("random"), PerceptualLoss("random")
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.calibrated
    assert float(first(planes)) == float(second(planes)) > 0
    assert not any(p.requires_grad for p in first.parameters())
    assert not first.train().network.training
    assert float(first([(a, a) for a, _ in planes])) == 0


def test_gradients_reach_the_images(planes: list) -> None:
    fake = planes[0][1].requires_grad_()
    PerceptualLoss("random")([(planes[0][0], fake)]).backward()
    assert fake.grad is not None
    assert fake.grad.abs().max() > 0


@pytest.mark.parametrize("content", ["missing", b"text", {"a": torch.zeros(1)}, [1, 2], "shapes"])
def test_bad_files_are_named_with_the_choices(tmp_path: Path, squeezenet: dict, content: object) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "shapes":
        torch.save({key: value[:1] for key, value in squeezenet.items()}, path)
    elif content != "missing":
        torch.save(content, path)
    with pytest.raises(InputError, match=r"weights\.pth") as caught:
        PerceptualLoss(str(path))
    assert "random" in str(caught.value)

"""Networks for slices against torchvision's and Keras's definitions, from every file that is about, and slices."""

from __future__ import annotations

import urllib.error
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import Inception_V3_Weights, densenet121, inception_v3, resnet18, resnet50, squeezenet1_1

from decovae.errors import InputError
from decovae.metrics import slice_features
from decovae.metrics.slice_features import (
    PLANES,
    SliceNetwork,
    inception_network,
    radimagenet_network,
    random_network,
    volume_slices,
)

State = dict[str, Tensor]
BGR_MEANS = torch.tensor([0.406, 0.456, 0.485], dtype=torch.float64).view(3, 1, 1)


def some_weights(build: Callable[[], nn.Module], *, gain: float = 0.005) -> State:
    """Other values in every tensor of a network, and files of kilobytes: kernels differ between output channels only.

    The first convolution's differ everywhere, so that the order of channels shows; norms have tiny variances, so that
    their epsilon does.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        network = build()

    def values(name: str, shape: torch.Size) -> Tensor:
        drawn = torch.rand(
            shape if len(shape) < 2 or shape[1] == 3 else (shape[0], *[1] * (len(shape) - 1)), generator=generator
        )
        if name.endswith("running_var"):
            return 1e-5 * (0.5 + drawn)
        if name.endswith("num_batches_tracked"):
            return torch.tensor(7)
        if len(shape) > 1:
            return ((drawn - 0.3) / shape[1:].numel()).expand(shape)
        return gain * (0.5 + drawn) if name.endswith("weight") else 0.3 * (drawn - 0.4)

    return {name: values(name, tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.fixture(scope="module")
def resnet() -> State:
    return some_weights(lambda: resnet50(num_classes=165))


def headless(state: Mapping[str, Tensor]) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def official(state: Mapping[str, Tensor]) -> State:
    """Names of `backbone = nn.Sequential(*children)` in the official release."""
    with torch.device("meta"):
        numbers = {child: str(number) for number, (child, _) in enumerate(resnet50().named_children())}
    parts = {name: name.partition(".") for name in headless(state)}
    return {f"backbone.{numbers[child]}.{rest}": state[name] for name, (child, _, rest) in parts.items()}


def keras(state: Mapping[str, Tensor]) -> State:
    """The names of the conversion from Keras: headless, and with a bias in every convolution."""
    biases = {
        name.removesuffix("weight") + "bias": 0.1 * torch.arange(len(tensor)) / len(tensor)
        for name, tensor in state.items()
        if tensor.ndim == 4
    }
    return headless(state) | biases


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def slices(count: int = 3) -> Tensor:
    return torch.rand(count, 1, 45, 38, generator=torch.Generator().manual_seed(1))


def test_random_features_are_squeezenets_first_layers_from_seed_zero() -> None:
    state = torch.random.get_rng_state()
    network = random_network()
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = squeezenet1_1(weights=None).features[:5].eval()
    with torch.no_grad():
        assert torch.equal(network(slices()), layers(slices().expand(-1, 3, -1, -1)).mean((2, 3)))
    assert (network.name, network.proxy, network.features) == ("random", True, 128)
    assert network.fingerprint == random_network().fingerprint


def test_radimagenet_features_are_resnet50s_pooled_maps(resnet: State, tmp_path: Path) -> None:
    network = radimagenet_network(saved(resnet, tmp_path / "ResNet50.pt"))
    reference = resnet50(num_classes=165)
    reference.load_state_dict(resnet)
    reference.fc = nn.Identity()
    images = slices().double().expand(-1, 3, -1, -1)
    measured = network(slices())
    with torch.no_grad():
        expected = reference.double().eval()(images - BGR_MEANS)
        torch.testing.assert_close(measured.double(), expected, rtol=1e-3, atol=1e-6)
        exact = network.trunk.double()(network.prepare(images))
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=0)
    assert (network.name, network.proxy, network.features) == ("radimagenet", False, expected.shape[1])
    assert "RadImageNet" in network.title
    assert "ImageNet's" not in network.title.removeprefix("RadImageNet's")


def as_safetensors(state: State, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


FILES: dict[str, Callable[[State, Path], Path]] = {
    "module.": lambda state, folder: saved({f"module.{key}": each for key, each in state.items()}, folder / "m.pth"),
    "headless": lambda state, folder: saved(headless(state), folder / "h.pt"),
    "official": lambda state, folder: saved(official(state), folder / "ResNet50.pt"),
    "official, parallel": lambda state, folder: saved(
        {f"module.{key}": each for key, each in official(state).items()}, folder / "p.pt"
    ),
    "checkpoint": lambda state, folder: saved({"epoch": 3, "state_dict": state}, folder / "c.pth.tar"),
    "old": lambda state, folder: saved(
        {key: each for key, each in state.items() if "num_batches" not in key}, folder / "o.pt"
    ),
    "double": lambda state, folder: saved({key: each.double() for key, each in state.items()}, folder / "d.pt"),
    "safetensors": lambda state, folder: as_safetensors(state, folder / "s.safetensors"),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_spelling_of_resnet50s_names_is_the_same_network(kind: str, resnet: State, tmp_path: Path) -> None:
    plain = radimagenet_network(saved(resnet, tmp_path / "plain.pt"))
    other = radimagenet_network(FILES[kind](resnet, tmp_path))
    assert other.fingerprint == plain.fingerprint
    assert torch.equal(other(slices(1)), plain(slices(1)))


def test_other_weights_have_another_fingerprint(resnet: State, tmp_path: Path) -> None:
    plain = radimagenet_network(saved(resnet, tmp_path / "plain.pt"))
    touched = dict(resnet) | {"layer3.2.bn1.bias": resnet["layer3.2.bn1.bias"] + 1e-6}
    assert radimagenet_network(saved(touched, tmp_path / "touched.pt")).fingerprint != plain.fingerprint


def test_a_head_of_imagenets_classes_is_pointed_out(resnet: State, tmp_path: Path) -> None:
    imagenet = dict(resnet) | {"fc.weight": torch.zeros(1, 1).expand(1000, 2048), "fc.bias": torch.zeros(1000)}
    assert "1,000 classes" in radimagenet_network(saved(imagenet, tmp_path / "resnet50.pth")).title


def keras_features(state: State, images: Tensor) -> Tensor:
    """ResNet-50 as keras.applications defines it, operation by operation."""

    def convolution(x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        return nn.functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding)

    def norm(x: Tensor, name: str) -> Tensor:
        scale = state[f"{name}.weight"] / (state[f"{name}.running_var"] + 1.001e-5).sqrt()
        shift = state[f"{name}.bias"] - state[f"{name}.running_mean"] * scale
        return x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)

    x = norm(convolution(images, "conv1", 2, 3), "bn1").relu()
    x = nn.functional.max_pool2d(nn.functional.pad(x, (1, 1, 1, 1)), 3, 2)
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for number in range(blocks):
            block = f"layer{stage}.{number}"
            stride = 2 if stage > 1 and number == 0 else 1
            kept = norm(convolution(x, f"{block}.downsample.0", stride), f"{block}.downsample.1") if number == 0 else x
            x = norm(convolution(x, f"{block}.conv1", stride), f"{block}.bn1").relu()
            x = norm(convolution(x, f"{block}.conv2", 1, 1), f"{block}.bn2").relu()
            x = (norm(convolution(x, f"{block}.conv3"), f"{block}.bn3") + kept).relu()
    return x.mean((2, 3))


def test_the_conversion_from_keras_is_kerass_network(resnet: State, tmp_path: Path) -> None:
    state = keras(resnet)
    network = radimagenet_network(saved(state, tmp_path / "RadImageNet-ResNet50_notop.pth"))
    measured = network(slices())
    exact = {name: tensor.double() for name, tensor in state.items()}
    images = slices().double().expand(-1, 3, -1, -1) - BGR_MEANS
    expected = keras_features(exact, images)
    torch.testing.assert_close(measured.double(), expected, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(network.trunk.double()(images), expected, rtol=1e-9, atol=0)
    assert "Keras" in network.title
    other = radimagenet_network(saved(resnet, tmp_path / "ResNet50.pt"))
    assert other.fingerprint != network.fingerprint
    assert (other(slices()) - measured).abs().max() > 0.1


def test_files_that_are_no_resnet50_are_refused_with_what_to_do(resnet: State, tmp_path: Path) -> None:
    without, extra = dict(resnet), dict(resnet) | {"layer3.6.conv1.weight": torch.zeros(1)}
    del without["layer2.1.bn2.running_var"]
    reshaped = dict(resnet) | {"layer1.0.conv1.weight": torch.zeros(128, 64, 1, 1)}
    others = [some_weights(resnet18), some_weights(densenet121)]
    (tmp_path / "keras.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50))
    files = {
        tmp_path / "missing.pt": "no such weights file",
        tmp_path: "no such weights file",
        tmp_path / "keras.h5": "not a file of plain tensors",
        saved([1, 2], tmp_path / "list.pt"): "holds list",
        saved(without, tmp_path / "without.pt"): r"no layer2\.1\.bn2\.running_var",
        saved(extra, tmp_path / "resnet101.pt"): r"layer3\.6\.conv1\.weight is none of its tensors",
        saved(reshaped, tmp_path / "wide.pt"): r"\(128, 64, 1, 1\), not \(64, 64, 1, 1\)",
        saved(others[0], tmp_path / "resnet18.pt"): r"no layer1\.0\.conv3\.weight",
        saved(others[1], tmp_path / "DenseNet121.pt"): "not the weights of ResNet-50",
    }
    for file, message in files.items():
        with pytest.raises(InputError, match=f"{file.name}: .*{message}.*download .*https.*--radimagenet FILE"):
            radimagenet_network(file)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = some_weights(lambda: inception_v3(init_weights=False), gain=0.2)  # its epsilon is larger
    return saved(state, tmp_path_factory.mktemp("inception") / "inception.pth")


def test_inception_features_are_torchvisions(inception_file: Path) -> None:
    network = inception_network(inception_file)
    reference = inception_v3(init_weights=False, transform_input=True)
    reference.load_state_dict(torch.load(inception_file, weights_only=True))
    reference.fc = nn.Identity()
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    images = slices(2).double().expand(-1, 3, -1, -1)
    resized = nn.functional.interpolate(images, (299, 299), mode="bilinear")
    measured = network(slices(2))
    with torch.no_grad():
        expected = reference.double().eval()((resized - mean) / std)
        torch.testing.assert_close(measured.double(), expected, rtol=1e-3, atol=1e-6)
        exact = network.trunk.double()(network.prepare(images))
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=0)
    assert (network.name, network.proxy, network.features) == ("inception", True, expected.shape[1])
    assert "not the TensorFlow network" in network.title


def test_inception_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: object, **__: object) -> State:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(Inception_V3_Weights.IMAGENET1K_V1, "get_state_dict", offline, raising=False)
    with pytest.raises(InputError, match=r"no route.*--inception FILE.*--features"):
        inception_network()
    with pytest.raises(InputError, match=r"no such weights file.*--inception FILE"):
        inception_network(tmp_path / "missing.pth")
    with pytest.raises(InputError, match=r"not the weights of Inception v3 .*--inception FILE"):
        inception_network(saved({"a": torch.zeros(1)}, tmp_path / "a.pth"))


@pytest.fixture(scope="module")
def network() -> SliceNetwork:
    return random_network()


def test_features_do_not_depend_on_batches_autocast_or_mode(
    network: SliceNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = network(slices(7))
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.train()(slices(7)), whole)
    assert not any(module.training for module in network.modules())
    monkeypatch.setattr(slice_features, "BATCH", 3)
    torch.testing.assert_close(network(slices(7)), whole, rtol=1e-5, atol=1e-6)
    assert network(slices(2).bfloat16()).dtype == torch.float32


def test_wrong_slices_are_refused_by_name(network: SliceNetwork) -> None:
    with pytest.raises(TypeError, match="uint8"):
        network(torch.zeros(1, 1, 9, 9, dtype=torch.uint8))
    for shape in ((1, 3, 9, 9), (1, 9, 9), (0, 1, 9, 9)):
        with pytest.raises(ValueError, match="must be"):
            network(torch.zeros(shape))


def test_slices_lie_across_their_planes_axis() -> None:
    volume = torch.rand(6, 8, 10)
    assert PLANES == ("axial", "coronal", "sagittal")
    for plane, axis in zip(PLANES, (2, 1, 0), strict=True):
        cut = volume_slices(volume, plane)
        assert len(cut) == volume.shape[axis]
        for place in range(len(cut)):
            assert torch.equal(cut[place, 0], volume.select(axis, place))
        assert torch.equal(volume_slices(volume[None], plane), cut)
        assert cut.untyped_storage().data_ptr() == volume.untyped_storage().data_ptr()


@pytest.mark.parametrize("size", [1, 2, 7, 64, 73])
def test_every_and_central_choose_slices_around_the_middle(size: int) -> None:
    volume = torch.arange(size).float().expand(2, 3, size)

    def chosen(every: int, central: float) -> list[float]:
        places: list[float] = volume_slices(volume, "axial", every=every, central=central)[:, 0, 0, 0].tolist()
        return places

    assert chosen(1, 1.0) == list(range(size))
    assert chosen(3, 1.0) == list(range(0, size, 3))
    if size >= 7:
        assert chosen(2, 0.5) == list(range(size // 4, 3 * size // 4, 2))
    tiny = chosen(1, 1e-3)
    assert len(tiny) == 1
    assert abs(tiny[0] - (size - 1) / 2) <= 1


def test_wrong_choices_of_slices_are_refused_by_name() -> None:
    volume = torch.zeros(4, 4, 4)
    with pytest.raises(ValueError, match="'transverse'"):
        volume_slices(volume, "transverse")
    with pytest.raises(ValueError, match="not 0 and"):
        volume_slices(volume, "axial", every=0)
    for central in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"and {central}"):
            volume_slices(volume, "axial", central=central)
    for shape in ((4, 4), (2, 4, 4, 4)):
        with pytest.raises(ValueError, match="must be"):
            volume_slices(torch.zeros(shape), "axial")

"""The examples as their readers use them: run as they stand, and run as the ordinary scripts that they started from.

The ordinary script is an example without its marked lines, and with what they replaced in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from decovae import analyze_latents

FOLDER = Path(__file__).parents[2] / "examples"
MARK = "# DeCo-VAE"
REPLACED = "# before: "
PEER = {"monai_autoencoderkl": "monai", "monai_maisi": "monai", "diffusers_video_vae": "diffusers"}
STEPS = {"monai_autoencoderkl": 60, "monai_maisi": 60, "diffusers_video_vae": 50, "vae_2d": 150, "matrix": 200}

Main = Callable[..., tuple[torch.Tensor, float]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors of a few kilobytes gain nothing from threads, which wait for each other where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def script(name: str) -> str:
    if name in PEER:
        pytest.importorskip(PEER[name], reason=f"examples/{name}.py trains a network of {PEER[name]}")
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def added(source: str) -> list[str]:
    return [line for line in source.splitlines() if line.endswith(MARK)]


def ordinary(source: str) -> str:
    lines = [line.replace(REPLACED, "") for line in source.splitlines() if not line.endswith(MARK)]
    return "\n".join(lines) + "\n"


def execute(source: str, *, as_module: str = "example") -> dict[str, Any]:
    namespace = {"__name__": as_module}
    exec(compile(source, "example.py", "exec"), namespace)
    return namespace


def main_of(source: str) -> Main:
    return execute(source)["main"]


def first_gradients(main: Main, weight: float) -> list[torch.Tensor]:
    """The gradients in the optimizer's first step, of the parameters in its order: the encoder's come first."""
    gradients: list[torch.Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients.extend(parameter.grad.clone() for parameter in parameters if parameter.grad is not None)

    hook = register_optimizer_step_pre_hook(keep)
    try:
        main(steps=1, weight=weight)
    finally:
        hook.remove()
    return gradients


def assert_decorrelates(without: Main, with_loss: Main, steps: int) -> None:
    before, after = (analyze_latents(main(steps=steps)[0]) for main in (without, with_loss))
    assert after.pearson < 0.6 * before.pearson, f"mean |Pearson| {before.pearson:.3f} → {after.pearson:.3f}"
    assert after.effective_rank > before.effective_rank + 0.5, f"{before.effective_rank} → {after.effective_rank}"


def test_every_example_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*STEPS, "fuse_maisi"}


def test_fusing_keeps_the_gradient_and_less_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("monai", reason="examples/fuse_maisi.py fuses a network of MONAI")
    source = (FOLDER / "fuse_maisi.py").read_text(encoding="utf-8").replace("size: int = 24", "size: int = 16")
    (before, truth), (fused, _), (tight, gradient) = execute(source)["main"]().values()
    assert before > 4 * fused > 5 * tight
    torch.testing.assert_close(gradient, truth, rtol=1e-3, atol=1e-4 * float(truth.abs().max()))
    assert "6 × residual block" in capsys.readouterr().out
    execute(source, as_module="__main__")
    assert capsys.readouterr().out.count("MB kept for backward") == 3


@pytest.mark.parametrize("name", STEPS)
def test_at_most_five_lines_are_added(name: str) -> None:
    source = script(name)
    assert 1 <= len(added(source)) <= 5
    assert "decovae" not in ordinary(source), "a line that needs the project is not marked"


@pytest.mark.parametrize("name", STEPS)
def test_added_lines_decorrelate_the_latent(name: str) -> None:
    source = script(name)
    assert_decorrelates(main_of(ordinary(source)), main_of(source), STEPS[name])


@pytest.mark.parametrize("name", STEPS)
def test_gradient_reaches_the_whole_encoder_and_only_it(name: str) -> None:
    main = main_of(script(name))
    off, on = first_gradients(main, weight=0.0), first_gradients(main, weight=10.0)
    assert not torch.allclose(off[0], on[0], rtol=1e-2), "the encoder's first parameter"
    torch.testing.assert_close(off[-1], on[-1], msg=lambda difference: f"the decoder's last parameter: {difference}")


@pytest.mark.parametrize("transform", [str, ordinary], ids=["example", "ordinary"])
@pytest.mark.parametrize("name", STEPS)
def test_script_runs_from_top_to_bottom(
    name: str, transform: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = re.sub(r"steps: int = \d+", "steps: int = 1", script(name))
    execute(transform(source), as_module="__main__")
    printed = capsys.readouterr().out
    assert printed.count("error") == 2
    assert printed.count("effective rank") == (2 if transform is str else 0)


@pytest.mark.parametrize("name", ["vae_2d", "diffusers_video_vae"])
def test_added_lines_decorrelate_under_autocast(name: str) -> None:
    """A loss on μ, and the head, in a training that computes in bfloat16."""
    source = script(name)
    # One context spans all steps here, and its cache would keep the weights of the first.
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        assert main_of(source)(steps=0)[0].dtype == torch.bfloat16
        assert_decorrelates(main_of(ordinary(source)), main_of(source), STEPS[name])

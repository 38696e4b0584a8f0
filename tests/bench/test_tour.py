"""The tour launches every kernel, sees wrong results, and canaries see what leaves its bounds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton not installed", allow_module_level=True)

import triton
import triton.language as tl

from bench import canaries, tour
from decovae_kernels import group_norm_triton
from tests.channel_cases import DEVICE

pytestmark = pytest.mark.device


def test_every_kernel_is_launched_within_its_bounds_and_right() -> None:
    chosen = [case for case in tour.cases() if DEVICE.type == "cuda" or case.name.startswith(tour.QUICK)]
    with canaries.guarded() as guarded:
        outcomes = [tour.run_case(case, DEVICE) for case in chosen]
    assert [tour.line(outcome) for outcome in outcomes if not outcome.right] == []
    assert {kernel for outcome in outcomes for kernel in outcome.kernels} == tour.all_kernels()
    assert set(guarded) == tour.all_kernels()


def test_kernels_are_told_from_what_they_call() -> None:
    kernels = tour.all_kernels()
    assert {"_add_kernel", "_moments_kernel", "_head_gradient_kernel", "_downsample_kernel"} <= kernels
    assert not {"load_channels", "add_tile", "_tile"} & kernels


def test_every_operator_and_dtype_is_toured() -> None:
    cases = tour.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    for operator in ("decorrelation", "moments", "latent head", "group norm", "residual block", "norm and conv",
                     "convolution", "upsampling"):  # fmt: skip
        assert any(name.startswith(operator) for name in names)
    assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16, torch.float16}


def pairs(found: torch.Tensor, truth: torch.Tensor) -> Callable[[torch.device], list[tour.Pair]]:
    return lambda device: [tour.Pair(found, truth)]


@pytest.mark.parametrize(
    ("found", "right"),
    [
        (torch.ones(3), True),
        (torch.tensor([1.0, 1.0, 1.01]), False),
        (torch.tensor([1.0, 1.0, torch.nan]), False),
        (torch.ones(4), False),
    ],
)
def test_wrong_results_are_wrong(found: torch.Tensor, right: bool) -> None:
    case = tour.Case("a case", torch.float32, pairs(found, torch.ones(3, dtype=torch.float64)))
    outcome = tour.run_case(case, torch.device("cpu"))
    assert outcome.right == right
    assert tour.line(outcome).startswith("ok" if right else "wrong")


def test_the_exit_code_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(device: torch.device) -> list[tour.Pair]:
        raise RuntimeError("CUDA error: misaligned address")

    truth = torch.ones(1, dtype=torch.float64)
    some = [tour.Case("right", torch.float32, pairs(truth, truth)), tour.Case("broken", torch.float32, broken)]
    monkeypatch.setattr(tour, "cases", lambda: some)
    assert tour.main(["--out", str(tmp_path / "seen.json")]) == 1
    assert '"error": "RuntimeError: CUDA error: misaligned address"' in (tmp_path / "seen.json").read_text()
    assert '"ended": true' in (tmp_path / "seen.json").read_text()
    assert tour.main(["--only", "right", "--canaries"]) == 0
    assert tour.main(["--quick"]) == 2  # neither case is among them
    assert tour.main(["--only", "nothing"]) == 2


@triton.jit
def _copy_kernel(x_ptr, out_ptr, first, last, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Reads and writes [first, last), whatever lies there."""
    place = tl.arange(0, SIZE) - 16
    here = (place >= first) & (place < last)
    tl.store(out_ptr + place, tl.load(x_ptr + place, mask=here, other=0.0), mask=here)


def copy(first: int, last: int) -> torch.Tensor:
    """Every other of eight numbers, copied through launches as the kernels' modules make them."""
    x = torch.arange(16.0, device=DEVICE)[4:12]
    out = torch.zeros(16, device=DEVICE)[4:12]
    launch: Any = group_norm_triton.launch  # looked up here, as it is at every launch
    launch(_copy_kernel, (1,), x, out, first, last, SIZE=64)
    return out


def test_canaries_do_not_change_what_is_right() -> None:
    with canaries.guarded() as seen:
        assert copy(0, 8).tolist() == list(range(4, 12))
    assert seen == ["_copy_kernel"]


@pytest.mark.parametrize(("first", "last", "where"), [(-1, 8, "between bytes 12 and 15"), (0, 10, "between bytes 48")])
def test_canaries_see_what_is_written_out_of_bounds(first: int, last: int, where: str) -> None:
    with canaries.guarded(), pytest.raises(canaries.OutOfBounds, match=f"_copy_kernel, around argument 1.*{where}"):
        copy(first, last)


def test_canaries_make_nan_of_what_is_read_out_of_bounds() -> None:
    with canaries.guarded():
        x, out = torch.ones(4, device=DEVICE), torch.zeros(16, device=DEVICE)
        launch: Any = group_norm_triton.launch
        launch(_copy_kernel, (1,), x, out, 0, 8, SIZE=64)
    assert out[:4].tolist() == [1.0] * 4
    assert out[4:8].isnan().all()


def test_gaps_between_strides_are_poisoned_and_repetitions_are_not() -> None:
    x = torch.zeros(4, 6, device=DEVICE)[:, ::2]
    guard = canaries._Guard(x, -1)
    place = guard.take(x)
    assert (place == 0).all()
    assert place.stride() == x.stride()
    assert place.as_strided((4, 6), (6, 1))[:, 1::2][:, :2].isnan().all()
    guard.check("nowhere")
    repeated = torch.ones(3, device=DEVICE).expand(5, 3)
    assert canaries._Guard(repeated, -1).take(repeated).eq(1).all()

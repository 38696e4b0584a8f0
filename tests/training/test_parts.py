"""The parts of the loop that are functions of little: schedules, order, log, folder, averages."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from decovae.errors import InputError
from decovae.training.ema import ExponentialMovingAverage
from decovae.training.parallel import frozen
from decovae.training.presets import QUICKSTART
from decovae.training.run_folder import MetricsLog, check_folder, create_folder
from decovae.training.sampling import Batches
from decovae.training.schedule import learning_rate_factor, seed_step


def test_cosine_from_one_to_zero_with_a_linear_start() -> None:
    factors = [learning_rate_factor(step, steps=100, warmup=0) for step in range(101)]
    assert factors[0] == 1
    assert math.isclose(factors[50], 0.5)
    assert factors[100] == 0
    assert factors == sorted(factors, reverse=True)
    assert math.isclose(learning_rate_factor(0, steps=100, warmup=10), 0.1)
    assert learning_rate_factor(50, steps=100, warmup=10) == factors[50]


def test_a_step_s_noise_depends_on_seed_step_and_rank() -> None:
    draws = {}
    for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0)]:
        seed_step(*key)
        draw = torch.rand(1).item()
        assert draws.setdefault(key, draw) == draw
    assert len(set(draws.values())) == 4


@given(start=st.integers(0, 50), count=st.integers(1, 5), size=st.integers(1, 4), world=st.sampled_from([1, 2, 3, 4]))
def test_ranks_share_one_order_without_gaps_or_repeats(start: int, count: int, size: int, world: int) -> None:
    ranks = [list(Batches(start, count=count, size=size, rank=rank, world=world)) for rank in range(world)]
    taken = [position for step in zip(*ranks, strict=True) for position in chain.from_iterable(step)]
    assert taken == list(range(start, start + count * size * world))
    assert all(len(batches) == count for batches in ranks)


def test_opening_the_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, QUICKSTART, step=None)
    for step in (1, 2, 3, 4):
        log.write(step, {"l1": 1.0 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "l')  # a process killed while it wrote
    log = MetricsLog(tmp_path, QUICKSTART, step=2)
    log.write(3, {"l1": 9.0})
    log.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == [{"step": 1, "l1": 1.0}, {"step": 2, "l1": 0.5}, {"step": 3, "l1": 9.0}]
    MetricsLog(tmp_path, QUICKSTART, step=None).close()  # no checkpoint: the run begins again
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_folder_takes_the_run_it_holds_and_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    check_folder(folder, QUICKSTART)
    assert not folder.exists()
    create_folder(folder, QUICKSTART)
    check_folder(folder, QUICKSTART)
    check_folder(folder, replace(QUICKSTART, out=folder, log_every=3, compile="off", memory="none"))
    written = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(written.replace("memory: balanced", "recompute: true"))
    check_folder(folder, QUICKSTART)
    with pytest.raises(InputError, match=r"run with seed=42, not 7"):
        check_folder(folder, replace(QUICKSTART, seed=7))
    changed = replace(QUICKSTART, data=replace(QUICKSTART.data, patch=(24, 24, 24)))
    with pytest.raises(InputError, match=r"data\.patch=\[32, 40, 32\], not \[24, 24, 24\]"):
        check_folder(folder, changed)


def test_what_a_kill_left_half_written_goes(tmp_path: Path) -> None:
    create_folder(tmp_path / "run", QUICKSTART)
    left = [tmp_path / "run" / ".metrics.jsonl.1.2.partial", tmp_path / "run" / "previews" / ".step.png.1.2.partial"]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    create_folder(tmp_path / "run", QUICKSTART)
    assert not any(path.exists() for path in left)
    assert (tmp_path / "run" / "config.yaml").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="holds files but no run"):
        check_folder(tmp_path, QUICKSTART)
    with pytest.raises(InputError, match="is a file"):
        check_folder(tmp_path / "thesis.tex", QUICKSTART)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not readable YAML"):
        check_folder(tmp_path / "run", QUICKSTART)
    with pytest.raises(InputError, match="cannot be written"):
        create_folder(tmp_path / "thesis.tex" / "below", QUICKSTART)


def test_the_average_follows_the_weights_and_steps_aside() -> None:
    module = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(0.0)
    average = ExponentialMovingAverage(module, decay=0.9)
    with torch.no_grad():
        module.weight.fill_(1.0)
    average.update(1_000)
    with average.in_place():
        assert module.weight.item() == pytest.approx(0.1)
    assert module.weight.item() == 1.0
    early = ExponentialMovingAverage(module, decay=0.999)
    with torch.no_grad():
        module.weight.fill_(2.0)
    early.update(0)
    assert early.averages["weight"].item() == pytest.approx(1.9)


def test_frozen_networks_pass_gradients_on_and_take_none() -> None:
    network, x = nn.Linear(3, 1), torch.ones(2, 3, requires_grad=True)
    with frozen(network):
        network(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None and p.requires_grad for p in network.parameters())

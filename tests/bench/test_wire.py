"""What is sent in a step is what each strategy has to send, counted among real processes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.wire import A_NODE, CHANNELS, WORLD, Job, Trace, count, padded
from decovae.models.flow_unet import FlowUNetConfig
from decovae.training.presets import FLOW_PRESETS, QUICKSTART

FLOAT, BFLOAT = 4, 2


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    loss = replace(QUICKSTART.loss, adversarial_warmup=0, perceptual=0.0)
    vae = replace(QUICKSTART, data=replace(QUICKSTART.data, patch=(24, 24, 24)), loss=loss)
    model = FlowUNetConfig(channels=(16, 32), attention=(False, True), residual_blocks=1, head_channels=16, groups=8)
    flow = replace(FLOW_PRESETS["quickstart"][1], model=model)
    jobs = {
        "ddp": Job(vae, "ddp", "fp32"),
        "fsdp": Job(vae, "fsdp", "fp32"),
        "hsdp": Job(vae, "hsdp", "fp32"),
        "hsdp-bf16": Job(vae, "hsdp", "bf16"),
        "flow": Job(flow, "fsdp", "fp32"),
    }
    return dict(zip(jobs, count(list(jobs.values())), strict=True))


def size(trace: Trace, what: str) -> int:
    """Bytes of weights or gradients."""
    return sum(event.size for event in trace.events if event.what == what and event.sharding)


def test_padding_is_of_the_first_dimension() -> None:
    assert padded([[5, 3], [8]], 1) == 23
    assert padded([[5, 3], [8]], 4) == 8 * 3 + 8
    assert padded([[1, 100]], 64) == 6400


def test_ddp_reduces_every_gradient_once_and_gathers_nothing(traces: dict[str, Trace]) -> None:
    trace = traces["ddp"]
    assert size(trace, "gather") == size(trace, "scatter") == 0
    assert size(trace, "reduce") == FLOAT * trace.parameters


@pytest.mark.parametrize("name", ["fsdp", "flow"])
def test_fsdp_scatters_every_gradient_once_among_all(traces: dict[str, Trace], name: str) -> None:
    trace = traces[name]
    whole = FLOAT * padded(trace.shapes, WORLD)
    assert size(trace, "scatter") == whole
    assert size(trace, "reduce") == 0
    assert size(trace, "gather") >= whole
    assert {event.scope for event in trace.events} == {"world"}


def test_hsdp_scatters_in_a_node_and_reduces_a_share_across(traces: dict[str, Trace]) -> None:
    trace = traces["hsdp"]
    whole = FLOAT * padded(trace.shapes, A_NODE)
    assert size(trace, "scatter") == whole
    assert size(trace, "reduce") == whole / A_NODE
    scopes: dict[str, set[str]] = {}
    for event in trace.events:
        if event.sharding:
            scopes.setdefault(event.what, set()).add(event.scope)
    assert scopes == {"gather": {"node"}, "scatter": {"node"}, "reduce": {"across"}}


def test_weights_travel_in_bf16_and_gradients_in_float32(traces: dict[str, Trace]) -> None:
    assert FLOAT * size(traces["hsdp-bf16"], "gather") == BFLOAT * size(traces["hsdp"], "gather")
    assert size(traces["hsdp-bf16"], "scatter") == size(traces["hsdp"], "scatter")


def test_every_gather_is_waited_for_and_every_backward_settles(traces: dict[str, Trace]) -> None:
    for name, trace in traces.items():
        waiting = 0
        for event in trace.events:
            waiting += event.what == "gather" and event.sharding
            waiting -= event.what == "needed"
            assert waiting >= 0
        assert waiting == 0
        assert sum(event.what == "settled" for event in trace.events) == (1 if name == "flow" else 2)


def test_all_strategies_compute_the_same(traces: dict[str, Trace]) -> None:
    assert traces["ddp"].flops == traces["fsdp"].flops == traces["hsdp"].flops > 0
    assert traces["ddp"].shapes == traces["fsdp"].shapes == traces["hsdp"].shapes


def test_what_is_waited_for_at_once_is_small(traces: dict[str, Trace]) -> None:
    """Moments of the decorrelation, norms, and the agreement of the loop: numbers, not tensors."""
    for trace in traces.values():
        at_once = [event for event in trace.events if event.what in ("gather", "reduce") and not event.sharding]
        assert at_once
        assert max(event.size for event in at_once) <= 16 * FLOAT * WORLD * CHANNELS**2
    moments = [e for e in traces["ddp"].events if e.what == "gather" and not e.sharding]
    assert moments, "the moments of μ are over all processes"

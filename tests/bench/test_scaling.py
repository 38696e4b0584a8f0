"""Messages on links take the time that they must, and nothing that was reckoned is called measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import scaling
from bench.campaign.predict import RTX_3090
from bench.readme import BLOCKS, Results
from bench.scaling import CLUSTERS, SHARE, STRATEGIES, SUBJECTS, Cluster, on, seconds, sent, sent_by_node, timeline
from bench.wire import A_NODE, WORLD, Event, Trace
from decovae.training.config import Strategy
from tests.bench.made_up import GPU, campaign, counted, measured

PAIR = Cluster("a pair", RTX_3090, 2, 1, inside=1e9, network=1e6, inside_start=0.0, network_start=0.0)
FOUR = Cluster("two pairs", RTX_3090, 2, 2, inside=1e9, network=1e6, inside_start=0.0, network_start=0.0)
PROFILE = {"flops_floor": 71 * 10**9, "matrix_dtype": "bfloat16"}
"""A millisecond on an RTX 3090."""


def made(*events: Event, strategy: Strategy = "ddp", flops: int = 1000) -> Trace:
    return Trace(strategy, "bf16", [[64, 10]], list(events), flops)


def reduced(at: int, size: int) -> Event:
    return Event("reduce", at, size, sharding=True)


def test_without_messages_nothing_is_lost() -> None:
    assert timeline(PAIR, made(), 2.0).efficiency == 1.0


def test_a_gradient_travels_while_computing_goes_on() -> None:
    settled = Event("settled", 1000)
    hidden = timeline(PAIR, made(reduced(500, 400_000), settled), 1.0)
    assert hidden.total == pytest.approx(1.0), "0.4 s of message behind 0.5 s of computing"
    late = timeline(PAIR, made(reduced(900, 400_000), settled), 1.0)
    assert late.gradients == pytest.approx(0.3)
    queued = timeline(PAIR, made(reduced(500, 400_000), reduced(600, 400_000), settled), 1.0)
    assert queued.gradients == pytest.approx(0.3), "the second message waits for the first"


def test_computing_waits_for_what_a_loss_exchanges() -> None:
    line = timeline(PAIR, made(Event("reduce", 100, 400_000)), 1.0)
    assert line.others == pytest.approx(0.4)
    assert line.total == pytest.approx(1.4)


def test_computing_waits_for_the_gather_that_it_needs_and_no_other() -> None:
    first, second = (Event("gather", 0, 400_000, sharding=True) for _ in range(2))
    needed = [Event("needed", 0), Event("needed", 500)]
    line = timeline(PAIR, made(first, second, *needed, strategy="fsdp"), 1.0)
    assert line.weights == pytest.approx(0.2), "the second arrives while the first is computed with"


def test_a_ring_sends_what_a_ring_sends() -> None:
    assert sent(FOUR, Event("gather", 0, 1000)) == 750
    assert sent(FOUR, Event("reduce", 0, 1000)) == 1500
    assert sent(FOUR, Event("scatter", 0, 1000, "node")) == 500
    assert sent_by_node(FOUR, Event("scatter", 0, 1000, "node")) == 0
    assert sent_by_node(FOUR, Event("reduce", 0, 1000)) == 1500
    assert sent_by_node(FOUR, Event("reduce", 0, 500, "across")) == 1000, "a ring for each of its processes"


def test_hsdp_sends_less_over_the_network_than_ddp_and_fsdp() -> None:
    size = 10**6
    ddp = [reduced(0, size)]
    fsdp = [Event(what, 0, size, sharding=True) for what in ("gather", "gather", "scatter")]
    hsdp = [replace(event, scope="node") for event in fsdp] + [Event("reduce", 0, size // 2, "across", True)]
    network = [sum(sent_by_node(FOUR, event) for event in events) for events in (ddp, fsdp, hsdp)]
    assert network[2] < network[0] < network[1]


def test_a_slower_network_is_never_faster() -> None:
    events = (reduced(500, 10**9), Event("settled", 900))
    for cluster in CLUSTERS:
        slow = replace(cluster, network=cluster.network / 10, network_start=10 * cluster.network_start)
        assert seconds(slow, events[0]) > seconds(cluster, events[0])
        assert timeline(slow, made(*events), 1.0).efficiency <= timeline(cluster, made(*events), 1.0).efficiency


def test_accumulating_spreads_what_is_waited_for() -> None:
    line = timeline(PAIR, made(reduced(900, 400_000), Event("settled", 1000)), 1.0)
    assert scaling.accumulating(line, 1) == pytest.approx(line.efficiency)
    assert scaling.accumulating(line, 10) == pytest.approx(10 / 10.3)


def test_one_node_needs_no_network() -> None:
    alone = replace(FOUR, nodes=1, network=1e-9, network_start=1e9)
    assert seconds(alone, reduced(0, 1000)) < 1e-3


def test_weights_are_divided_anew_among_another_number_of_processes() -> None:
    gather, share = Event("gather", 0, 640, "node", True), Event("reduce", 0, 640 // A_NODE, "across", True)
    cluster = replace(FOUR, gpus=8)
    whole, part = on(cluster, made(gather, share, strategy="hsdp"))
    assert whole.size == 640
    assert part.size == 640 // 8
    padded = on(replace(FOUR, nodes=100), made(replace(gather, scope="world"), strategy="fsdp"))
    assert padded[0].size == 640 * 200 / 64, "200 processes divide a first dimension of 64 into as many parts"
    moments = on(cluster, made(Event("gather", 0, 100 * WORLD)))
    assert moments[0].size == 100 * cluster.world


@pytest.fixture
def results(tmp_path: Path) -> Results:
    folder = tmp_path / "campaign-predicted"
    folder.mkdir()
    rows = [
        counted("ours", subject=subject.row, shape=subject.shape, dtype="bfloat16", **PROFILE) for subject in SUBJECTS
    ]
    (folder / "predicted.json").write_text(json.dumps({"rows": [row.as_dict() for row in rows]}), encoding="utf-8")
    return Results(tmp_path, tmp_path / "README.md")


def test_a_step_is_predicted_until_it_is_measured(results: Results) -> None:
    found = scaling.step_time(SUBJECTS[0], RTX_3090, results.folder)
    assert found.measured is None
    assert found.seconds == pytest.approx(1e-3 / SHARE)
    row = measured("ours-balanced", 0.5, subject=SUBJECTS[0].row, shape=SUBJECTS[0].shape, dtype="bfloat16", **PROFILE)
    for name, card in (("campaign-other", "Card"), ("campaign-card", "NVIDIA GeForce RTX 3090")):
        (results.folder / name).mkdir()
        made_up = campaign(row, scale="gpu", machine={**GPU, "gpu": card})
        made_up.save(results.folder / name / "campaign.json")
    found = scaling.step_time(SUBJECTS[0], RTX_3090, results.folder)
    assert (found.seconds, found.measured) == (0.5, "campaign-card")
    assert scaling.step_time(SUBJECTS[1], RTX_3090, results.folder).measured is None


def test_the_file_and_its_block(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(jobs: Any) -> list[Trace]:
        events = [reduced(500, 10**9), Event("settled", 900)]
        return [Trace(job.strategy, job.precision, [[64, 10]], events, 1000) for job in jobs]

    monkeypatch.setattr(scaling, "count", count)
    monkeypatch.setattr(scaling, "RESULTS", results.folder)
    monkeypatch.setattr(scaling, "step_time", lambda *_: scaling.StepTime(0.5, 0.25, None))
    scaling.main(["--out", str(results.folder / scaling.NAME)])
    monkeypatch.setattr(scaling, "count", None)
    before = (results.folder / scaling.NAME).read_text(encoding="utf-8")
    scaling.main(["--out", str(results.folder / scaling.NAME), "--keep-counts"])
    assert (results.folder / scaling.NAME).read_text(encoding="utf-8") == before
    found = json.loads((results.folder / scaling.NAME).read_text(encoding="utf-8"))
    assert len(found["rows"]) == len(CLUSTERS) * len(SUBJECTS) * len(STRATEGIES)
    assert all(0 < row["efficiency_at_the_published_rate"] <= row["efficiency"] <= 1 for row in found["rows"])
    assert {entry["precision"] for entry in found["counted"]} == {"fp32", "bf16"}
    text = BLOCKS["scaling"](results)
    assert "predicted, not measured" in text
    assert all(cluster.name in text for cluster in CLUSTERS)
    assert all(assumption in text for assumption in found["assumptions"])


def test_the_cards_steps_are_counted() -> None:
    """On what is in the repository."""
    for subject in SUBJECTS:
        for cluster in CLUSTERS:
            found = scaling.step_time(subject, cluster.card)
            assert 0 < found.least <= found.seconds

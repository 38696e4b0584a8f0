"""How training should scale, without a cluster: its messages are counted, and their time is reckoned.

python -m bench.scaling [--out FILE] [--keep-counts]

`bench.wire` counts what processes send each other in a step of the paper's autoencoder and of its flow. Here these
messages are put on the links of a few clusters. While weights and gradients travel, computing goes on, as on a GPU, and
waits where it needs what has not arrived; a link carries one message after another. Efficiency is the time of a step of
one process over that of the same step among many, each with a batch of its own. The former is measured where a campaign
on that card is in bench/results/; else it is the step's arithmetic at `SHARE` of the card's published rate.

Not in it: loading data, validation, processes that are not equally fast, what else is on the network, and computing
that slows down beside messages. Takes a minute or two.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import units
from bench.campaign import cases, predict
from bench.campaign.predict import H200, RTX_3090, Card
from bench.campaign.record import FILE, Campaign
from bench.campaign.rows import Row
from bench.wire import A_NODE, WORLD, Event, Job, Precision, Trace, count, padded
from decovae.files import write_text
from decovae.machine import describe
from decovae.training.config import FlowConfig, Strategy, VAEConfig
from decovae.training.presets import FLOW_PRESETS, PAPER

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
NAME = "scaling.json"

STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp", "hsdp")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")

SHARE = 0.4
"""Of the card's published rate, that a step is assumed to reach where it was not measured."""

STATE = 16
"""Bytes a parameter between two steps: weight, gradient and both of AdamW's moments, in float32."""

BATCHES = 8
"""Accumulated in a step, where it is told what that helps."""

COUNTS = "scaling-counts.json"

PATCH = (24, 24, 24)
"""The smallest patch that both discriminators take."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs.

    Attributes:
        name: as people call it.
        card: every GPU's.
        nodes: how many.
        gpus: of a node.
        inside: bytes a second that a GPU sends to another of its node.
        network: bytes a second that a node sends to others.
        inside_start: seconds before a message inside arrives, however short.
        network_start: the same between nodes.
    """

    name: str
    card: Card
    nodes: int
    gpus: int
    inside: float
    network: float
    inside_start: float
    network_start: float

    @property
    def world(self) -> int:
        """Processes."""
        return self.nodes * self.gpus


def _consumer(nodes: int, gpus: int, gigabits: float) -> Cluster:
    """RTX 3090s, which reach each other through their machine's memory, and other machines by TCP."""
    name = f"{nodes}×{gpus} RTX 3090, {gigabits:g} Gb/s"
    return Cluster(name, RTX_3090, nodes, gpus, 8e9, 0.9 * gigabits / 8 * 1e9, 15e-6, 40e-6)


CLUSTERS = (
    _consumer(2, 4, 10),
    _consumer(2, 4, 25),
    _consumer(8, 8, 25),
    Cluster("8×8 H200, 400 Gb/s a GPU", H200, 8, 8, 360e9, 8 * 0.9 * 50e9, 4e-6, 8e-6),
)

ASSUMPTIONS = (
    "RTX 3090s exchange 8 GB/s within a node, through its memory over PCIe 4.0; H200s 360 GB/s by NVLink",
    "a network reaches 90 % of its rate, and a node of RTX 3090s has one link",
    "messages go round in rings, sums up and down a tree where that is faster; a hop adds 15 µs within a node of RTX "
    "3090s and 40 µs between such (TCP), 4 and 8 µs among H200s",
    "weights travel in bfloat16, gradients in float32",
)


@dataclass(frozen=True)
class Subject:
    """A training whose step is reckoned.

    Attributes:
        name: as people call it.
        config: on which messages are counted.
        row: what a campaign calls the step.
        shape: of its batch there.
    """

    name: str
    config: VAEConfig | FlowConfig
    row: str
    shape: str

    @property
    def samples(self) -> int:
        """Of the batch of a process."""
        return int(self.shape.partition("x")[0])


SUBJECTS = (
    Subject(
        "autoencoder", replace(PAPER, data=replace(PAPER.data, patch=PATCH)), "whole training step", "2x1x96x96x96"
    ),
    Subject("flow", FLOW_PRESETS["paper"][1], "training step of the flow", "4x4x32x64x32"),
)


def shards(strategy: Strategy, world: int, node: int) -> int:
    """Processes that divide one copy of the weights."""
    return {"ddp": 1, "fsdp": world, "hsdp": node}[strategy]


def on(cluster: Cluster, trace: Trace) -> list[Event]:
    """The events of a step as they are among the cluster's processes: they divide weights into other parts."""
    before, after = shards(trace.strategy, WORLD, A_NODE), shards(trace.strategy, cluster.world, cluster.gpus)
    longer = padded(trace.shapes, after) / padded(trace.shapes, before)
    made = []
    for event in trace.events:
        if event.sharding and event.what == "reduce":
            size = event.size * longer * before / after  # a process reduces its part
        elif event.sharding:
            size = event.size * longer
        elif event.what == "gather":
            size = event.size * cluster.world / WORLD  # a few numbers of each process
        else:
            size = event.size
        made.append(replace(event, size=round(size)))
    return made


def members(cluster: Cluster, event: Event) -> int:
    """Processes that a message goes among."""
    return {"world": cluster.world, "node": cluster.gpus, "across": cluster.nodes}[event.scope]


def sent(cluster: Cluster, event: Event) -> float:
    """Bytes that each process sends for a message that goes round in a ring."""
    among = members(cluster, event)
    return (2 if event.what == "reduce" else 1) * event.size * (among - 1) / among


def sent_by_node(cluster: Cluster, event: Event) -> float:
    """Bytes that leave a node: a ring over all processes leaves it once, and across nodes each GPU has a ring."""
    if event.scope == "node" or cluster.nodes == 1:
        return 0.0
    return sent(cluster, event) * (cluster.gpus if event.scope == "across" else 1)


def seconds(cluster: Cluster, event: Event) -> float:
    """How long a message takes on links of its own."""
    networked = event.scope != "node" and cluster.nodes > 1
    start = cluster.network_start if networked else cluster.inside_start
    hops = (2 if event.what == "reduce" else 1) * (members(cluster, event) - 1)
    inside = sent(cluster, event) / cluster.inside if event.scope != "across" else 0.0
    ring = max(inside, sent_by_node(cluster, event) / cluster.network) + hops * start
    if event.what != "reduce" or event.scope != "world":
        return ring
    # Up and down: along the GPUs of a node, and in a tree of nodes, in which none sends more than twice the whole.
    bandwidth = min(cluster.inside, cluster.network) if networked else cluster.inside
    depth = math.ceil(math.log2(cluster.nodes)) * cluster.network_start + (cluster.gpus - 1) * cluster.inside_start
    return min(ring, 2 * (event.size / bandwidth + depth))


@dataclass(frozen=True)
class Timeline:
    """Where the time of a step goes, in seconds.

    Attributes:
        computing: without any messages.
        weights: waiting for weights that are gathered.
        gradients: waiting for gradients behind a backward.
        others: waiting for what losses, norms and the loop exchange.
    """

    computing: float
    weights: float
    gradients: float
    others: float

    @property
    def total(self) -> float:
        return self.computing + self.weights + self.gradients + self.others

    @property
    def efficiency(self) -> float:
        """Of as much computing without messages."""
        return self.computing / self.total


def timeline(cluster: Cluster, trace: Trace, computing: float) -> Timeline:
    """A step of so many seconds of computing, with its messages on the cluster's links."""
    now, done = 0.0, 0
    free = {"inside": 0.0, "network": 0.0}
    gathered: deque[float] = deque()
    scattered = reduced = 0.0
    waits = {"weights": 0.0, "gradients": 0.0, "others": 0.0}

    def wait(until: float, what: str) -> None:
        nonlocal now
        waits[what] += max(until - now, 0.0)
        now = max(until, now)

    for event in on(cluster, trace):
        now += computing * (event.flops - done) / trace.flops
        done = event.flops
        if event.what == "needed":
            wait(gathered.popleft(), "weights")
        elif event.what == "settled":
            wait(max(scattered, reduced), "gradients")
        else:
            links = {"world": ("inside", "network"), "node": ("inside",), "across": ("network",)}[event.scope]
            ready = max(now, scattered) if event.what == "reduce" and event.sharding else now
            end = max(ready, *(free[link] for link in links)) + seconds(cluster, event)
            free |= dict.fromkeys(links, end)
            if not event.sharding:
                wait(end, "others")
            elif event.what == "gather":
                gathered.append(end)
            elif event.what == "scatter":
                scattered = end
            else:
                reduced = end
    return Timeline(computing, **waits)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of one process.

    Attributes:
        seconds: of it.
        least: its arithmetic at the card's published rate.
        measured: the campaign that they were measured in; None if they are predicted.
    """

    seconds: float
    least: float
    measured: str | None


def step_time(subject: Subject, card: Card, results: Path = RESULTS) -> StepTime:
    """What a step takes on a card, measured or predicted.

    Raises:
        FileNotFoundError: the step's arithmetic has not been counted.
    """
    counted = predict.load(results / predict.FOLDER.name)
    if counted is None:
        raise FileNotFoundError(f"{results / predict.FOLDER.name}: run `python -m bench.campaign predict` first.")
    group = _rows(subject, [Row.from_dict(row) for row in counted["rows"]])
    least, _ = predict.least_seconds(group[0].extra_info or {}, card)
    for path in sorted(results.glob(f"campaign-*/{FILE}")):
        campaign = Campaign.load(path)
        default = cases.default(_rows(subject, campaign.rows))
        median = cases.median(default) if default is not None else None
        if median is not None and card.name in str(campaign.machine.get("gpu")):
            return StepTime(median, least, path.parent.name)
    return StepTime(least / SHARE, least, None)


def _rows(subject: Subject, rows: Sequence[Row]) -> list[Row]:
    found = []
    for row in rows:
        case = cases.of(row)
        if case is not None and (case.subject, case.shape, case.dtype) == (subject.row, subject.shape, "bfloat16"):
            found.append(row)
    return found


def messages(trace: Trace) -> list[dict[str, Any]]:
    """What was counted, summed by kind: how many messages, and bytes of the whole tensors."""
    sums: dict[tuple[str, str, bool], list[int]] = {}
    for event in trace.events:
        if event.what not in ("needed", "settled"):
            entry = sums.setdefault((event.what, event.scope, event.sharding), [0, 0])
            entry[0] += 1
            entry[1] += event.size
    return [
        {"what": what, "scope": scope, "sharding": sharding, "messages": number, "bytes": size}
        for (what, scope, sharding), (number, size) in sums.items()
    ]


def accumulating(line: Timeline, batches: int) -> float:
    """Efficiency of a step over so many batches, of which the last one's gradients are sent."""
    computing = batches * line.computing
    return computing / (computing - line.computing + line.total)


def reckoned(subject: Subject, trace: Trace, cluster: Cluster, one: StepTime) -> dict[str, Any]:
    """A line of the result: a training, divided one way, on one cluster."""
    line = timeline(cluster, trace, one.seconds)
    fast = timeline(cluster, trace, one.least)
    parts = shards(trace.strategy, cluster.world, cluster.gpus)
    events = [event for event in on(cluster, trace) if event.what not in ("needed", "settled")]
    return {
        "subject": subject.name,
        "cluster": cluster.name,
        "card": cluster.card.name,
        "strategy": trace.strategy,
        "precision": trace.precision,
        "one_process_seconds": one.seconds,
        "measured": one.measured,
        "seconds": line.total,
        "messages_seconds": sum(seconds(cluster, event) for event in events),
        "waits": {"weights": line.weights, "gradients": line.gradients, "others": line.others},
        "efficiency": line.efficiency,
        "efficiency_at_the_published_rate": fast.efficiency,
        f"efficiency_of_{BATCHES}_batches": accumulating(line, BATCHES),
        "samples_per_second": cluster.world * subject.samples / line.total,
        "sent_by_process": round(sum(sent(cluster, event) for event in events)),
        "sent_by_node": round(sum(sent_by_node(cluster, event) for event in events)),
        "state_bytes": STATE * padded(trace.shapes, parts) // parts,
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Predicted efficiencies, a line a cluster, and what is sent, a line a strategy."""
    subjects = list(dict.fromkeys(row["subject"] for row in result["rows"]))
    found = {(row["subject"], row["cluster"], row["strategy"]): row for row in result["rows"]}
    columns = [(subject, strategy) for subject in subjects for strategy in STRATEGIES]
    lines = [["predicted efficiency", *(f"{subject}, {strategy}" for subject, strategy in columns)]]
    lines.append(["---", *["---:"] * len(columns)])
    for cluster in dict.fromkeys(row["cluster"] for row in result["rows"]):
        cells = []
        for subject, strategy in columns:
            row = found[subject, cluster, strategy]
            cells.append(f"{row['efficiency']:.0%} ({row['efficiency_at_the_published_rate']:.0%})")
        lines.append([cluster, *cells])
    first = result["rows"][0]["cluster"]
    sizes = [[f"sent in a step, {first}", *(f"{subject}, {strategy}" for subject, strategy in columns)]]
    sizes.append(["---", *["---:"] * len(columns)])
    texts: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
        ("by a process", lambda row: units.size(row["sent_by_process"])),
        ("by a node, over the network", lambda row: units.size(row["sent_by_node"])),
        ("time on the links", lambda row: units.seconds(row["messages_seconds"])),
        ("of it waited for", lambda row: units.seconds(sum(row["waits"].values()))),
        ("weights, gradients and moments that a process keeps", lambda row: units.size(row["state_bytes"])),
    )
    for title, text in texts:
        sizes.append([title, *(text(found[subject, first, strategy]) for subject, strategy in columns)])
    return "\n\n".join("\n".join(f"| {' | '.join(line)} |" for line in table) for table in (lines, sizes))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / NAME)
    parser.add_argument("--keep-counts", action="store_true", help="take the messages that were counted last time")
    arguments = parser.parse_args(argv)
    # In float32 what is gathered is twice as long: to count that once is enough.
    of = [(SUBJECTS[0], precision, strategy) for precision in PRECISIONS for strategy in STRATEGIES]
    of += [(subject, "bf16", strategy) for subject in SUBJECTS[1:] for strategy in STRATEGIES]
    counts = arguments.out.with_name(COUNTS)
    if arguments.keep_counts:
        traces = [Trace.from_dict(trace) for trace in json.loads(counts.read_text(encoding="utf-8"))]
    else:
        traces = count([Job(subject.config, strategy, precision) for subject, precision, strategy in of])
        write_text(counts, json.dumps([trace.as_dict() for trace in traces]) + "\n")
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": describe(),
        "processes_counted": {"world": WORLD, "node": A_NODE},
        "assumptions": [*ASSUMPTIONS, f"a step that was not measured takes its arithmetic at {SHARE:.0%} of the rate"],
        "share": SHARE,
        "clusters": [asdict(cluster) for cluster in CLUSTERS],
        "counted": [
            {
                "subject": subject.name,
                "strategy": trace.strategy,
                "precision": trace.precision,
                "parameters": trace.parameters,
                "messages": messages(trace),
            }
            for (subject, _, _), trace in zip(of, traces, strict=True)
        ],
        "rows": [
            reckoned(subject, trace, cluster, step_time(subject, cluster.card))
            for cluster in CLUSTERS
            for (subject, _, _), trace in zip(of, traces, strict=True)
            if trace.precision == "bf16"
        ],
    }
    write_text(arguments.out, json.dumps(result, indent=1) + "\n")
    print(markdown(result))


if __name__ == "__main__":
    main()

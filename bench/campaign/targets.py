"""Targets of speed and memory as data, and what a campaign says of each: met, missed or not measured.

A target compares rows of one case. Where it asks for a factor over peers, the factor is over the fastest (or smallest)
of all peers that it names; it is met only if every one of them was measured, so that a peer that failed cannot make
this project look good, and missed as soon as one of them shows it. Where several rows of this project may do it, the
fastest counts and is named, and so is each that has no figure.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench import data_tables, units
from bench.campaign import cases
from bench.campaign.rows import Row

RESULTS = Path(__file__).resolve().parents[1] / "results"

Outcome = Literal["met", "missed", "not measured"]
Device = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class Quantity:
    """A number of a row, and how it is written.

    Attributes:
        of: the row's number; None where it has none.
        text: the number with its unit.
    """

    of: Callable[[Row], float | None]
    text: Callable[[float], str]


def _extra_share_of_input(row: Row) -> float | None:
    extra, info = cases.measured(row, "peak_extra_bytes"), row.extra_info or {}
    # A loss reads μ once forward; backward reads it twice and writes a gradient of its size.
    return (
        None if extra is None else extra / (info["bytes_moved_floor"] / (3 if "backward" in info["direction"] else 1))
    )


MEDIAN = Quantity(cases.median, units.seconds)
SHARE = Quantity(cases.share_of_floor, units.percent)
PEAK = Quantity(lambda row: cases.measured(row, "peak_bytes"), units.size)
SAVED = Quantity(lambda row: cases.measured(row, "saved_bytes"), units.size)
NO_ROWS_TIME = Quantity(lambda row: None, units.seconds)
NO_ROWS_COUNT = Quantity(lambda row: None, units.operations)
NO_ROWS_FACTOR = Quantity(lambda row: None, units.times)
NO_ROWS_SHARE = Quantity(lambda row: None, units.percent)
NO_ROWS_SIZE = Quantity(lambda row: None, units.size)
EXTRA_SHARE = Quantity(_extra_share_of_input, units.percent)


@dataclass(frozen=True)
class Elsewhere:
    """A figure in another file of results.

    Attributes:
        file: its name in bench/results/.
        of: the figure in its content; None if it says that it has none.
    """

    file: str
    of: Callable[[Any], float | None]

    def figure(self) -> float | None:
        """The figure; None if there is no such file, or it has none."""
        path = RESULTS / self.file
        return self.of(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


@dataclass(frozen=True)
class Target:
    """One bound.

    Attributes:
        name: what is bounded, in words.
        on: the device that it is for.
        case: what the rows state, of `cases.Case`; all cases that agree have to keep the bound.
        ours: this project's row, or a pattern of rows of which the fastest counts.
        bound: of the figure.
        least: whether the figure has to be at least, not at most, the bound.
        peers: patterns of the rows that ours is compared with; without them ours has to keep the bound by itself.
        quantity: what is compared. Over peers the figure is a factor: theirs over ours where it has to be at least the
            bound, ours over theirs where it may be at most that.
        elsewhere: a figure that does not come from a campaign's rows, from a file in bench/results/.
        exact: whether that is the figure itself, not a prediction of what will be measured.
    """

    name: str
    on: Device
    case: Mapping[str, str]
    ours: str
    bound: float
    least: bool
    peers: Sequence[str] = ()
    quantity: Quantity = MEDIAN
    elsewhere: Elsewhere | None = None
    exact: bool = False

    def text(self, figure: float) -> str:
        """A figure of this target, or its bound, with its unit."""
        if self.peers:
            return units.times(figure) if self.least else units.percent(figure)
        return self.quantity.text(figure)

    @property
    def bound_text(self) -> str:
        bound = f"{self.bound:g}×" if self.peers and self.least else self.text(self.bound)
        return f"{'≥' if self.least else '≤'} {bound}"

    def holds(self, figure: float) -> bool:
        return figure >= self.bound if self.least else figure <= self.bound


@dataclass(frozen=True)
class Verdict:
    """What is known of a target.

    Attributes:
        target: which.
        outcome: met, missed or not measured.
        figure: the worst of all cases, with its unit; None where there is none.
        behind: the rows or the file behind the figure, or why there is none.
        predicted: a figure that stands for what was not measured.
        would: whether that would be met.
    """

    target: Target
    outcome: Outcome
    figure: str | None
    behind: str
    predicted: str | None = None
    would: Literal["met", "missed"] | None = None


def _counted(name: str, shape: Sequence[int], key: str, over: Sequence[str] = ()) -> Elsewhere:
    """A count of `bench.memory`, or its share of the smallest of the same counts of other implementations."""

    def figure(content: Any) -> float | None:
        found = {row["implementation"]: row.get(key) for row in content["rows"] if row["shape"] == list(shape)}
        if any(found.get(needed) is None for needed in (name, *over)):
            return None
        return float(found[name] / min(found[peer] for peer in over) if over else found[name])

    return Elsewhere("memory.json", figure)


def _whole_step(shape: Sequence[int]) -> Elsewhere:
    """The predicted peak of a whole training step, by `python -m bench.campaign predict`."""

    def figure(content: Any) -> float | None:
        return next((step["peak"]["balanced"] for step in content["full_steps"] if step["shape"] == list(shape)), None)

    return Elsewhere("campaign-predicted/predicted.json", figure)


def _chain_seconds(content: Any) -> float | None:
    """The longest chain, if its seconds are a measure of speed."""
    return (
        None if "no measure of speed" in content.get("note", "") else max(c["chain_seconds"] for c in content["chains"])
    )


_PATCHES, _WHOLE = (2, 1, 96, 96, 96), (1, 1, 128, 256, 128)
_AUTOENCODER = {"subject": "training step of the autoencoder"}
_PAPER_PATCHES = {**_AUTOENCODER, "shape": "2x1x96x96x96"}
_FULL_STEP = {"subject": "whole training step"}
_VAD = {"subject": "VAD", "direction": "forward+backward"}
_NORM_ACT = {
    "suite": "norm + act",
    "shape": "2x64x96x96x96",
    "dtype": "bfloat16",
    "direction": "forward+backward",
    "layout": "channels-last",  # which training runs in
}
_DECODING = {"subject": "decoding", "shape": "1x4x32x64x32"}
_VOLUME = {"subject": "a volume: 30 steps and decoding"}
_EAGER_ROWS, _COMPILED_ROWS = ("*-rows-eager",), ("*-rows-compiled",)
_MONAI_EAGER = ("monai-*eager",)  # with its options: norms that write float16, weights laid out channels-last

TARGETS = (
    Target("VAD at the training shape, eager", "gpu", {**_VAD, "shape": "2x4x24x24x24"}, "ours", 8, True, _EAGER_ROWS),
    Target(
        "VAD at the training shape, compiled", "gpu", {**_VAD, "shape": "2x4x24x24x24"}, "ours", 2, True, _COMPILED_ROWS
    ),
    Target(
        "VAD at the largest latent, share of the copy bandwidth",
        "gpu",
        {**_VAD, "shape": "1x4x384x384x384"},
        "ours",
        0.85,
        True,
        quantity=SHARE,
    ),
    Target(
        "VAD at the largest latent, extra memory over μ",
        "gpu",
        {**_VAD, "shape": "1x4x384x384x384"},
        "ours",
        0.01,
        False,
        quantity=EXTRA_SHARE,
    ),
    Target(
        "norm + act, channels-last, share of the copy bandwidth", "gpu", _NORM_ACT, "ours", 0.8, True, quantity=SHARE
    ),
    Target("norm + act, channels-last, eager", "gpu", _NORM_ACT, "ours", 2.5, True, ("plain-eager",)),
    Target("norm + act, channels-last, compiled", "gpu", _NORM_ACT, "ours", 1.3, True, ("plain-compiled",)),
    Target(
        "saved for backward, two 96³ patches, balanced",
        "gpu",
        _PAPER_PATCHES,
        "ours-balanced",
        3.5e9,
        False,
        quantity=SAVED,
        elsewhere=_counted("ours, balanced", _PATCHES, "saved"),
        exact=True,
    ),
    Target(
        "saved for backward, two 96³ patches, tight",
        "gpu",
        _PAPER_PATCHES,
        "ours-tight",
        2.1e9,
        False,
        quantity=SAVED,
        elsewhere=_counted("ours, tight", _PATCHES, "saved"),
        exact=True,
    ),
    Target(
        "forward arithmetic, two 96³ patches",
        "gpu",
        {},
        "ours-balanced",
        6.45e12,
        False,
        quantity=NO_ROWS_COUNT,
        elsewhere=_counted("ours, balanced", _PATCHES, "forward"),
        exact=True,
    ),
    Target("autoencoder's training step, MONAI eager", "gpu", _PAPER_PATCHES, "ours*", 4, True, _MONAI_EAGER),
    Target(
        "autoencoder's training step, MONAI checkpointed and compiled",
        "gpu",
        _PAPER_PATCHES,
        "ours*",
        2,
        True,
        ("monai-checkpointed-compiled",),
    ),
    Target(
        "autoencoder's training step, the strongest plain torch",
        "gpu",
        _PAPER_PATCHES,
        "ours*",
        1.25,
        True,
        ("plain-*",),
    ),
    Target(
        "whole training step, two 96³ patches, peak",
        "gpu",
        {**_FULL_STEP, "shape": "2x1x96x96x96"},
        "ours-balanced-compiled",
        7e9,
        False,
        quantity=PEAK,
        elsewhere=_whole_step(_PATCHES),
    ),
    Target(
        "whole training step, a whole volume, peak",
        "gpu",
        {**_FULL_STEP, "shape": "1x1x128x256x128"},
        "ours-balanced-compiled",
        20e9,
        False,
        quantity=PEAK,
        elsewhere=_whole_step(_WHOLE),
    ),
    Target("decoding a whole latent, MONAI eager", "gpu", _DECODING, "ours*", 2, True, _MONAI_EAGER),
    Target(
        "decoding a whole latent, peak over MONAI's",
        "gpu",
        _DECODING,
        "ours",
        0.5,
        False,
        _MONAI_EAGER,
        PEAK,
        _counted("ours, balanced", (1, 4, 32, 64, 32), "peak", over=("MONAI", "MONAI, norm_float16")),
    ),
    Target("a volume of 30 steps, decoded", "gpu", _VOLUME, "ours*", 1.0, False),
    Target("a volume of 30 steps, MONAI eager", "gpu", _VOLUME, "ours*", 2, True, _MONAI_EAGER),
    Target("a volume of 30 steps, peak", "gpu", _VOLUME, "ours-compiled", 12e9, False, quantity=PEAK),
    Target(
        "flow's training step, MONAI eager",
        "gpu",
        {"subject": "training step of the flow"},
        "ours*",
        1.5,
        True,
        _MONAI_EAGER,
    ),
    Target(
        "measuring reconstructions, over decoding them",
        "gpu",
        {},
        "",
        1.3,
        False,
        quantity=NO_ROWS_FACTOR,
        elsewhere=Elsewhere("evaluation-cuda.json", lambda content: max(content["measuring_over_decoding"].values())),
        exact=True,
    ),
    Target("VAD, eager", "cpu", {**_VAD, "shape": "8x4x32x64x32", "dtype": "float32"}, "ours", 6, True, _EAGER_ROWS),
    Target(
        "VAD, compiled", "cpu", {**_VAD, "shape": "8x4x32x64x32", "dtype": "float32"}, "ours", 3, True, _COMPILED_ROWS
    ),
    Target(
        "autoencoder's training step with recomputation, MONAI eager",
        "cpu",
        {**_AUTOENCODER, "shape": "2x1x32x32x32"},
        "ours*",
        2,
        True,
        _MONAI_EAGER,
    ),
    Target(
        "from training to four samples, `quickstart`",
        "cpu",
        {},
        "",
        720,
        False,
        quantity=NO_ROWS_TIME,
        elsewhere=Elsewhere("generation-cpu.json", _chain_seconds),
        exact=True,
    ),
    Target(
        "`decovae study quickstart`",
        "cpu",
        {},
        "",
        1800,
        False,
        quantity=NO_ROWS_TIME,
        elsewhere=Elsewhere("study-quickstart-cpu.json", lambda content: content["seconds"]),
        exact=True,
    ),
    Target(
        "the training loop around a step of one weight, one process",
        "cpu",
        {},
        "",
        3e-3,
        False,
        quantity=NO_ROWS_TIME,
        elsewhere=Elsewhere("loop-cpu.json", lambda content: content["loop"]["1"]["loop"]),
        exact=True,
    ),
    Target(
        "a checkpoint of the autoencoder's training, standing still",
        "cpu",
        {},
        "",
        0.5,
        False,
        quantity=NO_ROWS_TIME,
        elsewhere=Elsewhere("loop-cpu.json", lambda content: content["checkpoint"]["blocking"]),
        exact=True,
    ),
    Target(
        "the same, of a step's time, one in 1,000 steps",
        "cpu",
        {},
        "",
        0.02,
        False,
        quantity=NO_ROWS_SHARE,
        elsewhere=Elsewhere(
            "loop-cpu.json", lambda content: max(share for _, share in content["checkpoint"]["share"].values())
        ),
        exact=True,
    ),
    Target(
        "96³ patches from a store, to be augmented on a GPU; the reference's way; warm and cold",
        "cpu",
        {},
        "",
        50,
        True,
        quantity=NO_ROWS_FACTOR,
        elsewhere=Elsewhere(data_tables.NAME, lambda content: data_tables.crops_factor(content, "reference")),
        exact=True,
    ),
    Target(
        "96³ patches from a store; MONAI's PersistentDataset of the reference's transforms; warm and cold",
        "cpu",
        {},
        "",
        4,
        True,
        quantity=NO_ROWS_FACTOR,
        elsewhere=Elsewhere(data_tables.NAME, lambda content: data_tables.crops_factor(content, "persistent")),
        exact=True,
    ),
    Target(
        "a store's size, of PersistentDataset's",
        "cpu",
        {},
        "",
        0.6,
        False,
        quantity=NO_ROWS_SHARE,
        elsewhere=Elsewhere(data_tables.NAME, data_tables.size_share),
        exact=True,
    ),
    Target(
        "preparing a volume, over loading and resampling alone",
        "cpu",
        {},
        "",
        1.2,
        False,
        quantity=NO_ROWS_FACTOR,
        elsewhere=Elsewhere(data_tables.NAME, data_tables.preparing_factor),
        exact=True,
    ),
    Target(
        "a loader's worker, 25,252 volumes over 100",
        "cpu",
        {},
        "",
        2e6,
        False,
        quantity=NO_ROWS_SIZE,
        elsewhere=Elsewhere(data_tables.NAME, data_tables.memory_growth),
        exact=True,
    ),
)


def verdicts(rows: Sequence[Row], device: Device, targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """What rows measured on a device say of its targets."""
    groups = cases.by_case(rows)
    return [verdict(target, groups) for target in targets if target.on == device]


def verdict(target: Target, groups: Mapping[cases.Case, Sequence[Row]]) -> Verdict:
    """The worst figure among a target's cases against its bound.

    Args:
        target: with the case it is of.
        groups: rows by case.
    """
    found: list[tuple[float, str]] = []
    gaps: list[str] = []
    for case, rows in groups.items():
        if not target.case or any(getattr(case, key) != value for key, value in target.case.items()):
            continue
        figure, behind, missing = _figure(target, rows)
        gaps += missing
        if figure is not None:
            found.append((figure, f"{case.title}: {behind}"))
    if not found:
        return _without_rows(target, gaps)
    figure, behind = min(found) if target.least else max(found)
    if not target.holds(figure):
        return Verdict(target, "missed", target.text(figure), behind)
    if gaps:
        return Verdict(target, "not measured", target.text(figure), f"{behind}; missing: {'; '.join(gaps)}")
    return Verdict(target, "met", target.text(figure), behind)


def _figure(target: Target, rows: Sequence[Row]) -> tuple[float | None, str, list[str]]:
    """The figure of one case, the rows behind it, and the rows that it lacks."""
    ours, lost = _numbers(target, rows, [target.ours])
    if not ours:
        return None, "", lost or [f"{target.ours} has no row"]
    own, name = min(ours)
    told = f"{name} {target.quantity.text(own)}{''.join(f' ({gap})' for gap in lost)}"
    if not target.peers:
        return own, told, []
    peers, gaps = _numbers(target, rows, target.peers)
    if not peers:
        return None, "", gaps or [f"{' or '.join(target.peers)} has no row"]
    best, peer = min(peers)
    figure = best / own if target.least else own / best
    return figure, f"{told}, {peer} {target.quantity.text(best)}", gaps


def _numbers(target: Target, rows: Sequence[Row], patterns: Sequence[str]) -> tuple[list[tuple[float, str]], list[str]]:
    """Figures of the rows whose implementation is meant, with their names, and what the others ended with."""
    numbers, gaps = [], []
    for row in rows:
        name = cases.implementation(row)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            value = target.quantity.of(row)
            if value is None:
                gaps.append(f"{name} {why(row)}")
            else:
                numbers.append((value, name))
    return numbers, gaps


def why(row: Row) -> str:
    """Why a row has no time, in a word or three."""
    if row.outcome == "skipped":
        return "does not fit" if (row.reason or "").startswith("does not fit") else "skipped"
    if row.outcome == "failed":
        return "failed"
    return "not stated" if row.outcome == "measured" else "not measured"


def _without_rows(target: Target, gaps: Sequence[str]) -> Verdict:
    figure = target.elsewhere.figure() if target.elsewhere else None
    reason = "; ".join(dict.fromkeys(gaps)) or units.DASH
    if target.elsewhere is None or figure is None:
        return Verdict(
            target, "not measured", None, target.elsewhere.file if target.exact and target.elsewhere else reason
        )
    outcome: Literal["met", "missed"] = "met" if target.holds(figure) else "missed"
    if target.exact:
        return Verdict(target, outcome, target.text(figure), target.elsewhere.file)
    return Verdict(target, "not measured", None, reason, target.text(figure), outcome)

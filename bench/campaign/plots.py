"""A campaign's pictures: the roofline, speed against peers, and memory against patch size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from bench import units
from bench.campaign import cases, predict, table
from bench.campaign.cases import MONAI, OTHERS, OURS, PLAIN, Case
from bench.campaign.record import Campaign
from bench.campaign.rows import Row
from bench.campaign.targets import why

GIB = 2**30
DPI = 100

# Okabe and Ito's colours, which differ for colour-blind eyes too; shapes differ as well.
COLOURS = {OURS: "#0072B2", PLAIN: "#E69F00", MONAI: "#D55E00", OTHERS: "#7A7A7A"}
MARKERS = {OURS: "o", PLAIN: "^", MONAI: "s", OTHERS: "D"}
CARD_COLOURS = ("#009E73", "#CC79A7")
LineStyle = Literal["-", "--", "-.", ":"]
SWEEP_STYLES: dict[str, tuple[str, LineStyle, str]] = {
    "ours-tight": ("#0072B2", "-", "o"),
    "ours-balanced": ("#56B4E9", "-", "v"),
    "plain-eager": ("#E69F00", "--", "^"),
    "monai-checkpointed": ("#CC79A7", ":", "D"),
    "monai-eager": ("#D55E00", "-.", "s"),
}
UNSTYLED: tuple[str, LineStyle, str] = ("#7A7A7A", "-", "x")


@dataclass(frozen=True)
class Roof:
    """A machine's two ceilings.

    Attributes:
        label: whose.
        bytes_per_second: of a copy.
        flops_per_second: of matrix products.
        colour: of its line.
    """

    label: str
    bytes_per_second: float
    flops_per_second: float
    colour: str

    def attainable(self, intensity: float) -> float:
        return min(self.flops_per_second, intensity * self.bytes_per_second)


def write(out: Path, campaign: Campaign) -> None:
    """Draw what a campaign has measured so far into its folder."""
    rows = table.complete(campaign)
    where = f"{table.device_name(campaign.machine)}, {campaign.date}"
    roof = _roof(campaign)
    draw_roofline(rows, [roof] if roof else predicted_roofs(), out / "roofline.png", where=where, measured=True)
    draw_speed(rows, out / "speed.png", where=where)
    predicted = predict.load() if campaign.scale == "gpu" else None
    memory = campaign.machine.get("gpu_memory_gib")
    cards = {"this card": float(memory)} if memory else {}
    draw_memory(rows, predicted["memory"] if predicted else [], cards, out / "memory.png", where=where)


def write_predicted(out: Path, predicted: Mapping[str, Any]) -> None:
    """Draw what published figures and counts predict."""
    rows = [Row.from_dict(row) for row in predicted["rows"]]
    where = f"published figures and counts, {predicted['date']}"
    draw_roofline(rows, predicted_roofs(), out / "roofline.png", where=where, measured=False)
    cards = {card.name: card.memory_gib for card in predict.CARDS if card.memory_gib != 24}
    draw_memory(rows, predicted["memory"], cards, out / "memory.png", where=where)


def predicted_roofs() -> list[Roof]:
    """The two cards' ceilings as published."""
    return [
        Roof(f"{card.name}, published", card.bytes_per_second, card.flops_per_second["bfloat16"], colour)
        for card, colour in zip(predict.CARDS, CARD_COLOURS, strict=True)
    ]


def _roof(campaign: Campaign) -> Roof | None:
    found = campaign.ceilings
    rates = {dtype: rate for dtype, rate in ((found or {}).get("matrix_flops_per_second") or {}).items() if rate}
    if not found or not rates:
        return None
    dtype = "bfloat16" if "gpu" in campaign.machine and "bfloat16" in rates else "float32"
    if dtype not in rates:
        dtype = next(iter(rates))
    return Roof(f"measured, {dtype}", found["copy_bytes_per_second"], rates[dtype], "#333333")


def draw_roofline(rows: Sequence[Row], roofs: Sequence[Roof], path: Path, *, where: str, measured: bool) -> None:
    """Achieved rate over intensity; beside it achieved bandwidth of the rows that multiply nothing.

    Args:
        rows: of a campaign; the sweep's are left out.
        roofs: the ceilings to draw.
        path: of the picture.
        where: machine and date, for the title.
        measured: draw what rows reached; else what is attainable under each roof, a prediction.
    """
    groups = {case: group for case, group in table.headlines(rows).items() if not measured or _any_measured(group)}
    products = {case: group for case, group in groups.items() if _intensity(group[0]) > 0}
    copies = {case: group for case, group in groups.items() if _intensity(group[0]) == 0}
    names = list(products) + list(copies)
    figure = _figure(12, 7.2)
    left, right, key = figure.subplots(1, 3, width_ratios=(0.8, 2.4, 1.5))
    _draw_bandwidth(left, copies, roofs, names, measured=measured)
    _draw_rates(right, products, roofs, names, measured=measured)
    lines = [f"{names.index(case) + 1}  {_short(case)}" for case in names]
    key.axis("off")
    key.text(0, 1, "\n".join(lines) or "no row was measured", va="top", fontsize=8.5, linespacing=1.6)
    handles = [Line2D([], [], color=roof.colour, label=roof.label) for roof in roofs]
    if measured:
        shown = [family for family in COLOURS if any(_points(group, family) for group in groups.values())]
        handles += [_handle(family, COLOURS[family], MARKERS[family], filled=family == OURS) for family in shown]
    else:
        handles += [_handle("attainable there", roof.colour, "o") for roof in roofs]
    key.legend(handles=handles, loc="lower left", fontsize=9, frameon=False)
    kind = "what rows reached" if measured else "predicted: what rows could reach at most"
    figure.suptitle(f"Roofline, {kind} ({where})", fontsize=13)
    _save(figure, path)


def _draw_bandwidth(
    axes: Axes, groups: Mapping[Case, Sequence[Row]], roofs: Sequence[Roof], names: Sequence[Case], *, measured: bool
) -> None:
    places = {case: place for place, case in enumerate(groups)}
    for roof in roofs:
        axes.axhline(roof.bytes_per_second / 1e9, color=roof.colour, linewidth=1.5)
    for case, group in groups.items():
        if measured:
            for family in reversed(COLOURS):
                heights = [
                    (row.extra_info or {})["bytes_moved_floor"] / time / 1e9 for row, time in _points(group, family)
                ]
                axes.scatter([places[case]] * len(heights), heights, **_look(family), zorder=3)
        else:
            for roof in roofs:
                axes.scatter([places[case]], [roof.bytes_per_second / 1e9], color=roof.colour, s=45, zorder=3)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.5, high * 1.5)
    _read_plainly(axes.yaxis)
    axes.set_xticks(list(places.values()), [str(names.index(case) + 1) for case in places])
    axes.set_xlim(-0.7, max(len(places), 1) - 0.3)
    axes.set(ylabel="bytes of the floor a second, GB/s", xlabel="row")
    axes.set_title("Rows that only move bytes", fontsize=11)
    axes.grid(axis="y", which="both", alpha=0.25)


def _draw_rates(
    axes: Axes, groups: Mapping[Case, Sequence[Row]], roofs: Sequence[Roof], names: Sequence[Case], *, measured: bool
) -> None:
    intensities = [_intensity(group[0]) for group in groups.values()] or [1.0]
    low, high = min(intensities) / 3, max(intensities) * 3
    edges = [roof.flops_per_second / roof.bytes_per_second for roof in roofs]
    low, high = min(low, *(edge / 4 for edge in edges)), max(high, *(edge * 4 for edge in edges))
    for roof in roofs:
        xs = [low, roof.flops_per_second / roof.bytes_per_second, high]
        axes.plot(xs, [roof.attainable(x) / 1e12 for x in xs], color=roof.colour, linewidth=1.5)
    tops: list[tuple[float, float, str]] = []
    for case, group in groups.items():
        x = _intensity(group[0])
        if measured:
            heights = []
            for family in reversed(COLOURS):
                here = [(row.extra_info or {})["flops_floor"] / time / 1e12 for row, time in _points(group, family)]
                axes.scatter([x] * len(here), here, **_look(family), zorder=3)
                heights += here
        else:
            heights = [roof.attainable(x) / 1e12 for roof in roofs]
            for roof, height in zip(roofs, heights, strict=True):
                axes.scatter([x], [height], color=roof.colour, s=45, zorder=3)
        tops.append((x, max(heights), str(names.index(case) + 1)))
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    _number(axes, tops, width=math.log10(high / low))
    axes.set(xlabel="operations of the floor a byte of the floor", ylabel="operations of the floor a second, TFLOP/s")
    axes.set_title("Rows with products", fontsize=11)
    _read_plainly(axes.xaxis, axes.yaxis)
    axes.grid(which="both", alpha=0.25)


def _number(axes: Axes, tops: Sequence[tuple[float, float, str]], *, width: float) -> None:
    """Numbers above the highest points, those of neighbours stacked so that they can be read, with room for all."""
    taken: list[tuple[float, int]] = []
    for x, y, name in sorted(tops):
        level = 0
        while any(abs(math.log10(x / other)) < 0.035 * width and level == used for other, used in taken):
            level += 1
        taken.append((x, level))
        offset = (0, 7 + 11 * level)
        axes.annotate(name, (x, y), xytext=offset, textcoords="offset points", ha="center", fontsize=9)
    low, high = axes.get_ylim()
    levels = max((level for _, level in taken), default=0)
    axes.set_ylim(low, high * (high / low) ** (0.035 * (levels + 1)))


def draw_speed(rows: Sequence[Row], path: Path, *, where: str) -> None:
    """How many times as long as this project's fastest row, which is named, each peer takes, a group of bars a subject.

    Nothing stands where no time is.
    """
    kinds = {
        "plain torch, eager": (COLOURS[PLAIN], ""),
        "plain torch, compiled": ("#F0E442", "//"),
        "MONAI, eager": (COLOURS[MONAI], ""),
        "MONAI, fastest of the others": ("#CC79A7", "\\\\"),
        "others": (COLOURS[OTHERS], ".."),
    }
    groups: list[tuple[str, list[tuple[str, float]]]] = []
    for case, group in table.headlines(rows).items():
        own = cases.fastest(group, OURS)
        ours = None if own is None else cases.median(own)
        bars = []
        for kind in kinds:
            times = [time for row in group if _kind(row) == kind and (time := cases.median(row)) is not None]
            if ours and times:
                bars.append((kind, min(times) / ours))
        if own is not None and bars:
            groups.append((f"{_short(case)}\n{cases.implementation(own)}", bars))
    count = sum(len(bars) + 1 for _, bars in groups)
    figure = _figure(12, max(3.5, 1.6 + 0.2 * count))
    axes = figure.subplots()
    y, ticks = 0.0, []
    for name, bars in groups:
        ticks.append((y + (len(bars) - 1) / 2, name))
        for kind, factor in bars:
            colour, hatch = kinds[kind]
            axes.barh(y, factor - 1, left=1, color=colour, hatch=hatch, edgecolor="#333333", linewidth=0.5, height=0.9)
            axes.annotate(
                units.times(factor),
                (factor, y),
                xytext=(4 if factor >= 1 else -4, 0),
                fontsize=9,
                textcoords="offset points",
                va="center_baseline",
                ha="left" if factor >= 1 else "right",
            )
            y += 1
        y += 1
    axes.axvline(1, color="#333333", linewidth=1.2)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=9)
    axes.set_ylim(max(y - 1, 1) - 0.2, -0.8)
    factors = [factor for _, bars in groups for _, factor in bars] or [1.0]
    axes.set(xscale="log", xlim=(min(0.5, min(factors)) / 1.3, max(2.0, max(factors)) * 1.3))
    _read_plainly(axes.xaxis)
    axes.set_xlabel("time of the peer over this project's fastest: right of 1 this project is faster, left of 1 slower")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    shown = [kind for kind in kinds if any(kind == name for _, bars in groups for name, _ in bars)]
    if shown:
        handles = [
            Patch(facecolor=kinds[kind][0], hatch=kinds[kind][1], edgecolor="#333333", label=kind) for kind in shown
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(shown), frameon=False)
    else:
        axes.text(0.5, 0.5, "no peer was measured", transform=axes.transAxes, ha="center")
    figure.suptitle(f"Speed against peers, measured ({where})", fontsize=13)
    _save(figure, path)


def draw_memory(
    rows: Sequence[Row],
    predicted: Sequence[Mapping[str, Any]],
    cards: Mapping[str, float],
    path: Path,
    *,
    where: str,
) -> None:
    """Peak memory of the autoencoder's training step over the patch, a panel a batch size.

    Args:
        rows: of a campaign; drawn are the sweep's, measured or not fitting.
        predicted: counts of `predict`: implementation, shape, peak.
        cards: memory in GiB by name, drawn as lines beside the 24 GiB of common cards.
        path: of the picture.
        where: machine and date, for the title.
    """
    swept = [row for row in rows if (case := cases.of(row)) is not None and case.suite == "sweep"]
    found = [(cases.implementation(row), _lengths(row), row) for row in swept]
    counts = [(str(entry["implementation"]), tuple(entry["shape"]), entry["peak"] / GIB) for entry in predicted]
    batches = sorted({shape[0] for _, shape, _ in found} | {shape[0] for _, shape, _ in counts}) or [1]
    # On a CPU sizes are so small that these would squeeze what is drawn.
    common = {"24 GiB": 24.0} if cards or counts else {}
    lines = {**common, **{f"{name}, {memory:.0f} GiB": memory for name, memory in cards.items()}}
    figure = _figure(12, 6.6)
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    names = [name for name in SWEEP_STYLES if name in {n for n, _, _ in found} | {n for n, _, _ in counts}]
    names += sorted({name for name, _, _ in found} - set(names))
    for axes, batch in zip(panels, batches, strict=True):
        patches = sorted(
            {shape[2:] for _, shape, _ in found if shape[0] == batch}
            | {shape[2:] for _, shape, _ in counts if shape[0] == batch},
            key=lambda patch: (math.prod(patch), patch),
        )
        for name in names:
            colour, style, marker = SWEEP_STYLES.get(name, UNSTYLED)
            curve = sorted(
                (patches.index(shape[2:]), peak) for other, shape, peak in counts if (other, shape[0]) == (name, batch)
            )
            axes.plot([x for x, _ in curve], [y for _, y in curve], style, color=colour, linewidth=1.6)
            for other, shape, row in found:
                if (other, shape[0]) != (name, batch):
                    continue
                x, peak = patches.index(shape[2:]), cases.measured(row, "peak_bytes")
                if peak is not None:
                    axes.scatter([x], [peak / GIB], color=colour, marker=marker, s=55, zorder=3, edgecolor="#333333")
                elif why(row) == "does not fit":
                    top = max(cards.values(), default=24.0)
                    shift = 0.07 * (names.index(name) - (len(names) - 1) / 2)
                    axes.scatter([x + shift], [1.15 * top], color=colour, marker="x", s=60, zorder=3)
        for label, memory in lines.items():
            axes.axhline(memory, color="#333333", linewidth=1, linestyle=(0, (6, 3)))
            axes.annotate(
                label,
                (0.01, memory),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                fontsize=9,
                textcoords="offset points",
            )
        axes.set_yscale("log")
        axes.set_xticks(
            range(len(patches)), [units.shape("x".join(map(str, patch))) for patch in patches], rotation=30, ha="right"
        )
        axes.set_title(f"batch {batch}", fontsize=11)
        axes.margins(x=0.08)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("peak memory, GiB (2³⁰ bytes)")
    _read_plainly(panels[0].yaxis)
    fitted = any(cases.measured(row, "peak_bytes") is not None for row in swept)
    workspaces = "\npoints include workspaces, which a smaller card would not grant" if fitted and cards else ""
    panels[len(panels) // 2].set_xlabel(f"patch, voxels{workspaces}")
    handles = [
        Line2D([], [], color=colour, linestyle=style if counts else "", marker=marker if fitted else "", label=name)
        for name in names
        for colour, style, marker in [SWEEP_STYLES.get(name, UNSTYLED)]
    ]
    if any(why(row) == "does not fit" for row in swept):
        handles.append(Line2D([], [], color="#333333", linestyle="", marker="x", label="does not fit"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    kind = " over ".join(part for part, there in (("measured points", fitted), ("predicted lines", counts)) if there)
    figure.suptitle(f"Training step of the autoencoder: {kind or 'nothing measured'} ({where})", fontsize=13)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of Matplotlib: the same figures give the same file.
    figure.savefig(path, metadata={"Software": None})


def _read_plainly(*axes: Axis) -> None:
    """1, 2, 5, 10 on a logarithmic axis, not powers."""
    for axis in axes:
        axis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axis.set_major_formatter(_plain)
        axis.set_minor_formatter(NullFormatter())


def _plain(value: float, _: float) -> str:
    return f"{value:g}"


def _handle(label: str, colour: str, marker: str, *, filled: bool = True) -> Line2D:
    inside = colour if filled else "none"
    return Line2D([], [], color=colour, markerfacecolor=inside, marker=marker, linestyle="", label=label)


def _look(family: str) -> dict[str, Any]:
    filled = family == OURS
    colour = COLOURS[family]
    return {"marker": MARKERS[family], "s": 55, "facecolors": colour if filled else "none", "edgecolors": colour}


def _points(rows: Sequence[Row], family: str) -> list[tuple[Row, float]]:
    found = [(row, cases.median(row)) for row in rows if cases.family(cases.implementation(row)) == family]
    return [(row, time) for row, time in found if time is not None]


def _any_measured(rows: Sequence[Row]) -> bool:
    return any(cases.median(row) is not None for row in rows)


def _intensity(row: Row) -> float:
    info = row.extra_info or {}
    return float((info.get("flops_floor") or 0) / info["bytes_moved_floor"])


def _kind(row: Row) -> str:
    name = cases.implementation(row)
    family = cases.family(name)
    if family == PLAIN:
        return "plain torch, compiled" if name.endswith("compiled") else "plain torch, eager"
    if family == MONAI:
        return "MONAI, eager" if name == "monai-eager" else "MONAI, fastest of the others"
    return "" if family == OURS else "others"


def _lengths(row: Row) -> tuple[int, ...]:
    return tuple(int(length) for length in str((row.extra_info or {})["shape"]).split("x"))


def _short(case: Case) -> str:
    return f"{case.subject}, {units.shape(case.shape)}"

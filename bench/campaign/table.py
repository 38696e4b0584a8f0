"""A campaign as Markdown: what was measured where, ceilings, checks, targets, and a table a subject and shape."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import units
from bench.campaign import cases, predict
from bench.campaign.cases import MONAI, PLAIN, Case
from bench.campaign.record import Campaign
from bench.campaign.rows import Row
from bench.campaign.targets import Device, Verdict, verdicts, why
from bench.units import DASH
from decovae.files import write_text

FILE = "campaign.md"
RECORD = "campaign.json"
PLOTS = {
    "roofline.png": "Roofline",
    "speed.png": "Speed against peers",
    "memory.png": "Memory against patch size",
}
SUITES = ("losses", "norm + act", "blocks", "autoencoder", "training", "generation", "sweep")
SWEEP = "sweep"
SWEEP_TITLE = "training step of the autoencoder over batch and patch"
ALONE = ("losses", "norm + act", "blocks")
"""Suites whose memory is shown beyond what goes in and comes out; elsewhere it is all that is alive."""

LEGEND = """\
*Median* of whole calls, from Python until the device is done, with their interquartile range as *spread*; *of ours* is
the median over that of this project's fastest row. Times with a † were taken near the card's limit: torch gave cached
memory back between the calls and asked for it again, and that is in them. *Floor* is the least that has to be moved or
multiplied, whichever takes longer at the bandwidth of a copy and the rate of a large matrix product in the same run;
bench/floors.py counts it. *Share* is that time over the median. The copy is of the row's own size, launch and wait
included, so the share of a tiny row compares launches; there is none where that copy reaches less than half of the
machine's bandwidth. A loss without its gradient only reads, which may pass the rate of a copy, and 100 %. *Extra
memory* is the highest level of torch's allocations beyond what goes in, what comes out and the parameters; *peak
memory* has all of these in it, and in a step the optimizer's moments. Where calls replay CUDA graphs, which allocate
nothing, both are of what torch's allocator reserved for the row, the graphs' pools in it. Peaks that were measured on a
large card include workspaces that a small card would not grant: convolutions choose slower ways there. *Saved* is what
autograd keeps for backward, parameters and their casts left out. The last two columns are predictions, not
measurements: the floor at the published figures of a card, which nothing reaches. 1 GB is 10⁹ bytes."""


def write(out: Path, campaign: Campaign) -> None:
    """Write `FILE` to a campaign's folder."""
    pictures = [f"![{title}]({name})" for name, title in PLOTS.items() if (out / name).exists()]
    write_text(out / FILE, markdown(campaign, pictures=pictures))


def write_predicted(out: Path, predicted: Mapping[str, Any]) -> None:
    """Write `FILE` to the folder of predictions: the same tables, without a measured figure."""
    rows = [Row.from_dict(row) for row in predicted["rows"]]
    head = [
        "# What a campaign on a GPU will measure, predicted",
        "Nothing here was measured. Every row of `python -m bench.campaign` stands here with its floor, and with the "
        "least time that follows from it and from published figures of two cards; one run fills the empty columns. "
        f"Counted {predicted['date']} by `python -m bench.campaign predict`, without a GPU "
        f"([{predict.FILE}]({predict.FILE})).",
        cards(),
        *(f"![{title}, predicted]({name})" for name, title in PLOTS.items() if name != "speed.png"),
        "## Targets",
        targets_table(verdicts([], "gpu")),
        *memory_tables(predicted),
        *subject_tables(rows),
    ]
    write_text(out / FILE, "\n\n".join(head) + "\n")


def markdown(campaign: Campaign, *, pictures: Sequence[str] = ()) -> str:
    """The whole page of a campaign.

    Args:
        campaign: as far as it went.
        pictures: Markdown of the plots that are there.
    """
    rows = complete(campaign)
    parts = [
        f"# Campaign of {campaign.date} on {device_name(campaign.machine)}",
        f"{origin(campaign)} All of it is in [{RECORD}]({RECORD}), written by `python -m bench.campaign`.",
        progress(rows),
        "## Ceilings",
        ceilings(campaign.ceilings),
        "## Checks",
        checks(campaign.checks),
        "## Targets",
        targets_table(verdict for verdict in verdicts(rows, device(campaign)) if verdict.target.case),
        "## Summary",
        summary(rows),
        *pictures,
        *subject_tables(rows),
    ]
    return "\n\n".join(parts) + "\n"


def device(campaign: Campaign) -> Device:
    return "gpu" if "gpu" in campaign.machine else "cpu"


def device_name(machine: Mapping[str, Any]) -> str:
    """A GPU's name, or a processor's with its threads."""
    return str(machine.get("gpu") or f"{machine['processor']}, {_threads(machine)}")


def _threads(machine: Mapping[str, Any]) -> str:
    count = machine["torch_threads"]
    return f"{count} thread{'' if count == 1 else 's'}"


def origin(campaign: Campaign) -> str:
    """The machine, the versions and the commit, in a line."""
    machine, commit = campaign.machine, campaign.commit
    hardware = [f"{machine['processor']} with {_threads(machine)}"]
    if "gpu" in machine:
        hardware = [
            f"{machine['gpu']} with {machine.get('gpu_memory_gib', '?')} GiB, driver {machine['gpu_driver']}, "
            f"CUDA {machine['cuda']}",
            *hardware,
        ]
    names = {"torch": "torch", "triton": "Triton", "python": "Python"}
    software = [f"{name} {machine[key]}" for key, name in names.items() if machine.get(key)]
    software += [f"{name} {version}" for name, version in (campaign.versions or {}).items() if version]
    changes = " with uncommitted changes" if commit.get("dirty") else ""
    commit_id = (commit.get("id") or "unknown")[:7]
    return (
        f"{campaign.date}, scale `{campaign.scale}`, {campaign.seconds / 60:.0f} minutes: {'; '.join(hardware)}; "
        f"{', '.join(software)}; {machine['system']}; commit {commit_id}{changes}."
    )


def complete(campaign: Campaign) -> list[Row]:
    """All rows of a campaign, those that were not reached included; what did not say its case is looked up.

    Each says beside its own facts what a copy reached on the machine.

    Cases of the paper's sizes are known from the predictions. At other scales a row that never began stays without.
    """
    known: dict[str, Any] = {}
    predicted = predict.load()
    if predicted is not None and campaign.scale == "gpu":
        known = {row["row"]: row["extra_info"] for row in predicted["rows"]}
    rows = [
        row if cases.of(row) is not None else replace(row, extra_info=known.get(row.id, row.extra_info))
        for row in campaign.rows
    ]
    there = {row.id for row in rows}
    copying = (campaign.ceilings or {}).get("copy_bytes_per_second")
    if copying:
        rows = [replace(row, extra_info=row.extra_info and {**row.extra_info, cases.CEILING: copying}) for row in rows]
    rows += [
        Row(row_id, "counted", None, 0.0, 0.0, None, known.get(row_id), None)
        for row_id in campaign.not_reached
        if row_id not in there
    ]
    return rows


def progress(rows: Sequence[Row]) -> str:
    """How many rows ended how."""
    fits = [row for row in rows if why(row) == "does not fit"]
    counts = {
        "measured": sum(row.outcome == "measured" for row in rows),
        "did not fit": len(fits),
        "skipped": sum(row.outcome == "skipped" for row in rows) - len(fits),
        "failed": sum(row.outcome == "failed" for row in rows),
        "not reached": sum(row.outcome in ("counted", "started") for row in rows),
    }
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count or name == "measured")
    return f"{len(rows)} rows: {told}.{_slowed(rows)}"


def _slowed(rows: Sequence[Row]) -> str:
    """How many rows a GPU did not run at its full clock, and why."""
    reasons = [reason for row in rows if row.outcome == "measured" for reason in (row.gpu or {}).get("throttle") or ()]
    if not reasons:
        return ""
    told = ", ".join(f"{reasons.count(reason)} by {reason}" for reason in dict.fromkeys(reasons))
    return f" The GPU lowered its clocks right after some of them: {told}."


def ceilings(found: Mapping[str, Any] | None) -> str:
    """Bandwidth and rates that the machine reached."""
    if not found:
        return "Not measured."
    lines = [["copy", units.bandwidth(found["copy_bytes_per_second"])]]
    for key, name in (("matrix_flops_per_second", "matrix product"), ("convolution_flops_per_second", "convolution")):
        lines += [[f"{name}, {dtype}", units.rate(value)] for dtype, value in (found.get(key) or {}).items() if value]
    return grid([["ceiling", "reached"], ["---", "---:"], *lines])


def checks(found: Mapping[str, Any]) -> str:
    """Tests on the device, memory checkers, and what the first step costs."""
    lines = [["check", "outcome"], ["---", "---"], *([name, text] for name, text in check_lines(found))]
    cold = found.get("cold_start")
    if not cold:
        return grid(lines)
    parts = [grid(lines), f"**Cold start** of `train/vae.py {cold['options']}`"]
    parts += [cold_start({"": cold})] if cold["starts"] else []
    parts += ["\n".join(f"- {what}: not measured, {reason}" for what, reason in cold["left_out"].items())]
    return "\n\n".join(part for part in parts if part)


def check_lines(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each check and its outcome in a few words."""
    tests = found.get("tests") or {}
    name = f"tests (`pytest -m '{tests['expression']}'`)" if "expression" in tests else "tests on the device"
    cold = found.get("cold_start")
    return [
        ("kernels against float64 (`bench.tour`)", _tests(found.get("tour") or {})),
        (name, _tests(tests)),
        ("compute-sanitizer", _sanitizer(found.get("sanitizer"))),
        ("cold start", "measured" if cold and cold.get("starts") else "not measured"),
    ]


def _tests(found: Mapping[str, Any]) -> str:
    if not found:
        return "not run"
    if not found.get("available", True):
        return f"not run: {found.get('reason')}"
    counts = [(found.get(key) or 0, key) for key in ("passed", "failed", "errors", "skipped")]
    told = ", ".join(f"{count} {key}" for count, key in counts if count or key == "passed")
    return told if found.get("complete", True) else f"{told}; stopped before the last"


def _sanitizer(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "not run"
    if not found.get("available"):
        return f"not run: {found.get('reason')}"
    told = []
    for name, tool in found["tools"].items():
        errors = "no summary" if tool["errors"] is None else f"{tool['errors']} errors"
        told.append(f"{name}: {errors} in {len(tool['kernels'])} kernels{'' if tool['complete'] else ', not complete'}")
    return "; ".join([*told, *(f"{name}: not reached" for name in found["not_reached"])])


def cold_start(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What a first step costs, with empty compile caches and with full ones.

    Args:
        found: results of `bench.cold_start.measure`, by machine.
    """
    named = any(found)
    header = ["mode", "compile caches", "start to end of the first step", "first step", "later steps"]
    lines = [(["machine"] if named else []) + header, (["---"] if named else []) + ["---", "---", *["---:"] * 3]]
    for machine, result in found.items():
        for mode, states in result["starts"].items():
            for state, start in states.items():
                times = [start[key] for key in ("until_first_step", "first_step", "later_step")]
                caches = {"cold": "empty", "warm": "full"}.get(state, state)
                lines.append(([machine] if named else []) + [mode, caches, *(units.seconds(time) for time in times)])
    return grid(lines)


def targets_table(found: Iterable[Verdict]) -> str:
    """Each target with its bound, the figure, the verdict, and what is behind it."""
    lines = [["target", "bound", "figure", "verdict", "behind it"], ["---", "---:", "---:", "---", "---"]]
    lines += [[*verdict_cells(verdict), verdict.behind] for verdict in found]
    return grid(lines)


def verdict_cells(verdict: Verdict) -> list[str]:
    """A target's name, bound, figure and verdict."""
    predicted = f"predicted {verdict.predicted}" if verdict.predicted else DASH
    outcome = f"**{verdict.outcome}**" if verdict.outcome == "missed" else verdict.outcome
    if verdict.would == "missed":
        outcome = f"{outcome}, **predicted to miss**"
    return [verdict.target.name, verdict.target.bound_text, verdict.figure or predicted, outcome]


def summary(rows: Sequence[Row]) -> str:
    """One line a subject and shape: the fastest of ours, of plain torch and of MONAI, and our default's memory."""
    header = ["", "ours", "plain torch", "MONAI", "share of the floor", "memory"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for case, group in headlines(rows).items():
        ours, default = cases.fastest(group, cases.OURS), cases.default(group)
        time = None if ours is None else cases.median(ours)
        share = None if ours is None else cases.share_of_floor(ours)
        lines.append(
            [
                f"{case.subject}, {units.shape(case.shape)}, {case.title}",
                DASH if ours is None else f"{_time(ours)}{_which(ours, group)}",
                *(_against(group, family, time) for family in (PLAIN, MONAI)),
                DASH if share is None else units.percent(share),
                DASH if default is None else f"{_memory(default)}{_which(default, group)}",
            ]
        )
    return grid(lines)


def _which(row: Row, group: Sequence[Row]) -> str:
    """Which of this project's rows it is, where there are several, and what became of the default if it has no time."""
    names = [name for one in group if cases.family(name := cases.implementation(one)) == cases.OURS]
    default = cases.default(group)
    lost = default is not None and default is not row and cases.median(default) is None
    told = [cases.implementation(row)] if len(names) > 1 else []
    told += [f"{cases.implementation(default)} {why(default)}"] if default is not None and lost else []
    return f" ({'; '.join(told)})" if told else ""


def _time(row: Row) -> str:
    """A row's median, marked where the allocator's retries are in it."""
    time = cases.median(row)
    mark = " †" if cases.measured(row, "allocator_retries") else ""
    return DASH if time is None else f"{units.seconds(time)}{mark}"


def headlines(rows: Sequence[Row]) -> dict[Case, list[Row]]:
    """For every subject and shape the case that training or sampling meets, SID, COV, VAR and the sweep left out."""
    best: dict[tuple[str, str], Case] = {}
    groups = cases.by_case(rows)
    on_gpu = any(case.suite != "norm + act" and case.dtype == "bfloat16" and case.suite != "losses" for case in groups)
    dtype, layout = ("bfloat16", "channels-last") if on_gpu else ("float32", "contiguous")

    def likely(case: Case) -> tuple[bool, ...]:
        return case.direction != "forward", case.dtype == dtype, case.layout in (layout, None)

    for case in groups:
        if case.suite == SWEEP or (case.suite == "losses" and case.subject != "VAD"):
            continue
        key = (case.subject, case.shape)
        if key not in best or likely(case) > likely(best[key]):
            best[key] = case
    chosen = sorted(best.values(), key=_suite_place)
    return {case: groups[case] for case in chosen}


def _against(rows: Sequence[Row], family: str, ours: float | None) -> str:
    peer = cases.fastest(rows, family)
    time = None if peer is None else cases.median(peer)
    if peer is None or time is None:
        there = [row for row in rows if cases.family(cases.implementation(row)) == family]
        return "does not fit" if there and all(why(row) == "does not fit" for row in there) else DASH
    return _time(peer) if ours is None else f"{_time(peer)}, {units.times(time / ours)}"


def subject_tables(rows: Sequence[Row]) -> list[str]:
    """A heading and a table for each subject and shape, what the columns mean, and why rows have no figure."""
    parts: list[str] = []
    suite = ""
    for (name, subject, shape), group in _by_subject(rows).items():
        if name != suite:
            parts.append(f"## {name[:1].upper()}{name[1:]}")
            suite = name
        title = f"{subject}, {units.shape(shape)}" if shape else subject
        parts += [f"**{title}**", subject_table(group)]
    parts += ["## How to read the tables", LEGEND]
    reasons = [f"- `{row.id}`: {_reason(row)}" for row in rows if row.reason]
    if reasons:
        parts += ["## Rows without a figure", "\n".join(reasons)]
    unknown = [f"- `{row.id}`" for row in rows if cases.of(row) is None and not row.reason]
    if unknown:
        parts += ["## Rows that were not reached", "\n".join(unknown)]
    return parts


def subject_table(groups: Mapping[Case, Sequence[Row]], *, predictions: bool = True) -> str:
    """The rows of one subject and shape.

    Args:
        groups: rows by case.
        predictions: whether to show the predicted least times of the two cards.
    """
    memory = "extra memory" if next(iter(groups)).suite in ALONE else "peak memory"
    header = ["", "implementation", "median", "spread", "of ours", "floor", "share", memory, "saved"]
    names = [f"{card.name}, predicted" for card in predict.CARDS] if predictions else []
    lines = [[*header, *names], ["---"] * 2 + ["---:"] * (len(header) - 2 + len(names))]
    for case, rows in groups.items():
        ours = cases.fastest(rows, cases.OURS)
        for index, row in enumerate(rows):
            lines.append(
                [
                    "" if index else units.shape(case.shape) if case.suite == SWEEP else case.title,
                    cases.implementation(row),
                    *_figures(row, None if ours is None else cases.median(ours)),
                    *(_predicted(row) if predictions else []),
                ]
            )
    return grid(lines)


def _figures(row: Row, ours: float | None) -> list[str]:
    time, share = cases.median(row), cases.share_of_floor(row)
    if time is None or row.stats is None:
        reason = why(row)
        missing = DASH if reason == "not measured" else f"{DASH} {reason}"
        return [missing, DASH, DASH, _floor(row), DASH, DASH, DASH]
    return [
        _time(row),
        f"{row.stats['iqr'] / time:.0%}",
        DASH if not ours else units.times(time / ours),
        _floor(row),
        DASH if share is None else units.percent(share),
        _memory(row),
        _bytes(row, "saved_bytes"),
    ]


def _floor(row: Row) -> str:
    """What takes longest of the floor; both parts where the machine's ceilings are not known."""
    info, floor = row.extra_info or {}, cases.measured_floor(row)
    moved, products = units.size(info["bytes_moved_floor"]), info.get("flops_floor") or 0
    if floor is not None:
        return units.operations(products) if floor[1] == "operations" else moved
    return f"{moved}, {units.operations(products)}" if products else moved


def _predicted(row: Row) -> list[str]:
    return [f"≥ {units.seconds(predict.least_seconds(row.extra_info or {}, card)[0])}" for card in predict.CARDS]


def _memory(row: Row) -> str:
    return _bytes(row, "peak_extra_bytes" if (row.extra_info or {})["suite"] in ALONE else "peak_bytes")


def _bytes(row: Row, key: str) -> str:
    value = cases.measured(row, key)
    return DASH if value is None else units.size(value)


def _reason(row: Row) -> str:
    text, end = " ".join((row.reason or "").split()), why(row)
    text = text if text.startswith(end) else f"{end}: {text}"
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _by_subject(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[Case, list[Row]]]:
    """Rows by suite, subject and shape, then by case; the sweep's shapes stand together."""
    found: dict[tuple[str, str, str], dict[Case, list[Row]]] = {}
    groups = cases.by_case(rows)
    for case in sorted(groups, key=_suite_place):
        swept = case.suite == SWEEP
        key = (case.suite, SWEEP_TITLE, "") if swept else (case.suite, case.subject, case.shape)
        found.setdefault(key, {})[case] = groups[case]
    return found


def _suite_place(case: Case) -> int:
    return SUITES.index(case.suite) if case.suite in SUITES else len(SUITES)


def cards() -> str:
    """The published figures that predictions are made of."""
    lines = [["card", "memory", "bandwidth", "bf16 products", "TF32", "fp32", "source"], ["---", *["---:"] * 5, "---"]]
    for card in predict.CARDS:
        rates = [units.rate(card.flops_per_second[dtype]) for dtype in ("bfloat16", "tf32", "float32")]
        lines.append(
            [card.name, f"{card.memory_gib:g} GiB", units.bandwidth(card.bytes_per_second), *rates, card.source]
        )
    return grid(lines)


def memory_tables(predicted: Mapping[str, Any]) -> list[str]:
    """Predicted peaks of the autoencoder's step over batch and patch, and of the whole step."""
    parts = []
    names = list(dict.fromkeys(entry["implementation"] for entry in predicted["memory"]))
    if names:
        peaks = {(tuple(entry["shape"]), entry["implementation"]): entry["peak"] for entry in predicted["memory"]}
        lines = [["batch × patch", *names], ["---", *["---:"] * len(names)]]
        for shape in dict.fromkeys(shape for shape, _ in peaks):
            cells = [units.size(peaks[shape, name]) if (shape, name) in peaks else DASH for name in names]
            lines.append([units.shape("x".join(map(str, shape))), *cells])
        parts += [
            "## Peak memory of the autoencoder's training step, predicted",
            "Counted on fake tensors, bf16, with weights, gradients and AdamW's moments; without cuDNN's workspaces, "
            "the CUDA context and fragmentation.",
            grid(lines),
        ]
    if predicted["full_steps"]:
        modes = list(predicted["full_steps"][0]["peak"])
        lines = [["batch × patch", *modes], ["---", *["---:"] * len(modes)]]
        for step in predicted["full_steps"]:
            lines.append(
                [units.shape("x".join(map(str, step["shape"]))), *(units.size(step["peak"][mode]) for mode in modes)]
            )
        parts += ["The same of the whole training step, with LPIPS, discriminators and optimizers:", grid(lines)]
    return parts


def side_by_side(campaigns: Sequence[Campaign]) -> str:
    """Medians of several campaigns, a column each, over the rows that any of them measured."""
    header = ["row", "implementation", *(f"{device_name(one.machine)}, {one.date}" for one in campaigns)]
    found: dict[tuple[Case, str], dict[int, Row]] = {}
    for number, campaign in enumerate(campaigns):
        for groups in _by_subject(campaign.rows).values():
            for case, rows in groups.items():
                for row in rows:
                    if cases.median(row) is not None:
                        found.setdefault((case, cases.implementation(row)), {})[number] = row
    lines = [header, ["---", "---", *["---:"] * len(campaigns)]]
    before: Case | None = None
    for (case, name), rows_of in sorted(found.items(), key=lambda item: _suite_place(item[0][0])):
        title = f"{case.subject}, {units.shape(case.shape)}, {case.title}"
        times = [cases.median(rows_of[number]) if number in rows_of else None for number in range(len(campaigns))]
        cells = [DASH if time is None else units.seconds(time) for time in times]
        lines.append(["" if case == before else title, name, *cells])
        before = case
    return grid(lines)


def grid(lines: Iterable[Sequence[str]]) -> str:
    """Lines of cells as a Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str]) -> int:
    """Table and plots again from the files; of several folders also the medians side by side.

    Raises:
        InputError: a folder without a campaign.
    """
    from bench.campaign import plots

    parser = argparse.ArgumentParser(prog="python -m bench.campaign report", description=main.__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    arguments = parser.parse_args(argv)
    campaigns = []
    for folder in arguments.folders:
        campaign = Campaign.load(folder / RECORD)
        plots.write(folder, campaign)
        write(folder, campaign)
        campaigns.append(campaign)
        print(f"{folder / FILE}: {progress(complete(campaign))}")
    if len(campaigns) > 1:
        print(side_by_side(campaigns))
    return 0

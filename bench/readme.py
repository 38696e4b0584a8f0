"""The figures in the READMEs, written from the files in bench/results/: python -m bench.readme [--check]

Between ``<!-- figures: NAME (written by python -m bench.readme) -->`` and ``<!-- figures: end -->`` of README.md,
bench/README.md and kernels/README.md stands what `BLOCKS` makes of those files under that name, each block with the
file it is of. All of it is replaced; with --check it is compared, and the exit code says whether it is up to date.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import data_tables, loop_overhead, scaling, step_profile, store_formats, survival, units
from bench.campaign import predict, table
from bench.campaign.cases import Case
from bench.campaign.record import Campaign
from bench.campaign.rows import Row
from bench.campaign.targets import Device, Verdict, verdicts
from bench.units import DASH
from decovae.files import write_text
from decovae.report.table_text import markdown
from decovae.report.tables import PaperTable

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
FILES = ("README.md", "bench/README.md", "kernels/README.md")

BLOCK = re.compile(
    r"(?P<begin><!-- figures: (?P<name>[\w-]+) \(written by python -m bench\.readme\) -->\n)"
    r"(?P<text>.*?)"
    r"(?P<end><!-- figures: end -->)",
    re.DOTALL,
)


class Results:
    """The files of measured and counted figures, and how a README links to them.

    Args:
        folder: that holds them.
        readme: the file that the figures are for.
    """

    def __init__(self, folder: Path, readme: Path) -> None:
        self.folder = folder
        self.readme = readme

    def link(self, name: str) -> str:
        """A link to a file of the folder."""
        path = self.folder / name
        shown = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()
        return f"[{shown}]({Path(os.path.relpath(path, self.readme.parent)).as_posix()})"

    def read(self, name: str) -> Any:
        """The content of a JSON file; None if it is not there."""
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def campaigns(self) -> dict[str, Campaign]:
        """Measured campaigns by their folder's name, those on GPUs first."""
        found = {path.parent.name: Campaign.load(path) for path in sorted(self.folder.glob("campaign-*/campaign.json"))}
        return dict(sorted(found.items(), key=lambda item: table.device(item[1]) != "gpu"))

    def predicted(self) -> dict[str, Any] | None:
        """What `python -m bench.campaign predict` wrote."""
        return predict.load(self.folder / predict.FOLDER.name)


def studies(results: Results) -> str:
    """The paper's tables from every study, and how they came about."""
    return "\n\n".join(_study(results, path.name) for path in sorted(results.folder.glob("study-*.json"))) or (
        "Not measured yet."
    )


def _study(results: Results, name: str) -> str:
    found = results.read(name)
    tables = [PaperTable.from_dict(entry) for entry in found["tables"]]
    names = {"vae": "autoencoders are trained for {}", "decoder": "decoders tuned for {}", "flow": "flows for {}"}
    steps = [text.format(found["steps"][stage]) for stage, text in names.items() if found["steps"].get(stage)]
    samples = f", and {found['samples']} volumes are sampled from each flow" if found["steps"].get("flow") else ""
    head = (
        f"`decovae study {found['plan']}` on the {', '.join(found['data'])}: {found['date']}, "
        f"{table.device_name(found['machine'])}, {found['seconds'] / 60:.0f} minutes in all. In steps, "
        f"{', '.join(steps)}{samples}. Beside each figure stands the paper's; all of it comes from "
        f"{results.link(name)}, written by that command."
    )
    of: dict[str, list[str]] = {}
    for one in tables:
        for note in one.notes:
            of.setdefault(note, []).append(str(one.number))
    notes = [
        f"- {note}" if len(numbers) == len(tables) else f"- Table{'s'[: len(numbers) > 1]} {', '.join(numbers)}: {note}"
        for note, numbers in of.items()
    ]
    return "\n".join([head, "", *(markdown(one, notes=False) for one in tables), *notes])


def quickstart(results: Results) -> str:
    """Reconstruction and use of the channels after `quickstart`, by loss."""
    name = "quickstart-cpu.json"
    found = results.read(name)
    if found is None:
        return "Not measured yet."
    lines = [
        ["deco", "PSNR before → after", "mean abs. Pearson", "effective rank", "time", "peak memory"],
        ["---"] * 6,
    ]
    lines += [
        [
            run["deco"],
            f"{run['psnr_before_training']:.1f} → {run['psnr']:.1f} dB",
            f"{run['pearson']:.3f}",
            f"{run['effective_rank']:.2f} of {len(run['explained_variance'])}",
            f"{run['seconds']:.0f} s",
            f"{run['peak_memory_gb']:.1f} GB",
        ]
        for run in found["runs"]
    ]
    origin = _origin(results, name, found, "python -m bench.quickstart")
    return f"{table.grid(lines)}\n\nValidation subjects of the template cohort, one seed. {origin}"


def generation(results: Results) -> str:
    """Fine-tuned decoders, flows on their latents, and samples."""
    name = "generation-cpu.json"
    found = results.read(name)
    if found is None:
        return "Not measured yet."
    lines = [
        [
            "deco",
            "PSNR, fine-tuning",
            "flow trained on",
            "flow loss, held out",
            "Fréchet distance",
            "Dice with template",
        ],
        ["---"] * 6,
    ]
    for chain in found["chains"]:
        for train_on, flow in chain["flows"].items():
            lines.append(
                [
                    chain["deco"],
                    f"{chain['vae']['psnr']:.2f} → {chain['decoder']['psnr']:.2f} dB",
                    {"draws": "draws μ + σε", "mean": "means μ"}.get(train_on, train_on),
                    f"{flow['summary']['flow_loss']:.4f}",
                    f"{flow['frechet_random_features']:.3f}",
                    f"{flow['dice_with_template']['mean']:.3f}",
                ]
            )
    unseen = found["frechet_random_features_of_other_unseen_subjects"]
    dice = found["dice_with_template_of_the_unseen"]["mean"]
    return (
        f"{table.grid(lines)}\n\nThe Fréchet distance is a proxy: {found['samples']} samples against as many unseen "
        f"subjects, features of slices from a network with random weights; other unseen subjects come to {unseen:.3f}, "
        f"and their Dice coefficient is {dice:.3f}. {_origin(results, name, found, 'python -m bench.generation')}"
    )


def parity(results: Results) -> str:
    """Loss curves with and without fused blocks."""
    name = "parity-cpu.json"
    found = results.read(name)
    if found is None:
        return "Not measured yet."
    lines = [["run", "L1 at the end", "RMS difference from plain float32"], ["---", "---:", "---:"]]
    for run, share in found["relative_rms_difference_of_l1"].items():
        lines.append([run, f"{found['curves'][run][-1]:.4f}", f"{share:.1%}"])
    return (
        f"{table.grid(lines)}\n\n{found['steps']} steps of one seed; curves in {results.link('parity-cpu.png')}. "
        + (_origin(results, name, found, "python -m bench.parity"))
    )


def autoencoder_memory(results: Results) -> str:
    """Counts of the paper's autoencoder, in training and decoding."""
    name = "memory.json"
    found = results.read(name)
    if found is None:
        return "Not counted yet."
    names = {
        "MONAI": "MONAI",
        "MONAI, its `norm_float16`": "MONAI, norm_float16",
        "MONAI, its checkpointing": "MONAI, use_checkpointing",
        "plain torch": "plain torch, channels-last",
        "`balanced`": "ours, balanced",
        "`tight`": "ours, tight",
    }
    lines = [["counted, bf16", *names], ["---", *["---:"] * len(names)]]
    wanted = (
        ((2, 1, 96, 96, 96), "saved", "2×1×96³, saved for backward"),
        ((2, 1, 96, 96, 96), "peak", "the same, peak of the step"),
        ((2, 1, 96, 96, 96), "forward", "the same, arithmetic forward"),
        ((2, 1, 96, 96, 96), "both", "the same, forward and backward"),
        ((1, 1, 128, 256, 128), "saved", "1×1×128×256×128, saved for backward"),
        ((1, 1, 128, 256, 128), "peak", "the same, peak of the step"),
        ((1, 4, 32, 64, 32), "peak", "decoding 1×4×32×64×32, peak"),
    )
    values = {(row["implementation"], tuple(row["shape"])): row for row in found["rows"]}
    for shape, key, title in wanted:
        text = units.operations if key in ("forward", "both") else units.size
        cells = [values.get((name, shape), {}).get(key) for name in names.values()]
        lines.append([title, *(DASH if cell is None else text(cell) for cell in cells)])
    return f"{table.grid(lines)}\n\n{_counted(results, name, found, 'python -m bench.memory')}"


def flow_memory(results: Results) -> str:
    """Counts of the paper's flow, in training and sampling."""
    name = "flow-memory.json"
    found = results.read(name)
    if found is None:
        return "Not counted yet."
    names = list(dict.fromkeys(row["implementation"] for row in found["rows"]))
    lines = [["counted, bf16", *names], ["---", *["---:"] * len(names)]]
    wanted = (
        ("training", "saved", "training on 4×4×32×64×32, saved for backward"),
        ("training", "peak", "the same, peak with weights and Adam's moments"),
        ("velocity", "peak", "one velocity of 1×4×32×64×32, peak"),
    )
    values = {(row["implementation"], row["what"]): row for row in found["rows"]}
    for what, key, title in wanted:
        lines.append([title, *(units.size(values[name, what][key]) for name in names)])
    return f"{table.grid(lines)}\n\n{_counted(results, name, found, 'python -m bench.flow_memory')}"


def machines(results: Results) -> str:
    """What was measured where: a line a campaign."""
    campaigns = results.campaigns()
    if not campaigns:
        return "No campaign has been measured yet."
    lines = [
        ["machine", "date", "sizes", "rows measured", "all of it", "ceilings: copy, matrix products"],
        ["---"] * 6,
    ]
    for name, campaign in campaigns.items():
        rows = table.complete(campaign)
        done = sum(row.outcome == "measured" for row in rows)
        found = campaign.ceilings or {}
        rates = found.get("matrix_flops_per_second") or {}
        dtype = next((dtype for dtype in ("bfloat16", "float32") if rates.get(dtype) and _main(campaign, dtype)), None)
        reached = [units.bandwidth(found["copy_bytes_per_second"])] if found else []
        reached += [f"{units.rate(rates[dtype])} {dtype}"] if dtype else []
        lines.append(
            [
                table.device_name(campaign.machine),
                campaign.date,
                {"gpu": "the paper's", "cpu": "small", "tiny": "tiny"}[campaign.scale],
                f"{done} of {len(rows)}",
                f"{results.link(f'{name}/{table.FILE}')}, {results.link(f'{name}/{table.RECORD}')}",
                ", ".join(reached) or DASH,
            ]
        )
    return table.grid(lines)


def _main(campaign: Campaign, dtype: str) -> bool:
    return (dtype == "bfloat16") == (table.device(campaign) == "gpu")


def measured_summary(results: Results) -> str:
    """For each campaign a line a subject."""
    parts = []
    for name, campaign in results.campaigns().items():
        link = results.link(f"{name}/{table.RECORD}")
        parts += [
            f"**{table.device_name(campaign.machine)}**, {campaign.date}, from {link}; beside each peer's fastest time "
            "how many times as long as our fastest it is; memory is that of what is done by default:",
            table.summary(table.complete(campaign)),
        ]
    return "\n\n".join(parts) or "No campaign has been measured yet."


def targets(results: Results) -> str:
    """All targets, each with what the campaigns say of it."""
    found: dict[Device, list[Verdict]] = {"gpu": verdicts([], "gpu"), "cpu": verdicts([], "cpu")}
    campaigns = []
    for name, campaign in results.campaigns().items():
        if campaign.scale == table.device(campaign):
            found[table.device(campaign)] = verdicts(table.complete(campaign), table.device(campaign))
            campaigns.append(results.link(f"{name}/{table.RECORD}"))
    lines = [["target", "on", "bound", "figure", "verdict"], ["---", "---", "---:", "---:", "---"]]
    files = set()
    for device, group in found.items():
        for verdict in group:
            name, *cells = table.verdict_cells(verdict)
            lines.append([name, device.upper(), *cells])
            if verdict.target.elsewhere and (verdict.predicted or verdict.behind == verdict.target.elsewhere.file):
                files.add(verdict.target.elsewhere.file)
    sources = [*campaigns, *(results.link(file) for file in sorted(files) if (results.folder / file).exists())]
    return f"{table.grid(lines)}\n\nFrom {', '.join(sources) or 'nothing measured yet'}."


def predicted(results: Results) -> str:
    """The least times of a few rows on two cards, and what fits them."""
    found = results.predicted()
    if found is None:
        return "Not counted yet."
    rows = [Row.from_dict(row) for row in found["rows"]]
    names = [card.name for card in predict.CARDS]
    lines = [["predicted least time", *names, "bound by"], ["---", *["---:"] * len(names), "---"]]
    for case, group in table.headlines(rows).items():
        times = [predict.least_seconds(group[0].extra_info or {}, card) for card in predict.CARDS]
        bound = " / ".join(dict.fromkeys(by for _, by in times))
        lines.append([_title(case), *(f"≥ {units.seconds(seconds)}" for seconds, _ in times), bound])
    folder = predict.FOLDER.name
    steps = "; ".join(
        f"{units.size(step['peak']['balanced'])} for {units.shape('x'.join(map(str, step['shape'])))}"
        for step in found["full_steps"]
    )
    return (
        f"{table.grid(lines)}\n\nNot measured: counted bytes over {_bandwidths()}, or counted products over "
        f"{_rates()}, whichever takes longer. The whole training step, `balanced`, is predicted to peak at {steps}. "
        f"All rows: {results.link(f'{folder}/{table.FILE}')}, from {results.link(f'{folder}/{predict.FILE}')}, made by "
        "`python -m bench.campaign predict`."
    )


def _bandwidths() -> str:
    return " and ".join(units.bandwidth(card.bytes_per_second) for card in predict.CARDS)


def _rates() -> str:
    return " and ".join(units.rate(card.flops_per_second["bfloat16"]) for card in predict.CARDS)


def cold_start(results: Results) -> str:
    """What the first step after installing costs, and the next start."""
    found: dict[str, Any] = {}
    links = []
    for name, campaign in results.campaigns().items():
        check = campaign.checks.get("cold_start")
        if check and check.get("starts"):
            found[f"{table.device_name(campaign.machine)}, `{check['options'].split()[0]}`"] = check
            links.append(results.link(f"{name}/{table.RECORD}"))
    return f"{table.cold_start(found)}\n\nFrom {', '.join(links)}." if found else "Not measured yet."


def not_measured(results: Results) -> str:
    """Which devices, checks and rows have no figure."""
    campaigns = results.campaigns()
    lines = []
    if not any(table.device(campaign) == "gpu" for campaign in campaigns.values()):
        lines.append(
            "- Anything on a GPU: no campaign ran on one. The Triton kernels are compiled for sm_86 and sm_90 and "
            "tested in Triton's interpreter; `python -m bench.campaign` on a GPU fills the tables."
        )
    for name, campaign in campaigns.items():
        rows = table.complete(campaign)
        missing = {"failed": 0, "not reached": 0, "skipped": 0}
        for row in rows:
            if row.outcome == "failed":
                missing["failed"] += 1
            elif row.outcome == "skipped" and not (row.reason or "").startswith("does not fit"):
                missing["skipped"] += 1
            elif row.outcome not in ("measured", "skipped"):
                missing["not reached"] += 1
        checks = [what for what, told in table.check_lines(campaign.checks) if told.startswith(("not run", "not meas"))]
        told = [f"{count} rows {why}" for why, count in missing.items() if count] + checks
        if told:
            link = results.link(f"{name}/{table.FILE}")
            lines.append(f"- {table.device_name(campaign.machine)}: {'; '.join(told)} ({link}).")
    lines.append("- The `paper` preset beyond a few steps of its parts.")
    return "\n".join(lines)


def predicted_scaling(results: Results) -> str:
    """What training on several nodes is predicted to reach, and on what grounds."""
    found = results.read(scaling.NAME)
    if found is None:
        return "Not counted yet."
    measured = sorted({row["measured"] for row in found["rows"] if row["measured"]})
    steps = {(row["subject"], row["card"]): row["one_process_seconds"] for row in found["rows"]}
    times = "; ".join(f"{subject} on an {card} {units.seconds(seconds)}" for (subject, card), seconds in steps.items())
    source = f"measured in {', '.join(measured)}, or predicted" if measured else "predicted, not measured"
    counted = found["processes_counted"]
    worst = min((row for row in found["rows"] if row["strategy"] == "hsdp"), key=lambda row: row["efficiency"])
    key = f"efficiency_of_{scaling.BATCHES}_batches"
    helped = (
        f"Where a network is too slow, accumulate: the {worst['subject']} on {worst['cluster']} (hsdp) rises from "
        f"{worst['efficiency']:.0%} to {worst[key]:.0%} with `--optimizer.accumulation {scaling.BATCHES}`. "
    )
    return (
        f"{scaling.markdown(found)}\n\n"
        "Efficiency is one process's time a step over that of each among all, with a batch of its own, in bfloat16; in "
        "brackets, were the cards as fast as published, so that messages had the least computing to hide behind. "
        f"{helped}A step of one process ({source}): {times}. Assumed: {'; '.join(found['assumptions'])}. Messages were "
        f"counted {found['date']} among {counted['world']} processes as 2 nodes on the CPU: "
        f"{results.link(scaling.NAME)}, made by `python -m bench.scaling`, which says what is left out."
    )


def loop_cost(results: Results) -> str:
    """What training costs beside its networks."""
    found = results.read(loop_overhead.NAME)
    if found is None:
        return "Not measured yet."
    origin = _origin(results, loop_overhead.NAME, found, "python -m bench.loop_overhead")
    return f"{loop_overhead.markdown(found)}\n\n{origin}"


def step_split(results: Results) -> str:
    """Where the time of a training step goes."""
    parts = []
    for device in ("cpu", "cuda"):
        name = f"step-profile-{device}.json"
        if (found := results.read(name)) is not None:
            origin = _origin(results, name, found, "python -m bench.step_profile")
            parts += [step_profile.table(found["modes"]), f"`{' '.join(found['options'])}`. {origin}"]
    return "\n\n".join(parts) or "Not measured yet."


def survived(results: Results) -> str:
    """How runs came out that were killed."""
    found = results.read(survival.NAME)
    if found is None:
        return "Not measured yet."
    kills = ", ".join(f"{count} in {inside}" for inside, count in found["kills"].items())
    processes = sorted({trial["processes"] for trial in found["each"]})
    return (
        f"Of {found['trials']} runs of {_all_of(processes)} processes that were killed by SIGKILL, {found['equal']} "
        f"came out bit-equal to one that was not, in weights, log, pictures and summary. Kills: {kills}. "
        f"{_origin(results, survival.NAME, found, 'python -m bench.survival')}"
    )


def data_speed(results: Results) -> str:
    """Patches a second from a store and MONAI's ways to them, and what a store costs."""
    found = results.read(data_tables.NAME)
    if found is None:
        return "Not measured yet."
    origin = _origin(results, data_tables.NAME, found, "python -m bench.data")
    return f"{data_tables.markdown(found)}\n\n{data_tables.explanation(found)} {origin}"


def formats(results: Results) -> str:
    """What volumes could be kept in."""
    found = results.read(store_formats.NAME)
    if found is None:
        return "Not measured yet."
    origin = _origin(results, store_formats.NAME, found, "python -m bench.store_formats")
    return f"{store_formats.markdown(found)}\n\n{store_formats.explanation(found)} {origin}"


def _all_of(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))


def loss_tables(results: Results) -> str:
    """VAD's rows of every campaign."""
    return _tables(results, lambda case: case.suite == "losses" and case.subject == "VAD")


def block_tables(results: Results) -> str:
    """The blocks' and the autoencoder's rows of every campaign."""
    return _tables(results, lambda case: case.suite in ("blocks", "autoencoder", "norm + act"))


def _tables(results: Results, wanted: Callable[[Case], bool]) -> str:
    """A table a subject and shape, of the case that stands for it in the summary."""
    parts = []
    for name, campaign in results.campaigns().items():
        groups = {case: rows for case, rows in table.headlines(table.complete(campaign)).items() if wanted(case)}
        if groups:
            parts.append(f"{table.origin(campaign)} From {results.link(f'{name}/{table.RECORD}')}.")
        for case, rows in groups.items():
            parts += [
                f"**{case.subject}, {units.shape(case.shape)}**",
                table.subject_table({case: rows}, predictions=False),
            ]
    return "\n\n".join(parts) or "No campaign has been measured yet."


def _title(case: Case) -> str:
    return f"{case.subject}, {units.shape(case.shape)}, {case.title}"


def _origin(results: Results, name: str, found: Mapping[str, Any], command: str) -> str:
    return f"{found['date']}, {table.device_name(found['machine'])}: {results.link(name)}, made by `{command}`."


def _counted(results: Results, name: str, found: Mapping[str, Any], command: str) -> str:
    return (
        f"Counted {found['date']} on fake tensors, without a GPU: {results.link(name)}, made by `{command}`. Peaks "
        "have weights, gradients and the optimizer's moments in them, not cuDNN's workspaces, the CUDA context and "
        "fragmentation."
    )


BLOCKS: dict[str, Callable[[Results], str]] = {
    "studies": studies,
    "quickstart": quickstart,
    "generation": generation,
    "parity": parity,
    "autoencoder-memory": autoencoder_memory,
    "flow-memory": flow_memory,
    "machines": machines,
    "summary": measured_summary,
    "targets": targets,
    "predicted": predicted,
    "cold-start": cold_start,
    "not-measured": not_measured,
    "scaling": predicted_scaling,
    "loop": loop_cost,
    "step-profile": step_split,
    "survival": survived,
    "data": data_speed,
    "store-formats": formats,
    "losses": loss_tables,
    "blocks": block_tables,
}


def rewritten(text: str, results: Results) -> str:
    """A README with its blocks made again.

    Raises:
        ValueError: a block of an unknown name.
    """

    def made(block: re.Match[str]) -> str:
        name = block["name"]
        if name not in BLOCKS:
            raise ValueError(f"{results.readme}: no figures are called {name!r}; there are {', '.join(BLOCKS)}")
        return f"{block['begin']}{BLOCKS[name](results).rstrip()}\n{block['end']}"

    return BLOCK.sub(made, text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args(argv)
    outdated = []
    for name in FILES:
        path = ROOT / name
        found = path.read_text(encoding="utf-8")
        text = rewritten(found, Results(RESULTS, path))
        if text != found:
            outdated.append(name)
            if not arguments.check:
                write_text(path, text)
    if arguments.check and outdated:
        print(f"{', '.join(outdated)}: not what bench/results/ says; run `python -m bench.readme`.", file=sys.stderr)
    return int(arguments.check and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())

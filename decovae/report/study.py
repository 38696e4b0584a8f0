"""The paper's matrix as commands: {none, COV, SID, VAD} × {before, after fine-tuning}, through flow and samples.

A study is a folder. Each of its models has one of its own in it, ``vad-seed42``, with the runs ``vae``, ``decoder``
and, where the plan generates, ``flow``; latents, analyses, samples and evaluations lie in the runs that they are of.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from decovae.generation.sample_folder import CONTACT_SHEET
from decovae.losses.objective import Decorrelation
from decovae.report.models import AFTER, BEFORE
from decovae.report.study_plans import Plan

Tool = Literal["train/vae.py", "train/decoder.py", "train/flow.py", "decovae"]

DECOS: tuple[Decorrelation, ...] = ("none", "cov", "sid", "vad")


FIRST: dict[Decorrelation, int] = {"none": 0, "vad": 0, "sid": 1, "cov": 2}
"""What is wanted first when a study is stopped half-way: the baseline and the paper's best, side by side."""


@dataclass(frozen=True)
class Cell:
    """One command of a study.

    Attributes:
        name: ``vad-seed42/flow``; unique.
        tool: what is run.
        arguments: its arguments.
        done: a file that is there once it has succeeded.
        after: names of the cells whose results it needs.
        stage: how many blocks of commands have to be behind it; those of one stage need nothing of each other.
    """

    name: str
    tool: Tool
    arguments: tuple[str, ...]
    done: Path
    after: tuple[str, ...] = ()
    stage: int = 0

    @property
    def overwrites(self) -> bool:
        """Whether it can be run again over its result: analyses and evaluations can, what they measure is kept."""
        return self.tool == "decovae" and self.arguments[0] in ("analyze", "evaluate")


@dataclass(frozen=True)
class StudyOptions:
    """What all models of a study have in common. `vae`, `decoder` and `flow` are further options of the trainings."""

    plan: Plan
    out: Path
    samples: int
    decos: tuple[Decorrelation, ...] = DECOS
    seeds: tuple[int, ...] = (42,)
    vae: tuple[str, ...] = ()
    decoder: tuple[str, ...] = ()
    flow: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()
    common: tuple[str, ...] = field(default=())
    """Of every command: ``--device cpu``."""


def cells(options: StudyOptions) -> list[Cell]:
    """All commands of a study, in an order that respects what needs what.

    Seed by seed, and of each seed none and VAD to their end before SID and COV, so that a study that is stopped has
    something to compare. Autoencoders for Table 1 alone come last.
    """
    found: list[tuple[tuple[int, int, int], Cell]] = []
    for turn, seed in enumerate(options.seeds):
        for deco in options.decos:
            found += [((turn, FIRST[deco], cell.stage), cell) for cell in _model_cells(deco, seed, options)]
    for turn, seed in enumerate(options.plan.latent_seeds, start=len(options.seeds)):
        for deco in options.decos:
            if seed not in options.seeds and deco != "cov":
                alone = _model_cells(deco, seed, options, latents_only=True)
                found += [((turn, FIRST[deco], cell.stage), cell) for cell in alone]
    return [cell for _, cell in sorted(found, key=lambda entry: entry[0])]


def _model_cells(deco: str, seed: int, options: StudyOptions, *, latents_only: bool = False) -> Iterator[Cell]:
    model = f"{deco}-seed{seed}"
    folder = options.out / model
    vae, decoder, flow = (folder / name for name in ("vae", "decoder", "flow"))
    plan, common = options.plan, options.common
    seeded = ("--seed", str(seed), *common)

    def cell(name: str, tool: Tool, arguments: Sequence[object], done: Path, after: Sequence[str], stage: int) -> Cell:
        needs = tuple(f"{model}/{before}" for before in after)
        return Cell(f"{model}/{name}", tool, tuple(map(str, arguments)), done, needs, stage)

    def train(name: str, arguments: Sequence[object], after: Sequence[str], stage: int) -> Cell:
        out = folder / name
        everything = [plan.preset, *arguments, "--out", out, *seeded]
        return cell(name, f"train/{name}.py", everything, out / "summary.json", after, stage)  # type: ignore[arg-type]

    def evaluate(name: str, arguments: Sequence[object], out: Path, after: Sequence[str], stage: int) -> Cell:
        everything = ["evaluate", *arguments, "--out", out, *options.evaluate, *common]
        return cell(name, "decovae", everything, out / "evaluation.json", after, stage)

    yield train("vae", ["--deco", deco, *plan.data, *plan.vae, *options.vae], [], 0)
    latents = vae / "latents" / "index.json"
    yield cell("encode", "decovae", ["encode", vae, *common], latents, ["vae"], 1)
    analysis = vae / "analysis"
    analyze = ["analyze", vae, "--out", analysis, *(["--tsne-codes", "0"] if latents_only else []), *common]
    yield cell("analyze", "decovae", analyze, analysis / "analysis.json", ["encode"], 2)
    if latents_only:
        return
    if plan.generates:
        yield train("flow", ["--vae", vae, *plan.flow, *options.flow], ["encode"], 3)
    yield train("decoder", ["--vae", vae, *plan.decoder, *options.decoder], ["vae"], 4)
    for phase, run in ((BEFORE, vae), (AFTER, decoder)):
        yield evaluate(f"evaluate-{run.name}", [run], run / "evaluation", [run.name], 5)
        if not plan.generates:
            continue
        out = flow / "samples" / phase
        sample = ["sample", flow, "-n", options.samples, "--decoder", run, "--out", out, *seeded]
        sheet = out / CONTACT_SHEET  # which is drawn when all samples are there
        yield cell(f"sample-{phase}", "decovae", sample, sheet, ["flow", run.name], 6)
        measured = [flow, "--samples", out, "-n", options.samples]
        yield evaluate(f"evaluate-{phase}", measured, out / "evaluation", [f"sample-{phase}"], 7)


def command_list(planned: Sequence[Cell], *, processes: int | None = None) -> str:
    """The commands as a shell script: blocks, of which each needs those before it, and whose lines need nothing of each
    other, so that a scheduler may run them at the same time.

    Args:
        planned: the cells.
        processes: of a command; None is one a GPU.
    """
    lines = [
        "#!/usr/bin/env bash",
        "# Lines of one block can run at the same time; a block needs the blocks before it. In a clone of decovae.",
        f'LAUNCH=${{LAUNCH:-"torchrun --standalone --nproc_per_node {processes or "gpu"}"}}',
    ]
    block, stage = 0, -1
    for cell in sorted(planned, key=lambda cell: cell.stage):
        if cell.stage != stage:
            block, stage = block + 1, cell.stage
            lines.append(f"\n# {block}: {cell.name.rpartition('/')[2].partition('-')[0]}")
        tool = "-m decovae.cli" if cell.tool == "decovae" else cell.tool
        lines.append(f"$LAUNCH {tool} {shlex.join(cell.arguments)}")
    return "\n".join(lines) + "\n"

"""The paper's matrix as commands: {none, COV, SID, VAD} × {before, after fine-tuning}, through flow and samples.

A study is a folder. Each of its models has one of its own in it, ``vad-seed42``, with the runs ``vae``, ``decoder`` and
``flow``; latents, analyses, samples and evaluations lie in the runs that they are of.
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
from decovae.training.config import Preset

Tool = Literal["train/vae.py", "train/decoder.py", "train/flow.py", "decovae"]

DECOS: tuple[Decorrelation, ...] = ("none", "cov", "sid", "vad")


@dataclass(frozen=True)
class Plan:
    """What a study trains and samples, beside what its options say.

    Attributes:
        preset: of the three trainings.
        samples: volumes to sample from each flow.
        data: options of train/vae.py on its volumes, the template cohort's; all later steps take them from its run.
        vae: more options of train/vae.py.
        decoder: more options of train/decoder.py.
        flow: more options of train/flow.py.
        latent_seeds: seeds of further autoencoders, trained and analysed alone, for Table 1's mean and deviation; COV,
            which is not in the paper's, has none.
    """

    preset: Preset
    samples: int
    data: tuple[str, ...] = ()
    vae: tuple[str, ...] = ()
    decoder: tuple[str, ...] = ()
    flow: tuple[str, ...] = ()
    latent_seeds: tuple[int, ...] = ()


PLANS = {
    "quickstart": Plan(
        "quickstart",
        samples=10,
        data=tuple("--data.cohort-size 32 --data.validation-fraction 0.25".split()),
        # The paper's KL weight acts over 100,000 steps; in 400 it would leave the channels' means, which the cosine
        # similarity does not subtract, where they began.
        vae=tuple("--steps 400 --validate-every 400 --loss.kl 5e-3".split()),
        decoder=tuple("--steps 60 --validate-every 60".split()),
        flow=tuple("--steps 300 --validate-every 300 --preview.samples 0".split()),
        latent_seeds=(43, 44),  # a seed alone decides in so few steps how SID and VAD compare
    ),
    "paper": Plan("paper", samples=1000),
}
"""By name."""


@dataclass(frozen=True)
class Cell:
    """One command of a study.

    Attributes:
        name: ``vad-seed42/flow``; unique.
        tool: what is run.
        arguments: its arguments.
        done: a file that is there once it has succeeded.
        after: names of the cells whose results it needs.
        stage: its rank in the order in which cells are begun; those of one rank need nothing of each other.
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
    """All commands of a study, in an order that respects what needs what."""
    found = [cell for seed in options.seeds for deco in options.decos for cell in _model_cells(deco, seed, options)]
    for seed in options.plan.latent_seeds:
        for deco in options.decos:
            if seed not in options.seeds and deco != "cov":
                found += _model_cells(deco, seed, options, latents_only=True)
    return sorted(found, key=lambda cell: cell.stage)


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
    yield cell("analyze", "decovae", analyze, analysis / "analysis.json", ["encode"], 4)
    if latents_only:
        return
    yield train("flow", ["--vae", vae, *plan.flow, *options.flow], ["encode"], 2)
    yield train("decoder", ["--vae", vae, *plan.decoder, *options.decoder], ["vae"], 3)
    for phase, run in ((BEFORE, vae), (AFTER, decoder)):
        yield evaluate(f"evaluate-{run.name}", [run], run / "evaluation", [run.name], 5)
        out = flow / "samples" / phase
        sample = ["sample", flow, "-n", options.samples, "--decoder", run, "--out", out, *seeded]
        sheet = out / CONTACT_SHEET  # which is drawn when all samples are there
        yield cell(f"sample-{phase}", "decovae", sample, sheet, ["flow", run.name], 6)
        measured = [flow, "--samples", out, "-n", options.samples]
        yield evaluate(f"evaluate-{phase}", measured, out / "evaluation", [f"sample-{phase}"], 7)


def command_list(planned: Sequence[Cell]) -> str:
    """The commands as a shell script: blocks, of which each needs those before it, and whose lines need nothing of each
    other, so that a scheduler may run them at the same time."""
    lines = [
        "#!/usr/bin/env bash",
        "# Lines of one block can run at the same time; a block needs the blocks before it. In a clone of decovae.",
        'LAUNCH=${LAUNCH:-"torchrun --standalone --nproc_per_node gpu"}',
    ]
    stage = -1
    for cell in planned:
        if cell.stage != stage:
            stage = cell.stage
            lines.append(f"\n# {stage + 1}: {cell.name.rpartition('/')[2].partition('-')[0]}")
        tool = "-m decovae.cli" if cell.tool == "decovae" else cell.tool
        lines.append(f"$LAUNCH {tool} {shlex.join(cell.arguments)}")
    return "\n".join(lines) + "\n"

"""``decovae study``: the paper's models and tables, by one command."""

from __future__ import annotations

import contextlib
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from decovae.errors import InputError
from decovae.losses.objective import Decorrelation, LossConfig
from decovae.losses.perceptual import RANDOM
from decovae.report.study import DECOS, Cell, StudyOptions, cells, command_list
from decovae.report.study_plans import PLANS

if TYPE_CHECKING:
    from decovae.report.models import Model
    from decovae.report.study_run import Record


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """Volumes of all models."""

    root: Path | None = None
    """A store of `decovae prepare`, a folder with .nii or .nii.gz anywhere below it, or a CSV manifest with a `path`
    column; none is the template cohort."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Train, fine-tune, encode, analyse, sample and evaluate the paper's models; write its Tables 1 to 5 and a page.

    The same command with the same --out goes on where it was stopped, so that short sessions (--minutes) add up.
    """

    plan: tyro.conf.Positional[Literal["quickstart", "mini", "mini-3h", "paper"]] = "quickstart"
    """Settings of all runs. quickstart takes minutes on a laptop. mini is the paper's autoencoder and losses on the
    template cohort in 1,800 steps, without flows: Tables 1, 2, 4 and 5, by prediction half an hour of one H200. mini-3h
    has 6,500 steps, and three seeds in Table 1. paper is the paper's."""
    out: Path | None = None
    """The study's folder; by default runs/study-PLAN."""
    deco: tuple[Decorrelation, ...] = DECOS
    """Decorrelation losses to compare."""
    seeds: tuple[int, ...] = (42,)
    """Seeds; with several, tables show mean and standard deviation."""
    latent_seeds: tuple[int, ...] | None = None
    """Seeds of further autoencoders, without COV, that are trained for Table 1 alone; by default 43 44 (quickstart,
    mini-3h) or none."""
    samples: int | None = None
    """Volumes to sample from each flow; by default 10 (quickstart) or 1,000 (paper); mini has no flows."""
    data: StudyData = field(default_factory=StudyData)
    radimagenet: Path | None = None
    """RadImageNet's ResNet-50, whose features the paper's FID is of; without it the tables show a proxy."""
    perceptual: str | None = None
    """Features of the perceptual loss: pretrained, random (a proxy), none, or the path of a squeezenet1_1 weights file.
    By default the preset's: random for quickstart, else pretrained, which are downloaded before anything is trained.
    With random, this and the adversarial loss have the quickstart's weights, which were chosen for such features."""
    vae_options: str = ""
    """More options of train/vae.py for every model, one string behind an equals sign: --vae-options="--steps 50000"."""
    decoder_options: str = ""
    """More options of train/decoder.py."""
    flow_options: str = ""
    """More options of train/flow.py."""
    evaluate_options: str = ""
    """More options of decovae evaluate."""
    print_commands: bool = False
    """Print the commands as a script for a cluster, and run nothing."""
    minutes: float | None = None
    """Stop after so many, as Ctrl-C would, with a checkpoint, and write the tables and the page of what is done; the
    same command goes on. The stop may take a minute more, and evaluations begin anew: give more than one of them takes.
    0 runs nothing and writes what is there."""
    jobs: int | None = None
    """Commands at a time; by default 1 with a GPU, and up to 4 on the CPU, one a core."""
    processes: int | None = None
    """Processes of a command, by torchrun; by default one a GPU, and 1 for mini, whose batch is that of one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return self.out if self.out is not None else Path("runs") / f"study-{self.plan}"


def main(arguments: Sequence[str]) -> int:
    """The command, from its options to its exit code: 0, 1 if a step failed, 2 for a wrong input."""
    from decovae.training.command_line import exit_code, parse_options

    def study() -> None:
        config = parse_options(StudyConfig, arguments, program="decovae study")
        options = study_options(config)
        planned = cells(options)
        if config.print_commands:
            again = [argument for argument in arguments if argument not in ("--print-commands", "--print_commands")]
            print(command_list(planned, processes=config.processes or options.plan.processes))
            print(f"# Tables and page\ndecovae study {shlex.join(again)}")
            return
        _study(config, options, planned)

    return exit_code(study, stopped="stopped; the same command goes on from the last checkpoints.")


def study_options(config: StudyConfig) -> StudyOptions:
    """What a command line asks for.

    Raises:
        InputError: an unusable option.
    """
    plan = PLANS[config.plan]
    samples = plan.samples if config.samples is None else config.samples
    if not plan.generates:
        for option, value in (("--samples", config.samples), ("--flow-options", config.flow_options or None)):
            if value is not None:
                raise InputError(f"{option} {value}: {config.plan} trains no flows; leave it out.")
    elif samples < 2:
        raise InputError(f"--samples {samples}: a Fréchet distance needs at least 2 volumes.")
    if config.minutes is not None and not config.minutes >= 0:
        raise InputError(f"--minutes {config.minutes:g}: must not be negative.")
    for option, values in (("--deco", config.deco), ("--seeds", config.seeds)):
        if not values or len(set(values)) < len(values):
            raise InputError(f"{option} {' '.join(map(str, values))}: name at least one, and none twice.")
    for option, number in (("--jobs", config.jobs), ("--processes", config.processes)):
        if number is not None and number < 1:
            raise InputError(f"{option} {number}: must be at least 1.")
    if config.data.root is not None:
        plan = replace(plan, data=("--data.root", str(config.data.root)))
    if config.latent_seeds is not None:
        plan = replace(plan, latent_seeds=config.latent_seeds)
    features = () if config.radimagenet is None else ("--radimagenet", str(config.radimagenet))
    return StudyOptions(
        plan,
        config.folder,
        samples,
        decos=config.deco,
        seeds=config.seeds,
        vae=(*_perceptual(config, "vae"), *_split("--vae-options", config.vae_options)),
        decoder=(*_perceptual(config, "decoder"), *_split("--decoder-options", config.decoder_options)),
        flow=_split("--flow-options", config.flow_options),
        evaluate=(*features, *_split("--evaluate-options", config.evaluate_options)),
        common=() if config.device == "auto" else ("--device", config.device),
    )


def _perceptual(config: StudyConfig, stage: Literal["vae", "decoder"]) -> tuple[str, ...]:
    """Options of a training that stand for ``--perceptual``."""
    from decovae.training.presets import DECODER_PRESETS, VAE_PRESETS

    if config.perceptual is None:
        return ()
    options = ("--loss.perceptual-network", config.perceptual)
    if config.perceptual != RANDOM:
        return options
    loss: LossConfig = (VAE_PRESETS if stage == "vae" else DECODER_PRESETS)["quickstart"][1].loss
    names = ("perceptual", "adversarial_slices", "adversarial_volume")
    weights = [(f"--loss.{name.replace('_', '-')}", str(getattr(loss, name))) for name in names]
    return (*options, *(word for weight in weights for word in weight))


def _split(option: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise InputError(f"{option} {text}: is no command line ({error}).") from error


def _study(config: StudyConfig, options: StudyOptions, planned: Sequence[Cell]) -> None:
    import datetime

    import torch

    import decovae
    from decovae.machine import describe
    from decovae.metrics.slice_features import radimagenet_network
    from decovae.report.study_run import Record, Runner
    from decovae.report.study_trainings import check_trainings, forecast, read_trainings

    until = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
    # What they are not is better said now than after the trainings.
    if config.radimagenet is not None:
        radimagenet_network(config.radimagenet)
    trainings = read_trainings(planned)
    check_trainings(trainings)
    gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    cores = torch.get_num_threads()
    jobs = config.jobs or (1 if gpus else min(4, cores))
    processes = config.processes or options.plan.processes or max(1, gpus)
    folder = config.folder
    facts = {
        "plan": config.plan,
        "date": datetime.date.today().isoformat(),
        "decovae": decovae.__version__,
        "machine": describe(),
        "jobs": jobs,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be made ({error.strerror}); give another folder.") from error
    record = Record(folder, facts)
    seconds = forecast(planned, trainings)
    predicted = "" if seconds is None else f", {seconds / 60:.0f} minutes of one H200 (predicted, not measured)"
    print(f"{len(planned)} steps, {jobs} at a time{predicted}; logs in {folder / 'logs'}", flush=True)
    runner = Runner(folder, record, jobs=jobs, processes=processes, threads=max(1, cores // jobs))
    try:
        remaining = runner.run(planned, until=until)
    except BaseException:
        if runner.began:
            with contextlib.suppress(InputError, OSError):  # of two things that went wrong the first counts
                _write_tables(config, options, record)
        raise
    _write_page(config, options, record)
    for line in closing_lines(planned, remaining, config.minutes):
        print(line)


def closing_lines(planned: Sequence[Cell], remaining: Sequence[Cell], minutes: float | None) -> list[str]:
    """What is left, a line a model, and as the last line how far the study is."""
    if not remaining:
        return [f"Finished: all {len(planned)} steps are done."]
    left: dict[str, list[str]] = {}
    for cell in remaining:
        model, _, name = cell.name.partition("/")
        left.setdefault(model, []).append(name)
    return [
        *(f"To do: {model}: {', '.join(names)}" for model, names in left.items()),
        f"Stopped after {minutes:g} minutes: {len(planned) - len(remaining)} of {len(planned)} steps are done, "
        f"{len(remaining)} are not. The same command goes on.",
    ]


def _write_tables(config: StudyConfig, options: StudyOptions, record: Record) -> list[Model]:
    """Write the tables of the models whose runs are finished, also into the study's record, and return the models."""
    from decovae.report.collect import collect
    from decovae.report.table_text import write_tables
    from decovae.report.tables import study_tables

    finished = [path.parent for path in sorted(config.folder.glob("*/*/summary.json"))]
    if not finished:
        return []
    models = collect(finished)
    tables = study_tables(models, expected=config.deco)
    write_tables(tables, config.folder / "tables")
    record.content |= {
        "data": sorted({model.data for model in models}),
        "steps": {stage: run.config["steps"] for model in reversed(models) for stage, run in model.runs.items()},
        "samples": options.samples,
        "tables": [table.as_dict() for table in tables if not table.empty],
    }
    record.write()
    return models


def _write_page(config: StudyConfig, options: StudyOptions, record: Record) -> None:
    """Write tables and page, and print the tables."""
    from decovae.report.page import write_report
    from decovae.report.table_text import markdown
    from decovae.report.tables import PaperTable

    models = _write_tables(config, options, record)
    if not models:
        print("No run is finished so far, so there are no tables.")
        return
    for entry in record.content["tables"]:
        print(markdown(PaperTable.from_dict(entry)))
    page = config.folder / "report.html"
    write_report(models, page, title=f"DeCo-VAE: study {config.plan}", expected=config.deco)
    if record.content["tables"]:
        print(f"Tables: {config.folder / 'tables'}")
    print(f"Page: {page}")

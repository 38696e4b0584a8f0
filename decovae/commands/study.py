"""``decovae study``: the paper's models and tables, by one command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from decovae.errors import InputError
from decovae.losses.objective import Decorrelation
from decovae.report.study import DECOS, PLANS, Plan, StudyOptions, cells, command_list


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """Volumes of all models."""

    root: Path | None = None
    """Folder with .nii or .nii.gz anywhere below it, or a CSV manifest with a `path` column; none is the template
    cohort."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Train, fine-tune, encode, analyse, sample and evaluate the paper's models; write its Tables 1 to 5 and a page.

    The same command with the same --out goes on where it was stopped.
    """

    plan: tyro.conf.Positional[Literal["quickstart", "paper"]] = "quickstart"
    """Settings of all runs: quickstart takes minutes on a laptop, paper is the paper's."""
    out: Path | None = None
    """The study's folder; by default runs/study-PLAN."""
    deco: tuple[Decorrelation, ...] = DECOS
    """Decorrelation losses to compare."""
    seeds: tuple[int, ...] = (42,)
    """Seeds; with several, tables show mean and standard deviation."""
    latent_seeds: tuple[int, ...] | None = None
    """Seeds of further autoencoders, without COV, that are trained for Table 1 alone; by default 43 44 (quickstart) or
    none (paper)."""
    samples: int | None = None
    """Volumes to sample from each flow; by default 10 (quickstart) or 1,000 (paper)."""
    data: StudyData = field(default_factory=StudyData)
    radimagenet: Path | None = None
    """RadImageNet's ResNet-50, whose features the paper's FID is of; without it the tables show a proxy."""
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
    jobs: int | None = None
    """Commands at a time; by default 1 with a GPU, and up to 4 on the CPU, one a core."""
    processes: int | None = None
    """Processes of a command, by torchrun; by default one a GPU."""
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
        if config.print_commands:
            again = [argument for argument in arguments if argument not in ("--print-commands", "--print_commands")]
            print(command_list(cells(options)) + f"\n# Tables and page\ndecovae study {shlex.join(again)}")
            return
        _study(config, options)

    return exit_code(study, stopped="stopped; the same command goes on from the last checkpoints.")


def study_options(config: StudyConfig) -> StudyOptions:
    """What a command line asks for.

    Raises:
        InputError: an unusable option.
    """
    plan: Plan = PLANS[config.plan]
    samples = plan.samples if config.samples is None else config.samples
    if samples < 2:
        raise InputError(f"--samples {samples}: a Fréchet distance needs at least 2 volumes.")
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
        vae=_split("--vae-options", config.vae_options),
        decoder=_split("--decoder-options", config.decoder_options),
        flow=_split("--flow-options", config.flow_options),
        evaluate=(*features, *_split("--evaluate-options", config.evaluate_options)),
        common=() if config.device == "auto" else ("--device", config.device),
    )


def _split(option: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise InputError(f"{option} {text}: is no command line ({error}).") from error


def _study(config: StudyConfig, options: StudyOptions) -> None:
    import datetime

    import torch

    import decovae
    from decovae.machine import describe
    from decovae.metrics.slice_features import radimagenet_network
    from decovae.report.collect import collect
    from decovae.report.page import write_report
    from decovae.report.study_run import Record, Runner
    from decovae.report.table_text import markdown, write_tables
    from decovae.report.tables import study_tables

    if config.radimagenet is not None:
        radimagenet_network(config.radimagenet)  # what it is not is better said now than after the trainings
    gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    cores = torch.get_num_threads()
    jobs = config.jobs or (1 if gpus else min(4, cores))
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
    planned = cells(options)
    print(f"{len(planned)} steps, {jobs} at a time; logs in {folder / 'logs'}", flush=True)
    Runner(folder, record, jobs=jobs, processes=config.processes or max(1, gpus), threads=max(1, cores // jobs)).run(
        planned
    )
    models = collect([folder])
    tables = study_tables(models)
    write_tables(tables, folder / "tables")
    record.content |= {
        "data": sorted({model.data for model in models}),
        "steps": {stage: run.config["steps"] for stage, run in models[0].runs.items()},
        "samples": options.samples,
        "tables": [table.as_dict() for table in tables],
    }
    record.write()
    for table in tables:
        print(markdown(table))
    page = folder / "report.html"
    write_report(models, page, title=f"DeCo-VAE: study {config.plan}")
    print(f"Tables: {folder / 'tables'}\nPage: {page}")

"""``decovae report``: runs, their figures and their volumes on one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from decovae.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """One self-contained HTML page on finished runs, to read anywhere: no network, no other files.

    What `decovae analyze` and `decovae evaluate` left in the runs is shown; what is missing is named with the command
    that brings it.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of finished runs (autoencoder, decoder, flow), of samples, or of a study that holds them."""
    out: Path = Path("report.html")
    """The page."""
    title: str = "DeCo-VAE report"
    """Its heading."""


def main(arguments: Sequence[str]) -> int:
    """The command, from its options to its exit code: 0, or 2 for a wrong input."""
    from decovae.training.command_line import exit_code, parse_options

    return exit_code(
        lambda: run(parse_options(ReportConfig, arguments, program="decovae report")),
        stopped="stopped; nothing was written.",
    )


def run(config: ReportConfig) -> None:
    """Write the page and say how large it is.

    Raises:
        InputError: a folder is no finished run, a file of it is damaged, or the page cannot be written.
    """
    if not config.runs:
        raise InputError("RUNS: none given; give folders of finished runs, or that of a study.")
    if config.out.is_dir():
        raise InputError(f"--out {config.out}: is a folder; give the name of an HTML file.")
    from decovae.report.collect import collect  # pictures and volumes, which a wrong option can do without
    from decovae.report.honesty import missing
    from decovae.report.page import MEGABYTE, write_report

    models = collect(config.runs)
    try:
        size = write_report(models, config.out, title=config.title)
    except OSError as error:
        raise InputError(f"--out {config.out}: cannot be written ({error.strerror}); give another file.") from error
    names = ", ".join(model.name for model in models)
    count = "1 model" if len(models) == 1 else f"{len(models)} models"
    print(f"{config.out}: {count} ({names}), {size / MEGABYTE:.2f} MB.")
    if gaps := missing(models):
        print(f"  Missing on it: {gaps[0]}" + (f"; and {len(gaps) - 1} more, named there." if gaps[1:] else "."))

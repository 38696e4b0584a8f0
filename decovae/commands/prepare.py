"""``decovae prepare``: volumes into a store that training reads at its own speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from decovae.errors import InputError, RunError

if TYPE_CHECKING:
    from decovae.preparation.config import PrepareConfig

LEFT_OUT = 3
"""The exit code where a volume was left out for which no rule asked."""


def main(arguments: Sequence[str]) -> int:
    """The command, from its options to its exit code: 0, 3 if a volume was left out for which no rule asked, 1 if it
    could not go on, 2 for a wrong input."""
    from decovae.preparation.config import PrepareConfig
    from decovae.training.command_line import exit_code, parse_options

    return exit_code(
        lambda: run(parse_options(PrepareConfig, arguments, program="decovae prepare")),
        stopped="stopped; the same command goes on from the last finished volume.",
    )


def run(config: PrepareConfig) -> int:
    """Prepare a store, or check one, and print what came of it.

    Returns:
        The exit code: 0 or 3.

    Raises:
        InputError, RunError: as `decovae.preparation.run.prepare` and `verify`.
    """
    if config.verify is not None:
        if config.source is not None or config.out is not None:
            raise InputError("--verify: checks a store and prepares none; leave SRC and --out away.")
        verify(config.verify, config.workers)
        return 0
    from decovae.preparation.report import EXCLUDED, summary
    from decovae.preparation.run import prepare

    outcome = prepare(config)
    for line in summary(outcome):
        print(line)
    count = len(outcome.problems)
    if not count or config.allow_excluded:
        return 0
    print(
        f"  {count} left out for which no rule asked, so this ends with exit code {LEFT_OUT}: see to what "
        f"{outcome.folder / EXCLUDED} says and start the same command again, or add --allow-excluded."
    )
    return LEFT_OUT


def verify(folder: Path, workers: int | None) -> None:
    """Check every file of a store and print what is wrong, a line each.

    Raises:
        InputError: there is no store.
        RunError: something is wrong; it says how much.
    """
    from decovae.data.store import open_store
    from decovae.data.store_check import verify_store
    from decovae.preparation.workers import usual_workers

    volumes = open_store(folder)
    faults = verify_store(folder, usual_workers() if workers is None else max(workers, 1))
    for fault in faults:
        print(fault)
    if faults:
        raise RunError(
            f"{folder}: {len(faults)} files are not what they should be; remove them, and run the `decovae prepare` "
            "that made the store again: it makes those anew."
        )
    print(f"{folder}: {len(volumes.records)} volumes, every file as it was written; checksum {volumes.checksum}.")

"""The `decovae` command: ``decovae COMMAND [--option value …]``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from decovae.errors import InputError, RunError
from decovae.process import heard, leave


class Command(NamedTuple):
    """A subcommand: what it does, and the module whose ``main(arguments)`` does it and returns the exit code."""

    purpose: str
    module: str


COMMANDS = {
    "info": Command("Versions, devices, kernels, and the largest patch that fits a card.", "decovae.commands.info"),
    "prepare": Command("Volumes checked and stored so that training reads them fast.", "decovae.commands.prepare"),
    "encode": Command("Latents of a cohort, by a trained autoencoder.", "decovae.commands.encode"),
    "analyze": Command("How latents use their channels: Table 1, Figures 1b, 2 and 3.", "decovae.commands.analyze"),
    "sample": Command("New volumes from a trained flow, labelled as synthetic.", "decovae.commands.sample"),
    "evaluate": Command("Reconstructions or samples, measured like the paper's.", "decovae.commands.evaluate"),
    "export": Command("Weights of a run or a checkpoint, for other programs.", "decovae.commands.export"),
    "import": Command("MAISI's or the authors' flow, as a run to sample from.", "decovae.commands.import_flow"),
    "study": Command("The paper's models, its Tables 1 to 5, and a page on them.", "decovae.commands.study"),
    "report": Command("One self-contained page on runs: tables, figures, a viewer.", "decovae.commands.report"),
}
"""Modules are imported when their command is given, so that none pays for what another needs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        arguments: the command line without the program's name; by default this process's.

    Returns:
        0, 1 if it could not go on, 2 for a wrong input, either with one sentence on standard error that says why; 141
        if whoever was to read what it prints has gone.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    return heard(lambda: _run(given))


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] not in COMMANDS:
        print(f"error: {arguments[0]}: no such command; choose {' or '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(COMMANDS[arguments[0]].module).main(arguments[1:]))
    except ModuleNotFoundError as error:
        missing = f"{arguments[0]}: {error.name} is not installed; `pip install 'decovae[train]'` brings it."
        print(f"error: {missing}", file=sys.stderr)
        return 2
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {command.purpose}" for name, command in COMMANDS.items()]
    usage = "usage: decovae COMMAND [--option value ...]"
    return "\n".join([usage, "", *rows, "", "decovae COMMAND --help says more."])


if __name__ == "__main__":
    leave(main())

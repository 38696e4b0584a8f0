"""From a command line to a configuration, and from an error to one sentence."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from decovae.errors import InputError, RunError
from decovae.process import end_loaders, heard, lost_another, lost_loader

Config = TypeVar("Config")

LOST = (
    "lost another process of this run, which ended or cannot be reached ({}); started again, the run continues from "
    "its last checkpoint, torchrun --max-restarts does so by itself."
)

LOADER = (
    "a loader process was killed, most often for want of memory; ask for more of it, or lower --data.workers; started "
    "again, the run continues from its last checkpoint."
)


def parse(presets: Mapping[str, tuple[str, Config]], arguments: Sequence[str], *, default: str) -> Config:
    """The configuration that ``[preset] [--option value …]`` stands for.

    Args:
        presets: name to (description, configuration).
        arguments: the command line without the program's name; without a preset first, ``default`` is meant.
        default: name of a preset.

    Raises:
        InputError: naming the unknown option or the unusable value.
        SystemExit: with code 0 after printing ``--help``.
    """
    arguments = list(arguments)
    asks_for_help = bool(arguments) and arguments[0] in ("-h", "--help")
    if not asks_for_help and (not arguments or arguments[0].startswith("-")):
        arguments.insert(0, default)
    if not asks_for_help and arguments[0] not in presets:
        raise InputError(f"{arguments[0]}: no such preset; choose {' or '.join(presets)}.")
    choice = tyro.conf.configure(tyro.conf.AvoidSubcommands)(
        tyro.extras.subcommand_type_from_defaults(
            {name: config for name, (_, config) in presets.items()},
            {name: description for name, (description, _) in presets.items()},
        )
    )
    parsed: Config = _parsed(choice, arguments, None)
    return parsed


def parse_options(kind: type[Config], arguments: Sequence[str], *, program: str) -> Config:
    """The configuration of a command without presets, from ``[--option value …]``.

    Args:
        kind: a dataclass whose fields are the options.
        arguments: the command line without the program's name.
        program: that name, for ``--help``.

    Raises:
        InputError: naming the unknown option or the unusable value.
        SystemExit: with code 0 after printing ``--help``.
    """
    parsed: Config = _parsed(kind, arguments, program)
    return parsed


def _parsed(kind: Any, arguments: Sequence[str], program: str | None) -> Any:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(kind, prog=program, args=list(arguments), return_unknown_args=True)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_sentence(complaint.getvalue())) from None
    if unknown:
        raise InputError(f"{unknown[0]}: no such option{_suggestion(unknown[0], config)}; see --help.")
    return config


def given(arguments: Sequence[str], option: str) -> str | None:
    """The value that a command line gives an option, ``--option value`` or ``--option=value``, or None.

    For what has to be known before the options can be parsed: the run whose settings are the defaults.
    """
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            following = arguments[place + 1] if place + 1 < len(arguments) else None
            return value if equals else following
    return None


def exit_code(action: Callable[[], int | None], *, stopped: str) -> int:
    """What a command's process ends with: what ``action`` returns, 0 for None; 1 if it could not go on, 2 for a wrong
    input, 130 after Ctrl-C, each with its sentence on standard error; 141, without one, if nobody reads what it prints.

    Any other error is answered with its traceback and 1; where another one of several processes is gone, with a
    sentence: the error is that one's. However it ends, its loader processes are gone then, and nobody waits for them.

    Args:
        action: the command.
        stopped: the sentence after Ctrl-C: what is kept, and how to go on.
    """
    try:
        return heard(lambda: action() or 0)
    except KeyboardInterrupt:
        return fail(RunError(stopped), 130)
    except Exception as error:
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        if lost_loader(error):
            return fail(RunError(LOADER), 1)
        if not alone and (gone := lost_another(error)) is not None:
            return fail(RunError(LOST.format(gone)), 1)
        if isinstance(error, InputError):
            return fail(error, 2)
        if isinstance(error, RunError):
            return fail(error, 1)
        traceback.print_exc()
        return 1
    finally:
        end_loaders()


def fail(error: InputError | RunError, exit_code: int) -> int:
    """Print the error's sentence, once for all processes where all have it; returns ``exit_code``."""
    rank = int(os.environ.get("RANK", "0"))
    # A loader process sends its traceback along, the sentence last and behind the error's type.
    sentence = re.sub(r"^[\w.]+Error: ", "", str(error).strip().splitlines()[-1])
    if rank == 0:
        print(f"error: {sentence}", file=sys.stderr)
    elif not error.on_all_processes:
        print(f"error of process {rank}: {sentence}", file=sys.stderr)
    return exit_code


def _sentence(box: str) -> str:
    """The message between the title and the first rule of what tyro draws, with box characters or without."""
    message: list[str] = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]:
        text = line.strip("│ ")
        if not set(text) <= set("─-╰╯"):
            message.append(text)
        elif message:
            break
    return " ".join(message).rstrip(".") + "; see --help."


def _suggestion(option: str, config: object) -> str:
    known = [f"--{name.replace('_', '-')}" for name in _field_names(config)]
    close = difflib.get_close_matches(option, known, n=1)
    return f", did you mean {close[0]}" if close else ""


def _field_names(config: object, prefix: str = "") -> list[str]:
    names = []
    for name in getattr(config, "__dataclass_fields__", {}):
        value = getattr(config, name)
        if hasattr(value, "__dataclass_fields__"):
            names += _field_names(value, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names

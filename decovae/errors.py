"""The errors that a user, not a programmer, is meant to read: one sentence, printed without a traceback."""

from __future__ import annotations


class InputError(Exception):
    """A wrong input: a file, a value or an option that the user gave. Commands end with exit code 2.

    The message is one sentence that says what is wrong, where, and what to do.
    """

    on_all_processes = False
    """Whether every process of the run raised it, so that one of them is enough to print it."""


class RunError(Exception):
    """A run that cannot go on for a reason that is not an option's. Commands end with exit code 1."""

    on_all_processes = False
    """As for :class:`InputError`."""

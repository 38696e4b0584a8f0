"""The one error that a user, not a programmer, is meant to read."""

from __future__ import annotations


class InputError(Exception):
    """A wrong input: a file, a value or an option that the user gave.

    The message is one sentence that says what is wrong, where, and what to do. Commands print it without a traceback
    and exit with code 2.
    """


class RunError(Exception):
    """A run that cannot go on for a reason that is not an option's: one sentence, no traceback, exit code 1."""

"""Exceptions for users' mistakes and for failures of their environment, with the exit codes of the CLI.

Every message says what was given, what is allowed and what to do next, in one or two lines.
Any other exception is a bug in lenet_sweep and is shown with its traceback.
"""

import difflib


def suggestion(word: str, known: set[str]) -> str:
    """Return " Did you mean ...?" for the closest of the `known` words, or "" if none is close."""
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


class LenetSweepError(Exception):
    """Base class of all errors that are shown as a message instead of a traceback."""

    exit_code = 2


class ConfigError(LenetSweepError):
    """The command or the config is invalid; nothing was started."""


class DeviceError(LenetSweepError):
    """The requested device or backend is not available on this machine; nothing was started."""


class DataError(LenetSweepError):
    """A dataset is missing, damaged or cannot be downloaded."""


class OutputError(LenetSweepError):
    """An output folder cannot be created or written."""


class TrackingError(LenetSweepError):
    """The tracking store cannot be reached or refuses a request."""


class RunFailed(LenetSweepError):
    """A run stopped before its last epoch; the message is the reason."""

    exit_code = 1

"""The mistakes a user can make or meet, each with the exit code the command line ends with.

Every message says what was given, what is allowed and what to do next, in one or two lines.
Anything else that is raised is a bug in lenet_sweep and shows its traceback.
"""

import difflib


def suggestion(word: str, known: set[str]) -> str:
    """' Did you mean ...?' for the nearest of the `known` words; '' if none is near."""
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


class LenetSweepError(Exception):
    """Base of all errors that are shown as a message instead of a traceback."""

    exit_code = 2


class ConfigError(LenetSweepError):
    """The command or config asks for something that cannot be; nothing was started."""


class DeviceError(LenetSweepError):
    """The device asked for is not on this machine; nothing was started."""


class DataError(LenetSweepError):
    """A dataset is missing, damaged or out of reach."""


class OutputError(LenetSweepError):
    """A folder that the run has to write to cannot be written."""


class TrackingError(LenetSweepError):
    """The tracking store cannot be reached or refuses what it is sent."""


class RunFailed(LenetSweepError):
    """A run that had started did not reach its last epoch; the reason is the message."""

    exit_code = 1

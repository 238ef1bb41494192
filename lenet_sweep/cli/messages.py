"""From the exceptions of Hydra and OmegaConf to error messages in terms of what the user typed."""

import re
from collections.abc import Collection

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lenet_sweep.config import parsing
from lenet_sweep.errors import ConfigError, LenetSweepError, OutputError, suggestion


class ThroughHydra(BaseException):
    """Carries an error unchanged through Hydra.

    Hydra turns an `Exception` of a callback into a warning and adds its own text to one of a task; it does
    neither to a `BaseException`.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def explain(error: Exception, commands: Collection[str]) -> LenetSweepError:
    """Convert an error to one whose message refers to what the user typed.

    `commands` are the names of the subcommands, for suggestions. A `LenetSweepError` is returned as it is.
    """
    if isinstance(error, LenetSweepError):
        return error
    text, cause = str(error), error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_option(str(error.missing_cfg_file), text)
    if isinstance(error, OverrideParseException) and "=" in error.override:
        return ConfigError(
            f"{error.override}: not a valid KEY=VALUE; quote a value with spaces or special "
            "characters twice, as in 'data.root=\"~/my data\"'; write a list as KEY=[A,B]"
        )
    if isinstance(error, OverrideParseException):
        if error.override in parsing.known_keys():
            return ConfigError(f"{error.override!r} needs a value: write {error.override}=VALUE")
        known = {*commands, *parsing.known_keys()}
        return ConfigError(
            f"{error.override!r} is neither a command ({', '.join(commands)}) nor KEY=VALUE."
            + suggestion(error.override.partition("=")[0], known)
        )
    if ambiguous := re.match(r"Ambiguous value for argument '(.*)'", text):
        return ConfigError(
            f"{ambiguous[1]}: several values make a sweep, which needs -m; write a single list as KEY=[A,B]"
        )
    if missing := re.match(r"Could not override '(\w+)'\. No match in the defaults list", text):
        return ConfigError(f"{missing[1]} needs a + in front: +{missing[1]}=NAME")
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        return parsing.unknown_key(cause.full_key)
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return ConfigError(f"{error.full_key}: {text.splitlines()[0]}")
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return OutputError(f"{error.filename or 'input or output'}: {error.strerror or error}")
    detail = f": {str(cause).splitlines()[0]}" if cause and str(cause) else ""
    return ConfigError(" ".join(text.split("\nSee ")[0].splitlines()) + detail)


def raised_in_hydra(error: BaseException) -> bool:
    """Whether the error was raised by Hydra's code, where some malformed overrides end in a ValueError."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("hydra.")


def _unknown_option(path: str, text: str) -> ConfigError:
    """The error for an option of a group, such as 'model/sigmod', that has no file in conf/."""
    group, _, option = path.rpartition("/")
    options = re.findall(r"^\t(?!provider=)(.+)$", text, re.MULTILINE)
    if not group or not options:
        return ConfigError(f"there is no config {path!r}; python -m lenet_sweep --help lists all choices")
    hint = suggestion(option, set(options))
    return ConfigError(f"there is no {group}={option}.{hint}\nOptions of {group}: {', '.join(options)}.")

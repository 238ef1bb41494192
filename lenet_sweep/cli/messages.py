"""TODO cli.messages."""

import re
from collections.abc import Collection

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lenet_sweep.config import parsing
from lenet_sweep.errors import ConfigError, LenetSweepError, OutputError, suggestion


class ThroughHydra(BaseException):
    """Carries an error through Hydra, which would turn it into a warning (callback) or add to it (task)."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def explain(error: Exception, commands: Collection[str]) -> LenetSweepError:
    """The error in terms of what the user typed; `commands` are the names of the subcommands."""
    if isinstance(error, LenetSweepError):
        return error
    text, cause = str(error), error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_option(str(error.missing_cfg_file), text)
    if isinstance(error, OverrideParseException) and "=" in error.override:
        return ConfigError(
            f"{error.override}: is no KEY=VALUE; a value with spaces or signs needs quotes within quotes, "
            "as in 'data.root=\"~/my data\"'; a list is [A,B]"
        )
    if isinstance(error, OverrideParseException):
        if error.override in parsing.known_keys():
            return ConfigError(f"{error.override!r} lacks its value: write {error.override}=VALUE")
        known = {*commands, *parsing.known_keys()}
        return ConfigError(
            f"{error.override!r} is neither a command ({', '.join(commands)}) nor KEY=VALUE."
            + suggestion(error.override.partition("=")[0], known)
        )
    if ambiguous := re.match(r"Ambiguous value for argument '(.*)'", text):
        return ConfigError(
            f"{ambiguous[1]}: several values are a sweep, which needs -m; for one list, write KEY=[A,B]"
        )
    if missing := re.match(r"Could not override '(\w+)'\. No match in the defaults list", text):
        return ConfigError(f"{missing[1]} is chosen with a + in front: +{missing[1]}=NAME")
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        return parsing.unknown_key(cause.full_key)
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return ConfigError(f"{error.full_key}: {text.splitlines()[0]}")
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return OutputError(f"{error.filename or 'input or output'}: {error.strerror or error}")
    detail = f": {str(cause).splitlines()[0]}" if cause and str(cause) else ""
    return ConfigError(" ".join(text.split("\nSee ")[0].splitlines()) + detail)


def raised_in_hydra(error: BaseException) -> bool:
    """Whether Hydra, not our code, stumbled: it lets some odd overrides through to plain ValueErrors."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("hydra.")


def _unknown_option(path: str, text: str) -> ConfigError:
    """The error for a group's option ('model/sigmod') that there is no file for."""
    group, _, option = path.rpartition("/")
    options = re.findall(r"^\t(?!provider=)(.+)$", text, re.MULTILINE)
    if not group or not options:
        return ConfigError(f"there is no config {path!r}; python -m lenet_sweep --help lists what there is")
    hint = suggestion(option, set(options))
    return ConfigError(f"there is no {group}={option}.{hint}\nOptions of {group}: {', '.join(options)}.")

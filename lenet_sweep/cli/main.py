"""The command line: subcommands are in `commands`; Hydra handles every other command.

Hydra composes the config and makes the output folder, and `task` passes both to `run`. Torch and MLflow are
imported only when a run starts, so that --help, --cfg and completion are fast.

Exit codes: 0 success; 1 a run failed; 2 a mistake in the command or config, nothing was started;
3 `reproduce` found a difference; 130 interrupted.
"""

import atexit
import gc
import os
import re
import select
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lenet_sweep.cli import commands
from lenet_sweep.cli.commands import COMMANDS, INTERRUPTED
from lenet_sweep.cli.compose import to_config
from lenet_sweep.cli.messages import ThroughHydra, explain, raised_in_hydra
from lenet_sweep.config import parsing
from lenet_sweep.config.schema import Config
from lenet_sweep.errors import ConfigError, LenetSweepError
from lenet_sweep.paths import conf_dir
from lenet_sweep.storage.manifest import Job, read_manifest

if TYPE_CHECKING:
    from lenet_sweep.storage.result import Result


def main() -> int:
    """Run the command in `sys.argv`; return the exit code."""
    debug = os.environ.get("HYDRA_FULL_ERROR") == "1"
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        debug = True
    signal.signal(signal.SIGTERM, commands.raise_interrupt)
    # At exit Python searches all objects for reference cycles, which takes 1.3 s once torch and MLflow are
    # loaded. Freezing skips that search; the system reclaims the memory anyway.
    atexit.register(gc.freeze)
    try:
        command = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
        if command:
            return command(sys.argv[2:]) or 0
        _run_hydra()
    except KeyboardInterrupt:
        print("interrupted; the same command resumes where it stopped", file=sys.stderr)
        return INTERRUPTED
    except (ThroughHydra, LenetSweepError, HydraException, OmegaConfBaseException, OSError) as caught:
        error = caught.error if isinstance(caught, ThroughHydra) else caught
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 0  # as after --help | head
        return _print_error(explain(error, COMMANDS), debug)
    except ValueError as caught:
        if not raised_in_hydra(caught):
            raise
        typed = " ".join(sys.argv[1:])
        return _print_error(ConfigError(f"{typed}: {caught}; write a choice as in model=lenet"), debug)
    return 0


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more; what is left of it then goes to the null device."""
    if not hasattr(select, "poll"):  # on Windows
        return False
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors are reported in any case
    if not poll.poll(0):
        return False
    # Python flushes at its end: https://docs.python.org/3/library/signal.html#note-on-sigpipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _print_error(error: LenetSweepError, debug: bool) -> int:
    """Print the error, with its traceback if `debug`; return its exit code."""
    if debug:
        traceback.print_exc()
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def task(composed: DictConfig) -> "Result":
    """Train one run, or one job of a sweep, in the folder that Hydra made for it.

    Raises:
        ThroughHydra: around a `LenetSweepError` of a single run.
    """
    from lenet_sweep.runs.run import run
    from lenet_sweep.runs.spec import RunSpec

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    overrides = tuple(hydra_config.overrides.task)
    if hydra_config.mode == RunMode.MULTIRUN:
        config, job = _planned_job(composed, hydra_config)
        return run(RunSpec(config, folder, overrides, job))
    try:
        return run(RunSpec(to_config(composed), folder, overrides))
    except LenetSweepError as error:
        raise ThroughHydra(error) from error


class RefuseEarly(Callback):
    """Checks a single run before Hydra makes a folder for it. The sweeper checks the jobs of a sweep."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        from lenet_sweep.runs import preflight

        try:
            run_config = to_config(config)
            if run_config.sweep.dry_run:
                raise ConfigError("sweep.dry_run=true: needs -m, because only a sweep has a plan")
            if OmegaConf.select(config, "hydra.sweeper.params"):
                raise ConfigError("this experiment is a sweep, so it needs -m")
            preflight.check([run_config], Path(config.hydra.run.dir), print)
        except (LenetSweepError, OmegaConfBaseException) as error:
            raise ThroughHydra(error) from error


def _run_hydra() -> None:
    """Let Hydra handle the command line; its exceptions are raised unchanged."""
    for word in sys.argv[1:]:
        key = word.lstrip("-").partition("=")[0]
        if word.startswith("-") and key in parsing.known_keys():
            raise ConfigError(f"{word}: write values without dashes: {key}=VALUE")
    # Hydra's argparse requires all overrides in a row and would refuse `lr=0.1,0.2 -m seed=1`: flags first.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: bool(re.match(r"[^-].*=|~", word)))
    previous = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise errors instead of printing them
    try:
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(task)()
    finally:
        if previous is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = previous


def _planned_job(composed: DictConfig, hydra_config: HydraConf) -> tuple[Config, Job]:
    """The config of a job and its position in the sweep, both from the manifest if our sweeper wrote one.

    Hydra's other launchers compose a job when it starts. A YAML file that was edited after the start of the
    sweep must not change it.
    """
    folder, number = Path(hydra_config.sweep.dir), int(hydra_config.job.num)
    manifest = read_manifest(folder)
    if manifest is None:
        label = " ".join(hydra_config.overrides.task)
        return to_config(composed), Job(folder.name, number + 1, None, label)
    return manifest.job(folder, number)

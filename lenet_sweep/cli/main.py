"""The command line: `compare`, `data`, `predict`, `reproduce`, `sync`, `ui` are our own, all else is Hydra's.

Hydra composes the config and makes the output folder, and `task` hands both to `run`. Torch and
mlflow are imported only when a run starts, so that --help, --cfg and completion answer at once.

Exit codes: 0 all well; 1 a run failed; 2 a mistake in the command or config, nothing was started;
3 `reproduce` found other numbers; 130 interrupted.
"""

import atexit
import gc
import os
import re
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
    from lenet_sweep.storage.manifest import Job, read_manifest
    from lenet_sweep.storage.result import Result


def main() -> int:
    """Run the command in `sys.argv`; return the exit code."""
    debug = os.environ.get("HYDRA_FULL_ERROR") == "1"
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        debug = True
    signal.signal(signal.SIGTERM, commands.raise_interrupt)
    # Python ends with a search for cycles among all objects, which takes 1.3 s after torch and mlflow; all
    # the memory goes back to the system anyway.
    atexit.register(gc.freeze)
    try:
        command = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
        if command:
            return command(sys.argv[2:]) or 0
        _hydra()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from where it stopped", file=sys.stderr)
        return INTERRUPTED
    except (ThroughHydra, LenetSweepError, HydraException, OmegaConfBaseException, OSError) as caught:
        return _tell(explain(caught.error if isinstance(caught, ThroughHydra) else caught, COMMANDS), debug)
    except ValueError as caught:
        if not raised_in_hydra(caught):
            raise
        typed = " ".join(sys.argv[1:])
        return _tell(ConfigError(f"{typed}: {caught}; a choice is written as model=lenet"), debug)
    return 0


def _tell(error: LenetSweepError, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def task(composed: DictConfig) -> "Result":
    """One run, or one job of a sweep, in the folder that Hydra made for it."""
    from lenet_sweep.runs.run import run
    from lenet_sweep.runs.spec import RunSpec

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    overrides = tuple(hydra_config.overrides.task)
    if hydra_config.mode == RunMode.MULTIRUN:
        config, job = _planned(composed, hydra_config)
        return run(RunSpec(config, folder, overrides, job))
    try:
        return run(RunSpec(to_config(composed), folder, overrides))
    except LenetSweepError as error:
        raise ThroughHydra(error) from error


class RefuseEarly(Callback):
    """Refuses a single run before Hydra makes a folder for it; a sweep is checked by its sweeper."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        from lenet_sweep.runs import preflight

        try:
            own = to_config(config)
            if own.sweep.dry_run:
                raise ConfigError("sweep.dry_run=true: plans a sweep, so it needs -m")
            if OmegaConf.select(config, "hydra.sweeper.params"):
                raise ConfigError("this experiment is a sweep, so it needs -m")
            preflight.check([own], Path(config.hydra.run.dir), print)
        except (LenetSweepError, OmegaConfBaseException) as error:
            raise ThroughHydra(error) from error


def _hydra() -> None:
    """Let Hydra read the rest of the command line; its exceptions come through as they are."""
    for word in sys.argv[1:]:
        key = word.lstrip("-").partition("=")[0]
        if word.startswith("-") and key in parsing.known_keys():
            raise ConfigError(f"{word}: values are given without dashes: {key}=VALUE")
    # argparse takes only overrides that stand together: `lr=0.1,0.2 -m seed=1` would be refused.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: bool(re.match(r"[^-].*=|~", word)))
    given = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's way to raise errors instead of printing them
    try:
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(task)()
    finally:
        if given is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = given


def _planned(composed: DictConfig, hydra_config: HydraConf) -> tuple[Config, Job]:
    """The job's config and its place in the sweep, both from the manifest if our sweeper wrote one.

    Stock launchers compose a job when it starts; a file edited since then must not change it.
    """
    folder, number = Path(hydra_config.sweep.dir), int(hydra_config.job.num)
    manifest = read_manifest(folder)
    if manifest is None:
        label = " ".join(hydra_config.overrides.task)
        return to_config(composed), Job(folder.name, number + 1, None, label)
    return manifest.job(folder, number)

"""A sweep from its command line to its table: list the jobs, check them all, launch them, report."""

import json
import shlex
import sys
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from lenet_sweep import preflight, tracking
from lenet_sweep.cli import to_config
from lenet_sweep.config import Config
from lenet_sweep.errors import OutputError, RunFailed
from lenet_sweep.paths import write_atomic

Job = list[str]  # the overrides of one job


def sweep(
    arguments: list[str], *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
) -> list[list[JobReturn]]:
    """Run every job that `arguments` span, with whatever launcher the config names.

    Raises:
        ConfigError, DataError, DeviceError, OutputError, TrackingError: nothing was started.
        RunFailed: at the end, if any run failed.
    """
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=hydra_context, task_function=task_function, config=config
    )
    parser = OverridesParser.create(config_loader=hydra_context.config_loader)
    # Hydra's own expansion of lists, choice, range and glob.
    (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(arguments), max_batch_size=None)
    configs = [_compose(job, hydra_context, config) for job in jobs]
    folder = Path(config.hydra.sweep.dir)
    if configs[0].sweep.dry_run:
        _print_plan(jobs)
        return []

    preflight.check(configs, folder, print)
    _claim(folder, jobs, config)
    try:
        return [list(launcher.launch(jobs, initial_job_idx=0))]
    finally:
        # Also after Ctrl-C, or when the launcher itself broke.
        _report(jobs, folder, configs[0])


def _compose(job: Job, hydra_context: HydraContext, config: DictConfig) -> Config:
    return to_config(hydra_context.config_loader.load_sweep_config(config, job))


def _claim(folder: Path, jobs: list[Job], config: DictConfig) -> None:
    """Make `folder` this sweep's own by creating its plan, which no other sweep may have."""
    plan = {"command": shlex.join(["python", "-m", "lenet_sweep", *sys.argv[1:]]), "jobs": jobs}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "sweep.json", "x", encoding="utf-8") as file:
            json.dump(plan, file, indent=2)
        write_atomic(folder / "multirun.yaml", OmegaConf.to_yaml(config))
    except FileExistsError as error:
        raise OutputError(f"{folder}: already holds a sweep; choose another hydra.sweep.dir") from error
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error


def _print_plan(jobs: list[Job]) -> None:
    for number, job in enumerate(jobs, start=1):
        print(f"[{number}/{len(jobs)}] {' '.join(job)}")
    print(f"{len(jobs)} runs would be trained; sweep.dry_run=true starts none")


def _report(jobs: list[Job], folder: Path, config: Config) -> None:
    """Print every run's result and where everything is.

    Raises:
        RunFailed: if any run failed.
    """
    from lenet_sweep import progress, report  # imports torch, as the runs have by now
    from lenet_sweep.run import read_result

    rows = [
        report.Row(tuple(job), folder / str(i), read_result(folder / str(i))) for i, job in enumerate(jobs)
    ]
    screen = progress.console()
    screen.print(report.sweep_table(rows))
    for line in report.failures(rows):
        screen.print(line, markup=False, soft_wrap=True, style="red")
    screen.print(f"output folder {folder.absolute()}", markup=False, soft_wrap=True)
    if config.tracking.name == "mlflow" and (command := tracking.ui_command(config.tracking.uri)):
        screen.print(command, markup=False, soft_wrap=True)
    failed = sum(row.failed for row in rows)
    if failed and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
        raise RunFailed(f"{failed} of {len(rows)} runs failed")

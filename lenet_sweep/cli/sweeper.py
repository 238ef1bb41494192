"""The core of our Hydra sweeper: expand the jobs of a sweep, check them all, plan, launch, report."""

import shlex
import sys
from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from lenet_sweep.cli.compose import Composer
from lenet_sweep.errors import ConfigError, OutputError
from lenet_sweep.paths import write_atomic
from lenet_sweep.runs import preflight
from lenet_sweep.storage.manifest import write_manifest
from lenet_sweep.sweeps import plan
from lenet_sweep.sweeps.summary import print_plan, report_sweep, to_manifest


def sweep(
    arguments: list[str], *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
) -> list[list[JobReturn]]:
    """Expand `arguments` to jobs and launch those that are not finished, with the launcher of the config.

    Raises:
        ConfigError, DataError, DeviceError, OutputError, TrackingError: before any job was started.
        RunFailed: at the end, if any run failed.
    """
    composer = Composer(hydra_context, config)
    configured = [(tuple(job), composer.compose(job)) for job in composer.expand(arguments)]
    if not configured:
        raise ConfigError(f"{' '.join(arguments)}: contains no runs")
    if config.hydra.sweep._get_node("subdir")._value() != "${hydra.job.num}":
        raise ConfigError(
            "hydra.sweep.subdir: cannot be changed, so that no two runs of a sweep share a folder"
        )
    sweep_config = configured[0][1].sweep
    if sweep_config.dry_run:
        print_plan(plan.make_plan(configured))
        return []

    folder = Path(config.hydra.sweep.dir)
    preflight.check([job_config for _, job_config in configured], folder, print)
    planned = plan.make_plan(configured)
    missing = [job for job in planned if job.action != "skip"]
    if len(missing) < len(planned):
        print(f"{len(planned) - len(missing)} of {len(planned)} runs are finished already")
    returns: list[list[JobReturn]] = []
    if missing:  # write_manifest refuses the folder of another sweep before anything in it is changed
        command = shlex.join(["python", "-m", "lenet_sweep", *sys.argv[1:]])
        write_manifest(folder, to_manifest(command, planned, missing))
        _write_multirun(folder, config)
    try:
        if missing:
            launcher = Plugins.instance().instantiate_launcher(
                hydra_context=hydra_context, task_function=task_function, config=config
            )
            returns.append(list(launcher.launch([list(job.overrides) for job in missing], initial_job_idx=0)))
    finally:
        # Also after Ctrl-C and after an error in the launcher itself.
        report_sweep(planned, missing, folder, [job._return_value for jobs in returns for job in jobs])
    return returns


def _write_multirun(folder: Path, config: DictConfig) -> None:
    """Write the sweep's composed config where Hydra's own sweepers write it."""
    try:
        write_atomic(folder / "multirun.yaml", OmegaConf.to_yaml(config))
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error

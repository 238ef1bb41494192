"""The core of our Hydra launcher: split the jobs of a sweep into groups and train them with an executor."""

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.types import HydraContext
from omegaconf import DictConfig, flag_override

from lenet_sweep.config import parsing
from lenet_sweep.errors import ConfigError, LenetSweepError, RunFailed
from lenet_sweep.runs import preflight, progress
from lenet_sweep.runs.spec import RunSpec
from lenet_sweep.storage.manifest import read_manifest
from lenet_sweep.storage.result import Outcome, Result
from lenet_sweep.sweeps import resources
from lenet_sweep.sweeps.dask_pool import DaskPool
from lenet_sweep.sweeps.executor import Executor
from lenet_sweep.sweeps.group import outcomes_of_lost_group, train_group
from lenet_sweep.sweeps.plan import group_jobs
from lenet_sweep.tracking.stores import open_store

log = logging.getLogger(__name__)


def launch(
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
    *,
    hydra_context: HydraContext,
    config: DictConfig,
) -> list[JobReturn]:
    """Train every job in its own folder; with sweep.fail_fast, start no job after a failure.

    The configs come from the manifest of the sweep. So no job is composed a second time, and editing a YAML
    file while the sweep runs does not change later jobs.
    """
    specs = _run_specs(Path(config.hydra.sweep.dir), job_overrides, initial_job_idx)
    jobs = [spec.config for spec in specs]
    executor: Executor = DaskPool()
    hardware = executor.hardware()
    groups = group_jobs(jobs, resources.array_width(jobs, hardware))
    workers = resources.choose_worker_count(jobs, groups, hardware)
    if workers > 1:  # longest first, so that the sweep does not end with one worker busy
        groups.sort(key=lambda group: -group.cost)
        progress.say(f"{len(jobs)} runs in {workers} worker processes")
    waves = [[[(i, specs[i]) for i in wave] for wave in group.waves] for group in groups]
    run_job_in_hydra = _HydraJobRunner(hydra_context, config, Singleton.get_state())
    work = functools.partial(train_group, run_job_in_hydra, bool(config.sweep.fail_fast))

    returns = [JobReturn(overrides=list(overrides)) for overrides in job_overrides]
    costs = {specs[i].label: cost for group in groups for i, cost in group.costs.items()}
    with (
        progress.SweepScreen(costs) as screen,
        progress.reporting_to(screen),
        closing(executor.run(work, waves, workers)) as group_results,
    ):
        for group_index, group_result in group_results:
            if isinstance(group_result, RunFailed):
                outcomes = outcomes_of_lost_group(waves[group_index], group_result)
            else:
                outcomes = group_result or []
            for i, outcome in outcomes:
                returns[i].status = JobStatus.COMPLETED if isinstance(outcome, Result) else JobStatus.FAILED
                returns[i].return_value = outcome
            if isinstance(group_result, RunFailed):
                preflight.recover(open_store(jobs[0].tracking), progress.say)
            if config.sweep.fail_fast and any(isinstance(o, LenetSweepError) for _, o in outcomes):
                break
    return returns


def _run_specs(folder: Path, job_overrides: Sequence[Sequence[str]], first: int) -> list[RunSpec]:
    manifest = read_manifest(folder)
    if manifest is None:
        raise ConfigError("hydra/launcher=lenet_sweep: works only with hydra/sweeper=lenet_sweep")
    specs = []
    for number, overrides in enumerate(job_overrides, start=first):
        config, job = manifest.job(folder, number)
        specs.append(RunSpec(config, folder / str(number), tuple(overrides), job))
    return specs


@dataclass(frozen=True)
class _HydraJobRunner:
    """A `JobRunner` that uses Hydra's `run_job`: it makes the folder, .hydra/ and the log of the job.

    It can be pickled, so it works in worker processes, too.
    """

    context: HydraContext
    config: DictConfig  # of the sweep
    state: dict[Any, Any]  # Hydra's singletons, to be restored in a new process

    def __call__(self, spec: RunSpec, function: Callable[[], Result | None]) -> Outcome | None:
        """Return what `function` returned, or the error that it raised."""
        Singleton.set_state(self.state)
        try:
            job_return = run_job(
                task_function=lambda _: function(),
                config=self._job_config(spec),
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                hydra_context=self.context,
            )
        except OSError as error:  # the folder could not be created
            return RunFailed(str(error))
        value = job_return._return_value
        if isinstance(value, LenetSweepError):
            return RunFailed(str(value))  # without its traceback, which keeps the run's tensors alive
        if isinstance(value, Exception):
            log.error("the run failed", exc_info=value)
            return RunFailed(f"{type(value).__name__}: {value}")
        return cast("Result | None", value)

    def _job_config(self, spec: RunSpec) -> DictConfig:
        """The config that Hydra would compose for this job, from the sweep's config and the manifest."""
        assert spec.job
        job = copy.deepcopy(self.config)
        with flag_override(job, ["struct", "readonly"], False), flag_override(job.hydra, ["readonly"], False):
            for key, value in parsing.to_dict(spec.config).items():
                job[key] = value
            job.hydra.job.id = str(spec.job.number - 1)
            job.hydra.job.num = spec.job.number - 1
            job.hydra.overrides.task = list(spec.overrides)
        return job

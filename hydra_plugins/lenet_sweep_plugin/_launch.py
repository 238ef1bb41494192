"""The jobs of a sweep, one after the other in this process."""

import copy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, flag_override

from lenet_sweep import config as configs
from lenet_sweep import identity
from lenet_sweep.cli import read_plan
from lenet_sweep.config import Config


def launch(
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
    *,
    hydra_context: HydraContext,
    task_function: TaskFunction,
    config: DictConfig,
) -> list[JobReturn]:
    """Run every job in a folder of its own; with sweep.fail_fast, none after the first that fails.

    The configs are those of the plan: a YAML file that is edited meanwhile changes no later job,
    and nothing is composed a second time. Of jobs that differ only in their epochs the shorter ones
    come first, so that each goes on from the one before: all of them cost the longest.
    """
    plan = read_plan(Path(config.hydra.sweep.dir))
    assert plan is not None, "the sweeper leaves a plan"
    jobs = [configs.parse(job["config"]) for job in plan["jobs"]]
    returns = [JobReturn(overrides=overrides) for overrides in job_overrides]
    for place in _shorter_first(jobs[initial_job_idx : initial_job_idx + len(job_overrides)]):
        number, overrides = initial_job_idx + place, job_overrides[place]
        try:
            done = run_job(
                task_function=task_function,
                config=_job_config(config, list(overrides), plan["jobs"][number]["config"], number),
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                hydra_context=hydra_context,
            )
        except OSError as error:  # the job's folder could not be made
            done = JobReturn(status=JobStatus.FAILED, overrides=overrides)
            done.return_value = error
        _release(done)
        returns[place] = done
        if done.status == JobStatus.FAILED and config.sweep.fail_fast:
            break
    return returns


def _shorter_first(jobs: Sequence[Config]) -> list[int]:
    """The places of all jobs, in order, but each trajectory's together and by their epochs."""
    trajectories = [identity.trajectory_hash(job) for job in jobs]
    return sorted(range(len(jobs)), key=lambda i: (trajectories.index(trajectories[i]), jobs[i].epochs, i))


def _release(done: JobReturn) -> None:
    """Let go of the tensors that a failed job's traceback holds: the next job needs their memory."""
    error = done._return_value if done.status == JobStatus.FAILED else None
    while isinstance(error, BaseException):
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__


def _job_config(master: DictConfig, overrides: list[str], values: dict[str, Any], number: int) -> DictConfig:
    """What Hydra would compose for this job, made from the sweep's config and the planned values."""
    job = copy.deepcopy(master)
    with flag_override(job, ["struct", "readonly"], False), flag_override(job.hydra, ["readonly"], False):
        for key, value in values.items():
            job[key] = value
        job.hydra.job.id = str(number)
        job.hydra.job.num = number
        job.hydra.overrides.task = overrides
    return job

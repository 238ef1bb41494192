"""The jobs of a sweep, in the groups of the plan, in this process or in workers."""

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

from lenet_sweep import config as configs
from lenet_sweep import identity, ledger, plan, preflight, progress, workers
from lenet_sweep.cli import planned_job, read_plan
from lenet_sweep.config import Config
from lenet_sweep.errors import LenetSweepError, RunFailed
from lenet_sweep.ledger import Result
from lenet_sweep.plan import Job

log = logging.getLogger(__name__)

End = Result | LenetSweepError


@dataclass(frozen=True)
class _Task:
    """A job as it travels to the process that trains it: plain values."""

    job: Job
    folder: Path
    overrides: tuple[str, ...]
    config: dict[str, Any]


def launch(
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
    *,
    hydra_context: HydraContext,
    config: DictConfig,
) -> list[JobReturn]:
    """Train every job, each in a folder of its own; with sweep.fail_fast, begin none after a failure.

    The configs are those of the plan: a YAML file that is edited meanwhile changes no later job,
    and nothing is composed a second time.
    """
    tasks = _tasks(Path(config.hydra.sweep.dir), job_overrides, initial_job_idx)
    jobs = [configs.parse(task.config) for task in tasks]
    groups = plan.groups(jobs, _width(jobs))
    count = workers.how_many(jobs, groups)
    if count > 1:  # the longest first, so that none of them is left over at the end
        groups.sort(key=lambda group: -group.cost)
        progress.say(f"{len(jobs)} runs in {count} worker processes")
    waves = [[[(place, tasks[place]) for place in wave] for wave in group.waves] for group in groups]
    do = functools.partial(_train, hydra_context, config, Singleton.get_state())
    answers = workers.at_once(do, waves, count) if count > 1 else workers.in_turn(do, waves)

    returns = [JobReturn(overrides=list(overrides)) for overrides in job_overrides]
    costs = {tasks[place].job.long_label: cost for group in groups for place, cost in group.costs.items()}
    with progress.SweepScreen(costs) as screen, progress.audience(screen), closing(answers):
        for number, answer in answers:
            ends = answer if not isinstance(answer, RunFailed) else _lost(waves[number], answer)
            for place, end in ends or ():
                returns[place].status = JobStatus.COMPLETED if isinstance(end, Result) else JobStatus.FAILED
                returns[place].return_value = end
            if isinstance(answer, RunFailed):
                preflight.recover(jobs[0].tracking, progress.say)
            if config.sweep.fail_fast and any(isinstance(end, LenetSweepError) for _, end in ends or ()):
                break
    return returns


def _tasks(folder: Path, job_overrides: Sequence[Sequence[str]], first: int) -> list[_Task]:
    found = read_plan(folder)
    assert found is not None, "the sweeper leaves a plan"
    return [
        _Task(
            planned_job(folder, found, number),
            folder / str(number),
            tuple(overrides),
            found["jobs"][number]["config"],
        )
        for number, overrides in enumerate(job_overrides, start=first)
    ]


def _width(jobs: Sequence[Config]) -> int:
    """How many trajectories may be one array; on a GPU's memory that depends when it is filled."""
    fuse = jobs[0].sweep.fuse
    if isinstance(fuse, int):
        return fuse
    if fuse == "off" or not all(identity.trains_on_gpu(job) and job.backend == "auto" for job in jobs):
        return 1
    return -(-len(jobs) // max(1, identity.gpus()))


def _lost(waves: list[list[tuple[int, _Task]]], error: RunFailed) -> list[tuple[int, End]]:
    """The ends of a group whose process died: what its jobs had written, or the reason."""
    return [(place, _ended_before(task) or error) for wave in waves for place, task in wave]


def _ended_before(task: _Task) -> End | None:
    """How a job ended in a worker that died in a later one of its group; None if it did not end."""
    result = ledger.read_result(task.folder)
    return RunFailed(result.reason or result.status) if result and result.status != "FINISHED" else result


# ---------------------------------------------------------------- where a group is trained


def _train(
    hydra_context: HydraContext,
    master: DictConfig,
    state: dict[Any, Any],
    waves: list[list[tuple[int, _Task]]],
) -> list[tuple[int, End]]:
    """Train a group's waves; return each job's place and end. `state` is Hydra's, for a new process."""
    Singleton.set_state(state)
    ends: list[tuple[int, End]] = []
    for wave in waves:
        tasks = [task for _, task in wave]
        if len(wave) == 1:
            found = [_train_alone(hydra_context, master, tasks[0])]
        else:
            found = _train_array(hydra_context, master, tasks)
        for task, end in zip(tasks, found, strict=True):
            progress.ended(task.job.long_label, isinstance(end, LenetSweepError))
        ends += zip([place for place, _ in wave], found, strict=True)
        if master.sweep.fail_fast and any(isinstance(end, LenetSweepError) for end in found):
            break
    return ends


def _train_alone(hydra_context: HydraContext, master: DictConfig, task: _Task) -> End:
    from lenet_sweep.run import run

    config = configs.parse(task.config)
    end = _ended_before(task) or _in_hydra(
        hydra_context, master, task, lambda _: run(config, task.folder, task.overrides, task.job)
    )
    assert end
    return end


def _train_array(hydra_context: HydraContext, master: DictConfig, tasks: list[_Task]) -> list[End]:
    """Each job's folder is made by Hydra as if it ran alone; the log of all is in the last one's."""
    from lenet_sweep.run import Order, run_array

    ends: dict[int, End] = {}
    for i, task in enumerate(tasks):
        if end := _ended_before(task) or _in_hydra(hydra_context, master, task, lambda _: None):
            ends[i] = end
    left = [i for i in range(len(tasks)) if i not in ends]
    orders = [
        Order(configs.parse(tasks[i].config), tasks[i].folder, tasks[i].overrides, tasks[i].job) for i in left
    ]
    ends |= zip(left, run_array(orders), strict=True)
    return [ends[i] for i in range(len(tasks))]


def _in_hydra(
    hydra_context: HydraContext,
    master: DictConfig,
    task: _Task,
    function: Callable[[DictConfig], Result | None],
) -> End | None:
    """Call `function` as Hydra runs a job: in its folder, with .hydra/ and a log; errors are returned."""
    try:
        done = run_job(
            task_function=function,
            config=_job_config(master, task),
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            hydra_context=hydra_context,
        )
    except OSError as error:  # the folder could not be made
        return RunFailed(str(error))
    value = done._return_value
    if isinstance(value, LenetSweepError):
        return RunFailed(str(value))  # without its traceback, which holds the run's tensors
    if isinstance(value, Exception):
        log.error("the run failed", exc_info=value)
        return RunFailed(f"{type(value).__name__}: {value}")
    return cast("Result | None", value)


def _job_config(master: DictConfig, task: _Task) -> DictConfig:
    """What Hydra would compose for this job, made from the sweep's config and the planned values."""
    job = copy.deepcopy(master)
    with flag_override(job, ["struct", "readonly"], False), flag_override(job.hydra, ["readonly"], False):
        for key, value in task.config.items():
            job[key] = value
        job.hydra.job.id = str(task.job.number - 1)
        job.hydra.job.num = task.job.number - 1
        job.hydra.overrides.task = list(task.overrides)
    return job

"""Train one group of jobs in the calling process, one wave after the other.

A group and its waves are made by `plan.group_jobs`.
"""

from collections.abc import Callable, Sequence

from lenet_sweep.errors import LenetSweepError, RunFailed
from lenet_sweep.runs import progress
from lenet_sweep.runs.spec import RunSpec
from lenet_sweep.storage.result import Outcome, Result, read_result

Wave = list[tuple[int, RunSpec]]  # jobs with their indices; several jobs are trained as one array

# Calls a function in the context of a job (folder, log); returns its result or the error that it raised.
JobRunner = Callable[[RunSpec, Callable[[], Result | None]], Outcome | None]


def train_group(run_job: JobRunner, fail_fast: bool, waves: Sequence[Wave]) -> list[tuple[int, Outcome]]:
    """Train the waves of a group; return the index and outcome of each job.

    With `fail_fast`, no wave is started after a failure.
    """
    outcomes: list[tuple[int, Outcome]] = []
    for wave in waves:
        specs = [spec for _, spec in wave]
        of_wave = [_train_alone(run_job, specs[0])] if len(wave) == 1 else _train_array(run_job, specs)
        for spec, outcome in zip(specs, of_wave, strict=True):
            progress.job_done(spec.label, isinstance(outcome, LenetSweepError))
        outcomes += zip([i for i, _ in wave], of_wave, strict=True)
        if fail_fast and any(isinstance(outcome, LenetSweepError) for outcome in of_wave):
            break
    return outcomes


def outcomes_of_lost_group(waves: Sequence[Wave], error: RunFailed) -> list[tuple[int, Outcome]]:
    """The outcomes of a group whose process died: the results that its jobs wrote, else `error`."""
    return [(i, _earlier_outcome(spec) or error) for wave in waves for i, spec in wave]


def _train_alone(run_job: JobRunner, spec: RunSpec) -> Outcome:
    from lenet_sweep.runs.run import run

    outcome = _earlier_outcome(spec) or run_job(spec, lambda: run(spec))
    assert outcome
    return outcome


def _train_array(run_job: JobRunner, specs: Sequence[RunSpec]) -> list[Outcome]:
    """Train jobs as one array. Each has its own folder; the log of the whole array is in the last one."""
    from lenet_sweep.runs.array import run_array

    outcomes: dict[int, Outcome] = {}
    for i, spec in enumerate(specs):
        if outcome := _earlier_outcome(spec) or run_job(spec, lambda: None):
            outcomes[i] = outcome
    remaining = [i for i in range(len(specs)) if i not in outcomes]
    outcomes |= zip(remaining, run_array([specs[i] for i in remaining]), strict=True)
    return [outcomes[i] for i in range(len(specs))]


def _earlier_outcome(spec: RunSpec) -> Outcome | None:
    """The outcome of a job that ended before the worker died in a later job of the group, if it did end."""
    result = read_result(spec.folder)
    return RunFailed(result.reason or result.status) if result and result.status != "FINISHED" else result

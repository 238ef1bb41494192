"""One group of a sweep's jobs, trained in the process that calls this: wave after wave."""

from collections.abc import Callable, Sequence

from lenet_sweep.errors import LenetSweepError, RunFailed
from lenet_sweep.runs import progress
from lenet_sweep.runs.spec import RunSpec
from lenet_sweep.storage.result import Result, read_result

End = Result | LenetSweepError  # how a job ended: what `run` returned or raised
Wave = list[tuple[int, RunSpec]]  # jobs with their indices; several are trained as one array

# Calls a function in a job's surroundings (folder, log), and returns its result or the error it raised.
Surround = Callable[[RunSpec, Callable[[], Result | None]], End | None]


def train_group(surround: Surround, fail_fast: bool, waves: Sequence[Wave]) -> list[tuple[int, End]]:
    """Train a group's waves; return each job's index and end. With `fail_fast`, stop after a failure."""
    ends: list[tuple[int, End]] = []
    for wave in waves:
        specs = [spec for _, spec in wave]
        found = [_train_alone(surround, specs[0])] if len(wave) == 1 else _train_array(surround, specs)
        for spec, end in zip(specs, found, strict=True):
            progress.job_done(spec.label, isinstance(end, LenetSweepError))
        ends += zip([i for i, _ in wave], found, strict=True)
        if fail_fast and any(isinstance(end, LenetSweepError) for end in found):
            break
    return ends


def ends_of_lost(waves: Sequence[Wave], error: RunFailed) -> list[tuple[int, End]]:
    """The ends of a group whose process died: what its jobs had written, or else `error`."""
    return [(i, _ended_before(spec) or error) for wave in waves for i, spec in wave]


def _train_alone(surround: Surround, spec: RunSpec) -> End:
    from lenet_sweep.runs.run import run

    end = _ended_before(spec) or surround(spec, lambda: run(spec))
    assert end
    return end


def _train_array(surround: Surround, specs: Sequence[RunSpec]) -> list[End]:
    """Each job's folder is made as if it ran alone; the log of all is in the last one's."""
    from lenet_sweep.runs.array import run_array

    ends: dict[int, End] = {}
    for i, spec in enumerate(specs):
        if end := _ended_before(spec) or surround(spec, lambda: None):
            ends[i] = end
    left = [i for i in range(len(specs)) if i not in ends]
    ends |= zip(left, run_array([specs[i] for i in left]), strict=True)
    return [ends[i] for i in range(len(specs))]


def _ended_before(spec: RunSpec) -> End | None:
    """How a job ended in a worker that died in a later one of its group; None if it did not end."""
    result = read_result(spec.folder)
    return RunFailed(result.reason or result.status) if result and result.status != "FINISHED" else result

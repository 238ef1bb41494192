"""How many worker processes a sweep uses, and how many runs form one array, on given hardware."""

import heapq
from collections.abc import Sequence

from lenet_sweep import shapes
from lenet_sweep.config.schema import TRAIN_EXAMPLES, Config
from lenet_sweep.runs.hardware import Hardware
from lenet_sweep.shapes import CLASSES, IMAGE_SHAPE
from lenet_sweep.sweeps.plan import JobGroup
from lenet_sweep.training import compiler

_WORKER_BYTES = 2 << 30  # upper bound for a worker: torch, MLflow and a run
_CORE_FLOPS = 1e11  # of the native backend on one core, per second
_SERIAL_SHARE = 0.08  # fraction of a step in which one thread works and the others wait
_JOB_S = 0.25  # overhead of a job beyond its training, on one core
_START_S = 10.0  # start of the workers, including their slow first calls


def choose_worker_count(jobs: Sequence[Config], groups: Sequence[JobGroup], hardware: Hardware) -> int:
    """The number of worker processes for these groups; 1 means the calling process alone.

    One worker per GPU, if there are GPUs. Otherwise the number with the shortest estimated makespan: with
    more workers each has fewer threads, and cores are idle while the last long groups are trained. Results of
    the torch backend depend on its threads, so with `threads=auto` it runs serially on all of them.
    """
    configured = jobs[0].sweep.workers
    if isinstance(configured, int):
        return min(configured, len(groups))
    if any(hardware.trains_on_gpu(job) for job in jobs):
        return max(1, min(hardware.gpus, len(groups)))
    if any(
        job.threads == "auto" and not compiler.native_is_likely(job.backend, job.precision.amp)
        for job in jobs
    ):
        return 1
    threads = max(job.threads if isinstance(job.threads, int) else 1 for job in jobs)
    most = max(1, min(hardware.cores // threads, len(groups), hardware.free_bytes // _WORKER_BYTES))
    return min(range(1, most + 1), key=lambda count: _makespan_s(jobs, groups, count, hardware.cores))


def array_width(jobs: Sequence[Config], hardware: Hardware) -> int:
    """The largest number of trajectories in one array; `runs.array` also limits it to the GPU's memory."""
    fuse = jobs[0].sweep.fuse
    if isinstance(fuse, int):
        return fuse
    if fuse == "off" or not all(hardware.trains_on_gpu(job) and job.backend == "auto" for job in jobs):
        return 1
    return -(-len(jobs) // max(1, hardware.gpus))


def _makespan_s(jobs: Sequence[Config], groups: Sequence[JobGroup], count: int, cores: int) -> float:
    """The estimated time of `count` workers in seconds, the longest group first.

    Source: Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17, 1969.
    """
    done_s = [0.0 if count == 1 else _START_S] * count
    for seconds in sorted((_group_s(jobs, group, cores // count) for group in groups), reverse=True):
        heapq.heapreplace(done_s, done_s[0] + seconds)
    return max(done_s)


def _group_s(jobs: Sequence[Config], group: JobGroup, threads: int) -> float:
    """The estimated time of a group in seconds; jobs with `threads=auto` use `threads` threads."""
    seconds = 0.0
    for i, epochs in group.costs.items():
        job = jobs[i]
        examples = epochs * (job.data.train_size or TRAIN_EXAMPLES[job.data.name])
        training = examples * shapes.training_flops(job.model, IMAGE_SHAPE, CLASSES) / _CORE_FLOPS
        parallel = (1 - _SERIAL_SHARE) / (job.threads if isinstance(job.threads, int) else threads)
        seconds += _JOB_S + training * (_SERIAL_SHARE + parallel)
    return seconds

"""How many workers a sweep is worth, and how many runs an array, given what there is to train with."""

import heapq
from collections.abc import Sequence

from lenet_sweep import shapes
from lenet_sweep.config.schema import TRAIN_EXAMPLES, Config
from lenet_sweep.runs.hardware import Hardware
from lenet_sweep.shapes import CLASSES, IMAGE_SHAPE
from lenet_sweep.sweeps.plan import JobGroup
from lenet_sweep.training import compiler

_WORKER_BYTES = 2 << 30  # what a worker needs at most: torch, mlflow, and a run
_CORE_FLOPS = 1e11  # of the native backend, a second and core
_SERIAL_SHARE = 0.08  # of a step: what one thread does while the others wait
_JOB_S = 0.25  # the overhead of a job beyond its training, on one core
_START_S = 10.0  # until workers have begun, slow first calls included


def choose_worker_count(jobs: Sequence[Config], groups: Sequence[JobGroup], hardware: Hardware) -> int:
    """The number of worker processes for these groups; 1 stands for the calling process alone.

    One worker a GPU, if there are GPUs. Otherwise the number with the shortest estimated makespan: more
    workers leave fewer threads to each, and cores idle when only long groups are left. The torch backend's
    results depend on its threads, so with `threads=auto` it runs serially on all of them.
    """
    asked = jobs[0].sweep.workers
    if isinstance(asked, int):
        return min(asked, len(groups))
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
    """How many trajectories may form one array; how many fit in a GPU's memory is found out there."""
    fuse = jobs[0].sweep.fuse
    if isinstance(fuse, int):
        return fuse
    if fuse == "off" or not all(hardware.trains_on_gpu(job) and job.backend == "auto" for job in jobs):
        return 1
    return -(-len(jobs) // max(1, hardware.gpus))


def _makespan_s(jobs: Sequence[Config], groups: Sequence[JobGroup], count: int, cores: int) -> float:
    """The estimated time of `count` workers, the longest group first (Graham 1969), in seconds."""
    done_s = [0.0 if count == 1 else _START_S] * count
    for seconds in sorted((_group_s(jobs, group, cores // count) for group in groups), reverse=True):
        heapq.heapreplace(done_s, done_s[0] + seconds)
    return max(done_s)


def _group_s(jobs: Sequence[Config], group: JobGroup, threads: int) -> float:
    """The estimated time of a group in seconds, if jobs with `threads=auto` have `threads` threads."""
    seconds = 0.0
    for i, epochs in group.costs.items():
        job = jobs[i]
        examples = epochs * (job.data.train_size or TRAIN_EXAMPLES[job.data.name])
        training = examples * shapes.training_flops(job.model, IMAGE_SHAPE, CLASSES) / _CORE_FLOPS
        parallel = (1 - _SERIAL_SHARE) / (job.threads if isinstance(job.threads, int) else threads)
        seconds += _JOB_S + training * (_SERIAL_SHARE + parallel)
    return seconds

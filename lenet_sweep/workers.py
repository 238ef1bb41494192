"""Where the groups of a sweep are trained: in this process, or in several of Dask Distributed's.

Both executors take the same function and yield its answers as they come. A worker process lives on
from group to group, so it imports torch once; its datasets are mapped from the files that all share.
Everything is bound to loopback and encrypted with keys that only these processes have, because
whoever can speak to Dask's scheduler can run code.
"""

import contextlib
import heapq
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from lenet_sweep import compiler, identity, progress, shapes
from lenet_sweep.config import CLASSES, IMAGE_SHAPE, TRAIN_EXAMPLES, Config
from lenet_sweep.errors import RunFailed
from lenet_sweep.plan import Group

if TYPE_CHECKING:
    from distributed import Client, Worker
    from distributed.client import Future

T = TypeVar("T")
S = TypeVar("S")
Answers = Generator[tuple[int, T | RunFailed], None, None]  # each group's place, and what came of it

_WORKER_BYTES = 2 << 30  # what a worker needs at most: torch, mlflow, and a run
_CORE_FLOPS = 1e11  # of the native step, a second
_ALONE = 0.08  # share of a step that one thread does while the others wait
_JOB_S = 0.25  # what a job takes beside its training, on one core
_START_S = 10.0  # until workers have begun, with what is slow at first
_TOPIC = "lenet_sweep"
_PATIENCE_S = 30  # for runs to save their state after Ctrl-C
_THREADS = "distributed.nanny.pre-spawn-environ.OMP_NUM_THREADS"
_SETTINGS: dict[str, Any] = {
    "distributed.scheduler.allowed-failures": 1,
    "distributed.scheduler.worker-ttl": None,
    "distributed.worker.use-file-locking": False,
    # Dask always opens a port for web pages; with nothing behind it nobody can be shown anything.
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
}


def how_many(jobs: Sequence[Config], groups: Sequence[Group]) -> int:
    """How many worker processes these groups are worth; 1 stands for this process alone.

    A GPU each where there are any; else as many as are done first: more of them leave fewer threads to
    each, and cores idle when only long groups are left. torch's step gives other bits with other
    threads, so unless `threads` says how many, runs that take it get all of them, one after the other.
    """
    asked = jobs[0].sweep.workers
    if isinstance(asked, int):
        return min(asked, len(groups))
    if any(identity.trains_on_gpu(job) for job in jobs):
        return max(1, min(identity.gpus(), len(groups)))
    if any(job.threads == "auto" and not compiler.is_likely(job) for job in jobs):
        return 1
    threads = max(job.threads if isinstance(job.threads, int) else 1 for job in jobs)
    memory = psutil.virtual_memory().available // _WORKER_BYTES
    most = max(1, min(cores() // threads, len(groups), memory))
    return min(range(1, most + 1), key=lambda count: _makespan(jobs, groups, count))


def _makespan(jobs: Sequence[Config], groups: Sequence[Group], count: int) -> float:
    """About how many seconds this many workers take, the longest group first (Graham 1969)."""
    done_s = [0.0 if count == 1 else _START_S] * count
    for seconds in sorted((_seconds(jobs, group, cores() // count) for group in groups), reverse=True):
        heapq.heapreplace(done_s, done_s[0] + seconds)
    return max(done_s)


def _seconds(jobs: Sequence[Config], group: Group, threads: int) -> float:
    """About how long a group takes where jobs that leave their number open have this many threads."""
    seconds = 0.0
    for place, epochs in group.costs.items():
        job = jobs[place]
        examples = epochs * (job.data.train_size or TRAIN_EXAMPLES[job.data.name])
        training = examples * shapes.training_flops(job.model, IMAGE_SHAPE, CLASSES) / _CORE_FLOPS
        side_by_side = (1 - _ALONE) / (job.threads if isinstance(job.threads, int) else threads)
        seconds += _JOB_S + training * (_ALONE + side_by_side)
    return seconds


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_turn(do: Callable[[S], T], groups: Sequence[S]) -> Answers[T]:
    """Do one group after the other in this process; yield each one's place and answer."""
    for place, group in enumerate(groups):
        yield place, do(group)


def at_once(do: Callable[[S], T], groups: Sequence[S], count: int) -> Answers[T]:
    """Do the groups, in order, in `count` worker processes; yield each one's place and answer.

    A group whose worker dies is tried once more, by the worker that takes its place; a `RunFailed`
    stands for one whose second worker died too. When the consumer stops early, groups that have
    begun are still ended. Ctrl-C ends them at once: a run then saves its state, as it does here.
    """
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    waiting = iter(enumerate(groups))
    with _client(count) as client:
        places: dict[Future[Any], int] = {}
        running = as_completed(loop=client.loop)

        def hand_out() -> None:
            for place, group in waiting:
                future = client.submit(_work, do, group, key=f"group {place}", retries=0, pure=False)
                places[future] = place
                running.add(future)
                return

        try:
            for _ in range(count):
                hand_out()
            for future in running:
                place = places.pop(future)
                try:
                    yield place, future.result()
                except KilledWorker:
                    yield place, RunFailed("its worker process died twice (out of memory?)")
                hand_out()
        except KeyboardInterrupt:
            _interrupt(client, list(places))
            places.clear()
            raise
        finally:
            for future in places:  # those that had begun when the consumer lost interest
                future.exception()


@contextlib.contextmanager
def _client(count: int) -> "Iterator[Client]":
    """A client of `count` workers on this machine, which end with the block."""
    import dask
    from distributed import Client, LocalCluster
    from distributed.security import Security

    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what went wrong is told in our words
    with (
        tempfile.TemporaryDirectory(prefix="lenet_sweep-") as scratch,
        dask.config.set(_SETTINGS | {"temporary-directory": scratch, _THREADS: max(1, cores() // count)}),
        LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            memory_limit=0,  # none: a run that needs much is not paused or killed for it
            security=Security.temporary(),
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.register_worker_callbacks(_ignore_interrupts)  # of the workers to come, too
        client.subscribe_topic(_TOPIC, _hear)
        yield client


def _interrupt(client: "Client", running: "list[Future[Any]]") -> None:
    """Have all runs save their state; a second Ctrl-C ends the waiting for that."""
    client.run(_stop)
    deadline = time.monotonic() + _PATIENCE_S
    for future in running:
        with contextlib.suppress(TimeoutError):
            future.exception(timeout=max(0.0, deadline - time.monotonic()))


def _hear(event: tuple[float, dict[str, Any]]) -> None:
    """Tell this process's audience what a run in a worker said."""
    _, message = event
    getattr(progress.current(), message["what"])(*message["words"])


# ---------------------------------------------------------------- in a worker process

_stopping = threading.Event()


def _ignore_interrupts() -> None:
    """A terminal sends Ctrl-C to all its processes; what is to end here says `_stop`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stop() -> None:
    _stopping.set()


def _work(do: Callable[[S], T], group: S) -> T | None:
    """Do a group; None if it was interrupted."""
    from distributed import get_worker

    from lenet_sweep import devices

    worker = get_worker()
    devices.prefer_gpu(int(worker.name))
    with progress.audience(_Sender(worker)):
        try:
            return do(group)
        except KeyboardInterrupt:
            return None


class _Sender:
    """The audience in a worker: passes everything on to the process that the sweep was started in."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker

    def line(self, text: str) -> None:
        self._send("line", text)

    def detail(self, text: str) -> None:
        self._send("detail", text)

    def reached(self, run: str, epoch: float, epochs: int, numbers: str) -> None:
        self._send("reached", run, epoch, epochs, numbers)
        if _stopping.is_set():
            raise KeyboardInterrupt

    def left(self, run: str) -> None:
        self._send("left", run)

    def ended(self, run: str, failed: bool) -> None:
        self._send("ended", run, failed)

    def _send(self, what: str, *words: object) -> None:
        self._worker.log_event(_TOPIC, {"what": what, "words": words})

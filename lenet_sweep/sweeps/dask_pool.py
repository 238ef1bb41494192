"""The executor for this machine: Dask Distributed's local workers, or the calling process alone.

A worker process stays alive from group to group, so it imports torch once; its datasets are mapped from
files that all workers share. Everything is bound to loopback and encrypted with keys that only these
processes have, because whoever can connect to Dask's scheduler can run code.
"""

import contextlib
import logging
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lenet_sweep.errors import RunFailed
from lenet_sweep.runs import hardware, progress
from lenet_sweep.runs.hardware import Hardware
from lenet_sweep.sweeps.executor import Answers, S, T, run_serial

if TYPE_CHECKING:
    from distributed import Client, Worker
    from distributed.client import Future


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


class DaskPool:
    """Implements `Executor` on this machine; one worker is the calling process itself."""

    def hardware(self) -> Hardware:
        return hardware.here()

    def run(self, work: Callable[[S], T], groups: Sequence[S], workers: int) -> Answers[T]:
        return run_parallel(work, groups, workers) if workers > 1 else run_serial(work, groups)


def run_parallel(work: Callable[[S], T], groups: Sequence[S], workers: int) -> Answers[T]:
    """Call `work` for each group, in order, in `workers` processes; yield its index and answer.

    A group whose worker dies is tried once more, by the worker that replaces it; a `RunFailed` stands
    for one whose second worker died too.
    """
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    waiting = iter(enumerate(groups))
    with _client(workers) as client:
        indices: dict[Future[Any], int] = {}
        running = as_completed(loop=client.loop)

        def submit_next() -> None:
            for i, group in waiting:
                future = client.submit(_work, work, group, key=f"group {i}", retries=0, pure=False)
                indices[future] = i
                running.add(future)
                return

        try:
            for _ in range(workers):
                submit_next()
            for future in running:
                i = indices.pop(future)
                try:
                    yield i, future.result()
                except KilledWorker:
                    yield i, RunFailed("its worker process died twice (out of memory?)")
                submit_next()
        except KeyboardInterrupt:
            _interrupt(client, list(indices))
            indices.clear()
            raise
        finally:
            for future in indices:  # those that had begun when the consumer stopped
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
        dask.config.set(
            _SETTINGS | {"temporary-directory": scratch, _THREADS: max(1, hardware.cores() // count)}
        ),
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
        client.subscribe_topic(_TOPIC, _forward)
        yield client


def _interrupt(client: "Client", running: "list[Future[Any]]") -> None:
    """Have all runs save their state; a second Ctrl-C ends the waiting for that."""
    client.run(_stop)
    deadline = time.monotonic() + _PATIENCE_S
    for future in running:
        with contextlib.suppress(TimeoutError):
            future.exception(timeout=max(0.0, deadline - time.monotonic()))


def _forward(event: tuple[float, dict[str, Any]]) -> None:
    """Pass what a run in a worker reported to this process's reporter."""
    _, message = event
    getattr(progress.current(), message["method"])(*message["arguments"])


# What follows runs in a worker process.

_stopping = threading.Event()


def _ignore_interrupts() -> None:
    """A terminal sends Ctrl-C to all its processes; what is to end here says `_stop`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stop() -> None:
    _stopping.set()


def _work(work: Callable[[S], T], group: S) -> T | None:
    """Train a group; None if it was interrupted."""
    from distributed import get_worker

    from lenet_sweep.training import devices

    worker = get_worker()
    devices.prefer_gpu(_number(worker.name))
    with progress.reporting_to(_RemoteReporter(worker)):
        try:
            return work(group)
        except KeyboardInterrupt:
            return None


def _number(worker_name: object) -> int:
    """The number of a worker among others: Dask's local workers are called 0, other clusters' pool-0."""
    number = re.search(r"\d+$", str(worker_name))
    return int(number[0]) if number else 0


class _RemoteReporter:
    """The reporter in a worker: sends everything to the process that the sweep was started in."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker

    def line(self, text: str) -> None:
        self._send("line", text)

    def detail(self, text: str) -> None:
        self._send("detail", text)

    def progress(self, run: str, epoch: float, epochs: int, numbers: str) -> None:
        self._send("progress", run, epoch, epochs, numbers)
        if _stopping.is_set():  # every run reports several times an epoch, so it ends soon
            raise KeyboardInterrupt

    def stopped(self, run: str) -> None:
        self._send("stopped", run)

    def job_done(self, run: str, failed: bool) -> None:
        self._send("job_done", run, failed)

    def _send(self, method: str, *arguments: object) -> None:
        self._worker.log_event(_TOPIC, {"method": method, "arguments": arguments})

"""The executor for one machine: local workers of Dask Distributed, or the calling process alone.

A worker process trains one group after the other, so it imports torch once. Its datasets are mapped from
files that all workers share. Anyone who can connect to Dask's scheduler can run code, so every port is bound
to loopback, and connections are encrypted with temporary keys.
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
from lenet_sweep.sweeps.executor import GroupResults, S, T, run_serial

if TYPE_CHECKING:
    from distributed import Client, Worker
    from distributed.client import Future


_REPORT_TOPIC = "lenet_sweep"
_INTERRUPT_TIMEOUT_S = 30  # for runs to save their state after Ctrl-C
_OMP_THREADS_KEY = "distributed.nanny.pre-spawn-environ.OMP_NUM_THREADS"
_DASK_CONFIG: dict[str, Any] = {
    "distributed.scheduler.allowed-failures": 1,
    "distributed.scheduler.worker-ttl": None,
    "distributed.worker.use-file-locking": False,
    # Dask always opens a port for its web pages. Without routes that port serves nothing.
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
}


class DaskPool:
    """An `Executor` on this machine. With one worker, groups are trained in the calling process."""

    def hardware(self) -> Hardware:
        return hardware.here()

    def run(self, work: Callable[[S], T], groups: Sequence[S], workers: int) -> GroupResults[T]:
        return run_parallel(work, groups, workers) if workers > 1 else run_serial(work, groups)


def run_parallel(work: Callable[[S], T], groups: Sequence[S], workers: int) -> GroupResults[T]:
    """Call `work` for each group, in order, in `workers` processes; yield its index and result.

    A group whose worker process dies is tried once more, in a new process. If that dies, too, the result of
    the group is a `RunFailed`.
    """
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    remaining = iter(enumerate(groups))
    with _start_workers(workers) as client:
        indices: dict[Future[Any], int] = {}
        running = as_completed(loop=client.loop)

        def submit_next() -> None:
            for i, group in remaining:
                future = client.submit(_train_group, work, group, key=f"group {i}", retries=0, pure=False)
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
            for future in indices:  # groups that had started when the consumer stopped are still finished
                future.exception()


@contextlib.contextmanager
def _start_workers(count: int) -> "Iterator[Client]":
    """Start `count` worker processes and give a client for them; they end with the block."""
    import dask
    from distributed import Client, LocalCluster
    from distributed.security import Security

    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # we print our own error messages
    with (
        tempfile.TemporaryDirectory(prefix="lenet_sweep-") as scratch,
        dask.config.set(
            _DASK_CONFIG
            | {"temporary-directory": scratch, _OMP_THREADS_KEY: max(1, hardware.cores() // count)}
        ),
        LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            memory_limit=0,  # no limit: Dask must not pause or kill a run because of its memory
            security=Security.temporary(),
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.register_worker_callbacks(_ignore_interrupts)  # also in workers that are started later
        client.subscribe_topic(_REPORT_TOPIC, _forward)
        yield client


def _interrupt(client: "Client", running: "list[Future[Any]]") -> None:
    """Stop all runs and wait until they have saved their state; a second Ctrl-C ends the wait."""
    client.run(_request_stop)
    deadline = time.monotonic() + _INTERRUPT_TIMEOUT_S
    for future in running:
        with contextlib.suppress(TimeoutError):
            future.exception(timeout=max(0.0, deadline - time.monotonic()))


def _forward(event: tuple[float, dict[str, Any]]) -> None:
    """Call the reporter of this process with what a run in a worker reported."""
    _, message = event
    getattr(progress.current(), message["method"])(*message["arguments"])


# ---------------------------------------------------------------- what runs in the worker processes

_stop_requested = threading.Event()


def _ignore_interrupts() -> None:
    """Ignore Ctrl-C, which a terminal sends to all its processes; the sweep calls `_request_stop` instead."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _request_stop() -> None:
    _stop_requested.set()


def _train_group(work: Callable[[S], T], group: S) -> T | None:
    """Call `work` for a group; return None if it was interrupted."""
    from distributed import get_worker

    from lenet_sweep.training import devices

    worker = get_worker()
    devices.prefer_gpu(_worker_number(worker.name))
    with progress.reporting_to(_RemoteReporter(worker)):
        try:
            return work(group)
        except KeyboardInterrupt:
            return None


def _worker_number(worker_name: object) -> int:
    """The number at the end of a worker's name: 0 for Dask's first local worker, pool-0 in other clusters."""
    number = re.search(r"\d+$", str(worker_name))
    return int(number[0]) if number else 0


class _RemoteReporter:
    """A `Reporter` in a worker: sends every call to the process that started the sweep."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker

    def line(self, text: str) -> None:
        self._send("line", text)

    def detail(self, text: str) -> None:
        self._send("detail", text)

    def progress(self, run: str, epoch: float, epochs: int, numbers: str) -> None:
        self._send("progress", run, epoch, epochs, numbers)
        if _stop_requested.is_set():  # every run calls this several times an epoch, so it stops soon
            raise KeyboardInterrupt

    def stopped(self, run: str) -> None:
        self._send("stopped", run)

    def job_done(self, run: str, failed: bool) -> None:
        self._send("job_done", run, failed)

    def _send(self, method: str, *arguments: object) -> None:
        self._worker.log_event(_REPORT_TOPIC, {"method": method, "arguments": arguments})

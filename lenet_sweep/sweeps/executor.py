"""The protocol of an executor, which trains the groups of a sweep, and the serial implementation.

Callers do not assume that work runs on this host: `Executor.hardware` describes the host where it does.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Protocol, TypeVar

from lenet_sweep.errors import RunFailed
from lenet_sweep.runs.hardware import Hardware

T = TypeVar("T")
S = TypeVar("S")
GroupResults = Generator[tuple[int, T | RunFailed], None, None]  # yields (index of a group, its result)


class Executor(Protocol):
    """Trains groups of jobs, in this process or in others."""

    def hardware(self) -> Hardware:
        """The CPU cores, GPUs and memory of one host on which the work runs."""

    def run(self, work: Callable[[S], T], groups: Sequence[S], workers: int) -> GroupResults[T]:
        """Call `work` for each group, in order, with `workers` processes; yield its index and result.

        The result of a group whose process died is a `RunFailed`. If the consumer stops early, groups that
        have started are still finished. Ctrl-C interrupts them, and their runs save their state.
        """


def run_serial(work: Callable[[S], T], groups: Sequence[S]) -> GroupResults[T]:
    """Call `work` for one group after the other in this process; yield its index and result."""
    for i, group in enumerate(groups):
        yield i, work(group)

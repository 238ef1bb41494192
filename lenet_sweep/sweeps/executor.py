"""Where the groups of a sweep are trained: the protocol, and the executor that a config asks for.

Nothing above this protocol assumes one host: what there is to train with is asked of the executor, which
counts it where the work runs.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Protocol, TypeVar

from lenet_sweep.errors import RunFailed
from lenet_sweep.runs.hardware import Hardware

T = TypeVar("T")
S = TypeVar("S")
Answers = Generator[tuple[int, T | RunFailed], None, None]  # each group's index, and what came of it


class Executor(Protocol):
    """Trains groups of jobs in this process or in others."""

    def hardware(self) -> Hardware:
        """What one host has to train with, counted where the work runs."""

    def run(self, work: Callable[[S], T], groups: Sequence[S], workers: int) -> Answers[T]:
        """Call `work` for each group, in order, with `workers` processes; yield its index and answer.

        A `RunFailed` stands for the answer of a group whose process died. When the consumer stops early,
        groups that have begun are still finished. Ctrl-C ends them at once; a run then saves its state.
        """


def run_serial(work: Callable[[S], T], groups: Sequence[S]) -> Answers[T]:
    """Call `work` for one group after the other in this process."""
    for i, group in enumerate(groups):
        yield i, work(group)

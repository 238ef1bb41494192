"""CPU threads: torch's number of them, and a small team that computes slices of a batch in parallel."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch's CPU operations use `count` threads, if called by the current thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ThreadTeam:
    """Up to four threads that process slices of a batch in parallel. `size` is their number.

    The word is OpenMP's: a team of threads executes one parallel region, and the calling thread belongs to
    it. torch's own CPU threads are divided among the members. Four are the limit because the GIL serialises
    the Python code of all slices.
    """

    def __init__(self, threads: int) -> None:
        sizes = (4, 3) if threads > 4 else (threads,)
        self.size = max(sizes, key=lambda size: threads // size * size)
        self._threads_each = threads // self.size
        # The caller of `map` is a member of the team, so the pool has one thread less.
        self._others = ThreadPoolExecutor(max(1, self.size - 1), "slice", _set_threads, (self._threads_each,))

    def map(self, work: Callable[..., T], *slices: Sequence[Any]) -> list[T]:
        """Like `list(map(work, *slices))`, in parallel.

        If a call raises, the others are cancelled or awaited before the exception is raised here.
        """
        calls = dict(enumerate(zip(*slices, strict=True)))
        with torch_threads(self._threads_each):
            others = {i: self._others.submit(work, *call) for i, call in calls.items() if i % self.size}
            try:
                mine = {i: work(*call) for i, call in calls.items() if i not in others}
                return [mine[i] if i in mine else others[i].result() for i in calls]
            finally:
                running = [other for other in others.values() if not other.cancel()]
                wait(running)


def _set_threads(count: int) -> None:
    # The first call in a thread copies the number that any thread set last, so it must come before the set.
    torch.get_num_threads()
    torch.set_num_threads(count)

"""TODO training.threads."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch's operations on the CPU have this many threads, for the calling thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ThreadTeam:
    """At most four threads that take parts of some work side by side, each with its share of torch's.

    The parts' Python takes turns, so that more of them would wait for that.
    """

    def __init__(self, threads: int) -> None:
        sizes = (4, 3) if threads > 4 else (threads,)
        self.size = max(sizes, key=lambda size: threads // size * size)
        self._share = threads // self.size
        # One of the team is whoever calls `map`.
        self._others = ThreadPoolExecutor(max(1, self.size - 1), "part", _set_threads, (self._share,))

    def map(self, work: Callable[..., T], *parts: Sequence[Any]) -> list[T]:
        """What `work` makes of each part, in their order. However it ends, no part is still worked on."""
        calls = dict(enumerate(zip(*parts, strict=True)))
        with torch_threads(self._share):
            others = {i: self._others.submit(work, *call) for i, call in calls.items() if i % self.size}
            try:
                mine = {i: work(*call) for i, call in calls.items() if i not in others}
                return [mine[i] if i in mine else others[i].result() for i in calls]
            finally:
                running = [other for other in others.values() if not other.cancel()]
                wait(running)


def _set_threads(count: int) -> None:
    # At its first question a thread takes the number that was last set, by whichever thread.
    torch.get_num_threads()
    torch.set_num_threads(count)

"""A gradient step as a CUDA graph: captured once, then replayed without launch overhead."""

import logging
import sys
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)


WARM_UP = 3  # eager steps before the capture, in which the CUDA libraries initialise themselves


class GraphedStep:
    """Calls `step(indices)`: eagerly at first, then as one CUDA graph for each shape of `indices`.

    A replayed graph runs the same kernels on the same memory addresses as when it was captured. `step` must
    therefore only use tensors that are never reallocated; `indices` is copied into a static tensor. If the
    capture fails, all steps run eagerly.

    See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
    """

    def __init__(self, step: Callable[[Tensor], None], device: torch.device) -> None:
        self._step, self._can_capture = step, True
        self._stream = torch.cuda.Stream(device)
        self._calls: dict[torch.Size, int] = {}
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, indices: Tensor) -> None:
        if indices.shape in self._graphs:
            graph, static_indices = self._graphs[indices.shape]
            static_indices.copy_(indices)
            graph.replay()
            return
        calls = self._calls[indices.shape] = self._calls.get(indices.shape, 0) + 1
        # Graphs are captured on a side stream, so the warm-up must run on one, too.
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step(indices)
        current.wait_stream(self._stream)
        if calls == WARM_UP and self._can_capture:
            self._capture(indices.clone())

    def _capture(self, static_indices: Tensor) -> None:
        """Capture a step without executing it."""
        graph = torch.cuda.CUDAGraph()
        handled = sys.exc_info()[1]
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._step(static_indices)
        except RuntimeError as error:  # for example out of memory
            self._can_capture = False
            log.warning(
                "CUDA graph capture failed, so all steps run eagerly: %s", _root_cause(error, handled)
            )
        else:
            self._graphs[static_indices.shape] = graph, static_indices


def _root_cause(error: BaseException, handled: BaseException | None) -> BaseException:
    """The first error of a chain: to end a failed capture raises another one, which hides the cause."""
    while error.__context__ and error.__context__ is not handled:
        error = error.__context__
    return error

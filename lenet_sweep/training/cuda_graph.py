"""A gradient step as CUDA graphs: captured once, replayed without the cost of launching its kernels."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)


WARM_UP = 3  # steps before a CUDA graph is captured, in which libraries set themselves up


class GraphedStep:
    """Calls `step`, as a CUDA graph for each shape of `indices` once it is warm; eagerly where that fails.

    A graph repeats the very kernels on the very memory that it was captured with: `step` reads and
    writes only tensors that stay where they are, and `indices` are copied to where it expects them.
    """

    def __init__(self, step: Callable[[Tensor], None], device: torch.device) -> None:
        self._step, self._works = step, True
        self._stream = torch.cuda.Stream(device)
        self._calls: dict[torch.Size, int] = {}
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, indices: Tensor) -> None:
        if indices.shape in self._graphs:
            graph, its_indices = self._graphs[indices.shape]
            its_indices.copy_(indices)
            graph.replay()
            return
        calls = self._calls[indices.shape] = self._calls.get(indices.shape, 0) + 1
        # Captured work runs on another stream than the default one, and so must its warm-up.
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step(indices)
        current.wait_stream(self._stream)
        if calls == WARM_UP and self._works:
            self._capture(indices.clone())

    def _capture(self, its_indices: Tensor) -> None:
        """Record a step; it is not carried out."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._step(its_indices)
        except RuntimeError as error:  # out of memory among them
            self._works = False
            log.warning("no CUDA graph, the steps run one by one: %s", error)
        else:
            self._graphs[its_indices.shape] = graph, its_indices

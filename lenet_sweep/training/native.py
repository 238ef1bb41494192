"""Gradients on the CPU by compiled code (native.cpp), several times as fast as `backend.TorchBackend`.

All sums have a fixed order, so results are bit-identical for any number of threads. Gradients differ from
autograd's by rounding, about 1e-6 of their length.

Shape suffixes: N examples.
"""

import ctypes
import functools
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lenet_sweep.config.schema import ModelConfig
from lenet_sweep.shapes import IMAGE_SHAPE
from lenet_sweep.training import compiler
from lenet_sweep.training.compiler import Unavailable
from lenet_sweep.training.data import Split, scaled

MAX_WORKSPACE_BYTES = 2 << 30  # networks that need more are no faster than with torch
_TOLERANCE = 1e-3  # relative to a gradient's length; rounding gives 1e-5, a bug 1e-1 and more


class NativeBackend:
    """Computes gradients of `network` by compiled code.

    The library reads the float32 parameters, and writes their `.grad`, in place. Their values may change, but
    the tensors must not be replaced. Instances share no state. An instance is not thread-safe.
    """

    name = "native"

    def __init__(self, network: nn.Sequential, config: ModelConfig, threads: int) -> None:
        """Compile the library unless it is cached, and compare one step with autograd.

        Raises:
            Unavailable: without a C++ compiler or a supported vector unit, if the network is too large or
                has an unsupported layer, or if the gradients differ from autograd's.
        """
        self.network = network
        self._library = _load(compiler.library(config))
        self._threads = threads
        self._parameters = list(network.parameters())
        self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            assert parameter.dtype == torch.float32
            assert parameter.is_contiguous()
            parameter.grad = gradient
        # Created once, because creating them takes 1 % of a step.
        self._weight_pointers = _pointers(self._parameters)
        self._gradient_pointers = _pointers(self._gradients)
        self._totals = torch.zeros(2, dtype=torch.float64)
        self._size, self._workspace = 0, mmap.mmap(-1, 1)
        self._workspace_address(1)
        _check(self, config)

    def gradients(self, examples: Split, indices_N: Tensor) -> Tensor:
        """Set `.grad` to the gradients of the batch's mean loss; return [sum of losses, number correct].

        The returned float64 tensor is the same object at every call; the next call overwrites it.
        """
        assert self._parameters[0].grad is self._gradients[0], "zero_grad removed the gradient tensors"
        size = len(indices_N)
        workspace = self._workspace_address(size)
        self._library.gradients(
            self._weight_pointers,
            self._gradient_pointers,
            examples.images_NCHW.data_ptr(),
            examples.labels_N.data_ptr(),
            indices_N.data_ptr(),
            size,
            self._threads,
            workspace,
            self._totals.data_ptr(),
        )
        return self._totals

    def totals(self, examples: Split) -> Tensor:
        """[sum of losses, number correct] over all examples, float64."""
        self._evaluate(examples, None)
        return self._totals

    def predict(self, examples: Split) -> Tensor:
        """The most likely class of each example, int64 of shape (N,)."""
        classes_N = torch.empty(len(examples), dtype=torch.int64)
        self._evaluate(examples, classes_N.data_ptr())
        return classes_N

    def _evaluate(self, examples: Split, predicted: int | None) -> None:
        self._library.evaluate(
            self._weight_pointers,
            examples.images_NCHW.data_ptr(),
            examples.labels_N.data_ptr(),
            len(examples),
            self._threads,
            self._workspace_address(len(examples)),
            self._totals.data_ptr(),
            predicted,
        )

    def _workspace_address(self, size: int) -> int:
        """The address of working memory for a batch of `size`. Its pages are allocated on first use."""
        if size > self._size:
            needed = self._library.workspace_bytes(self._threads, size)
            if needed > MAX_WORKSPACE_BYTES:
                raise Unavailable(f"the network needs {needed / 2**30:.1f} GiB of working memory")
            self._workspace = _allocate(needed)
            self._size = size
        return ctypes.addressof(ctypes.c_char.from_buffer(self._workspace))


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"the compiled library cannot be loaded: {error}") from error
    library.workspace_bytes.argtypes = [integer, long]
    library.workspace_bytes.restype = long
    library.gradients.argtypes = [pointer] * 5 + [long, integer] + [pointer] * 2
    library.gradients.restype = None
    library.evaluate.argtypes = [pointer] * 3 + [long, integer] + [pointer] * 3
    library.evaluate.restype = None
    return library


def _allocate(size: int) -> mmap.mmap:
    """Zeroed memory, aligned to a page, in huge pages if possible."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _check(native: NativeBackend, config: ModelConfig) -> None:
    """Compare one step on random images with autograd, once per process for each network.

    Raises:
        Unavailable: if they differ by more than rounding errors.
    """
    if config in _checked:
        return
    examples = Split(
        torch.randint(256, (37, *IMAGE_SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        torch.arange(37) % 10,
    )
    parameters = list(native.network.parameters())
    loss = F.cross_entropy(native.network(scaled(examples.images_NCHW)), examples.labels_N)
    expected = torch.autograd.grad(loss, parameters)
    native_loss = float(native.gradients(examples, torch.arange(37))[0]) / 37
    differences = [
        float((p.grad - g).norm() / (g.norm() + 1e-6))
        for p, g in zip(parameters, expected, strict=True)
        if p.grad is not None
    ]
    if not (abs(native_loss - float(loss.detach())) < _TOLERANCE and max(differences) < _TOLERANCE):
        raise Unavailable(f"its gradients differ from autograd's by {max(differences):.1g} of their length")
    _checked.add(config)


_checked: set[ModelConfig] = set()

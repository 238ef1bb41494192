"""The gradient step on the CPU as compiled code (native.cpp): the same step as `engine.Autograd`, faster.

Its sums have a fixed order, so the number of threads changes no bit of a result; against autograd's
they are rounded otherwise, by about 1e-6 of a gradient.

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

MOST_BYTES = 2 << 30  # of working memory; a network that needs more gains nothing from it
_TOLERANCE = 1e-3  # of a gradient's length; rounding gives 1e-5, a mistake 1e-1 and more


class NativeBackend:
    """Takes the gradients of `network`, whose float32 parameters it reads where they are.

    Parameters and their `.grad` may change in value, but must stay the tensors that they are.
    Instances share nothing; one instance is for one thread at a time.
    """

    name = "native"

    def __init__(self, network: nn.Sequential, config: ModelConfig, threads: int) -> None:
        """Compile what is missing, and hold one step against autograd.

        Raises:
            Unavailable: if there is no compiler, no vector unit, too large a network, or a gradient
                that differs from autograd's.
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
        # Made once: at every step they would cost a hundredth of it.
        self._weights_at, self._gradients_at = _pointers(self._parameters), _pointers(self._gradients)
        self._totals = torch.zeros(2, dtype=torch.float64)
        self._size, self._workspace = 0, mmap.mmap(-1, 1)
        self._address(1)
        _check(self, config)

    def gradients(self, examples: Split, indices_N: Tensor) -> Tensor:
        """Put the mean loss's gradients into `.grad`; return [sum of losses, number right], float64.

        The tensor returned is the same at every call, and overwritten by the next one.
        """
        assert self._parameters[0].grad is self._gradients[0], "zero_grad took the gradients away"
        size = len(indices_N)
        workspace = self._address(size)
        self._library.gradients(
            self._weights_at,
            self._gradients_at,
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
        """[sum of losses, number right] over all examples, float64; nothing is learned."""
        self._evaluate(examples, None)
        return self._totals

    def predict(self, examples: Split) -> Tensor:
        """The likeliest class of each example, int64 of shape (N,)."""
        classes_N = torch.empty(len(examples), dtype=torch.int64)
        self._evaluate(examples, classes_N.data_ptr())
        return classes_N

    def _evaluate(self, examples: Split, predicted: int | None) -> None:
        self._library.evaluate(
            self._weights_at,
            examples.images_NCHW.data_ptr(),
            examples.labels_N.data_ptr(),
            len(examples),
            self._threads,
            self._address(len(examples)),
            self._totals.data_ptr(),
            predicted,
        )

    def _address(self, size: int) -> int:
        """Where the working memory for a batch of `size` is; pages that are not touched cost nothing."""
        if size > self._size:
            needed = self._library.workspace_bytes(self._threads, size)
            if needed > MOST_BYTES:
                raise Unavailable(f"it would need {needed / 2**30:.1f} GiB of working memory")
            self._workspace = _zeroed(needed)
            self._size = size
        return ctypes.addressof(ctypes.c_char.from_buffer(self._workspace))


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"its library does not load: {error}") from error
    library.workspace_bytes.argtypes = [integer, long]
    library.workspace_bytes.restype = long
    library.gradients.argtypes = [pointer] * 5 + [long, integer] + [pointer] * 2
    library.gradients.restype = None
    library.evaluate.argtypes = [pointer] * 3 + [long, integer] + [pointer] * 3
    library.evaluate.restype = None
    return library


def _zeroed(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size)  # starts at a page
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _check(native: NativeBackend, config: ModelConfig) -> None:
    """Hold one step on noise against autograd; once for each network that this process trains.

    Raises:
        Unavailable: if they differ by more than rounding does.
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
    found = float(native.gradients(examples, torch.arange(37))[0]) / 37
    differences = [
        float((p.grad - g).norm() / (g.norm() + 1e-6))
        for p, g in zip(parameters, expected, strict=True)
        if p.grad is not None
    ]
    if not (abs(found - float(loss.detach())) < _TOLERANCE and max(differences) < _TOLERANCE):
        raise Unavailable(f"its first step differs from autograd's by {max(differences):.1g} of a gradient")
    _checked.add(config)


_checked: set[ModelConfig] = set()

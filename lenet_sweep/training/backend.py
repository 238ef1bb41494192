"""Backends compute the gradients of one network on a batch, and evaluate it.

`choose_backend` selects one for a run: `TorchBackend` (autograd, any device) or `native.NativeBackend`
(compiled code, CPU). Arrays of runs use `fused_step` instead.

Shape suffixes: N examples, C channels, H height, W width, K classes.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial, reduce
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lenet_sweep.config.schema import ModelConfig
from lenet_sweep.errors import DeviceError
from lenet_sweep.training.compiler import Unavailable
from lenet_sweep.training.data import Split, scaled
from lenet_sweep.training.native import NativeBackend
from lenet_sweep.training.threads import ThreadTeam

EVALUATION_BATCH = 1000  # examples per forward pass in evaluation


class Backend(Protocol):
    """Gradients and evaluation of one network.

    `gradients` sets `.grad` of all parameters to the gradient of the batch's mean loss. It and `totals`
    return [sum of losses, number correct], on the network's device. `predict` returns the most likely
    classes, int64 of shape (N,).
    """

    @property
    def name(self) -> str: ...
    @property
    def network(self) -> nn.Sequential: ...
    def gradients(self, examples: Split, indices_N: Tensor) -> Tensor: ...
    def totals(self, examples: Split) -> Tensor: ...
    def predict(self, examples: Split) -> Tensor: ...


class TorchBackend:
    """Gradients by torch's autograd, on any device.

    On a CPU, each thread computes the gradients of one slice of the batch. The threads synchronise once per
    step; torch's own threads would synchronise in every operation. The loss of an example must not depend on
    other examples (no batch normalisation). `threads` changes the last bits of a result.
    """

    name = "torch"

    def __init__(self, network: nn.Sequential, amp: bool = False, threads: int = 1) -> None:
        self.network = network
        self._amp = amp
        self._parameters = list(network.parameters())
        self._team = ThreadTeam(threads)

    def gradients(self, examples: Split, indices_N: Tensor) -> Tensor:
        """Set `.grad` to the gradients of the batch's mean loss; return [sum of losses, number correct]."""
        compute = partial(self._slice_gradients, examples, batch_size=len(indices_N))
        gradients, totals = zip(*self._team.map(compute, indices_N.chunk(self._team.size)), strict=True)
        for parameter, *slices in zip(self._parameters, *gradients, strict=True):
            # The order of the sum is fixed, for reproducible bits. Fused optimizers require this layout.
            parameter.grad = reduce(torch.add, slices).contiguous()
        sums: Tensor = reduce(torch.add, totals)
        return sums

    def _slice_gradients(
        self, examples: Split, indices_N: Tensor, batch_size: int
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The contribution of these examples to the gradients and totals of a batch of `batch_size`."""
        batch = examples.take(indices_N)
        logits_NK = forward(self.network, batch.images_NCHW, self._amp)
        loss = F.cross_entropy(logits_NK, batch.labels_N, reduction="sum")
        gradients = torch.autograd.grad(loss / batch_size, self._parameters)
        return gradients, loss_and_correct(loss, logits_NK, batch.labels_N)

    def totals(self, examples: Split) -> Tensor:
        """[sum of losses, number correct] over all examples, in eval mode."""

        @torch.no_grad()
        def evaluate(images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
            logits_NK = forward(self.network, images_NCHW, self._amp)
            loss = F.cross_entropy(logits_NK, labels_N, reduction="sum")
            return loss_and_correct(loss, logits_NK, labels_N).to(total_dtype(labels_N.device))

        self.network.eval()
        slices = batches(examples, EVALUATION_BATCH // self._team.size)
        totals = reduce(torch.add, self._team.map(evaluate, *zip(*slices, strict=True)))
        self.network.train()
        return totals

    def predict(self, examples: Split) -> Tensor:
        """The most likely class of each example, int64 of shape (N,), in eval mode."""

        @torch.no_grad()
        def classify(images_NCHW: Tensor) -> Tensor:
            return forward(self.network, images_NCHW, self._amp).argmax(1)

        self.network.eval()
        slices = examples.images_NCHW.split(EVALUATION_BATCH // self._team.size)
        classes = torch.cat(self._team.map(classify, slices))
        self.network.train()
        return classes


def choose_backend(
    network: nn.Sequential, device: torch.device, config: ModelConfig, wanted: str, amp: bool
) -> tuple[Backend, str | None]:
    """Choose the backend of `network`. `wanted` is auto, torch or native.

    Returns:
        The backend, and the reason for the fallback to torch if auto could not use the native backend.

    Raises:
        DeviceError: if `wanted` is native and that backend is not available.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if wanted == "torch" or (wanted == "auto" and (device.type != "cpu" or amp)):
        return TorchBackend(network, amp, threads), None
    try:
        if device.type != "cpu":
            raise Unavailable(f"it supports CPUs only, and this run is on {device}")
        return NativeBackend(network, config, threads), None
    except Unavailable as error:
        if wanted == "native":
            raise DeviceError(f"backend=native: {error}") from error
        reason = f"using the torch backend, which is slower; the native backend is not available: {error}"
        return TorchBackend(network, amp, threads), reason


def forward(network: nn.Module, images_NCHW: Tensor, amp: bool = False) -> Tensor:
    """Compute logits NK of uint8 images. The dtype is that of the weights (float32), also with `amp`."""
    dtype = next(network.parameters()).dtype
    with torch.autocast(images_NCHW.device.type, torch.bfloat16) if amp else nullcontext():
        logits_NK: Tensor = network(scaled(images_NCHW, dtype))
    return logits_NK.to(dtype)


def batches(examples: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels in batches of `size`, in order; the last batch may be smaller."""
    return zip(examples.images_NCHW.split(size), examples.labels_N.split(size), strict=True)


def loss_and_correct(loss: Tensor, logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """[sum of losses, number correct] of a batch, shape (2,). `loss` is the sum of its losses."""
    correct = (logits_NK.argmax(1) == labels_N).sum()
    return torch.stack([loss.detach(), correct])


def total_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums over an epoch: float64 to avoid rounding; float32 on Apple GPUs, which lack it."""
    return torch.float32 if device.type == "mps" else torch.float64

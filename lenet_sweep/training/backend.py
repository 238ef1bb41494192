"""TODO training.backend."""

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

EVALUATION_BATCH = 1000  # examples that pass forward at a time; changes no result's meaning


class Backend(Protocol):
    """Gradients and evaluation of one network; totals are [sum of losses, number right], on the device."""

    @property
    def name(self) -> str: ...
    @property
    def network(self) -> nn.Sequential: ...
    def gradients(self, examples: Split, indices_N: Tensor) -> Tensor: ...
    def totals(self, examples: Split) -> Tensor: ...
    def predict(self, examples: Split) -> Tensor: ...


class TorchBackend:
    """The step as torch does it, on any device.

    On a CPU a few threads take a part of the batch each, from its images to its gradients: they wait
    for each other once in a step, where torch's own do in every operation. So no example may have a
    part in another's loss, as it has where batches are normalised; and `threads` decides the last bits.
    """

    name = "torch"

    def __init__(self, network: nn.Sequential, amp: bool = False, threads: int = 1) -> None:
        self.network = network
        self._amp = amp
        self._parameters = list(network.parameters())
        self._team = ThreadTeam(threads)

    def gradients(self, examples: Split, indices_N: Tensor) -> Tensor:
        """Put the mean loss's gradients into `.grad`; return [sum of losses, number right]."""
        take = partial(self._part, examples, size=len(indices_N))
        gradients, totals = zip(*self._team.map(take, indices_N.chunk(self._team.size)), strict=True)
        for parameter, *parts in zip(self._parameters, *gradients, strict=True):
            # In order, so that the bits are always the same; fused optimizers ask for no other layout.
            parameter.grad = reduce(torch.add, parts).contiguous()
        sums: Tensor = reduce(torch.add, totals)
        return sums

    def _part(self, examples: Split, indices_N: Tensor, size: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """What these examples add to the gradients and totals of a batch of `size`."""
        batch = examples.take(indices_N)
        logits_NK = forward(self.network, batch.images_NCHW, self._amp)
        loss = F.cross_entropy(logits_NK, batch.labels_N, reduction="sum")
        gradients = torch.autograd.grad(loss / size, self._parameters)
        return gradients, loss_and_right(loss, logits_NK, batch.labels_N)

    def totals(self, examples: Split) -> Tensor:
        """[sum of losses, number right] over all examples, in eval mode."""

        @torch.no_grad()
        def take(images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
            logits_NK = forward(self.network, images_NCHW, self._amp)
            loss = F.cross_entropy(logits_NK, labels_N, reduction="sum")
            return loss_and_right(loss, logits_NK, labels_N).to(total_dtype(labels_N.device))

        self.network.eval()
        parts = batches(examples, EVALUATION_BATCH // self._team.size)
        totals = reduce(torch.add, self._team.map(take, *zip(*parts, strict=True)))
        self.network.train()
        return totals

    def predict(self, examples: Split) -> Tensor:
        """The likeliest class of each example, int64 of shape (N,)."""

        @torch.no_grad()
        def take(images_NCHW: Tensor) -> Tensor:
            return forward(self.network, images_NCHW, self._amp).argmax(1)

        self.network.eval()
        parts = examples.images_NCHW.split(EVALUATION_BATCH // self._team.size)
        classes = torch.cat(self._team.map(take, parts))
        self.network.train()
        return classes


def choose_backend(
    network: nn.Sequential, device: torch.device, config: ModelConfig, wanted: str, amp: bool
) -> tuple[Backend, str | None]:
    """The backend for `network` that `wanted` (auto, torch or native) names.

    Returns it, and the reason if auto would have preferred the native backend and it is not available.

    Raises:
        DeviceError: if the native backend is required by name and is not available.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if wanted == "torch" or (wanted == "auto" and (device.type != "cpu" or amp)):
        return TorchBackend(network, amp, threads), None
    try:
        if device.type != "cpu":
            raise Unavailable(f"it is for CPUs, and this run is on {device}")
        return NativeBackend(network, config, threads), None
    except Unavailable as error:
        if wanted == "native":
            raise DeviceError(f"backend=native: {error}") from error
        reason = f"using the torch backend, which is slower; the native one is not available: {error}"
        return TorchBackend(network, amp, threads), reason


def forward(network: nn.Module, images_NCHW: Tensor, amp: bool = False) -> Tensor:
    """uint8 images to logits NK of the weights' type: float32, unless somebody changed it."""
    dtype = next(network.parameters()).dtype
    with torch.autocast(images_NCHW.device.type, torch.bfloat16) if amp else nullcontext():
        logits_NK: Tensor = network(scaled(images_NCHW, dtype))
    return logits_NK.to(dtype)


def batches(examples: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels for one forward pass without gradients after another."""
    return zip(examples.images_NCHW.split(size), examples.labels_N.split(size), strict=True)


def loss_and_right(loss: Tensor, logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """[sum of the losses, number right] of a batch whose summed loss is `loss`, shape (2,)."""
    right = (logits_NK.argmax(1) == labels_N).sum()
    return torch.stack([loss.detach(), right])


def total_dtype(device: torch.device) -> torch.dtype:
    """float64, so that adding up an epoch loses nothing; Apple's GPUs have none."""
    return torch.float32 if device.type == "mps" else torch.float64

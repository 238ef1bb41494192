"""The training loop: one gradient step, one epoch, one pass over held-out examples.

`train` yields an `EpochMetrics` after every epoch and does nothing else: watching, tracking,
saving and stopping early are done by whoever consumes it (`run`). Gradients come from a `Step`:
`Autograd` defines it, `native.Native` is the same for CPUs, faster.

Shape suffixes: N examples, C channels, H height, W width, K classes.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lenet_sweep import devices
from lenet_sweep.compiler import Unavailable
from lenet_sweep.config import Config
from lenet_sweep.data import Data, Split, scaled
from lenet_sweep.errors import DeviceError, RunFailed
from lenet_sweep.native import Native
from lenet_sweep.randomness import generator

CURVE_POINTS = 5  # points of the training curves in an epoch, as in the tutorial
EVALUATION_BATCH = 1000  # examples that pass forward at a time; changes no result's meaning


@dataclass(frozen=True)
class CurvePoint:
    """Means over the training examples seen so far in the epoch, while the network learned from them."""

    epoch: float  # epochs since the start, with fraction
    train_loss: float
    train_acc: float


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch showed. Losses are mean cross-entropies in nats, accuracies lie in [0, 1]."""

    epoch: int  # from 1
    train_loss: float  # summed while training, as in the tutorial: the network changed meanwhile
    train_acc: float
    test_loss: float  # with the weights at the end of the epoch
    test_acc: float
    val_loss: float | None  # None unless examples are held out
    val_acc: float | None
    examples_per_s: float  # the training part only, gathering of batches included
    epoch_s: float  # the whole epoch, evaluation included
    curve: tuple[CurvePoint, ...]


class Step(Protocol):
    """Gradients and evaluation of one network; totals are [sum of losses, number right], on the device."""

    @property
    def name(self) -> str: ...
    @property
    def network(self) -> nn.Sequential: ...
    def gradients(self, examples: Split, indices_N: Tensor) -> Tensor: ...
    def totals(self, examples: Split) -> Tensor: ...
    def predict(self, examples: Split) -> Tensor: ...


class Autograd:
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
        self._team = devices.Team(threads)

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


def choose_step(config: Config, network: nn.Sequential, device: torch.device) -> tuple[Step, str | None]:
    """The step that `config.backend` asks for, and, where auto could not have the fast one, why not.

    Raises:
        DeviceError: if the native step is asked for by name and cannot be had.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if config.backend == "torch" or (config.backend == "auto" and _wants_torch(config, device)):
        return Autograd(network, config.precision.amp, threads), None
    try:
        if device.type != "cpu":
            raise Unavailable(f"it is for CPUs, and this run is on {device}")
        return Native(network, config.model, threads), None
    except Unavailable as error:
        if config.backend == "native":
            raise DeviceError(f"backend=native: {error}") from error
        reason = f"no native step, so torch's, which is slower: {error}"
        return Autograd(network, config.precision.amp, threads), reason


def _wants_torch(config: Config, device: torch.device) -> bool:
    return device.type != "cpu" or config.precision.amp


def train(
    step: Step,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    data: Data,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    first_epoch: int = 1,
    on_point: Callable[[CurvePoint], None] | None = None,
) -> Iterator[EpochMetrics]:
    """Train the step's network in place, yielding once an epoch; all tensors stay on the data's device.

    The order of examples is a fresh permutation each epoch, drawn on the CPU from `seed` and the
    epoch's number, so it is the same on every device; so a run restored to the state after epoch e
    goes on with `first_epoch` e + 1, to the bit. `on_point` is called five times an epoch.

    Raises:
        RunFailed: at the first curve point where the loss is not a finite number.
    """
    device = data.train.labels_N.device
    steps = math.ceil(len(data.train) / batch_size)
    points = {math.ceil(steps * k / CURVE_POINTS) for k in range(1, CURVE_POINTS + 1)}

    for epoch in range(first_epoch, epochs + 1):
        started = time.perf_counter()
        order_N = torch.randperm(len(data.train), generator=generator(seed, f"order/{epoch}")).to(device)
        totals = torch.zeros(2, dtype=total_dtype(device), device=device)
        seen, curve = 0, []
        # The step has threads of its own; torch's would meet at every tensor of a small update.
        with devices.torch_threads(1):
            for number, indices_N in enumerate(order_N.split(batch_size), start=1):
                totals += step.gradients(data.train, indices_N)
                optimizer.step()
                seen += len(indices_N)
                if number in points:
                    loss, accuracy = (totals / seen).tolist()  # host-device sync: five an epoch
                    if not math.isfinite(loss):
                        raise RunFailed(
                            f"the loss became {loss} in epoch {epoch}, by step {number} of {steps}"
                        )
                    curve.append(CurvePoint(epoch - 1 + number / steps, loss, accuracy))
                    if on_point:
                        on_point(curve[-1])
        trained = time.perf_counter()
        schedule.step()

        test_loss, test_acc = evaluate(step, data.test)
        val_loss, val_acc = evaluate(step, data.val) if data.val else (None, None)
        if not math.isfinite(test_loss):
            raise RunFailed(f"the test loss became {test_loss} after epoch {epoch}")
        yield EpochMetrics(
            epoch,
            curve[-1].train_loss,
            curve[-1].train_acc,
            test_loss,
            test_acc,
            val_loss,
            val_acc,
            examples_per_s=seen / (trained - started),
            epoch_s=time.perf_counter() - started,
            curve=tuple(curve),
        )


def evaluate(step: Step, examples: Split) -> tuple[float, float]:
    """Mean loss and accuracy over `examples`."""
    loss, accuracy = (step.totals(examples) / len(examples)).tolist()  # host-device sync: one a pass
    return loss, accuracy


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

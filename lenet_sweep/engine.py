"""The training loop: one gradient step, one epoch, one pass over held-out examples.

`train` yields an `EpochMetrics` after every epoch and does nothing else: watching, tracking,
saving and stopping early are done by whoever consumes it (`run`).

Shape suffixes: N examples, C channels, H height, W width, K classes.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lenet_sweep.data import Data, Split, scaled
from lenet_sweep.errors import RunFailed
from lenet_sweep.randomness import generator

CURVE_POINTS = 5  # points of the training curves in an epoch, as in the tutorial
EVALUATION_BATCH = 1000  # examples in one forward pass without gradients; changes no result's meaning


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


def train(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    data: Data,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    first_epoch: int = 1,
    amp: bool = False,
    on_point: Callable[[CurvePoint], None] | None = None,
) -> Iterator[EpochMetrics]:
    """Train `network` in place, yielding once an epoch; all tensors stay on the data's device.

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
        network.train()
        order_N = torch.randperm(len(data.train), generator=generator(seed, f"order/{epoch}")).to(device)
        totals = torch.zeros(2, dtype=_total_dtype(device), device=device)
        seen, curve = 0, []
        for step, indices_N in enumerate(order_N.split(batch_size), start=1):
            totals += gradient_step(network, optimizer, data.train.take(indices_N), amp)
            seen += len(indices_N)
            if step in points:
                loss, accuracy = (totals / seen).tolist()  # host-device sync: five an epoch
                if not math.isfinite(loss):
                    raise RunFailed(f"the loss became {loss} in epoch {epoch}, by step {step} of {steps}")
                curve.append(CurvePoint(epoch - 1 + step / steps, loss, accuracy))
                if on_point:
                    on_point(curve[-1])
        trained = time.perf_counter()
        schedule.step()

        test_loss, test_acc = evaluate(network, data.test, amp)
        val_loss, val_acc = evaluate(network, data.val, amp) if data.val else (None, None)
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


def gradient_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, batch: Split, amp: bool = False
) -> Tensor:
    """Take one step on `batch`; return [sum of its losses, number right], still on the device."""
    logits_NK = forward(network, batch.images_NCHW, amp)
    loss = F.cross_entropy(logits_NK, batch.labels_N)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return _totals(loss, logits_NK, batch.labels_N)


@torch.no_grad()
def evaluate(network: nn.Module, split: Split, amp: bool = False) -> tuple[float, float]:
    """Mean loss and accuracy over `split`, in eval mode, on the device that it is on."""
    network.eval()
    device = split.labels_N.device
    totals = torch.zeros(2, dtype=_total_dtype(device), device=device)
    batches = zip(
        split.images_NCHW.split(EVALUATION_BATCH), split.labels_N.split(EVALUATION_BATCH), strict=True
    )
    for images_NCHW, labels_N in batches:
        logits_NK = forward(network, images_NCHW, amp)
        totals += _totals(F.cross_entropy(logits_NK, labels_N), logits_NK, labels_N)
    loss, accuracy = (totals / len(split)).tolist()  # host-device sync: one a pass
    return loss, accuracy


@torch.no_grad()
def predict(network: nn.Module, images_NCHW: Tensor, amp: bool = False) -> Tensor:
    """The likeliest class of each uint8 image, int64 of shape (N,)."""
    network.eval()
    return torch.cat([forward(network, b, amp).argmax(1) for b in images_NCHW.split(EVALUATION_BATCH)])


def forward(network: nn.Module, images_NCHW: Tensor, amp: bool = False) -> Tensor:
    """uint8 images to float32 logits NK."""
    with torch.autocast(images_NCHW.device.type, torch.bfloat16) if amp else nullcontext():
        logits_NK: Tensor = network(scaled(images_NCHW))
    return logits_NK.float()


def _totals(loss: Tensor, logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    right = (logits_NK.argmax(1) == labels_N).sum()
    return torch.stack([loss.detach() * len(labels_N), right])


def _total_dtype(device: torch.device) -> torch.dtype:
    """float64, so that adding up an epoch loses nothing; Apple's GPUs have none."""
    return torch.float32 if device.type == "mps" else torch.float64

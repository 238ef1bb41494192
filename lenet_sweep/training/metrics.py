"""The metrics of one epoch, and the meter that collects them. Does not import torch.

`engine.train` and `fused.train` share the meter, so both report the same quantities.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from lenet_sweep.errors import RunFailed

CURVE_POINTS = 5  # points of the training curve per epoch, as in the tutorial


@dataclass(frozen=True)
class CurvePoint:
    """Means over the training examples seen so far in the epoch, computed while the weights change."""

    epoch: float  # epochs since the start of training, with a fraction
    train_loss: float
    train_acc: float


@dataclass(frozen=True)
class EpochMetrics:
    """The metrics of one epoch. Losses are mean cross-entropies in nats, accuracies are in [0, 1]."""

    epoch: int  # from 1
    train_loss: float  # mean over the epoch's batches while the weights change, as in the tutorial
    train_acc: float
    test_loss: float  # with the weights at the end of the epoch
    test_acc: float
    val_loss: float | None  # None if no examples are held out
    val_acc: float | None
    examples_per_s: float  # training only, including the selection of batches
    epoch_s: float  # the whole epoch, including evaluation
    curve: tuple[CurvePoint, ...]


class EpochMeter:
    """Collects the curve points of one run in one epoch and builds its `EpochMetrics`."""

    def __init__(self, epoch: int, steps: int, on_point: Callable[[CurvePoint], None] | None = None) -> None:
        """Args: `epoch` from 1; `steps` in the epoch; `on_point` is called with every curve point."""
        self.epoch = epoch
        self._steps, self._on_point = steps, on_point
        self._curve: list[CurvePoint] = []

    def add(self, step: int, loss: float, accuracy: float) -> None:
        """Add a curve point: mean loss and accuracy after `step` steps of the epoch.

        Raises:
            RunFailed: if the loss is not finite.
        """
        if not math.isfinite(loss):
            raise RunFailed(f"the loss became {loss} in epoch {self.epoch}, by step {step} of {self._steps}")
        self._curve.append(CurvePoint(self.epoch - 1 + step / self._steps, loss, accuracy))
        if self._on_point:
            self._on_point(self._curve[-1])

    def finish(
        self,
        test: tuple[float, float],
        val: tuple[float, float] | tuple[None, None],
        examples_per_s: float,
        epoch_s: float,
    ) -> EpochMetrics:
        """Build the epoch's metrics. `test` and `val` are loss and accuracy with its final weights.

        Raises:
            RunFailed: if the test loss is not finite.
        """
        if not math.isfinite(test[0]):
            raise RunFailed(f"the test loss became {test[0]} after epoch {self.epoch}")
        last = self._curve[-1]
        return EpochMetrics(
            self.epoch,
            last.train_loss,
            last.train_acc,
            test[0],
            test[1],
            val[0],
            val[1],
            examples_per_s,
            epoch_s,
            tuple(self._curve),
        )


def curve_steps(steps: int) -> frozenset[int]:
    """The steps (from 1) after which a curve point is recorded, in an epoch of `steps` steps."""
    return frozenset(math.ceil(steps * k / CURVE_POINTS) for k in range(1, CURVE_POINTS + 1))

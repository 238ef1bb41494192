"""What one epoch of training showed, and the meter that collects it. Free of torch.

Shared by `engine.train` and the arrays of `fused.train`, so both report the same quantities.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from lenet_sweep.errors import RunFailed

CURVE_POINTS = 5  # points of the training curves in an epoch, as in the tutorial


@dataclass(frozen=True)
class CurvePoint:
    """Means over the training examples seen so far in the epoch, while the network learned from them."""

    epoch: float  # epochs since the start, with fraction
    train_loss: float
    train_acc: float


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch showed. Losses are mean cross-entropies in nats, accuracies are in [0, 1]."""

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


class EpochMeter:
    """Collects one run's curve points in one epoch, and turns them into its `EpochMetrics`."""

    def __init__(self, epoch: int, steps: int, on_point: Callable[[CurvePoint], None] | None = None) -> None:
        """`epoch` counts from 1, `steps` are those of the epoch; `on_point` is called for each point."""
        self.epoch = epoch
        self._steps, self._on_point = steps, on_point
        self._curve: list[CurvePoint] = []

    def add(self, step: int, loss: float, accuracy: float) -> None:
        """Add a curve point: the means after `step` (from 1) steps of the epoch.

        Raises:
            RunFailed: if the loss is not a finite number.
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
        """The epoch's metrics; `test` and `val` are loss and accuracy with its final weights.

        Raises:
            RunFailed: if the test loss is not a finite number.
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
    """The steps (from 1) of an epoch of `steps` steps after which a curve point is taken."""
    return frozenset(math.ceil(steps * k / CURVE_POINTS) for k in range(1, CURVE_POINTS + 1))

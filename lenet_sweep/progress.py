"""What a user sees while a run trains: a live bar on a terminal, one plain line an epoch elsewhere."""

import logging
import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from lenet_sweep.shapes import Layer

if TYPE_CHECKING:  # engine imports torch, and a table needs none
    from lenet_sweep.engine import CurvePoint, EpochMetrics

log = logging.getLogger("lenet_sweep")


def console() -> Console:
    """Standard output; where that is no terminal, wide enough that nothing is cut or wrapped."""
    found = _Console(highlight=False)
    return found if found.is_terminal else _Console(highlight=False, width=240)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on without an audience: `| head` must not end a training, as rich would have it."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(line: str) -> None:
    """Print a line for the user and keep it in the run's log file."""
    console().print(line, markup=False, soft_wrap=True)
    log.info("%s", line)


def layer_table(layers: list[Layer]) -> str:
    """Every layer's output shape for one image, a line each."""
    lines = [f"{layer.name:<10}{layer.kind:<12}{layer.output_shape}" for layer in layers]
    return "\n".join(["layer     kind        output shape", *lines])


def epoch_line(metrics: "EpochMetrics", epochs: int) -> str:
    """One epoch in words and numbers."""
    val = f"val acc {metrics.val_acc:.3f}  " if metrics.val_acc is not None else ""
    return (
        f"epoch {metrics.epoch:>{len(str(epochs))}}/{epochs}  train loss {metrics.train_loss:.3f}  "
        f"train acc {metrics.train_acc:.3f}  {val}test acc {metrics.test_acc:.3f}  "
        f"{metrics.examples_per_s:,.0f} examples/s"
    )


class Watch:
    """Shows the progress of one run; used as a context manager around its training."""

    def __init__(self, epochs: int, label: str) -> None:
        """`label` names the run among others ('[2/3] lr=0.5'); '' for a single one."""
        self._epochs = epochs
        self._label = f"{label}  " if label else ""
        self._numbers = ""
        screen = console()
        self._bar = Progress(*_columns(), console=screen, transient=True) if screen.is_terminal else None
        if self._bar:
            self._task = self._bar.add_task(self._label, total=epochs, epoch=f"epoch 1/{epochs}", numbers="")

    def __enter__(self) -> "Watch":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def point(self, point: "CurvePoint") -> None:
        """A fifth of an epoch is done."""
        if self._bar:
            numbers = f"loss {point.train_loss:.3f}  acc {point.train_acc:.3f}  {self._numbers}"
            self._bar.update(self._task, completed=point.epoch, numbers=numbers)

    def epoch(self, metrics: "EpochMetrics") -> None:
        """An epoch is done."""
        line = self._label + epoch_line(metrics, self._epochs)
        if not self._bar:
            say(line)
            return
        log.info("%s", line)
        self._numbers = f"test acc {metrics.test_acc:.3f}  {metrics.examples_per_s:,.0f} examples/s"
        numbers = f"loss {metrics.train_loss:.3f}  acc {metrics.train_acc:.3f}  {self._numbers}"
        coming = min(metrics.epoch + 1, self._epochs)
        self._bar.update(
            self._task, completed=metrics.epoch, epoch=f"epoch {coming}/{self._epochs}", numbers=numbers
        )


def _columns() -> list[ProgressColumn]:
    return [
        TextColumn("{task.description}{task.fields[epoch]}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeRemainingColumn(compact=True),
    ]

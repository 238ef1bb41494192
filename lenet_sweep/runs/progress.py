"""What is shown while runs train: a live line for each run on a terminal, plain lines otherwise.

Runs report to the current `Reporter`. By default this is the process's screen. `reporting_to` replaces it: a
sweep's screen adds a line of totals, and a worker process forwards everything to the sweep's process.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn

from lenet_sweep.shapes import Layer

if TYPE_CHECKING:
    from lenet_sweep.training.metrics import CurvePoint, EpochMetrics

log = logging.getLogger("lenet_sweep")


class Reporter(Protocol):
    """Receives the progress of runs. `run` is the label of a job of a sweep, '' for a single run."""

    def line(self, text: str) -> None:
        """Print a line of text."""

    def detail(self, text: str) -> None:
        """Print a line that repeats what a live line shows already."""

    def progress(self, run: str, epoch: float, epochs: int, numbers: str) -> None:
        """The run has trained `epoch` of `epochs`; `numbers` is its loss and accuracy as text."""

    def stopped(self, run: str) -> None:
        """The run no longer trains."""

    def job_done(self, run: str, failed: bool) -> None:
        """The job has ended, even if it never trained."""


class Screen:
    """Standard output, with a live line for each run in training if it is a terminal."""

    def __init__(self) -> None:
        self._live: Progress | None = None
        self._rows: dict[str, TaskID] = {}

    def line(self, text: str) -> None:
        screen = self._live.console if self._live else console()
        screen.print(text, markup=False, soft_wrap=True)

    def detail(self, text: str) -> None:
        if not self._live:
            self.line(text)

    def progress(self, run: str, epoch: float, epochs: int, numbers: str) -> None:
        self._start()
        if not self._live:
            return
        if run not in self._rows:
            self._rows[run] = self._live.add_task(run, total=epochs, about="", numbers="")
        about = f"epoch {min(int(epoch) + 1, epochs)}/{epochs}"
        self._live.update(self._rows[run], completed=epoch, about=about, numbers=numbers)

    def stopped(self, run: str) -> None:
        if self._live and run in self._rows:
            self._live.remove_task(self._rows.pop(run))
            if not self._rows:
                self._stop()

    def job_done(self, run: str, failed: bool) -> None:
        pass

    def _start(self) -> None:
        screen = console()
        if self._live or not screen.is_terminal:
            return
        # Runs of a sweep start and end, so the time left is estimated from the last two minutes.
        self._live = Progress(*_columns(), console=screen, transient=True, speed_estimate_period=120)
        self._live.start()

    def _stop(self) -> None:
        if self._live:
            self._live.stop()
            self._live, self._rows = None, {}


class SweepScreen(Screen):
    """A screen with a line of totals, live or after each job: jobs done and failed, time left."""

    def __init__(self, costs: Mapping[str, float]) -> None:
        """`costs` maps the label of every job to the number of epochs that it has to train."""
        super().__init__()
        self._costs = costs
        self._first: dict[str, float] = {}  # where a job that trains now began, in epochs
        self._shares: dict[str, float] = {}  # of each job, how much of its cost is done
        self._ended = self._failed = 0
        self._started = time.monotonic()

    def __enter__(self) -> "SweepScreen":
        self._start()
        if self._live:
            self._totals = self._live.add_task("sweep", total=sum(self._costs.values()), about="", numbers="")
            self._count()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def progress(self, run: str, epoch: float, epochs: int, numbers: str) -> None:
        super().progress(run, epoch, epochs, numbers)
        first = self._first.setdefault(run, epoch)
        self._shares[run] = (epoch - first) / (epochs - first) if first < epochs else 1.0
        self._count()

    def stopped(self, run: str) -> None:
        if self._live and run in self._rows:
            self._live.remove_task(self._rows.pop(run))

    def job_done(self, run: str, failed: bool) -> None:
        self._ended += 1
        self._failed += failed
        self._shares[run] = 1.0
        self._count()
        if not self._live and self._ended < len(self._costs):
            self.line(f"{self._so_far()}{self._time_left()}")

    def _count(self) -> None:
        if self._live:
            self._live.update(self._totals, completed=self._done(), about=self._so_far())

    def _done(self) -> float:
        return sum(self._costs[run] * share for run, share in self._shares.items() if run in self._costs)

    def _so_far(self) -> str:
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{self._ended} of {len(self._costs)} runs{failed}"

    def _time_left(self) -> str:
        done, seconds = self._done(), time.monotonic() - self._started
        if not done:
            return ""
        left = round(seconds * (sum(self._costs.values()) - done) / done)
        return f", about {left // 60}:{left % 60:02} left"


_reporter: Reporter = Screen()


@contextlib.contextmanager
def reporting_to(other: Reporter) -> Iterator[None]:
    """Report to `other` within the block."""
    global _reporter
    before, _reporter = _reporter, other
    try:
        yield
    finally:
        _reporter = before


def current() -> Reporter:
    """The current reporter."""
    return _reporter


def console() -> Console:
    """Standard output. If it is not a terminal, it is 240 columns wide, so that no table is wrapped."""
    screen = _Console(highlight=False)
    return screen if screen.is_terminal else _Console(highlight=False, width=240)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Discard further output. Rich would exit, but `| head` must not end a training."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(line: str, run: str = "") -> None:
    """Print a line, prefixed by the label `run` if there is one, and write it to the log file."""
    line = f"{run}: {line}" if run else line
    _reporter.line(line)
    log.info("%s", line)


def job_done(run: str, failed: bool) -> None:
    """Count a job of a sweep as done."""
    _reporter.job_done(run, failed)


def layer_table(layers: list[Layer]) -> str:
    """One line per layer, with its output shape for one image."""
    lines = [f"{layer.name:<10}{layer.kind:<12}{layer.output_shape}" for layer in layers]
    return "\n".join(["layer     kind        output shape", *lines])


def epoch_line(metrics: "EpochMetrics", epochs: int) -> str:
    """The metrics of one epoch as a line of text."""
    val = f"val acc {metrics.val_acc:.3f}  " if metrics.val_acc is not None else ""
    return (
        f"epoch {metrics.epoch:>{len(str(epochs))}}/{epochs}  train loss {metrics.train_loss:.3f}  "
        f"train acc {metrics.train_acc:.3f}  {val}test acc {metrics.test_acc:.3f}  "
        f"{metrics.examples_per_s:,.0f} examples/s"
    )


class RunProgress:
    """Reports how far one run is, from `start` until `close`."""

    def __init__(self, epochs: int, run: str, done: int = 0) -> None:
        """`run` is its label ('[2/3] lr=0.5'), '' for a single run; `done` epochs are behind it."""
        self._epochs, self._run, self._done = epochs, run, done
        self._last = ""  # the metrics of the last whole epoch

    def start(self) -> None:
        _reporter.progress(self._run, self._done, self._epochs, "")

    def close(self) -> None:
        _reporter.stopped(self._run)

    def point(self, point: "CurvePoint") -> None:
        """A fifth of an epoch is done."""
        self._report(point.epoch, point.train_loss, point.train_acc)

    def epoch(self, metrics: "EpochMetrics") -> None:
        """An epoch is done."""
        line = f"{self._run}  {epoch_line(metrics, self._epochs)}".lstrip()
        log.info("%s", line)
        _reporter.detail(line)
        self._last = f"test acc {metrics.test_acc:.3f}  {metrics.examples_per_s:,.0f} examples/s"
        self._report(metrics.epoch, metrics.train_loss, metrics.train_acc)

    def _report(self, epoch: float, loss: float, accuracy: float) -> None:
        numbers = f"loss {loss:.3f}  acc {accuracy:.3f}  {self._last}"
        _reporter.progress(self._run, epoch, self._epochs, numbers)


def _columns() -> list[ProgressColumn]:
    return [
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[about]}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeRemainingColumn(compact=True),
    ]

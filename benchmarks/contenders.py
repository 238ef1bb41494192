"""What the ladder compares: training loops, measured by epoch, and sweeps, measured as whole commands.

Every loop runs in its own process, so that its settings and allocator do not change the speed of another.
It trains one epoch per call. All loops train the same two networks on the same data.
"""

import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from hydra import compose, initialize_config_dir

from benchmarks import measurement, tutorial
from benchmarks.measurement import Peak
from lenet_sweep.cli.compose import to_config
from lenet_sweep.config.schema import TRAIN_EXAMPLES, Config
from lenet_sweep.errors import RunFailed
from lenet_sweep.paths import conf_dir
from lenet_sweep.training import devices, engine, fused
from lenet_sweep.training.metrics import EpochMetrics
from lenet_sweep.training.state import prepare

MODELS = {"sigmoid/avg": ("lenet", 0.9), "ReLU/max": ("lenet_relu_max", 0.1)}
TUTORIAL = "tutorial's loop"
ENDLESS = 1_000_000  # epochs


@dataclass(frozen=True)
class Setting:
    """What is the same for all contenders."""

    device: str  # as in devices.resolve
    threads: int
    data: str

    @property
    def examples(self) -> int:
        """Training examples per epoch."""
        return TRAIN_EXAMPLES[self.data]


@dataclass(frozen=True)
class Sample:
    """One epoch including its test pass, or one whole sweep."""

    seconds: float
    examples: int  # training examples of all runs together
    train_rate: float | None = None  # examples/s without the test pass; None if it was not timed separately
    peak: Peak | None = None  # None if memory was not measured

    @property
    def rate(self) -> float:
        """Training examples per second of total time."""
        return self.examples / self.seconds


class Contender(Protocol):
    """One competitor: `take` returns the next sample, `warm_up` an optional first one that is not counted."""

    @property
    def name(self) -> str: ...
    @property
    def network(self) -> str: ...
    def warm_up(self) -> Sample | None: ...
    def take(self) -> Sample: ...
    def close(self) -> None: ...


class Recipe(Protocol):
    """A training loop: `epochs` yields one sample per epoch, without end."""

    @property
    def name(self) -> str: ...
    @property
    def network(self) -> str: ...
    @property
    def setting(self) -> Setting: ...
    def epochs(self) -> Iterator[Sample]: ...


@dataclass(frozen=True)
class Tutorial:
    """The tutorial's own loop."""

    setting: Setting
    network: str
    workers: int

    @property
    def name(self) -> str:
        return f"{TUTORIAL}, {self.workers} DataLoader workers"

    def epochs(self) -> Iterator[Sample]:
        net, lr = tutorial.network(self.network == "ReLU/max"), MODELS[self.network][1]
        root, device = tutorial.raw_folder(self.setting.data), devices.resolve(self.setting.device)
        for *_, seconds in self._loop()(net, root, lr, self.workers, device):
            yield Sample(seconds, self.setting.examples)

    def _loop(self) -> Callable[..., Iterator[tuple[float, float, float, float]]]:
        return tutorial.epochs


class Lightning(Tutorial):
    """The tutorial's recipe in PyTorch Lightning."""

    @property
    def name(self) -> str:
        return f"Lightning, {self.workers} DataLoader workers"

    def _loop(self) -> Callable[..., Iterator[tuple[float, float, float, float]]]:
        from benchmarks import lightning_loop

        return lightning_loop.epochs


@dataclass(frozen=True)
class Step:
    """Our loop with one of the backends."""

    setting: Setting
    network: str
    backend: str

    @property
    def name(self) -> str:
        return f"one run, backend={self.backend}"

    def epochs(self) -> Iterator[Sample]:
        config = _our_config(self, f"backend={self.backend}")
        state = prepare(config)
        for metrics in engine.train(state, epochs=ENDLESS, batch_size=config.batch_size, seed=config.seed):
            yield Sample(metrics.epoch_s, self.setting.examples, metrics.examples_per_s)


@dataclass(frozen=True)
class Array:
    """Several runs trained as one array; the examples of all runs are counted."""

    setting: Setting
    network: str
    width: int

    @property
    def name(self) -> str:
        return f"{self.width} runs as one array"

    def epochs(self) -> Iterator[Sample]:
        first = _our_config(self)
        data, members = None, []
        for seed in range(self.width):
            state = prepare(replace(first, seed=seed), fused=True, data=data)
            data = state.data
            members.append(fused.Member(state.network, state.optimizer, state.schedule, seed, epochs=ENDLESS))
        assert data
        outcomes = fused.train(members, data, batch_size=first.batch_size)
        while epoch := list(itertools.islice(outcomes, self.width)):
            metrics = [_reached(outcome) for _, outcome in epoch]
            rate = sum(each.examples_per_s for each in metrics)
            yield Sample(metrics[0].epoch_s, self.width * self.setting.examples, rate)


def _reached(outcome: EpochMetrics | RunFailed) -> EpochMetrics:
    if isinstance(outcome, RunFailed):
        raise outcome
    return outcome


def compose_config(*overrides: str) -> Config:
    """The config of a command with these overrides, without tracking."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_config(compose("config", [*overrides, "tracking=none"]))


def _our_config(recipe: Recipe, *overrides: str) -> Config:
    (model, lr), setting = MODELS[recipe.network], recipe.setting
    common = (f"model={model}", f"lr={lr}", f"data={setting.data}", f"device={setting.device}")
    return compose_config(*common, f"threads={setting.threads}", *overrides)


class Loop:
    """Runs a recipe in its own process."""

    def __init__(self, recipe: Recipe) -> None:
        self.name, self.network = recipe.name, recipe.network
        self._is_ours = not isinstance(recipe, Tutorial)
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start, (recipe,))
        self._pid: int | None = None

    def warm_up(self) -> Sample:
        """The first epoch, which includes imports and filling caches. Memory is measured only here.

        Measuring it in every epoch would slow down a fast epoch by some percent.
        """
        settings = contextlib.nullcontext() if self._is_ours else measurement.without_our_settings()
        with settings, _deaf_to_interrupts():  # the new process inherits this; `close` ends it
            pid = self._process.submit(os.getpid)
        self._pid = pid.result()
        epoch = self._process.submit(_next_epoch)
        peak = measurement.watch(self._pid, lambda seconds: bool(wait([epoch], seconds).done))
        return replace(epoch.result(), peak=peak)

    def take(self) -> Sample:
        """Train one more epoch."""
        return self._process.submit(_next_epoch).result()

    def close(self) -> None:
        """End the process, even during an epoch."""
        if self._pid:
            measurement.end(self._pid)
        self._process.shutdown()


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_epochs: Iterator[Sample]


def _start(recipe: Recipe) -> None:
    global _epochs
    warnings.simplefilter("ignore")  # for example, that there are more workers than cores
    # Otherwise DataLoaders would spawn their workers like this process, which takes seconds per epoch.
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(recipe.setting.threads)
    _epochs = recipe.epochs()


def _next_epoch() -> Sample:
    return next(_epochs)


@dataclass(frozen=True)
class Sweep:
    """One small sweep: a real command in an empty folder, from start to exit."""

    setting: Setting
    launcher: tuple[str, ...]  # the overrides that select it
    epochs: int
    network = "sigmoid/avg"
    rates = (0.3, 0.5, 0.7, 0.9)

    @property
    def name(self) -> str:
        return f"sweep, {' '.join(self.launcher)}"

    def warm_up(self) -> None:
        """Do nothing: a command needs no warm-up."""

    def take(self) -> Sample:
        setting = (f"data={self.setting.data}", f"device={self.setting.device}")
        runs = (f"lr={','.join(map(str, self.rates))}", f"epochs={self.epochs}")
        cost = measurement.take(["lenet_sweep", *runs, *setting, *self.launcher, "-m"])
        return Sample(cost.wall_s, len(self.rates) * self.epochs * self.setting.examples, None, cost.peak)

    def close(self) -> None:
        """Do nothing: no process is left."""


def missing(package: str, what: str) -> bool:
    """Whether an optional package is not installed; if so, print what is left out."""
    if importlib.util.find_spec(package):
        return False
    measurement.say(f"{what}: left out, because {package.rpartition('.')[2]} is not installed. "
                    "Install it with: python -m pip install -e '.[bench]'")  # fmt: skip
    return True

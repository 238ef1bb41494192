"""What the ladder compares: loops that take epochs, and sweeps that are whole commands.

Every loop lives in a process of its own, so that no switch or allocator of one changes another's
speed, and ends an epoch when it is asked for one. All train the same two networks on the same data.
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
    """What all contenders have in common."""

    device: str  # as devices.resolve takes it
    threads: int
    data: str

    @property
    def examples(self) -> int:
        """Training examples of an epoch."""
        return TRAIN_EXAMPLES[self.data]


@dataclass(frozen=True)
class Sample:
    """One epoch and its test pass, or one whole sweep."""

    seconds: float
    examples: int  # trained on, those of all runs
    train_rate: float | None = None  # examples/s of the training part; None where it is not told apart
    peak: Peak | None = None  # None where nobody looked

    @property
    def rate(self) -> float:
        """Examples trained on a second, all that goes with it included."""
        return self.examples / self.seconds


class Contender(Protocol):
    """What takes its turn: `take` returns the next sample, `warm_up` one that does not count, if any."""

    @property
    def name(self) -> str: ...
    @property
    def network(self) -> str: ...
    def warm_up(self) -> Sample | None: ...
    def take(self) -> Sample: ...
    def close(self) -> None: ...


class Recipe(Protocol):
    """A loop: `epochs` yields a sample an epoch, without end."""

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
    """The same in PyTorch Lightning."""

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
    """As many runs as one array; examples are those of all of them."""

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
    """The config that a command with these overrides would have, untracked."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_config(compose("config", [*overrides, "tracking=none"]))


def _our_config(recipe: Recipe, *overrides: str) -> Config:
    (model, lr), setting = MODELS[recipe.network], recipe.setting
    common = (f"model={model}", f"lr={lr}", f"data={setting.data}", f"device={setting.device}")
    return compose_config(*common, f"threads={setting.threads}", *overrides)


class Loop:
    """A recipe in its own process."""

    def __init__(self, recipe: Recipe) -> None:
        self.name, self.network = recipe.name, recipe.network
        self._is_ours = not isinstance(recipe, Tutorial)
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start, (recipe,))
        self._pid: int | None = None

    def warm_up(self) -> Sample:
        """The first epoch, which pays for imports, caches and clocks, with a look at the memory.

        No later one is looked at, as that costs a fast epoch some percent.
        """
        settings = contextlib.nullcontext() if self._is_ours else measurement.without_our_settings()
        with settings, _deaf_to_interrupts():  # which the new process inherits: it is ended by `close`
            pid = self._process.submit(os.getpid)
        self._pid = pid.result()
        epoch = self._process.submit(_next_epoch)
        peak = measurement.watch(self._pid, lambda seconds: bool(wait([epoch], seconds).done))
        return replace(epoch.result(), peak=peak)

    def take(self) -> Sample:
        """One more epoch."""
        return self._process.submit(_next_epoch).result()

    def close(self) -> None:
        """End the process, in the middle of an epoch too."""
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
    warnings.simplefilter("ignore")  # that there are more workers than cores, say
    # DataLoaders would start their workers as this process was started, which takes them seconds an epoch.
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(recipe.setting.threads)
    _epochs = recipe.epochs()


def _next_epoch() -> Sample:
    return next(_epochs)


@dataclass(frozen=True)
class Sweep:
    """One small sweep as a real command in an empty folder, from start to last word."""

    setting: Setting
    launcher: tuple[str, ...]  # the overrides that choose it
    epochs: int
    network = "sigmoid/avg"
    rates = (0.3, 0.5, 0.7, 0.9)

    @property
    def name(self) -> str:
        return f"sweep, {' '.join(self.launcher)}"

    def warm_up(self) -> None:
        """A command is what it is from its first time on."""

    def take(self) -> Sample:
        setting = (f"data={self.setting.data}", f"device={self.setting.device}")
        runs = (f"lr={','.join(map(str, self.rates))}", f"epochs={self.epochs}")
        cost = measurement.take(["lenet_sweep", *runs, *setting, *self.launcher, "-m"])
        return Sample(cost.wall_s, len(self.rates) * self.epochs * self.setting.examples, None, cost.peak)

    def close(self) -> None:
        """Nothing lives on."""


def missing(package: str, what: str) -> bool:
    """Whether an optional package is not installed; if so, say what is left out for that."""
    if importlib.util.find_spec(package):
        return False
    measurement.say(f"{what}: left out, as {package.rpartition('.')[2]} is not installed; "
                    "python -m pip install -e '.[bench]' adds it")  # fmt: skip
    return True

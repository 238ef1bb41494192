"""How fast one epoch is, from the tutorial's loop to the compiled step, and how near to the processor's roof.

python -m benchmarks.ladder [--rounds 5] [--json FILE]

Every round takes one epoch (training and test pass) of every contender, one after the other, so that
noise of the machine meets all alike; the table has medians and ranges over the rounds. The roof is
the fastest float32 matrix product of the same rounds. Start-up (imports, compiling, reading the
data) is in no figure.
"""

import argparse
import json
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import tutorial
from lenet_sweep import engine, identity, run, shapes
from lenet_sweep.cli import to_config
from lenet_sweep.config import CLASSES, IMAGE_SHAPE, Config
from lenet_sweep.paths import conf_dir

EXAMPLES = 60_000
MODELS = {"sigmoid/avg": ("lenet", 0.9), "ReLU/max": ("lenet_relu_max", 0.1)}


@dataclass(frozen=True)
class Recipe:
    """What takes epochs: the tutorial's loop with some DataLoader workers, or ours with a backend."""

    model: str
    threads: int
    workers: int | None = None
    backend: str | None = None

    @property
    def name(self) -> str:
        if self.backend is None:
            return f"tutorial's loop, {self.workers} workers"
        return f"lenet_sweep, {self.backend} step"

    def epochs(self) -> Iterator[tuple[float | None, float]]:
        """Yield an epoch's examples/s of training (None: not told apart) and its seconds."""
        torch.set_num_threads(self.threads)
        model, lr = MODELS[self.model]
        if self.backend is None:
            net = tutorial.network(self.model == "ReLU/max")
            for *_, seconds in tutorial.epochs(net, tutorial.raw_folder(), lr, self.workers or 0):
                yield None, seconds
        config = _config(f"model={model}", f"lr={lr}", f"backend={self.backend}", "device=cpu")
        config = replace(config, threads=self.threads)
        trained, _ = run.prepare(config)
        for metrics in engine.train(
            trained.step,
            trained.optimizer,
            trained.schedule,
            trained.data,
            epochs=1_000,
            batch_size=config.batch_size,
            seed=0,
        ):
            yield metrics.examples_per_s, metrics.epoch_s


class Contender:
    """A recipe in a process of its own, so that no switch or allocator of one changes another's speed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.train_rates: list[float] = []
        self.rates: list[float] = []  # training examples over the whole epoch's seconds
        spawn = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, spawn, _start, (recipe,))

    def take(self) -> None:
        """Take one epoch and note how fast it was."""
        train_rate, seconds = self._process.submit(_next_epoch).result()
        self.rates.append(EXAMPLES / seconds)
        if train_rate is not None:
            self.train_rates.append(train_rate)

    def forget(self) -> None:
        """Drop what was noted."""
        self.train_rates.clear()
        self.rates.clear()


_epochs: Iterator[tuple[float | None, float]]


def _start(recipe: Recipe) -> None:
    global _epochs
    warnings.simplefilter("ignore")  # that four workers are more than there are cores is the point
    _epochs = recipe.epochs()


def _next_epoch() -> tuple[float | None, float]:
    return next(_epochs)


def contenders(threads: int) -> list[Contender]:
    """Everything that is compared."""
    recipes = []
    for model in MODELS:
        recipes += [Recipe(model, threads, workers=workers) for workers in (0, 2, 4)]
        recipes += [Recipe(model, threads, backend=backend) for backend in ("torch", "native")]
    return [Contender(recipe) for recipe in recipes]


def matmul_rate(size: int = 2048) -> float:
    """FLOP/s of a float32 matrix product, best of a few."""
    a, b, c = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, b, out=c)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def _config(*overrides: str) -> Config:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_config(compose("config", [*overrides, "tracking=none"]))


def measure(rounds: int, threads: int) -> tuple[list[Contender], list[float]]:
    """Run all contenders in turn, `rounds` times; also the roof, FLOP/s, once a round."""
    all_of_them, roofs = contenders(threads), []
    for number in range(rounds + 1):
        torch.set_num_threads(threads)
        roofs.append(matmul_rate())
        for contender in track(all_of_them, f"round {number} of {rounds}", console=Console(stderr=True)):
            contender.take()
            if number == 0:  # the first epoch pays for imports, caches and clocks
                contender.forget()
    return all_of_them, roofs[1:]


def table(found: list[Contender], roof: float) -> Table:
    """A row for each contender; the tutorial's own is the best of its numbers of workers."""
    shown = Table(title=f"float32 matrix product: {roof / 1e9:.0f} GFLOP/s", title_justify="left")
    for heading in (
        "contender",
        "network",
        "examples/s, training",
        "end to end",
        "x tutorial",
        "share of roof",
    ):
        shown.add_column(
            heading, no_wrap=True, justify="left" if heading in ("contender", "network") else "right"
        )
    for contender in found:
        recipe = contender.recipe
        loops = [c for c in found if c.recipe.model == recipe.model and c.recipe.backend is None]
        base = max(statistics.median(loop.rates) for loop in loops)
        flops = shapes.training_flops(_config(f"model={MODELS[recipe.model][0]}").model, IMAGE_SHAPE, CLASSES)
        trained = statistics.median(contender.train_rates or contender.rates)
        shown.add_row(
            recipe.name,
            recipe.model,
            _spread(contender.train_rates),
            _spread(contender.rates),
            f"{statistics.median(contender.rates) / base:.2f}",
            f"{trained * flops / roof:.0%}",
        )
    return shown


def _spread(rates: list[float]) -> str:
    if not rates:
        return ""
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="epochs of each contender, after one that is not counted"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write every sample there")
    chosen = parser.parse_args()
    found, roofs = measure(chosen.rounds, chosen.threads)
    Console(width=150).print(table(found, statistics.median(roofs)))
    if chosen.json:
        samples = [asdict(c.recipe) | {"training": c.train_rates, "end_to_end": c.rates} for c in found]
        facts = identity.environment("cpu", chosen.threads, "ladder")
        chosen.json.write_text(json.dumps({"machine": facts, "roofs": roofs, "samples": samples}, indent=1))


if __name__ == "__main__":
    main()

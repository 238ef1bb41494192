"""How long the first command takes: a sweep in an empty folder, compared with the tutorial's loop.

python -m benchmarks.cold_start [--rounds 3] [--epochs 10] [--json FILE]

The sweep is the real command, without a compiled step or a database. The tutorial's loop trains the same
runs one after the other, each in a new process, like a user who edits the learning rate each time.
Both read the same Fashion-MNIST files. The measurements are interleaved, so that machine noise affects
both equally.
"""

import argparse
import os
import statistics
from pathlib import Path

from rich.table import Table

from benchmarks import measurement, tutorial
from benchmarks.measurement import spread

LEARNING_RATES = ("0.1", "0.5", "0.9")


def sweep_s(epochs: int) -> float:
    """Wall seconds of the sweep, from start to exit."""
    command = ["lenet_sweep", f"lr={','.join(LEARNING_RATES)}", f"epochs={epochs}", "-m"]
    return measurement.take(command, cold=True).wall_s


def tutorial_s(epochs: int) -> float:
    """Wall seconds of the tutorial's loop for the same learning rates, one after the other."""
    with measurement.without_our_settings():
        return sum(
            measurement.take(["benchmarks.tutorial", "--lr", lr, "--epochs", str(epochs)]).wall_s
            for lr in LEARNING_RATES
        )


def table(sweeps: list[float], loops: list[float], epochs: int) -> Table:
    """One row each; `x sweep` is the median time relative to the sweep's."""
    title = f"{len(LEARNING_RATES)} runs x {epochs} epochs, {os.cpu_count()} cores, {len(sweeps)} rounds"
    shown = measurement.table(title, "contender", "wall s", "x sweep")
    for name, seconds in (("lenet_sweep, cold", sweeps), ("tutorial's loop", loops)):
        times = statistics.median(seconds) / statistics.median(sweeps)
        shown.add_row(name, spread(seconds), f"{times:.2f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write every sample to FILE")
    chosen = parser.parse_args()
    tutorial.raw_folder()  # downloads the dataset if it is missing, outside both measurements
    sweeps: list[float] = []
    loops: list[float] = []
    for _ in range(chosen.rounds):
        sweeps.append(sweep_s(chosen.epochs))
        loops.append(tutorial_s(chosen.epochs))
    measurement.show(table(sweeps, loops, chosen.epochs))
    facts = measurement.machine("cold start")
    measurement.write(chosen.json, facts, epochs=chosen.epochs, sweep_s=sweeps, tutorial_s=loops)


if __name__ == "__main__":
    main()

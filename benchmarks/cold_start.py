"""What a newcomer waits for: a sweep's first command in an empty folder, against the tutorial's loop.

python -m benchmarks.cold_start [--rounds 3] [--epochs 10] [--json FILE]

The sweep is the real command with nothing made yet: no compiled step and no database. The tutorial's
loop trains the same runs one after the other, a process for each, as editing the learning rate and
starting it again does. Both read the same files of Fashion-MNIST, and they take turns, so that noise
of the machine meets both alike.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import tutorial
from lenet_sweep import identity
from lenet_sweep.paths import PACKAGE

LEARNING_RATES = ("0.1", "0.5", "0.9")


def sweep_s(epochs: int) -> float:
    """Wall seconds of the sweep, from the command to its last word."""
    with tempfile.TemporaryDirectory() as folder:
        return _wall_s(
            ["lenet_sweep", f"lr={','.join(LEARNING_RATES)}", f"epochs={epochs}", "-m"],
            Path(folder),
            {"XDG_CACHE_HOME": f"{folder}/cache"},
        )


def tutorial_s(epochs: int) -> float:
    """Wall seconds of the tutorial's loop for the same learning rates, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        return sum(
            _wall_s(["benchmarks.tutorial", "--lr", lr, "--epochs", str(epochs)], Path(folder), {})
            for lr in LEARNING_RATES
        )


def _wall_s(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    data = Path(os.environ.get("LENET_SWEEP_DATA", "data")).absolute()
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | {"LENET_SWEEP_DATA": str(data), "PYTHONPATH": str(PACKAGE.parent)} | environment,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - started


def table(sweeps: list[float], loops: list[float], epochs: int) -> Table:
    """A row for each, and how many times as long the tutorial's loop takes, by medians."""
    title = f"{len(LEARNING_RATES)} runs x {epochs} epochs, {os.cpu_count()} cores, {len(sweeps)} rounds"
    shown = Table(title=title, title_justify="left")
    for heading in ("who", "wall s", "x sweep"):
        shown.add_column(heading, no_wrap=True, justify="left" if heading == "who" else "right")
    for name, seconds in (("lenet_sweep, cold", sweeps), ("tutorial's loop", loops)):
        median = statistics.median(seconds)
        spread = f"{median:.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        shown.add_row(name, spread, f"{median / statistics.median(sweeps):.2f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write every sample there")
    chosen = parser.parse_args()
    tutorial.raw_folder()  # fetches what is missing, which is no part of either
    sweeps: list[float] = []
    loops: list[float] = []
    for _ in range(chosen.rounds):
        sweeps.append(sweep_s(chosen.epochs))
        loops.append(tutorial_s(chosen.epochs))
    Console(width=150).print(table(sweeps, loops, chosen.epochs))
    if chosen.json:
        facts = identity.environment("cpu", os.cpu_count() or 1, "cold start")
        values = {"machine": facts, "epochs": chosen.epochs, "sweep_s": sweeps, "tutorial_s": loops}
        chosen.json.write_text(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()

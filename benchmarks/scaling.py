"""The cost of whole sweeps: wall time and peak memory by number of runs, epochs and workers.

python -m benchmarks.scaling [--rounds 3] [--json FILE]

Every number is measured with a real command in an empty folder, including imports, database, plots and
tracking. The measurements are interleaved, so that machine noise affects all sweeps equally. The compiled
step is already in its cache. Memory is the peak of all processes of the sweep together (PSS: a page shared
by n of them counts 1/n for each), and the peak of the largest process alone.
"""

import argparse
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import measurement
from benchmarks.measurement import Cost, spread

# Each group varies one thing: runs, epochs, sharing of epochs, workers.
SWEEPS = {
    "1 run x 10 epochs": ("lr=0.9", "epochs=10"),
    "3 runs x 10 epochs": ("lr=0.1,0.5,0.9", "epochs=10"),
    "3 lr x epochs 5, 10, 20, shared": ("lr=0.1,0.5,0.9", "epochs=5,10,20"),
    "3 lr x epochs 5, 10, 20, not shared": ("lr=0.1,0.5,0.9", "epochs=5,10,20", "sweep.rerun=true"),
    "12 runs x 10 epochs, 1 worker": ("lr=0.1,0.5,0.9", "seed=range(4)", "sweep.workers=1"),
    "12 runs x 10 epochs, 2 workers": ("lr=0.1,0.5,0.9", "seed=range(4)", "sweep.workers=2"),
    "50 runs x 1 short epoch": ("seed=range(50)", "epochs=1", "data=fashion_mnist_mini"),
    "50 runs x 1 short epoch, 2 workers": (
        "seed=range(50)", "epochs=1", "data=fashion_mnist_mini", "sweep.workers=2",
    ),
}  # fmt: skip


@dataclass
class Sweep:
    """A sweep and its costs, one per round."""

    name: str
    costs: list[Cost] = field(default_factory=list)

    def take(self) -> None:
        self.costs.append(measurement.take(["lenet_sweep", *SWEEPS[self.name], "-m"]))


def table(sweeps: list[Sweep]) -> Table:
    """One row per sweep: median and range over the rounds."""
    title = f"{os.cpu_count()} cores, {len(sweeps[0].costs)} rounds"
    shown = measurement.table(title, "sweep", "wall s", "peak MiB, all processes", "largest process alone")
    for sweep in sweeps:
        shown.add_row(
            sweep.name,
            spread([cost.wall_s for cost in sweep.costs]),
            spread([cost.peak.all_mib for cost in sweep.costs]),
            spread([cost.peak.largest_mib for cost in sweep.costs]),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="sweeps with one of these words in the name")
    parser.add_argument("--json", type=Path, help="also write every sample to FILE")
    chosen = parser.parse_args()
    names = [name for name in SWEEPS if not chosen.only or any(word in name for word in chosen.only)]
    measurement.warm_up("fashion_mnist")
    sweeps = [Sweep(name) for name in names]
    for number in range(chosen.rounds):
        for sweep in track(sweeps, f"round {number + 1} of {chosen.rounds}", console=Console(stderr=True)):
            sweep.take()
    measurement.show(table(sweeps))
    measurement.write(chosen.json, measurement.machine("scaling"), samples=list(map(asdict, sweeps)))


if __name__ == "__main__":
    main()

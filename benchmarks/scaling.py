"""What a whole sweep costs: wall seconds and peak memory against the number of runs, epochs and workers.

python -m benchmarks.scaling [--rounds 3] [--json FILE]

Every figure is a real command in an empty folder, imports, database, plots and tracking included, and
all of them are taken in turn, so that noise of the machine meets all alike. The compiled step is in
its cache already. Memory is what the sweep's processes take together at the worst moment (PSS: a page
that n of them share counts 1/n for each), and the most that a single worker takes of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lenet_sweep import identity

# By what grows: runs, epochs, the same epochs as prefixes of each other, workers.
SWEEPS = {
    "1 run x 10 epochs": ("lr=0.9", "epochs=10"),
    "3 runs x 10 epochs": ("lr=0.1,0.5,0.9", "epochs=10"),
    "3 lr x epochs 5, 10, 20, shared": ("lr=0.1,0.5,0.9", "epochs=5,10,20"),
    "3 lr x epochs 5, 10, 20, each by itself": ("lr=0.1,0.5,0.9", "epochs=5,10,20", "sweep.rerun=true"),
    "12 runs x 10 epochs, 1 worker": ("lr=0.1,0.5,0.9", "seed=range(4)", "sweep.workers=1"),
    "12 runs x 10 epochs, 2 workers": ("lr=0.1,0.5,0.9", "seed=range(4)", "sweep.workers=2"),
    "50 runs x 1 short epoch": ("seed=range(50)", "epochs=1", "data=fashion_mnist_mini"),
    "50 runs x 1 short epoch, 2 workers": (
        "seed=range(50)", "epochs=1", "data=fashion_mnist_mini", "sweep.workers=2",
    ),
}  # fmt: skip


@dataclass
class Cost:
    """What a sweep took, a value for each round."""

    name: str
    wall_s: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)  # of all processes, shared pages once
    process_mib: list[float] = field(default_factory=list)  # of the largest process, its own pages

    def take(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "lenet_sweep", *SWEEPS[self.name], "-m"],
                cwd=folder,
                env=os.environ | {"LENET_SWEEP_DATA": str(_data())},
                stdout=subprocess.DEVNULL,
            )
            peak, largest = _watch(process)
            self.wall_s.append(time.perf_counter() - started)
            if process.returncode:
                raise SystemExit(f"{self.name}: ended with code {process.returncode}")
        self.peak_mib.append(peak / 2**20)
        self.process_mib.append(largest / 2**20)


def _watch(process: "subprocess.Popen[bytes]") -> tuple[int, int]:
    """Wait for the process; return the most bytes of its whole family, and of any one of it by itself."""
    peak = largest = 0
    while process.poll() is None:
        family = []
        try:
            parent = psutil.Process(process.pid)
            family = [member.memory_full_info() for member in (parent, *parent.children(recursive=True))]
        except psutil.NoSuchProcess:
            continue  # one of them has just ended
        peak = max(peak, sum(info.pss for info in family))
        largest = max(largest, *(info.uss for info in family))
        time.sleep(0.5)
    return peak, largest


def _data() -> Path:
    return Path(os.environ.get("LENET_SWEEP_DATA", "data")).absolute()


def table(costs: list[Cost]) -> Table:
    """A row for each sweep: medians, and the ranges of the rounds."""
    shown = Table(title=f"{os.cpu_count()} cores, {len(costs[0].wall_s)} rounds", title_justify="left")
    for heading in ("sweep", "wall s", "peak MiB, all processes", "largest process alone"):
        shown.add_column(heading, no_wrap=True, justify="left" if heading == "sweep" else "right")
    for cost in costs:
        shown.add_row(cost.name, *map(_spread, (cost.wall_s, cost.peak_mib, cost.process_mib)))
    return shown


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="sweeps whose name holds one of these words")
    parser.add_argument("--json", type=Path, help="also write every sample there")
    chosen = parser.parse_args()
    names = [name for name in SWEEPS if not chosen.only or any(word in name for word in chosen.only)]
    subprocess.run([sys.executable, "-m", "lenet_sweep", "data", "fashion_mnist"], check=True)
    costs = [Cost(name) for name in names]
    for number in range(chosen.rounds):
        for cost in track(costs, f"round {number + 1} of {chosen.rounds}", console=Console(stderr=True)):
            cost.take()
    Console(width=150).print(table(costs))
    if chosen.json:
        facts = identity.environment("cpu", os.cpu_count() or 1, "scaling")
        values = {"machine": facts, "samples": [asdict(cost) for cost in costs]}
        chosen.json.write_text(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()

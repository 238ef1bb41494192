"""What the measurements share: a command in an empty folder, its memory, a table, a file of samples.

Memory is what all processes of a family take together at the worst moment (PSS: a page that n
processes share counts 1/n for each), and the most that any one of them takes of its own (USS).
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from lenet_sweep.paths import PACKAGE
from lenet_sweep.storage.environment import describe_environment

_LOOK_EVERY_S = 0.5  # a look costs some 10 ms for each process


@dataclass(frozen=True)
class Peak:
    """The most memory that a family of processes took."""

    all_mib: float  # of all processes together, shared pages once
    largest_mib: float  # of the largest process, its own pages


@dataclass(frozen=True)
class Cost:
    """What a command took."""

    wall_s: float
    peak: Peak


def take(command: Sequence[str], *, cold: bool = False) -> Cost:
    """Run `python -m COMMAND` in an empty folder, which is removed again, with the datasets at hand.

    `cold` hides the compiled steps of earlier commands. However the waiting ends, nothing that was
    started lives on.

    Raises:
        SystemExit: if the command fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        cache = {"XDG_CACHE_HOME": f"{folder}/cache"} if cold else {}
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=os.environ | _surroundings() | cache,
            stdout=subprocess.DEVNULL,
        )
        try:
            peak = watch(process.pid, lambda seconds: _has_ended(process, seconds))
            wall_s = time.perf_counter() - started
        finally:
            end(process.pid)
            process.wait()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: ended with code {process.returncode}")
    return Cost(wall_s, peak)


@contextlib.contextmanager
def without_our_settings() -> Iterator[None]:
    """Start other loops as their users do: without the waiting that lenet_sweep sets for OpenMP."""
    ours = os.environ.pop("GOMP_SPINCOUNT", None)
    try:
        yield
    finally:
        if ours is not None:
            os.environ["GOMP_SPINCOUNT"] = ours


def _surroundings() -> dict[str, str]:
    """The datasets and this code, as an empty folder finds them."""
    before = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return {
        "LENET_SWEEP_DATA": os.path.abspath(os.environ.get("LENET_SWEEP_DATA", "data")),
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, (PACKAGE.parent, *before))),
    }


def warm_up(data: str, *overrides: str) -> None:
    """Fetch the dataset and compile both networks' steps, so that later commands find them."""
    take(["lenet_sweep", "data", data])
    both = ("model=lenet,lenet_relu_max", "data=fashion_mnist_mini", "epochs=1", "tracking=none")
    take(["lenet_sweep", *both, *overrides, "-m"])


def watch(pid: int, has_ended: Callable[[float], bool]) -> Peak:
    """Look at the memory of a process and its descendants until `has_ended`, which waits some seconds."""
    everything = largest = 0
    while True:
        alone, together = [0], 0
        for member in _family(pid):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                info = member.memory_full_info()
                alone.append(info.uss)
                together += getattr(info, "pss", info.uss)  # only Linux counts shares
        everything, largest = max(everything, together), max(largest, *alone)
        if has_ended(_LOOK_EVERY_S):
            return Peak(everything / 2**20, largest / 2**20)


def end(pid: int) -> None:
    """Kill a process and its descendants, those that are left."""
    for member in _family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _has_ended(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and range; nothing of nothing."""
    if not values:
        return ""
    median, low, high = (f"{x:,.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"


def table(title: str, *headings: str, words: int = 1) -> Table:
    """An empty table whose first `words` columns hold words, the others numbers."""
    empty = Table(title=title, title_justify="left")
    for place, heading in enumerate(headings):
        empty.add_column(heading, no_wrap=True, justify="left" if place < words else "right")
    return empty


def show(what: Table) -> None:
    """Print a table whole, however narrow the terminal."""
    Console(width=170).print(what)


def say(text: str) -> None:
    """Tell whoever waits for a table."""
    print(text, file=sys.stderr, flush=True)


def machine(what: str, device: str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """Where this is measured: what every file of samples begins with."""
    return describe_environment(device, threads or os.cpu_count() or 1, what)


def write(file: Path | None, machine: dict[str, Any], **samples: Any) -> None:
    """Write every sample as JSON, if a file was asked for."""
    if file:
        file.write_text(json.dumps({"machine": machine, **samples}, indent=1), encoding="utf-8")

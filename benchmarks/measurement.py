"""Shared by all benchmarks: running a command in an empty folder, its memory, tables, files of samples.

Memory is the peak of a process and its descendants together (PSS: a page shared by n processes counts
1/n for each), and the peak of the largest of them alone (USS).
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

_LOOK_EVERY_S = 0.5  # one look costs about 10 ms per process


@dataclass(frozen=True)
class Peak:
    """Peak memory of a process and its descendants."""

    all_mib: float  # all processes together; shared pages are counted once
    largest_mib: float  # the largest process, only its own pages


@dataclass(frozen=True)
class Cost:
    """Time and memory of a command."""

    wall_s: float
    peak: Peak


def take(command: Sequence[str], *, cold: bool = False) -> Cost:
    """Run `python -m COMMAND` in a new empty folder, with the datasets available; remove the folder.

    `cold` hides the compiled steps of earlier commands. All started processes are ended, even after an
    error or an interrupt.

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
    """Start other loops as their users do: without the OpenMP wait policy that lenet_sweep sets."""
    ours = os.environ.pop("GOMP_SPINCOUNT", None)
    try:
        yield
    finally:
        if ours is not None:
            os.environ["GOMP_SPINCOUNT"] = ours


def _surroundings() -> dict[str, str]:
    """Environment variables that make the datasets and this code available in an empty folder."""
    before = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return {
        "LENET_SWEEP_DATA": os.path.abspath(os.environ.get("LENET_SWEEP_DATA", "data")),
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, (PACKAGE.parent, *before))),
    }


def warm_up(data: str, *overrides: str) -> None:
    """Download the dataset and compile the steps of both networks, so that later commands reuse them."""
    take(["lenet_sweep", "data", data])
    both = ("model=lenet,lenet_relu_max", "data=fashion_mnist_mini", "epochs=1", "tracking=none")
    take(["lenet_sweep", *both, *overrides, "-m"])


def watch(pid: int, has_ended: Callable[[float], bool]) -> Peak:
    """Sample the memory of a process and its descendants until `has_ended`, which waits some seconds."""
    everything = largest = 0
    while True:
        alone, together = [0], 0
        for member in _family(pid):
            with contextlib.suppress(psutil.NoSuchProcess):  # the process has just ended
                info = member.memory_full_info()
                alone.append(info.uss)
                together += getattr(info, "pss", info.uss)  # PSS exists only on Linux
        everything, largest = max(everything, together), max(largest, *alone)
        if has_ended(_LOOK_EVERY_S):
            return Peak(everything / 2**20, largest / 2**20)


def end(pid: int) -> None:
    """Kill a process and its descendants, if they still run."""
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
    """Median and range as text; empty if there are no values."""
    if not values:
        return ""
    median, low, high = (f"{x:,.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"


def table(title: str, *headings: str, words: int = 1) -> Table:
    """An empty table: the first `words` columns are left-aligned text, the others right-aligned numbers."""
    empty = Table(title=title, title_justify="left")
    for place, heading in enumerate(headings):
        empty.add_column(heading, no_wrap=True, justify="left" if place < words else "right")
    return empty


def show(what: Table) -> None:
    """Print a table in full width, whatever the width of the terminal."""
    Console(width=170).print(what)


def say(text: str) -> None:
    """Print progress to standard error."""
    print(text, file=sys.stderr, flush=True)


def machine(what: str, device: str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """Facts about this machine, for the head of every file of samples."""
    return describe_environment(device, threads or os.cpu_count() or 1, what)


def write(file: Path | None, machine: dict[str, Any], **samples: Any) -> None:
    """Write every sample as JSON, if `file` is given."""
    if file:
        file.write_text(json.dumps({"machine": machine, **samples}, indent=1), encoding="utf-8")

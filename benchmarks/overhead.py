"""Measures the overhead of a sweep's job beyond its training: 50 short jobs, timed part by part.

python -m benchmarks.overhead [--jobs 50] [--json FILE]

One process runs a real sweep in an empty folder, with one short epoch per job, and times the calls below.
The first job imports torch and mlflow, so it has its own column. The time of a nested part counts only for
that part. `else` is the remaining time, including Hydra's work on a job.
"""

import argparse
import contextlib
import functools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.table import Table

from benchmarks import measurement
from benchmarks.measurement import spread
from lenet_sweep.cli import main as command_line
from lenet_sweep.runs import outputs, progress, session
from lenet_sweep.runs.spec import RunSpec
from lenet_sweep.storage import checkpoint, run_index
from lenet_sweep.sweeps import group
from lenet_sweep.tracking.mlflow_run import MlflowRun
from lenet_sweep.tracking.mlflow_store import MlflowStore

# Functions and methods by part, with the module or class through which they are called.
PARTS: dict[str, tuple[tuple[ModuleType | type, str], ...]] = {
    "look for finished runs": ((MlflowStore, "finished"), (run_index, "look_up")),
    "data, network, backend": ((session, "prepare"),),
    "describe machine and commit": ((outputs, "write_environment"), (RunSpec, "tags")),
    "tracking: begin": ((MlflowStore, "open_run"),),
    "tracking: epochs": ((MlflowRun, "log"),),
    "tracking: end": ((MlflowRun, "end"),),
    "checkpoint": ((checkpoint, "save"),),
    "weights and plots": ((outputs, "save"),),
    "console output": ((progress, "say"),),
}


class Clock:
    """Seconds of each part of each job. Nested time counts only for the inner part."""

    def __init__(self) -> None:
        self.jobs: list[Counter[str]] = []
        self._inner_s: list[float] = []  # for each active call, the time of its nested calls

    def time(self, owner: ModuleType | type, name: str, part: str) -> None:
        """Time the calls of `owner.name` from now on."""
        setattr(owner, name, self._timed(getattr(owner, name), part))

    def time_jobs(self, owner: ModuleType, name: str) -> None:
        """Start a new job with each call of `owner.name`, and time the whole call."""
        call = self._timed(getattr(owner, name), "else")

        def job(*given: Any, **named: Any) -> Any:
            self.jobs.append(Counter())
            return call(*given, **named)

        setattr(owner, name, job)

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            self._inner_s.append(0.0)
            try:
                return call(*given, **named)
            finally:
                took = time.perf_counter() - started
                inner = self._inner_s.pop()
                if self._inner_s:
                    self._inner_s[-1] += took
                if self.jobs:
                    self.jobs[-1][part] += took - inner

        return timed


def measure(jobs: int, folder: Path) -> list[Counter[str]]:
    """Run the sweep in `folder`; return the seconds of each part of each job, including training."""
    clock = Clock()
    for part, calls in PARTS.items():
        for owner, name in calls:
            clock.time(owner, name, part)
    clock.time_jobs(group, "_train_alone")
    os.chdir(folder)
    sys.argv[1:] = ["data=fashion_mnist_mini", "epochs=1", f"seed=range({jobs})", "sweep.workers=1", "-m"]
    with contextlib.redirect_stdout(sys.stderr):
        code = command_line.main()
    if code:
        raise SystemExit(f"the sweep ended with code {code}")
    (sweep,) = (folder / "outputs" / "sweeps").iterdir()
    for number, job in enumerate(clock.jobs):
        (line,) = (sweep / str(number) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        epoch_s = json.loads(line)["speed/epoch_s"]
        job["training"], job["else"] = epoch_s, job["else"] - epoch_s
    return clock.jobs


def table(jobs: list[Counter[str]]) -> Table:
    """One row per part: the first job, and median and range of the others."""
    title = f"ms per job, {len(jobs)} jobs, {os.cpu_count()} cores"
    shown = measurement.table(title, "part", "first job", "other jobs")
    beyond = [job.total() - job["training"] for job in jobs]
    rows = {part: [job[part] for job in jobs] for part in ("training", *PARTS, "else")}
    for name, seconds in (rows | {"all but training": beyond}).items():
        first, *others = (1000 * value for value in seconds)
        shown.add_row(name, f"{first:.0f}", spread(others))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=50, help="at least 2")
    parser.add_argument("--json", type=Path, help="also write every sample to FILE")
    chosen = parser.parse_args()
    file = chosen.json.absolute() if chosen.json else None
    with tempfile.TemporaryDirectory() as folder:
        jobs = measure(chosen.jobs, Path(folder))
        os.chdir("/")
    measurement.show(table(jobs))
    measurement.write(file, measurement.machine("overhead"), jobs_s=jobs)


if __name__ == "__main__":
    main()

"""The two seams of tracking: what a run writes to, and a store that runs are read from.

A new tracking backend implements both here in `tracking`, gets a config class in `config.schema`, a line
in `stores.open_store` and a YAML file in conf/tracking/. Nothing else names a backend.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from lenet_sweep.storage.records import Record
from lenet_sweep.storage.result import Result

Metrics = dict[int, dict[str, float]]  # epoch -> name -> value


class RunLogger(Protocol):
    """A run that is being tracked. Each method returns within seconds and raises nothing if a server dies."""

    run_id: str | None

    def log(self, epoch: int, metrics: dict[str, float], time_ms: int) -> None:
        """Log the metrics of an epoch (from 1) that ended at `time_ms`, milliseconds since 1970."""

    def end(self, result: Result) -> str | None:
        """Send what is missing and close the run; return what went wrong, None if nothing did."""

    def locations(self) -> list[str]:
        """Lines of text that tell where the run can be seen."""


class Store(Protocol):
    """Where runs are tracked.

    Every method may raise TrackingError if the store cannot be reached, and ConfigError if what is named does
    not exist.
    """

    @property
    def name(self) -> str | None:
        """The store in one word, as the run index keeps it; None for output folders alone."""

    def check(self) -> None:
        """Refuse, within seconds, a store that cannot be used. Also raises OutputError."""

    def open_run(
        self, folder: Path, name: str, tags: dict[str, str], start_ms: int, run_id: str | None = None
    ) -> RunLogger:
        """Start a run, or resume `run_id`; its params are those of `folder`/config.yaml.

        An unreachable server is not an error: `recovery.sync_run` then creates the run later.
        """

    def finished(self, hashes: Collection[str]) -> dict[str, Result]:
        """The results, by config hash, of configs with a finished run here; of several, the latest."""

    def close_stale_runs(self) -> list[str]:
        """Mark as KILLED what is RUNNING though its process on this machine is gone; return the ids."""

    def latest_sweep(self) -> str | None:
        """The id of the sweep whose run started last."""

    def find(self, name: str) -> tuple[str, str]:
        """The id of the sweep, or else of the run, that starts with `name`; the other one is ''."""

    def check_filter(self, where: str) -> None:
        """Refuse the filter `where` if the store cannot filter runs."""

    def records(
        self, metrics: Sequence[str], *, sweep_id: str = "", run_ids: Sequence[str] = (), where: str = ""
    ) -> list[Record]:
        """Runs with the histories of `metrics`: those of a sweep and those with ids, or else all of them.

        `where` is a filter in the store's own language that every run must satisfy.
        """

    def fetch(self, name: str, folder: Path, files: Iterable[str]) -> tuple[str, Metrics]:
        """Copy those of `files` that the run `name` (an id or its start) has into `folder`.

        Returns the whole id, and every metric by epoch and name.
        """

    def attach_report(self, run_id: str, sweep_id: str, report: Path, answer: str) -> str | None:
        """Attach a sweep's report to its best run; return what went wrong, None if nothing did."""

    def open_command(self, name: str, overrides: Iterable[str]) -> str | None:
        """The shell command that opens a sweep or run ('': the latest sweep) in a browser, if any does."""

"""The table at the end of a sweep: every run, what it reached, and why it failed if it did."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from lenet_sweep.ledger import Result


@dataclass(frozen=True)
class Row:
    """One job of a sweep.

    `folder` is None if it was finished before the sweep; `result` is None if it did not end (it was
    killed, or never started).
    """

    overrides: tuple[str, ...]
    folder: Path | None
    result: Result | None

    @property
    def failed(self) -> bool:
        return self.result is None or self.result.status != "FINISHED"

    @property
    def status(self) -> str:
        if self.result is None:
            return "LOST" if self.folder and self.folder.exists() else "not started"
        notes = [
            note
            for note, holds in (("collapsed", self.result.collapsed), ("before", not self.folder))
            if holds
        ]
        return f"{self.result.status} ({', '.join(notes)})" if notes else self.result.status


def sweep_table(rows: list[Row]) -> Table:
    """A row for every run, with a column for each key that differs between them; the title has the others."""
    settings = [dict(override.partition("=")[::2] for override in row.overrides) for row in rows]
    varied = varied_keys([row.overrides for row in rows])
    same = [f"{key}={value}" for key, value in settings[0].items() if key not in varied]
    count = f"All {len(rows)} runs" if len(rows) > 1 else "One run"
    table = Table(title=f"{count}  {' '.join(same)}".rstrip(), title_justify="left")
    table.add_column("run", justify="right")
    for key in varied:
        table.add_column(key.lstrip("+"), overflow="fold")
    for heading in ("train loss", "train acc", "test acc", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("status")
    for number, (row, values) in enumerate(zip(rows, settings, strict=True), start=1):
        table.add_row(
            str(number),
            *(values.get(key, "") for key in varied),
            *_numbers(row.result),
            row.status,
            style="red" if row.failed else None,
        )
    return table


def varied_keys(jobs: Sequence[Sequence[str]]) -> list[str]:
    """The keys whose values are not the same in the overrides of all jobs."""
    settings = [dict(override.partition("=")[::2] for override in job) for job in jobs]
    keys = dict.fromkeys(key for values in settings for key in values)
    return [key for key in keys if len({values.get(key) for values in settings}) > 1]


def failures(rows: list[Row]) -> list[str]:
    """A line for each run that failed: which, why, and where its log is."""
    varied = varied_keys([row.overrides for row in rows])
    return [
        f"run {number} ({label(row.overrides, varied)}): {_reason(row)}; see {row.folder}"
        for number, row in enumerate(rows, start=1)
        if row.failed and row.status != "not started"
    ]


def label(overrides: Sequence[str], varied: Sequence[str]) -> str:
    """What tells a job from the others of its sweep."""
    return " ".join(override for override in overrides if override.partition("=")[0] in varied)


def _reason(row: Row) -> str:
    return (row.result.reason if row.result else None) or row.status


def _numbers(result: Result | None) -> list[str]:
    if result is None:
        return [""] * 4
    metrics = [result.metrics.get(name) for name in ("train/loss", "train/acc", "test/acc")]
    return [*("" if value is None else f"{value:.3f}" for value in metrics), f"{result.seconds:.1f}"]

"""metrics.jsonl: what a run measured, a line an epoch, in the names that MLflow has too."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenet_sweep.training.metrics import CurvePoint, EpochMetrics

log = logging.getLogger(__name__)

# Field of EpochMetrics -> name in metrics.jsonl and in MLflow.
NAMES = {
    "train_loss": "train/loss",
    "train_acc": "train/acc",
    "test_loss": "test/loss",
    "test_acc": "test/acc",
    "val_loss": "val/loss",
    "val_acc": "val/acc",
    "examples_per_s": "speed/examples_per_s",
    "epoch_s": "speed/epoch_s",
}


@dataclass(frozen=True)
class EpochRecord:
    """One epoch and the moment it ended (milliseconds since 1970)."""

    metrics: EpochMetrics
    time_ms: int

    @classmethod
    def now(cls, metrics: EpochMetrics, before: Sequence["EpochRecord"]) -> "EpochRecord":
        """The record of an epoch that ends now; never earlier than `before`, as clocks can be set back."""
        now_ms = int(time.time() * 1000)
        return cls(metrics, max(now_ms, before[-1].time_ms) if before else now_ms)

    def named(self) -> dict[str, float]:
        """The metrics by name, without those that the run has not."""
        values = {name: getattr(self.metrics, field) for field, name in NAMES.items()}
        return {name: value for name, value in values.items() if value is not None}

    def dump(self) -> str:
        """One line of JSON, without its end; every float keeps its bits."""
        curve = [[point.epoch, point.train_loss, point.train_acc] for point in self.metrics.curve]
        return json.dumps(
            {"epoch": self.metrics.epoch, "time_ms": self.time_ms, **self.named(), "curve": curve}
        )


def parse(text: str) -> EpochRecord:
    """The line that `dump` wrote.

    Raises:
        ValueError: if it is another or a damaged one.
    """
    try:
        values: dict[str, Any] = json.loads(text)
        curve = tuple(CurvePoint(*map(float, point)) for point in values["curve"])
        fields = {
            field: None if name not in values and name.startswith("val/") else float(values[name])
            for field, name in NAMES.items()
        }
        metrics = EpochMetrics(epoch=int(values["epoch"]), curve=curve, **fields)  # type: ignore[arg-type]
        return EpochRecord(metrics, int(values["time_ms"]))
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a line of metrics: {text[:80]!r}") from error


def write(path: Path, records: Sequence[EpochRecord]) -> None:
    """Start a metrics.jsonl with `records`, in place of any earlier content."""
    path.write_text("".join(f"{record.dump()}\n" for record in records), encoding="utf-8")


def append(path: Path, record: EpochRecord) -> None:
    """Add one line. The file is opened for each, so that hundreds of runs hold no open files."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{record.dump()}\n")


def read(path: Path, *, strict: bool = False) -> list[EpochRecord]:
    """The records in a metrics.jsonl; an empty list if it does not exist.

    A damaged line, as a crash can leave it, is skipped with a warning.

    Raises:
        ValueError: if `strict` and a line is damaged.
    """
    found, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            found.append(parse(line))
        except ValueError:
            if strict:
                raise
            damaged += 1
    if damaged:
        log.warning("%s: skipped %d damaged line%s", path, damaged, "s" * (damaged > 1))
    return found

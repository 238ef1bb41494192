"""A run after the fact, from a folder or a store: its params, its metrics, how it ended.

    outputs/sweeps/X/sweep.json                                     the manifest, with every job's config
    outputs/sweeps/X/N/{config.yaml,metrics.jsonl,result.json}      the files of run N

Records are untrusted data: text that is shown and numbers that are compared.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lenet_sweep.config import parsing
from lenet_sweep.errors import ConfigError
from lenet_sweep.storage import metrics_file, run_index
from lenet_sweep.storage.manifest import read_manifest
from lenet_sweep.storage.result import read_result

# For every metric: whether higher values are better.
MORE_IS_BETTER = {
    "train/loss": False,
    "train/acc": True,
    "test/loss": False,
    "test/acc": True,
    "val/loss": False,
    "val/acc": True,
    "speed/examples_per_s": True,
    "speed/epoch_s": False,
}

PARAM_LENGTH = 6000  # MLflow refuses longer values

History = dict[int, float]  # epoch -> value


@dataclass(frozen=True)
class Record:
    """One run. `status` is MLflow's (FINISHED, FAILED, KILLED, RUNNING), or LOST if it left no result.

    `params` is the whole config, flattened, in MLflow's spelling; `history` has each metric by epoch.
    """

    name: str  # its run id, or its folder
    status: str
    params: dict[str, str]
    config_hash: str
    reason: str | None = None
    collapsed: bool = False
    seconds: float | None = None
    commit: str = ""
    start_ms: int = 0
    history: dict[str, History] = field(default_factory=dict)

    @property
    def ended_well(self) -> bool:
        return self.status == "FINISHED" and not self.collapsed

    def last(self, metric: str) -> float | None:
        """The value after the last epoch; None if there is none, or it is not finite."""
        values = self.history.get(metric)
        return _number(values[max(values)]) if values else None

    def best(self, metric: str) -> tuple[int, float] | None:
        """The first epoch that reached the best value, and that value."""
        values = {epoch: x for epoch, x in self.history.get(metric, {}).items() if _number(x) is not None}
        if not values:
            return None
        sign = 1 if MORE_IS_BETTER[metric] else -1
        epoch = max(sorted(values), key=lambda epoch: sign * values[epoch])
        return epoch, values[epoch]


def of_sweep(folder: Path) -> list[Record]:
    """The runs of the sweep in `folder`: its own, and those of the same configs that another sweep finished.

    The latter were finished before it began, or by another sweep for which it waited.

    Raises:
        ConfigError: if the folder holds no sweep.
    """
    manifest = read_manifest(folder)
    if manifest is None or not manifest.jobs:
        numbers = _numbered(folder)
        if not numbers:
            raise ConfigError(
                f"{str(folder)!r}: contains no sweep (there is no sweep.json and no numbered run)"
            )
        return [of_folder(folder / str(number)) for number in numbers]
    found = [of_folder(folder / str(number), job.config) for number, job in enumerate(manifest.jobs)]
    for i, job in enumerate(manifest.jobs):
        if found[i].status == "LOST" and (other := _latest(job.config_hash)):
            found[i] = other
    before = (_latest(run.config_hash) for run in manifest.finished_before)
    return [*found, *filter(None, before)]


def _latest(config_hash: str) -> Record | None:
    """The latest run of a config, if its folder is there."""
    entry = run_index.look_up(config_hash)
    return of_folder(entry.folder) if entry and (entry.folder / "config.yaml").is_file() else None


def of_folder(folder: Path, values: dict[str, Any] | None = None) -> Record:
    """The run in `folder`; `values` is its config where that is at hand (YAML takes 10 ms to read).

    Raises:
        ConfigError: if it has no config that can be read.
    """
    config = values or parsing.to_dict(parsing.load(folder / "config.yaml"))
    result = read_result(folder)
    environment = _json(folder / "environment.json")
    return Record(
        name=str(folder),
        status=result.status if result else "LOST",
        params=params(config),
        config_hash=result.config_hash if result else "",
        reason=result.reason if result else None,
        collapsed=bool(result and result.collapsed),
        seconds=result.seconds if result else None,
        commit=str(environment.get("git_commit") or ""),
        start_ms=_modified_ms(folder / "config.yaml"),
        history=read_history(folder / "metrics.jsonl"),
    )


def params(config: dict[str, Any]) -> dict[str, str]:
    """A config, flattened, as MLflow stores it."""
    return {key: str(value)[:PARAM_LENGTH] for key, value in parsing.flatten(config)}


def read_history(path: Path) -> dict[str, History]:
    """Every metric of a metrics.jsonl by epoch."""
    found: dict[str, History] = {}
    for record in metrics_file.read(path):
        for name, value in record.named().items():
            found.setdefault(name, {})[record.metrics.epoch] = value
    return found


def without_repeats(found: Sequence[Record]) -> list[Record]:
    """One record per config hash, the latest finished one: equal configs must not count as two seeds."""
    kept: dict[str, Record] = {}
    for record in sorted(found, key=lambda r: (r.status == "FINISHED", r.start_ms)):
        key = record.config_hash or record.name
        kept.pop(key, None)
        kept[key] = record
    order = {record.name: i for i, record in enumerate(found)}
    return sorted(kept.values(), key=lambda record: order[record.name])


def _numbered(folder: Path) -> list[int]:
    """The numbers of the runs in a sweep's folder without a manifest."""
    return sorted(
        int(path.parent.name) for path in folder.glob("[0-9]*/config.yaml") if path.parent.name.isdecimal()
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _modified_ms(path: Path) -> int:
    try:
        return int(path.stat().st_mtime * 1000)
    except OSError:
        return 0


def _number(x: float) -> float | None:
    """None for a value that is not finite; stores keep infinity as the largest float."""
    return x if math.isfinite(x) and abs(x) < 1e300 else None

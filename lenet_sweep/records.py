"""What is known of a run after the fact, from whatever source: its params, its metrics, how it ended.

    outputs/sweeps/X/sweep.json                                     the plan, with every job's config
    outputs/sweeps/X/N/{config.yaml,metrics.jsonl,result.json}      what run N left

All of it is only data: text that is shown and numbers that are compared, whoever wrote them.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lenet_sweep import config as configs
from lenet_sweep import ledger
from lenet_sweep.errors import ConfigError

# Of every metric: whether more of it is better.
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
        """The value after the last epoch; None if there is none, or no number."""
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


@dataclass(frozen=True)
class Plan:
    """What `sweep.json` says of a sweep: its command, its jobs' configs, and runs finished before it."""

    command: str = ""
    configs: tuple[dict[str, Any], ...] = ()
    hashes: tuple[str, ...] = ()  # of the configs
    finished_before: tuple[dict[str, Any], ...] = ()  # each with `config_hash` and `run_id`


def read_plan(folder: Path) -> Plan:
    """The plan in a sweep's folder; an empty one if there is none that can be read."""
    try:
        values = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        return Plan(
            str(values.get("command", "")),
            tuple(dict(job["config"]) for job in values["jobs"]),
            tuple(str(job.get("config_hash")) for job in values["jobs"]),
            tuple(dict(job) for job in values.get("finished_before", [])),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Plan()


def of_sweep(folder: Path) -> list[Record]:
    """The runs of the sweep in `folder`: those it trained, and those that were finished for it.

    These were finished before it began, or by another sweep for which it waited.

    Raises:
        ConfigError: if the folder holds no sweep.
    """
    plan = read_plan(folder)
    numbers = range(len(plan.configs)) or _numbered(folder)
    if not numbers:
        raise ConfigError(f"{str(folder)!r}: holds no sweep (there is no sweep.json and no numbered run)")
    found = [of_folder(folder / str(n), plan.configs[n] if plan.configs else None) for n in numbers]
    for place, config_hash in enumerate(plan.hashes):
        if found[place].status == "LOST" and (elsewhere := _latest(config_hash)):
            found[place] = elsewhere
    before = (_latest(str(job.get("config_hash"))) for job in plan.finished_before)
    return [*found, *filter(None, before)]


def _latest(config_hash: str) -> Record | None:
    """The latest run of a config, if its folder is there."""
    entry = ledger.look_up(config_hash)
    return of_folder(entry.folder) if entry and (entry.folder / "config.yaml").is_file() else None


def of_folder(folder: Path, values: dict[str, Any] | None = None) -> Record:
    """The run in `folder`; `values` is its config where that is at hand (YAML takes 10 ms to read).

    Raises:
        ConfigError: if it has no config that can be read.
    """
    config = values or configs.to_dict(configs.load(folder / "config.yaml"))
    result = ledger.read_result(folder)
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
    """A config, flattened and spelt as MLflow keeps it."""
    return {key: str(value)[:PARAM_LENGTH] for key, value in configs.flatten(config)}


def read_history(path: Path) -> dict[str, History]:
    """Every metric of a metrics.jsonl by epoch; a line that was cut off, as by a crash, is left out."""
    found: dict[str, History] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            values = json.loads(line)
            epoch = int(values["epoch"])
            for name in MORE_IS_BETTER.keys() & values.keys():
                found.setdefault(name, {})[epoch] = float(values[name])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            continue
    return found


def without_repeats(found: Sequence[Record]) -> list[Record]:
    """One record of each config: equal configs give equal bits, and must not count as two seeds.

    Of several, the latest finished one is kept.
    """
    kept: dict[str, Record] = {}
    for record in sorted(found, key=lambda r: (r.status == "FINISHED", r.start_ms)):
        key = record.config_hash or record.name
        kept.pop(key, None)
        kept[key] = record
    order = {record.name: i for i, record in enumerate(found)}
    return sorted(kept.values(), key=lambda record: order[record.name])


def _numbered(folder: Path) -> list[int]:
    """The numbers of the runs in a sweep's folder that has lost its plan."""
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
    """None for what is no number; a store keeps an infinite one as the largest float there is."""
    return x if math.isfinite(x) and abs(x) < 1e300 else None

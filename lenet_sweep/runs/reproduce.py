"""Train a run again from its stored config, and report whether every bit is the same.

A RUN is an MLflow run id or a unique prefix of one, an output folder, or a config.yaml. The stored files may
come from an untrusted server: they are read as data (YAML, JSON, safetensors), their paths are not used, and
nothing in them is imported or executed.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from lenet_sweep.config import parsing
from lenet_sweep.config.schema import Config
from lenet_sweep.errors import ConfigError, DataError, DeviceError
from lenet_sweep.runs import preflight, progress
from lenet_sweep.runs.progress import RunProgress
from lenet_sweep.runs.run import run
from lenet_sweep.runs.spec import RunSpec
from lenet_sweep.storage import checkpoint, metrics_file
from lenet_sweep.storage.environment import describe_environment
from lenet_sweep.storage.metrics_file import EpochRecord
from lenet_sweep.tracking.base import Metrics, Store
from lenet_sweep.tracking.stored import stored
from lenet_sweep.training import devices, engine
from lenet_sweep.training.state import prepare

_FILES = ("config.yaml", "metrics.jsonl", "environment.json", "model/weights.safetensors")

# Parts of the environment that can change bits; the commit is reported, too.
_DECISIVE = ("python", "cpu", "device", "threads", "backend", "packages torch", "packages numpy")


@dataclass(frozen=True)
class Original:
    """The stored data of a run; `weights_sha256` is None if it did not finish."""

    name: str
    config: Config
    metrics: Metrics
    weights_sha256: str | None
    environment: dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """One metric of one epoch that differs."""

    epoch: int
    metric: str
    before: float
    now: float

    @property
    def size(self) -> float:
        return abs(self.now - self.before)


@dataclass(frozen=True)
class Reproduction:
    """The comparison of a run with its repetition."""

    epochs: int  # number of epochs that are stored of the original, all of which were compared
    planned_epochs: int
    differences: tuple[Difference, ...]  # in the order of epochs
    weights_differ: bool | None  # None: no final weights of the original are stored
    code_changed: bool
    environment_changes: tuple[str, ...]  # a line for each other difference between the environments

    @property
    def identical(self) -> bool:
        return not self.differences and not self.weights_differ

    def lines(self) -> list[str]:
        """The outcome as lines of text, the most important one first."""
        if self.identical:
            weights = "" if self.weights_differ is None else ", and the weights"
            lines = [f"bit-identical: all metrics of {_epochs(self.epochs)}{weights} (speed is not compared)"]
        else:
            lines = ["different", *self._differences()]
        if self.epochs < self.planned_epochs:
            lines.append(f"the original ended after epoch {self.epochs} of {self.planned_epochs}")
        if self.weights_differ is None:
            lines.append("the original has no stored weights, so only its metrics were compared")
        if self.code_changed:
            lines.append("the code version differs: code that computes the results has changed since then")
        if self.environment_changes:
            lines += ["differences between the environments:", *(f"  {s}" for s in self.environment_changes)]
        if "backend: fused" in " ".join(self.environment_changes) and not self.identical:
            lines.append(
                "the original was trained in an array with other runs (sweep.fuse): a single run is "
                "equal up to rounding, which ReLU with max pooling amplifies, but not bit-identical"
            )
        elif any(s.startswith(_DECISIVE) for s in self.environment_changes) and not self.identical:
            lines.append(
                "with another device, library or number of threads, results are not bit-identical in general"
            )
        return lines

    def _differences(self) -> list[str]:
        lines = []
        if self.differences:
            first = self.differences[0]
            largest = max(self.differences, key=lambda d: d.size)
            lines += [
                f"first in epoch {first.epoch}, {first.metric}: {first.before!r} then, {first.now!r} now",
                f"largest: {largest.size:.3g}, in epoch {largest.epoch}, {largest.metric}",
            ]
        if self.weights_differ:
            lines.append("the final weights differ")
        return lines


def _epochs(n: int) -> str:
    return f"{n} epoch" if n == 1 else f"{n} epochs"


def load_original(name: str, store: Store) -> Original:
    """Read the stored data of the run `name`: a folder, a config.yaml, or an id in `store`.

    Raises:
        ConfigError: if there is no such run, or its config is not valid.
        DataError: if its stored data is damaged.
        TrackingError: if the store cannot be asked.
    """
    with stored(name, store, _FILES) as (folder, run_id, metrics):
        original = _from_folder(folder, run_id)
    # The store's numbers are the ones that users read and compare.
    return dataclasses.replace(original, metrics=_exact(metrics)) if metrics else original


def retrain(original: Original, data_root: str) -> Reproduction:
    """Train the original's config again, with its threads and for its number of epochs, and compare.

    Raises:
        LenetSweepError: if it cannot be trained here, or nothing is stored to compare with.
    """
    if not original.metrics:
        raise ConfigError(f"{original.name}: no epoch of it is stored, so there is nothing to compare")
    last_epoch = max(original.metrics)
    if not set(original.metrics) <= set(range(1, original.config.epochs + 1)):
        raise DataError(f"{original.name}: has epoch {last_epoch}, but its config {original.config.epochs}")
    config = _for_here(original, data_root)
    state = prepare(config, say=progress.say)
    metrics: Metrics = {}
    with closing(RunProgress(last_epoch, "")) as shown:
        shown.start()
        for epoch in engine.train(
            state,
            epochs=last_epoch,
            batch_size=config.batch_size,
            seed=config.seed,
            on_point=shown.point,
        ):
            shown.epoch(epoch)
            metrics |= _exact({epoch.epoch: EpochRecord(epoch, 0).named()})
    weights = checkpoint.digest(state.network.state_dict())
    environment = describe_environment(*devices.facts(state.device), state.backend.name)
    return _compare(original, metrics, weights, environment)


def _for_here(original: Original, data_root: str) -> Config:
    """The original's config for this machine: its number of threads, its device and backend if available.

    Runs without a stored backend are older than the native one and used torch's. A stored config is
    untrusted: its paths and its store are never used.
    """
    config = dataclasses.replace(
        original.config, data=dataclasses.replace(original.config.data, root=data_root)
    )
    threads = original.environment.get("threads")
    if type(threads) is int and 1 <= threads <= 1024:  # True is an int to isinstance
        config = dataclasses.replace(config, threads=threads)
    native = original.environment.get("backend") == "native"
    config = dataclasses.replace(config, backend="auto" if native else "torch")
    try:
        devices.resolve(config.device)
    except DeviceError as error:
        progress.say(f"{error}\ntraining on another device; results are not bit-identical in general")
        config = dataclasses.replace(config, device="auto")
    return config


def train_variant(
    original: Original, here: Config, changes: Sequence[tuple[str, Any]], overrides: tuple[str, ...]
) -> None:
    """Train the original's config with some values changed, as a new run, in the places that `here` names.

    Raises:
        LenetSweepError: as `preflight.check` and `run.run` do.
    """
    values, places = parsing.to_dict(original.config), parsing.to_dict(here)
    for key, value in changes:
        *sections, name = key.split(".")
        target = values
        for section in sections:
            target = target[section]
        target[name] = value
    changed = {key for key, _ in changes}
    if changed & {"lr", "optimizer"} and "optimizer.lr" not in changed:
        values["optimizer"]["lr"] = values["lr"]  # what ${lr} says in conf/optimizer/
    values["data"]["root"], values["tracking"] = here.data.root, places["tracking"]
    config = parsing.parse(values)
    folder = Path("outputs") / "runs" / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    preflight.check([config], folder, progress.say)
    run(RunSpec(config, folder, overrides, origin=original.name))


def _from_folder(folder: Path, name: str) -> Original:
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{name!r}: contains no run (there is no {folder / 'config.yaml'})")
    config = parsing.load(folder / "config.yaml")
    try:
        records = metrics_file.read(folder / "metrics.jsonl", strict=True)
        environment = json.loads(_read(folder / "environment.json") or "{}")
        weights = folder / "model" / "weights.safetensors"
        digest = checkpoint.digest(load_file(weights)) if weights.exists() else None
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{name}: the stored data of the run is damaged: {error}") from error
    metrics = _exact({record.metrics.epoch: record.named() for record in records})
    return Original(name, config, metrics, digest, environment if isinstance(environment, dict) else {})


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _exact(metrics: Metrics) -> Metrics:
    """Without the speed metrics, which differ every time."""
    return {
        epoch: {name: value for name, value in values.items() if not name.startswith("speed/")}
        for epoch, values in metrics.items()
    }


def _compare(original: Original, metrics: Metrics, weights: str, environment: dict[str, Any]) -> Reproduction:
    differences = tuple(
        Difference(epoch, name, before, metrics.get(epoch, {}).get(name, float("nan")))
        for epoch, values in sorted(original.metrics.items())
        for name, before in values.items()
        if not _same(before, metrics.get(epoch, {}).get(name))
    )
    kept = original.weights_sha256
    return Reproduction(
        len(original.metrics),
        original.config.epochs,
        differences,
        None if kept is None else kept != weights,
        original.environment.get("code_version", environment["code_version"]) != environment["code_version"],
        tuple(_changes(original.environment, environment)),
    )


def _same(before: float, now: float | None) -> bool:
    return now == before or (now is not None and math.isnan(now) and math.isnan(before))


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """A line for each difference between two environments."""
    lines = []
    for key in now:
        old, new = before.get(key), now[key]
        if isinstance(new, dict):
            lines += _changes(old if isinstance(old, dict) else {}, new, f"{prefix}{key} ")
        elif old != new and key not in ("host", "platform", "code_version"):
            lines.append(f"{prefix}{key}: {old} then, {new} now")
    return lines

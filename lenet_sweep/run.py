"""One run from its config to its last words: data, network, training, and everything it leaves.

outputs/.../config.yaml                 the whole config: it alone rebuilds the run
            metrics.jsonl               a line an epoch, written before anything is tracked
            environment.json            machine, versions, commit
            model/weights.safetensors   the weights after the last epoch
            plots/*.png
            result.json                 how it ended
            lenet_sweep.log
"""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from lenet_sweep import config as configs
from lenet_sweep import data as datasets
from lenet_sweep import devices, engine, identity, model, optim, plots, progress, shapes, tracking
from lenet_sweep.config import CLASSES, IMAGE_SHAPE, Config
from lenet_sweep.engine import EpochMetrics
from lenet_sweep.errors import LenetSweepError, OutputError, RunFailed
from lenet_sweep.paths import atomic_path, write_atomic
from lenet_sweep.randomness import generator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A run's place in a sweep: `number` counts from 1; `total` is None where nobody knows it."""

    sweep_id: str
    number: int
    total: int | None


@dataclass(frozen=True)
class Result:
    """How a run ended, as `result.json` keeps it. `metrics` are its last epoch's, by MLflow's names."""

    status: tracking.Status
    reason: str | None
    run_id: str | None
    config_hash: str
    epochs: int
    seconds: float
    metrics: dict[str, float]


def run(config: Config, folder: Path, overrides: tuple[str, ...] = (), job: Job | None = None) -> Result:
    """Train what `config` describes; leave everything in `folder` and the tracking store.

    `overrides` are what the user typed; they name the run.

    Raises:
        OutputError: if `folder` holds a run already or cannot be written.
        DataError, DeviceError, TrackingError: if the run cannot start.
        RunFailed: if it started and did not reach its end; its status is then FAILED.
    """
    started = time.time()
    _claim(folder, config)
    device = devices.resolve(config.device)
    devices.set_arithmetic(config.threads, config.precision)
    data = datasets.load(config.data, config.seed, device, progress.say)
    network = model.build(config.model, generator(config.seed, "init")).to(device)
    _introduce(config, device, overrides, job)

    tracked = tracking.open_run(
        config.tracking,
        name=_name(overrides) or config.model.name,
        params=configs.flatten(configs.to_dict(config)),
        tags=_tags(config, job),
        time_ms=int(started * 1000),
    )
    _write_json(folder / "environment.json", identity.environment(devices.describe(device)))

    history: list[EpochMetrics] = []
    status: tracking.Status = "FAILED"
    reason: str | None = None
    try:
        try:
            _train(config, network, data, folder, tracked, history, _label(overrides, job))
        finally:
            # Also a run that was stopped or went wrong keeps what it has learned.
            if history:
                _save(config, network, data, folder, history)
        status = "FINISHED"
    except KeyboardInterrupt:
        status, reason = "KILLED", "interrupted"
        raise
    except (LenetSweepError, OSError, RuntimeError) as error:
        # RuntimeError: torch's own, out of memory among them.
        reason = _reason(error)
        log.exception("the run failed")
        raise RunFailed(reason) from error
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        result = Result(
            status,
            reason,
            tracked.run_id,
            identity.config_hash(config),
            len(history),
            round(time.time() - started, 3),
            named(history[-1]) if history else {},
        )
        _write_json(folder / "result.json", dataclasses.asdict(result))
        untracked = tracked.end(status, reason, folder, int(time.time() * 1000))
        if untracked:
            progress.say(f"not all could be tracked ({untracked}); everything is in {folder}")
    _last_words(history[-1], device, folder, tracked, job)
    return result


def read_result(folder: Path) -> Result | None:
    """The result that a run left in `folder`; None if it left none (killed, or not started)."""
    try:
        return Result(**json.loads((folder / "result.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def named(metrics: EpochMetrics) -> dict[str, float]:
    """An epoch's metrics by the names they have in MLflow and in metrics.jsonl."""
    values = {
        "train/loss": metrics.train_loss,
        "train/acc": metrics.train_acc,
        "test/loss": metrics.test_loss,
        "test/acc": metrics.test_acc,
        "val/loss": metrics.val_loss,
        "val/acc": metrics.val_acc,
        "speed/examples_per_s": metrics.examples_per_s,
        "speed/epoch_s": metrics.epoch_s,
    }
    return {name: value for name, value in values.items() if value is not None}


def _train(
    config: Config,
    network: nn.Sequential,
    data: datasets.Data,
    folder: Path,
    tracked: tracking.Run,
    history: list[EpochMetrics],
    label: str,
) -> None:
    """Train, and after every epoch write its metrics down, track them and show them."""
    optimizer = optim.optimizer(config.optimizer, network.parameters())
    schedule = optim.schedule(config.schedule, optimizer, config.epochs)
    with (
        progress.Watch(config.epochs, label) as watch,
        open(folder / "metrics.jsonl", "a", encoding="utf-8") as journal,
        _profiler(folder) if config.profile else contextlib.nullcontext(),
    ):
        for metrics in engine.train(
            network,
            optimizer,
            schedule,
            data,
            epochs=config.epochs,
            batch_size=config.batch_size,
            seed=config.seed,
            amp=config.precision.amp,
            on_point=watch.point,
        ):
            history.append(metrics)
            time_ms = int(time.time() * 1000)
            journal.write(json.dumps(_journal_line(metrics, time_ms)) + "\n")
            journal.flush()
            tracked.log(metrics.epoch, named(metrics), time_ms)
            watch.epoch(metrics)
            if config.target_loss is not None and metrics.train_loss < config.target_loss:
                log.info("train loss is below target_loss=%g", config.target_loss)
                break


def _journal_line(metrics: EpochMetrics, time_ms: int) -> dict[str, Any]:
    curve = [[point.epoch, point.train_loss, point.train_acc] for point in metrics.curve]
    return {"epoch": metrics.epoch, "time_ms": time_ms, **named(metrics), "curve": curve}


def _save(
    config: Config, network: nn.Sequential, data: datasets.Data, folder: Path, history: list[EpochMetrics]
) -> None:
    """Write the weights and the pictures."""
    weights = folder / "model" / "weights.safetensors"
    weights.parent.mkdir(exist_ok=True)
    with atomic_path(weights) as temporary:
        save_file({name: tensor.cpu() for name, tensor in network.state_dict().items()}, temporary)
    title = f"{config.model.name}, {config.optimizer.name}, lr {config.optimizer.lr:g}"
    plots.curves(history, title, folder / "plots" / "curves.png")
    predicted_N = engine.predict(network, data.test.images_NCHW, config.precision.amp)
    counts = torch.bincount(data.test.labels_N * CLASSES + predicted_N, minlength=CLASSES**2)
    plots.confusion_matrix(
        counts.reshape(CLASSES, CLASSES).tolist(),
        data.class_names,
        folder / "plots" / "confusion_matrix.png",
    )


def _claim(folder: Path, config: Config) -> None:
    """Make `folder` this run's own by creating its config.yaml, which no other run may have."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "config.yaml", "x", encoding="utf-8") as file:
            file.write(configs.dump(config))
    except FileExistsError as error:
        raise OutputError(f"{folder}: already holds a run; choose another hydra.run.dir") from error
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error


def _introduce(config: Config, device: torch.device, overrides: tuple[str, ...], job: Job | None) -> None:
    """Say what will be trained, and on what; the layers of every job of a sweep are in its log only."""
    table = progress.layer_table(shapes.layers(config.model, IMAGE_SHAPE, CLASSES))
    if job is None:
        progress.say(table)
        progress.say(f"training on {devices.describe(device)}")
        return
    if job.number == 1 or any(override.startswith("model") for override in overrides):
        progress.say(table)
    progress.say(f"{_label(overrides, job)}: training on {devices.describe(device)}")


def _last_words(
    metrics: EpochMetrics, device: torch.device, folder: Path, tracked: tracking.Run, job: Job | None
) -> None:
    """The tutorial's two lines, and for a single run where to find it."""
    progress.say(
        f"loss {metrics.train_loss:.3f}, train acc {metrics.train_acc:.3f}, test acc {metrics.test_acc:.3f}"
    )
    progress.say(f"{metrics.examples_per_s:.1f} examples/sec on {device}")
    if job is None:
        progress.say(f"output folder {folder}")
        for line in tracked.where():
            progress.say(line)


def _tags(config: Config, job: Job | None) -> dict[str, str]:
    environment = identity.environment("")
    tags = {
        "config_hash": identity.config_hash(config),
        "host": environment["host"],
        "git_commit": environment["git_commit"] or "none: not run from a checkout",
        "git_dirty": str(environment["git_dirty"]).lower(),
        "mlflow.source.name": "lenet_sweep",
        "mlflow.source.type": "LOCAL",
    }
    if environment["git_commit"]:
        tags["mlflow.source.git.commit"] = environment["git_commit"]
    if job:
        tags["sweep_id"] = job.sweep_id
    return tags


def _name(overrides: tuple[str, ...]) -> str:
    """The run's name among others: what was overridden and can change a number."""
    telling = [o for o in overrides if not o.startswith(("tracking", "data.root", "sweep.", "hydra"))]
    return " ".join(telling)[:250]


def _label(overrides: tuple[str, ...], job: Job | None) -> str:
    if job is None:
        return ""
    of_how_many = f"/{job.total}" if job.total else ""
    return f"[{job.number}{of_how_many}] {_name(overrides)}".rstrip()


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory on the device: {str(error).splitlines()[0]}"
    if isinstance(error, LenetSweepError):
        return str(error)
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _profiler(folder: Path) -> Iterator[None]:
    """Record with torch.profiler; leave a trace for https://ui.perfetto.dev and print the totals."""
    with torch.profiler.profile(record_shapes=True) as profile:
        yield
    (folder / "profile").mkdir(exist_ok=True)
    profile.export_chrome_trace(str(folder / "profile" / "trace.json"))
    order: Literal["cuda_time_total", "cpu_time_total"] = (
        "cuda_time_total" if torch.cuda.is_available() else "cpu_time_total"
    )
    table = profile.key_averages().table(sort_by=f"self_{order}", row_limit=15)
    write_atomic(folder / "profile" / "operators.txt", table)
    progress.say(table)
    progress.say(f"trace {folder / 'profile' / 'trace.json'} (open it in https://ui.perfetto.dev)")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(values, indent=2) + "\n")

"""One run from its config to its last words: data, network, training, and everything it leaves.

    outputs/.../config.yaml                 the whole config: it alone rebuilds the run
                metrics.jsonl               a line an epoch, written before anything is tracked
                environment.json            machine, versions, commit
                uncommitted.diff            what the code's checkout had on top of its commit
                tracking.json               the run's id in the tracking store
                checkpoint.safetensors      its state after the last whole epoch
                model/weights.safetensors   the weights after the last epoch
                plots/*.png
                result.json                 how it ended
                lenet_sweep.log

A run that was cut short goes on from its checkpoint when the same config is run again, and ends
with the same bits as one that was never interrupted. In the same way a job of a sweep goes on from a
finished run that is its beginning (the same config with fewer epochs).
"""

import contextlib
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lenet_sweep import (
    checkpoint,
    devices,
    engine,
    identity,
    ledger,
    model,
    optim,
    plots,
    progress,
    shapes,
    tracking,
)
from lenet_sweep import config as configs
from lenet_sweep import data as datasets
from lenet_sweep.config import CLASSES, IMAGE_SHAPE, Config, NoTrackingConfig
from lenet_sweep.engine import EpochMetrics
from lenet_sweep.errors import LenetSweepError, OutputError, RunFailed, TrackingError
from lenet_sweep.journal import Line
from lenet_sweep.ledger import Entry, Result
from lenet_sweep.paths import atomic_path, write_atomic
from lenet_sweep.randomness import generator

log = logging.getLogger(__name__)

_CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Job:
    """A run's place in a sweep: `number` counts from 1; `total` is None where nobody knows it.

    `label` says what tells the run from the others, as in "lr=0.1 seed=2".
    """

    sweep_id: str
    number: int
    total: int | None
    label: str


@dataclass
class Trained:
    """What training works on, and what it has reached."""

    data: datasets.Data
    step: engine.Step
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    lines: list[Line]

    @property
    def network(self) -> nn.Sequential:
        return self.step.network

    @property
    def last(self) -> EpochMetrics:
        return self.lines[-1].metrics


def run(
    config: Config,
    folder: Path,
    overrides: tuple[str, ...] = (),
    job: Job | None = None,
    origin: str | None = None,
) -> Result:
    """Train what `config` describes; leave everything in `folder` and the tracking store.

    `overrides` are what the user typed; they name the run. Only one process trains a config at a
    time, others wait. A job of a sweep that is finished already is not trained again; a run that
    was interrupted goes on; `config.sweep.rerun` starts afresh in both cases. `origin` is the run
    that this one is a variant of.

    Raises:
        OutputError: if `folder` holds a run already or cannot be written.
        DataError, DeviceError, TrackingError: if the run cannot start.
        RunFailed: if it started and did not reach its end; its status is then FAILED.
    """
    config_hash = identity.config_hash(config)
    name = _name(overrides) or config.model.name
    with ledger.claim(config_hash, lambda: progress.say(f"{name}: another process trains it; waiting")):
        if job and not config.sweep.rerun:
            done = _finished(config, config_hash)
            if done:
                progress.say(f"{_label(job)}: finished before, not trained again")
                return done
        previous = None if config.sweep.rerun else _interrupted(config, config_hash)
        return _run(config, folder, overrides, _tags(config_hash, job, origin), job, previous)


def prepare(config: Config) -> tuple[Trained, torch.device]:
    """Everything that training starts from, on the device that the config asks for.

    Raises:
        DataError, DeviceError: if this machine has not what it takes.
    """
    device = devices.resolve(config.device)
    devices.set_arithmetic(config.threads, config.precision)
    data = datasets.load(config.data, config.seed, device, progress.say)
    network = model.build(config.model, generator(config.seed, "init")).to(device)
    step, why_slow = engine.choose_step(config, network, device)
    if why_slow:
        progress.say(why_slow)
    optimizer = optim.optimizer(config.optimizer, network.parameters())
    schedule = optim.schedule(config.schedule, optimizer, config.epochs)
    return Trained(data, step, optimizer, schedule, []), device


def _run(
    config: Config,
    folder: Path,
    overrides: tuple[str, ...],
    tags: dict[str, str],
    job: Job | None,
    previous: Entry | None,
) -> Result:
    config_hash, start_ms = tags["config_hash"], int(time.time() * 1000)
    _claim(folder, config)
    try:
        trained, device = prepare(config)
        _introduce(config, device, trained.step, overrides, job)
        trajectory = _trajectory(config, device, trained.step)
        run_id = _take_over(previous, folder, trained, trajectory) if previous else None
        if previous is None and job and not config.sweep.rerun:
            shorter = ledger.beginning(trajectory, config.epochs)
            if shorter:  # its MLflow run is another's
                _take_over(shorter, folder, trained, trajectory)
        _describe_surroundings(folder, device, trained.step)
        name = f"{_name(overrides) or config.model.name} #{config_hash[:6]}"
        tracked = tracking.open_run(config.tracking, folder, name, tags, start_ms, run_id)
    except (LenetSweepError, OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):  # the error itself may be a full disk
            ledger.write_result(folder, Result("FAILED", _reason(error), False, None, config_hash, 0.0, {}))
        raise
    # From here on a run that is cut short is found, with its checkpoint, in the new folder.
    ledger.enter(config_hash, Entry(folder, _store(config), tracked.run_id))
    if previous:
        (previous.folder / _CHECKPOINT).unlink(missing_ok=True)

    with _recorded(trained, tracked, folder, config_hash) as ends:
        _train(config, trajectory, trained, folder, tracked, _label(job))
        _save(config, trained, folder)
    (result,) = ends
    with contextlib.suppress(OSError):  # a full disk costs a longer run its head start, nothing else
        if identity.is_bound_to_its_end(config):
            (folder / _CHECKPOINT).unlink(missing_ok=True)
        else:
            ledger.enter_trajectory(trajectory, config.epochs, Entry(folder, None, None))
    _last_words(result, trained.last, device, folder, tracked, job)
    return result


@contextlib.contextmanager
def _recorded(
    trained: Trained, tracked: tracking.Run, folder: Path, config_hash: str
) -> Iterator[list[Result]]:
    """Record how the block ends, whatever ends it; the list then holds the result.

    Raises:
        RunFailed: for an error of the kind that a run can meet, with its reason in words.
    """
    started, ends = time.perf_counter(), list[Result]()
    status: ledger.Status = "FAILED"
    reason: str | None = None
    try:
        yield ends
        status = "FINISHED"
    except KeyboardInterrupt:
        status, reason = "KILLED", "interrupted"
        raise
    except (LenetSweepError, OSError, RuntimeError, MemoryError) as error:
        # RuntimeError: torch's own, out of memory among them.
        reason = _reason(error)
        log.exception("the run failed")
        raise RunFailed(reason) from error
    except BaseException as error:
        reason = _reason(error)
        raise
    finally:
        seconds = round(time.perf_counter() - started, 3)
        collapsed = bool(trained.lines) and _is_collapsed(trained.last)
        metrics = trained.lines[-1].named() if trained.lines else {}
        ends.append(Result(status, reason, collapsed, tracked.run_id, config_hash, seconds, metrics))
        _end(ends[0], tracked, folder)


def _end(result: Result, tracked: tracking.Run, folder: Path) -> None:
    """Write down how the run ended and close it in the store, or remember that this is still to do."""
    try:
        ledger.mark_unsynced(folder)
        ledger.write_result(folder, result)
    except OSError as error:
        # A full disk must not hide why the run ended, nor leave it as running in the store.
        progress.say(f"{folder}: the result could not be written: {error.strerror}")
    problem = tracked.end(result)
    if problem:
        progress.say(f"not all could be tracked ({problem}); python -m lenet_sweep sync sends the rest later")
        return
    with contextlib.suppress(OSError):
        ledger.mark_synced(folder)


def _train(
    config: Config,
    trajectory: str,
    trained: Trained,
    folder: Path,
    tracked: tracking.Run,
    label: str,
) -> None:
    """Train on; after every epoch keep the state, write the metrics down, track and show them."""

    def write_down(line: Line) -> None:
        journal.write(line.dump() + "\n")
        journal.flush()
        tracked.log(line.metrics.epoch, line.named(), line.time_ms)

    with (
        progress.Watch(config.epochs, label) as watch,
        open(folder / "metrics.jsonl", "w", encoding="utf-8") as journal,
        _profiler(folder, trained.data.train.labels_N.device) if config.profile else contextlib.nullcontext(),
    ):
        for line in trained.lines:
            write_down(line)
        if _is_done(config, trained):
            return
        for metrics in engine.train(
            trained.step,
            trained.optimizer,
            trained.schedule,
            trained.data,
            epochs=config.epochs,
            batch_size=config.batch_size,
            seed=config.seed,
            first_epoch=len(trained.lines) + 1,
            on_point=watch.point,
        ):
            trained.lines.append(Line(metrics, _now_ms(trained.lines)))
            # First the checkpoint: what is tracked must never be more than a resumed run knows of.
            checkpoint.save(
                folder / _CHECKPOINT,
                trained.network,
                trained.optimizer,
                trained.schedule,
                trajectory,
                trained.lines,
            )
            write_down(trained.lines[-1])
            watch.epoch(metrics)
            if _is_done(config, trained):
                return


def _is_done(config: Config, trained: Trained) -> bool:
    if not trained.lines:
        return False
    reached = config.target_loss is not None and trained.last.train_loss < config.target_loss
    return reached or trained.last.epoch == config.epochs


def _is_collapsed(metrics: EpochMetrics) -> bool:
    """Whether the epoch was no better than guessing: a network that is stuck, without any NaN."""
    at_chance = abs(metrics.train_acc - 1 / CLASSES) < 0.02
    return at_chance and abs(metrics.train_loss - math.log(CLASSES)) < 0.02


def _finished(config: Config, config_hash: str) -> Result | None:
    """The result of a finished run of this config in its store; what this folder knows, if that is dead."""
    try:
        return tracking.finished(config.tracking, config_hash)
    except TrackingError as error:
        log.warning("%s", error)
    entry = ledger.look_up(config_hash)
    result = ledger.read_result(entry.folder) if entry and entry.store == _store(config) else None
    return result if result and result.status == "FINISHED" else None


def _interrupted(config: Config, config_hash: str) -> Entry | None:
    """The run of this config that did not end, in the same store; None if there is none."""
    entry = ledger.look_up(config_hash)
    if entry is None or entry.store != _store(config) or not entry.folder.is_dir():
        return None
    result = ledger.read_result(entry.folder)
    return entry if result is None or result.status == "KILLED" else None


def _trajectory(config: Config, device: torch.device, step: engine.Step) -> str:
    """What two runs share if one may go on from the other's state: all but the epochs, and the arithmetic.

    The same config takes torch's step where the compiler is missing; half a run of each would be a
    number that nobody could have again. torch's sums on a CPU depend on its threads, native ones do not.
    """
    threads = torch.get_num_threads() if device.type == "cpu" and step.name == "torch" else ""
    return f"{identity.trajectory_hash(config)}-{device.type}-{step.name}{threads}"


def _take_over(previous: Entry, folder: Path, trained: Trained, trajectory: str) -> str | None:
    """Restore the state that another run of this trajectory reached, and copy its checkpoint into `folder`.

    Returns the id of the MLflow run to go on with.
    """
    path = previous.folder / _CHECKPOINT
    if not path.exists():
        # Nothing was tracked yet, so its run can be filled from the start.
        return previous.run_id
    try:
        trained.lines = checkpoint.restore(
            path, trained.network, trained.optimizer, trained.schedule, trajectory
        )
    except checkpoint.Damaged as error:
        progress.say(f"{error}; the run starts from its first epoch")
        return None
    with atomic_path(folder / _CHECKPOINT) as copy:
        shutil.copyfile(path, copy)
    progress.say(f"going on after epoch {trained.last.epoch} of {previous.folder}")
    return previous.run_id


def _now_ms(lines: list[Line]) -> int:
    """Milliseconds since 1970, never before the last line's: clocks are set back at times."""
    now = int(time.time() * 1000)
    return max(now, lines[-1].time_ms) if lines else now


def _save(config: Config, trained: Trained, folder: Path) -> None:
    """Write the weights and the pictures."""
    network, data = trained.network, trained.data
    weights = folder / "model" / "weights.safetensors"
    weights.parent.mkdir(exist_ok=True)
    with atomic_path(weights) as temporary:
        save_file({name: tensor.cpu() for name, tensor in network.state_dict().items()}, temporary)
    title = f"{config.model.name}, {config.optimizer.name}, lr {config.optimizer.lr:g}"
    plots.curves([line.metrics for line in trained.lines], title, folder / "plots" / "curves.png")
    predicted_N = trained.step.predict(data.test)
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


def _describe_surroundings(folder: Path, device: torch.device, step: engine.Step) -> None:
    environment = identity.environment(*devices.facts(device), step.name)
    write_atomic(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    if diff := identity.uncommitted_diff():
        write_atomic(folder / "uncommitted.diff", diff)


def _introduce(
    config: Config, device: torch.device, step: engine.Step, overrides: tuple[str, ...], job: Job | None
) -> None:
    """Say what will be trained, and on what; the layers of every job of a sweep are in its log only."""
    table = progress.layer_table(shapes.layers(config.model, IMAGE_SHAPE, CLASSES))
    if job is None:
        progress.say(table)
        progress.say(f"training on {devices.describe(device)}, {step.name} step")
        return
    if job.number == 1 or any(override.startswith("model") for override in overrides):
        progress.say(table)
    progress.say(f"{_label(job)}: training on {devices.describe(device)}, {step.name} step")


def _last_words(
    result: Result,
    metrics: EpochMetrics,
    device: torch.device,
    folder: Path,
    tracked: tracking.Run,
    job: Job | None,
) -> None:
    """The tutorial's two lines, and for a single run where to find it."""
    if result.collapsed:
        progress.say(
            "collapsed: it ends no better than guessing (loss ln 10); try another lr, or more epochs"
        )
    progress.say(
        f"loss {metrics.train_loss:.3f}, train acc {metrics.train_acc:.3f}, test acc {metrics.test_acc:.3f}"
    )
    progress.say(f"{metrics.examples_per_s:.1f} examples/sec on {device}")
    if job is None:
        progress.say(f"output folder {folder}")
        for line in tracked.where():
            progress.say(line)


def _store(config: Config) -> str | None:
    """The tracking store in one word, None without one."""
    if isinstance(config.tracking, NoTrackingConfig):
        return None
    return f"{config.tracking.uri} {config.tracking.experiment}"


def _tags(config_hash: str, job: Job | None, origin: str | None) -> dict[str, str]:
    git = identity.git()
    tags = {
        "config_hash": config_hash,
        "git_commit": git.commit or "none: not run from a checkout",
        "git_dirty": str(git.dirty).lower(),
        "mlflow.source.name": "lenet_sweep",
        "mlflow.source.type": "LOCAL",
    }
    if git.commit:
        tags["mlflow.source.git.commit"] = git.commit
    if job:
        tags["sweep_id"] = job.sweep_id
    if origin:
        tags["origin"] = origin
    return tags


def _name(overrides: tuple[str, ...]) -> str:
    """The run's name among others: what was overridden and can change a number."""
    telling = [o for o in overrides if not o.startswith(("tracking", "data.root", "sweep.", "hydra"))]
    return " ".join(telling)[:250]


def _label(job: Job | None) -> str:
    if job is None:
        return ""
    of_how_many = f"/{job.total}" if job.total else ""
    return f"[{job.number}{of_how_many}] {job.label}".rstrip()


def _reason(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory on the device: {str(error).splitlines()[0]}"
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, LenetSweepError):
        return str(error)
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _profiler(folder: Path, device: torch.device) -> Iterator[None]:
    """Record with torch.profiler; leave a trace for https://ui.perfetto.dev and print the totals."""
    with torch.profiler.profile(record_shapes=True) as profile:
        yield
    (folder / "profile").mkdir(exist_ok=True)
    profile.export_chrome_trace(str(folder / "profile" / "trace.json"))
    order = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=15)
    write_atomic(folder / "profile" / "operators.txt", table)
    progress.say(table)
    progress.say(f"trace {folder / 'profile' / 'trace.json'} (open it in https://ui.perfetto.dev)")

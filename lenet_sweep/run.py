"""One run from its config to its last words: data, network, training, and everything it leaves.

    outputs/.../config.yaml                 the whole config: it alone rebuilds the run
                metrics.jsonl               a line an epoch, written before anything is tracked
                environment.json            machine, versions, commit
                uncommitted.diff            what the code's checkout had on top of its commit
                tracking.json               the run's id in the tracking store
                checkpoint.safetensors      its state after the last whole epoch
                model/weights.safetensors   the weights after the last epoch
                plots/*.png                 curves, confusion matrix, filters, activations, mistakes
                per_class.json              the share of each class that was recognised
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch._C._profiler import _ExperimentalConfig

from lenet_sweep import (
    checkpoint,
    devices,
    engine,
    fused,
    identity,
    inside,
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
from lenet_sweep.config import CLASSES, IMAGE_SHAPE, Config, NoTrackingConfig, is_about_tracking
from lenet_sweep.engine import EpochMetrics
from lenet_sweep.errors import LenetSweepError, OutputError, RunFailed, TrackingError
from lenet_sweep.journal import Line
from lenet_sweep.ledger import Entry, Result
from lenet_sweep.paths import atomic_path, write_atomic
from lenet_sweep.plan import Job
from lenet_sweep.randomness import generator

log = logging.getLogger(__name__)

_CHECKPOINT = "checkpoint.safetensors"

ChooseStep = Callable[[Config, nn.Sequential, torch.device], tuple[engine.Step, str | None]]


@dataclass(frozen=True)
class Order:
    """A run that is to be trained: its config, where it goes, and what the user typed to get it."""

    config: Config
    folder: Path
    overrides: tuple[str, ...] = ()
    job: Job | None = None
    origin: str | None = None

    @property
    def name(self) -> str:
        """The run's name among others: what was overridden and can change a number, what is swept first."""
        telling = [
            override
            for override in self.overrides
            if not override.startswith(("data.root", "sweep.", "hydra")) and not is_about_tracking(override)
        ]
        swept = f" {self.job.label} " if self.job else ""
        return " ".join(sorted(telling, key=lambda o: f" {o} " not in swept))[:250]

    @property
    def label(self) -> str:
        """'[2/3] lr=0.5' for a job of a sweep, '' for a single run."""
        return self.job.long_label if self.job else ""


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
        OutputError: if `folder` holds another run already or cannot be written.
        DataError, DeviceError, TrackingError: if the run cannot start.
        RunFailed: if it started and did not reach its end; its status is then FAILED.
    """
    order = Order(config, folder, overrides, job, origin)
    with _claimed(order):
        if done := _done_before(order):
            return done
        with _recorded(order) as running:
            trained = running.trained
            epochs = engine.train(
                trained.step,
                trained.optimizer,
                trained.schedule,
                trained.data,
                epochs=config.epochs,
                batch_size=config.batch_size,
                seed=config.seed,
                first_epoch=len(trained.lines) + 1,
                on_point=running.watch.point,
            )
            while not running.is_done:
                running.record(next(epochs))
        return running.result


def run_array(orders: Sequence[Order]) -> list[Result | LenetSweepError]:
    """Train jobs that `plan.array_key` finds alike as one array; each leaves what `run` would leave.

    Returns, in order, what `run` would have returned or raised. As many are trained at once as the
    device has memory for.
    """
    ends: dict[int, Result | LenetSweepError] = {}
    with contextlib.ExitStack() as claims:
        # In one order everywhere, or two processes could wait for each other for ever.
        for order in sorted(orders, key=lambda order: identity.config_hash(order.config)):
            claims.enter_context(_claimed(order))
        for place, order in enumerate(orders):
            if done := _done_before(order):
                ends[place] = done
        left = [place for place in range(len(orders)) if place not in ends]
        while left:
            ends |= _train_array({place: orders[place] for place in left})
            left = [place for place in left if place not in ends]
    return [ends[place] for place in range(len(orders))]


def prepare(
    config: Config,
    step: ChooseStep = engine.choose_step,
    data: datasets.Data | None = None,
) -> tuple[Trained, torch.device]:
    """Everything that training starts from, on the device that the config asks for.

    `step` chooses how gradients are taken; `data` is the config's if it is at hand already.

    Raises:
        DataError, DeviceError: if this machine has not what it takes.
    """
    device = devices.resolve(config.device)
    devices.set_arithmetic(config.threads, config.precision)
    data = data or datasets.load(config.data, config.seed, device, progress.say)
    network = model.build(config.model, generator(config.seed, "init")).to(device)
    chosen, why_slow = step(config, network, device)
    if why_slow:
        progress.say(why_slow)
    optimizer = optim.optimizer(config.optimizer, network.parameters())
    schedule = optim.schedule(config.schedule, optimizer, config.epochs)
    return Trained(data, chosen, optimizer, schedule, []), device


class _Running:
    """A run while it trains: takes its epochs, keeps and tracks them, and knows when it is done."""

    def __init__(
        self,
        order: Order,
        trained: Trained,
        device: torch.device,
        trajectory: str,
        tracked: tracking.Run,
        watch: progress.Watch,
    ) -> None:
        self.order, self.trained, self.device, self.watch = order, trained, device, watch
        self.trajectory, self.tracked = trajectory, tracked
        self.result: Result  # there when the run has ended
        self._journal = open(order.folder / "metrics.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        for line in trained.lines:
            self._write_down(line)

    @property
    def is_done(self) -> bool:
        if not self.trained.lines:
            return False
        config, last = self.order.config, self.trained.last
        reached = config.target_loss is not None and last.train_loss < config.target_loss
        return reached or last.epoch == config.epochs

    def record(self, metrics: EpochMetrics) -> None:
        """Keep the state after an epoch, write its metrics down, track and show them."""
        trained = self.trained
        trained.lines.append(Line(metrics, _now_ms(trained.lines)))
        # First the checkpoint: what is tracked must never be more than a resumed run knows of.
        checkpoint.save(
            self.order.folder / _CHECKPOINT,
            trained.network,
            trained.optimizer,
            trained.schedule,
            self.trajectory,
            trained.lines,
        )
        self._write_down(trained.lines[-1])
        self.watch.epoch(metrics)

    def close(self) -> None:
        self._journal.close()

    def _write_down(self, line: Line) -> None:
        self._journal.write(line.dump() + "\n")
        self._journal.flush()
        self.tracked.log(line.metrics.epoch, line.named(), line.time_ms)


def _train_array(orders: dict[int, Order]) -> dict[int, Result | LenetSweepError]:
    """Train as many of `orders` at once as there is room for, at least one; return how those ended."""
    opened: dict[int, _Opened] = {}
    ends: dict[int, Result | LenetSweepError] = {}
    try:
        room, data = 1, None
        for place, order in orders.items():
            if len(opened) == room:
                break
            try:
                opened[place] = _Opened(_recorded(order, fused.step, data))
            except LenetSweepError as error:
                ends[place] = error
                continue
            if data is None:
                first = opened[place].running
                data = first.trained.data
                room = fused.width(first.device, first.trained.network, order.config.batch_size)
        if data:
            _feed(opened, data, ends)
    except (LenetSweepError, OSError, RuntimeError, MemoryError) as error:
        ends |= {place: opened[place].close(error) for place in opened if place not in ends}
    except BaseException as error:
        for place in opened.keys() - ends.keys():
            opened[place].close(error)
        raise
    return ends


class _Opened:
    """A run whose training is not a block of code: `_recorded`, entered here and left by `close`."""

    def __init__(self, recorded: contextlib.AbstractContextManager[_Running]) -> None:
        self._recorded = recorded
        self.running = recorded.__enter__()

    def close(self, error: BaseException | None = None) -> Result | LenetSweepError:
        """End the run, by `error` if there is one, and return what `run` would have returned or raised."""
        try:
            self._recorded.__exit__(type(error) if error else None, error, None)
        except LenetSweepError as failure:
            return failure
        return self.running.result if error is None else RunFailed(_reason(error))


def _feed(opened: dict[int, _Opened], data: datasets.Data, ends: dict[int, Result | LenetSweepError]) -> None:
    """Train all that is opened as one array, and close each run when it ends."""
    for place in opened:
        if opened[place].running.is_done:
            ends[place] = opened[place].close()
    places = [place for place in opened if place not in ends]
    runnings = [opened[place].running for place in places]
    members = [
        fused.Member(
            running.trained.network,
            running.trained.optimizer,
            running.trained.schedule,
            seed=running.order.config.seed,
            epochs=running.order.config.epochs,
            first_epoch=len(running.trained.lines) + 1,
        )
        for running in runnings
    ]
    if not members:
        return
    config = runnings[0].order.config
    for index, outcome in fused.train(
        members,
        data,
        batch_size=config.batch_size,
        amp=config.precision.amp,
        on_point=lambda index, point: runnings[index].watch.point(point),
    ):
        try:
            if isinstance(outcome, RunFailed):
                raise outcome
            runnings[index].record(outcome)
        except (RunFailed, OSError) as error:  # a full disk, say: the others go on
            ends[places[index]] = opened[places[index]].close(error)
            members[index].stopped = True
        else:
            if runnings[index].is_done:
                ends[places[index]] = opened[places[index]].close()
                members[index].stopped = True


def _claimed(order: Order) -> contextlib.AbstractContextManager[None]:
    """Be the only process that trains this config; wait for another that does."""
    name = order.name or order.config.model.name
    return ledger.claim(
        identity.config_hash(order.config),
        lambda: progress.say(f"{name}: another process trains it; waiting"),
    )


def _done_before(order: Order) -> Result | None:
    """The result of a job of a sweep that need not be trained again."""
    if order.job is None or order.config.sweep.rerun:
        return None
    done = _finished(order.config, identity.config_hash(order.config))
    if done:
        progress.say("finished before, not trained again", order.label)
    return done


@contextlib.contextmanager
def _recorded(
    order: Order, step: ChooseStep = engine.choose_step, data: datasets.Data | None = None
) -> Iterator[_Running]:
    """Start a run, have it trained by the block, and record how that ends, whatever ends it.

    Raises:
        OutputError, DataError, DeviceError, TrackingError: if it cannot start.
        RunFailed: for an error in the block of the kind that a run can meet, its reason in words.
    """
    config, folder = order.config, order.folder
    config_hash, start_ms = identity.config_hash(config), int(time.time() * 1000)
    previous = None if config.sweep.rerun else _interrupted(config, config_hash)
    _claim_folder(folder, config)
    try:
        trained, device = prepare(config, step, data)
        _introduce(order, device, trained.step)
        trajectory = _trajectory(config, device, trained.step)
        run_id = _take_over(previous, order, trained, trajectory) if previous else None
        if previous is None and order.job and not config.sweep.rerun:
            shorter = ledger.beginning(trajectory, config.epochs)
            if shorter:  # its MLflow run is another's
                _take_over(shorter, order, trained, trajectory)
        _describe_surroundings(folder, device, trained.step)
        name = f"{order.name or config.model.name} #{config_hash[:6]}"
        tags = _tags(config_hash, order.job, order.origin)
        tracked = tracking.open_run(config.tracking, folder, name, tags, start_ms, run_id)
    except (LenetSweepError, OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):  # the error itself may be a full disk
            ledger.write_result(folder, Result("FAILED", _reason(error), False, None, config_hash, 0.0, {}))
        raise
    # From here on a run that is cut short is found, with its checkpoint, in the new folder.
    ledger.enter(config_hash, Entry(folder, _store(config), tracked.run_id))
    if previous and previous.folder.absolute() != folder.absolute():
        (previous.folder / _CHECKPOINT).unlink(missing_ok=True)

    with (
        _ended(trained, tracked, folder, config_hash) as ends,
        progress.Watch(config.epochs, order.label, len(trained.lines)) as watch,
        contextlib.closing(_Running(order, trained, device, trajectory, tracked, watch)) as running,
    ):
        with _profiler(folder, device) if config.profile else contextlib.nullcontext():
            yield running
        _save(config, trained, folder)
    (running.result,) = ends
    with contextlib.suppress(OSError):  # a full disk costs a longer run its head start, nothing else
        if identity.is_bound_to_its_end(config):
            (folder / _CHECKPOINT).unlink(missing_ok=True)
        else:
            ledger.enter_trajectory(trajectory, config.epochs, Entry(folder, None, None))
    _last_words(running)


@contextlib.contextmanager
def _ended(trained: Trained, tracked: tracking.Run, folder: Path, config_hash: str) -> Iterator[list[Result]]:
    """Record how the block ends; the list then holds the result.

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


def _is_collapsed(metrics: EpochMetrics) -> bool:
    """Whether the epoch was no better than guessing: a network that is stuck or astray, without any NaN."""
    at_chance = abs(metrics.train_acc - 1 / CLASSES) < 0.02
    return at_chance and metrics.train_loss > math.log(CLASSES) - 0.02


def _finished(config: Config, config_hash: str) -> Result | None:
    """The result of a finished run of this config in its store; what this folder knows, if that is dead."""
    try:
        return tracking.finished(config.tracking, [config_hash]).get(config_hash)
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


def _take_over(previous: Entry, order: Order, trained: Trained, trajectory: str) -> str | None:
    """Restore the state that another run of this trajectory reached, and copy its checkpoint.

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
        progress.say(f"{error}; the run starts from its first epoch", order.label)
        return None
    if previous.folder.absolute() != order.folder.absolute():
        with atomic_path(order.folder / _CHECKPOINT) as copy:
            shutil.copyfile(path, copy)
    progress.say(f"going on after epoch {trained.last.epoch} of {previous.folder}", order.label)
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
    pictures = folder / "plots"
    plots.curves([line.metrics for line in trained.lines], title, pictures / "curves.png")
    predicted_N = trained.step.predict(data.test)
    counts = torch.bincount(data.test.labels_N * CLASSES + predicted_N, minlength=CLASSES**2)
    matrix = counts.reshape(CLASSES, CLASSES).tolist()
    plots.confusion_matrix(matrix, data.class_names, pictures / "confusion_matrix.png")
    accuracies = dict(zip(data.class_names, inside.per_class(matrix), strict=True))
    write_atomic(folder / "per_class.json", json.dumps(accuracies, indent=2) + "\n")
    with devices.torch_threads(1):
        _picture_inside(trained, predicted_N, pictures)


def _picture_inside(trained: Trained, predicted_N: torch.Tensor, folder: Path) -> None:
    """The learned filters, what they make of one example of each class, and the surest mistakes."""
    network, data = trained.network, trained.data
    convolutions = [(name, layer) for name, layer in network.named_children() if isinstance(layer, nn.Conv2d)]
    plots.filters([(name, layer.weight) for name, layer in convolutions[:2]], folder / "filters.png")
    examples = inside.one_of_each(data.test, CLASSES)
    outputs = inside.activations(network, examples)
    shown = [(f"act{i}", outputs[f"act{i}"]) for i in range(1, len(convolutions[:2]) + 1)]
    plots.activations(examples[:, 0], shown, data.class_names, folder / "activations.png")
    network.train()
    plots.mistakes(
        inside.mistakes(network, data.test, predicted_N, 10), data.class_names, folder / "mistakes.png"
    )


def _claim_folder(folder: Path, config: Config) -> None:
    """Make `folder` this run's own by creating its config.yaml.

    One that this very config was trained in until its process was killed is taken over: whoever
    holds the config's lock is the only one there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "config.yaml", "x", encoding="utf-8") as file:
            file.write(configs.dump(config))
    except FileExistsError as error:
        if not _is_abandoned(folder, config):
            raise OutputError(f"{folder}: already holds a run; choose another hydra.run.dir") from error
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error


def _is_abandoned(folder: Path, config: Config) -> bool:
    """Whether `folder` holds a run of `config` that did not live to write its result."""
    try:
        same = (folder / "config.yaml").read_bytes() == configs.dump(config).encode()
    except OSError:
        return False
    return same and not (folder / "result.json").exists()


def _describe_surroundings(folder: Path, device: torch.device, step: engine.Step) -> None:
    environment = identity.environment(*devices.facts(device), step.name)
    write_atomic(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    if diff := identity.uncommitted_diff():
        write_atomic(folder / "uncommitted.diff", diff)


def _introduce(order: Order, device: torch.device, step: engine.Step) -> None:
    """Say what will be trained, and on what; the layers only if they are others than the last run's."""
    global _layers_shown
    layers = shapes.layers(order.config.model, IMAGE_SHAPE, CLASSES)
    if order.job is None or layers != _layers_shown:
        progress.say(progress.layer_table(layers))
        _layers_shown = layers
    progress.say(f"training on {devices.describe(device)}, {step.name} step", order.label)


_layers_shown: list[shapes.Layer] = []


def _last_words(running: _Running) -> None:
    """The tutorial's two lines, and for a single run where to find it."""
    metrics, label = running.trained.last, running.order.label
    if running.result.collapsed:
        progress.say(
            "collapsed: it ends no better than guessing (loss ln 10); try another lr, or more epochs", label
        )
    progress.say(
        f"loss {metrics.train_loss:.3f}, train acc {metrics.train_acc:.3f}, test acc {metrics.test_acc:.3f}",
        label,
    )
    progress.say(f"{metrics.examples_per_s:.1f} examples/sec on {running.device}", label)
    if running.order.job is None:
        progress.say(f"output folder {running.order.folder}")
        for line in running.tracked.where():
            progress.say(line)
        if run_id := running.tracked.run_id:
            progress.say(tracking.ui_command(run_id[:8], running.order.overrides))


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
    if job and job.colour:
        tags["mlflow.runColor"] = job.colour
    if origin:
        tags["origin"] = origin
    return tags


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
    all_threads = _ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(record_shapes=True, experimental_config=all_threads) as profile:
        yield
    (folder / "profile").mkdir(exist_ok=True)
    profile.export_chrome_trace(str(folder / "profile" / "trace.json"))
    order = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=15)
    write_atomic(folder / "profile" / "operators.txt", table)
    progress.say(table)
    progress.say(f"trace {folder / 'profile' / 'trace.json'} (open it in https://ui.perfetto.dev)")

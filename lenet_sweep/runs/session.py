"""A run while it trains: started or resumed, recorded after every epoch, and ended in any case."""

import contextlib
import logging
import math
import time
from pathlib import Path

import torch

from lenet_sweep import shapes
from lenet_sweep.errors import LenetSweepError, RunFailed
from lenet_sweep.runs import outputs, progress, resume
from lenet_sweep.runs.progress import RunProgress
from lenet_sweep.runs.spec import RunSpec
from lenet_sweep.shapes import CLASSES, IMAGE_SHAPE
from lenet_sweep.storage import checkpoint, fingerprint, metrics_file, run_index
from lenet_sweep.storage.metrics_file import EpochRecord
from lenet_sweep.storage.result import Result, Status, write_result
from lenet_sweep.storage.run_index import CHECKPOINT, Entry
from lenet_sweep.tracking import processes
from lenet_sweep.tracking.base import RunLogger
from lenet_sweep.tracking.stores import open_store
from lenet_sweep.training import devices
from lenet_sweep.training.data import Data
from lenet_sweep.training.metrics import EpochMetrics
from lenet_sweep.training.state import TrainingState, prepare

log = logging.getLogger(__name__)

# What can end a run without being a bug; RuntimeError is torch's own, out of memory among them.
EXPECTED_ERRORS = (LenetSweepError, OSError, RuntimeError, MemoryError)


class RunSession:
    """A run that has started. `start` makes one; `finish` or `fail` must be called at its end.

    Whoever trains it passes each epoch's metrics to `record` until `is_done`. `result` is how it ended.
    """

    def __init__(
        self,
        spec: RunSpec,
        state: TrainingState,
        records: list[EpochRecord],
        trajectory: str,
        logger: RunLogger,
    ) -> None:
        """`records` are those of the epochs that a resumed run has behind it; they are logged again."""
        self.spec, self.state, self.records = spec, state, records
        self._trajectory, self._logger = trajectory, logger
        self._started = time.perf_counter()
        self.progress = RunProgress(spec.config.epochs, spec.label, len(records))
        self.result: Result | None = None

    @classmethod
    def start(cls, spec: RunSpec, *, fused: bool = False, data: Data | None = None) -> "RunSession":
        """Claim the folder, prepare or resume the state, and open the run in its store.

        Raises:
            OutputError, DataError, DeviceError, TrackingError: if it cannot start.
        """
        start_ms = int(time.time() * 1000)
        previous = None if spec.config.sweep.rerun else resume.interrupted(spec)
        resume.claim_folder(spec)
        session: RunSession | None = None
        try:
            state = prepare(spec.config, fused=fused, data=data, say=progress.say)
            _print_start(spec, state)
            trajectory = resume.trajectory_of(spec.config, state)
            records, run_id = resume.restore_latest(spec, previous, state, trajectory)
            outputs.write_environment(spec.folder, state)
            name = f"{spec.name} #{spec.config_hash[:6]}"
            store = open_store(spec.config.tracking)
            with processes.defer_interrupts():  # whatever is in the store has a session that ends it
                logger = store.open_run(spec.folder, name, spec.tags(), start_ms, run_id)
                session = cls(spec, state, records, trajectory, logger)
            # From here on an interrupted run is found, with its checkpoint, in the new folder.
            run_index.add(spec.config_hash, Entry(spec.folder, store.name, logger.run_id))
            if previous and previous.folder.absolute() != spec.folder.absolute():
                (previous.folder / CHECKPOINT).unlink(missing_ok=True)
            session.progress.start()
            session._log_earlier_epochs()
        except BaseException as error:
            if session:
                session.fail(error)
            else:
                _write_failed_start(spec, error)
            raise
        return session

    @property
    def next_epoch(self) -> int:
        """The epoch (from 1) that is to be trained next."""
        return len(self.records) + 1

    @property
    def is_done(self) -> bool:
        if not self.records:
            return False
        config, last = self.spec.config, self.records[-1].metrics
        reached = config.target_loss is not None and last.train_loss < config.target_loss
        return reached or last.epoch == config.epochs

    def record(self, metrics: EpochMetrics) -> None:
        """Save the state after an epoch; write, track and show its metrics."""
        self.records.append(EpochRecord.now(metrics, self.records))
        # The checkpoint comes first: a resumed run must know every epoch that was tracked.
        checkpoint.save(
            self.spec.folder / CHECKPOINT,
            self.state.network,
            self.state.optimizer,
            self.state.schedule,
            self._trajectory,
            self.records,
        )
        metrics_file.append(self._metrics_path, self.records[-1])
        self._log(self.records[-1])
        self.progress.epoch(metrics)

    def finish(self) -> Result:
        """Save weights and plots, end the run as FINISHED, and print its summary.

        Raises:
            RunFailed: if they cannot be saved; the run has then ended as FAILED.
        """
        try:
            outputs.save(self.spec, self.state, [record.metrics for record in self.records])
        except BaseException as error:
            self.fail(error)
            raise
        result = self._end("FINISHED", None)
        self._keep_checkpoint()
        self._print_summary(result)
        return result

    def fail(self, error: BaseException) -> None:
        """End the run because of `error`: KILLED by an interrupt, FAILED by anything else.

        Raises:
            RunFailed: in place of an error that a run can meet (`EXPECTED_ERRORS`). Any other one is left to
                the caller to raise, and so is any error after the end.
        """
        if self.result:
            return
        status, reason = how_it_ended(error)
        if isinstance(error, EXPECTED_ERRORS):
            log.error("the run failed", exc_info=error)
        self._end(status, reason)
        if isinstance(error, EXPECTED_ERRORS):
            raise RunFailed(reason) from error

    @property
    def _metrics_path(self) -> Path:
        return self.spec.folder / "metrics.jsonl"

    def _log_earlier_epochs(self) -> None:
        """Write and track the epochs that a resumed run has behind it."""
        metrics_file.write(self._metrics_path, self.records)
        for record in self.records:
            self._log(record)

    def _log(self, record: EpochRecord) -> None:
        self._logger.log(record.metrics.epoch, record.named(), record.time_ms)

    def _end(self, status: Status, reason: str | None) -> Result:
        """Write how the run ended and close it in the store, or note that this is still to do."""
        self.progress.close()
        seconds = round(time.perf_counter() - self._started, 3)
        last = self.records[-1] if self.records else None
        collapsed = last is not None and is_collapsed(last.metrics)
        result = Result(
            status,
            reason,
            collapsed,
            self._logger.run_id,
            self.spec.config_hash,
            seconds,
            last.named() if last else {},
        )
        folder = self.spec.folder
        try:
            run_index.mark_unsynced(folder)
            write_result(folder, result)
        except OSError as error:
            # A full disk must neither hide why the run ended nor leave it RUNNING in the store.
            progress.say(f"{folder}: the result could not be written: {error.strerror}")
        self.result = result
        if problem := self._logger.end(result):
            progress.say(f"not tracked in full ({problem}); send the rest later: python -m lenet_sweep sync")
            return result
        with contextlib.suppress(OSError):
            run_index.mark_synced(folder)
        return result

    def _keep_checkpoint(self) -> None:
        """Let longer runs of this trajectory resume from the finished run's state."""
        with contextlib.suppress(OSError):  # a full disk only costs a longer run its head start
            if fingerprint.depends_on_epochs(self.spec.config):
                (self.spec.folder / CHECKPOINT).unlink(missing_ok=True)
            else:
                entry = Entry(self.spec.folder, None, None)
                run_index.add_trajectory(self._trajectory, self.spec.config.epochs, entry)

    def _print_summary(self, result: Result) -> None:
        """Print the tutorial's two lines, and for a single run where to find it."""
        metrics, label = self.records[-1].metrics, self.spec.label
        if result.collapsed:
            progress.say(
                "collapsed: no better than guessing (loss ln 10); try another lr or more epochs", label
            )
        accuracies = f"train acc {metrics.train_acc:.3f}, test acc {metrics.test_acc:.3f}"
        progress.say(f"loss {metrics.train_loss:.3f}, {accuracies}", label)
        progress.say(f"{metrics.examples_per_s:.1f} examples/sec on {self.state.device}", label)
        if self.spec.job is None:
            progress.say(f"output folder {self.spec.folder}")
            store = open_store(self.spec.config.tracking)
            command = store.open_command((result.run_id or "")[:8], self.spec.overrides)
            for line in [*self._logger.locations(), *([command] if command and result.run_id else [])]:
                progress.say(line)


def is_collapsed(metrics: EpochMetrics) -> bool:
    """Whether the epoch was no better than guessing: a stuck or diverging network, without NaN."""
    at_chance = abs(metrics.train_acc - 1 / CLASSES) < 0.02
    return at_chance and metrics.train_loss > math.log(CLASSES) - 0.02


def how_it_ended(error: BaseException) -> tuple[Status, str]:
    """The status and reason of a run that `error` ended."""
    if isinstance(error, KeyboardInterrupt):
        return "KILLED", "interrupted"
    return "FAILED", failure_reason(error)


def failure_reason(error: BaseException) -> str:
    """The error in one line, as result.json and the tracking store keep it."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory on the device: {str(error).splitlines()[0]}"
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, LenetSweepError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _write_failed_start(spec: RunSpec, error: BaseException) -> None:
    """Write the result of a run that is not in its store yet."""
    status, reason = how_it_ended(error)
    with contextlib.suppress(OSError):  # the error itself may be a full disk
        write_result(spec.folder, Result(status, reason, False, None, spec.config_hash, 0.0, {}))


def _print_start(spec: RunSpec, state: TrainingState) -> None:
    """Print what is trained and on which device; the layers only if they differ from the last run's."""
    global _layers_shown
    layers = shapes.layers(spec.config.model, IMAGE_SHAPE, CLASSES)
    if spec.job is None or layers != _layers_shown:
        progress.say(progress.layer_table(layers))
        _layers_shown = layers
    progress.say(f"training on {devices.describe(state.device)}, {state.backend.name} backend", spec.label)


_layers_shown: list[shapes.Layer] = []

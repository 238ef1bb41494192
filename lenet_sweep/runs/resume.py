"""What a run must not do again: finished runs, interrupted ones, and shorter ones that it can resume from."""

import contextlib
import logging
import shutil

import torch

from lenet_sweep.config import parsing
from lenet_sweep.config.schema import Config
from lenet_sweep.errors import OutputError, TrackingError
from lenet_sweep.paths import atomic_path
from lenet_sweep.runs import progress
from lenet_sweep.runs.spec import RunSpec
from lenet_sweep.storage import checkpoint, fingerprint, run_index
from lenet_sweep.storage.metrics_file import EpochRecord
from lenet_sweep.storage.result import Result, read_result
from lenet_sweep.storage.run_index import CHECKPOINT, Entry
from lenet_sweep.tracking.stores import open_store
from lenet_sweep.training.state import TrainingState

log = logging.getLogger(__name__)


def claimed(spec: RunSpec) -> contextlib.AbstractContextManager[None]:
    """Be the only process that trains this config; wait for another that does."""
    return run_index.claim(
        spec.config_hash, lambda: progress.say(f"{spec.name}: another process trains it; waiting")
    )


def finished_before(spec: RunSpec) -> Result | None:
    """The result of a job of a sweep that need not be trained again.

    If its store cannot be reached, the run index decides.
    """
    if spec.job is None or spec.config.sweep.rerun:
        return None
    store = open_store(spec.config.tracking)
    try:
        done = store.finished([spec.config_hash]).get(spec.config_hash)
    except TrackingError as error:
        log.warning("%s", error)
        entry = run_index.look_up(spec.config_hash)
        done = run_index.finished(spec.config_hash) if entry and entry.store == store.name else None
    if done:
        progress.say("finished before, not trained again", spec.label)
    return done


def interrupted(spec: RunSpec) -> Entry | None:
    """The run of this config that did not end, in the same store; None if there is none."""
    entry = run_index.look_up(spec.config_hash)
    if entry is None or entry.store != open_store(spec.config.tracking).name or not entry.folder.is_dir():
        return None
    result = read_result(entry.folder)
    return entry if result is None or result.status == "KILLED" else None


def trajectory_of(config: Config, state: TrainingState) -> str:
    """What two runs share if one can resume from the other's state: all but the epochs, and the arithmetic.

    The same config uses the torch backend where the compiler is missing, and a run that mixes both backends
    cannot be reproduced. On a CPU, the torch backend's sums depend on its threads; native ones do not.
    """
    device, backend = state.device.type, state.backend.name
    threads = torch.get_num_threads() if device == "cpu" and backend == "torch" else ""
    return f"{fingerprint.trajectory_hash(config)}-{device}-{backend}{threads}"


def restore_latest(
    spec: RunSpec, previous: Entry | None, state: TrainingState, trajectory: str
) -> tuple[list[EpochRecord], str | None]:
    """Restore the state of the interrupted run `previous`, or of the longest finished prefix of this run.

    Returns the records of the epochs so far, and the id of the tracked run to continue: only an interrupted
    one is this config's own.
    """
    if previous:
        return _restore(previous, spec, state, trajectory)
    if spec.job and not spec.config.sweep.rerun:
        shorter = run_index.longest_prefix(trajectory, spec.config.epochs)
        if shorter:
            return _restore(shorter, spec, state, trajectory)[0], None
    return [], None


def _restore(
    previous: Entry, spec: RunSpec, state: TrainingState, trajectory: str
) -> tuple[list[EpochRecord], str | None]:
    """Restore the state that another run of this trajectory reached, and copy its checkpoint."""
    path = previous.folder / CHECKPOINT
    if not path.exists():
        # Nothing was tracked yet, so its run can be filled from the start.
        return [], previous.run_id
    try:
        records = checkpoint.restore(path, state.network, state.optimizer, state.schedule, trajectory)
    except checkpoint.Damaged as error:
        progress.say(f"{error}; the run starts from its first epoch", spec.label)
        return [], None
    if previous.folder.absolute() != spec.folder.absolute():
        with atomic_path(spec.folder / CHECKPOINT) as copy:
            shutil.copyfile(path, copy)
    progress.say(f"resuming after epoch {records[-1].metrics.epoch} of {previous.folder}", spec.label)
    return records, previous.run_id


def claim_folder(spec: RunSpec) -> None:
    """Make the run's folder its own by creating its config.yaml.

    A folder in which the same config was trained until its process was killed is reused. The caller holds the
    config's lock, so no other process uses it.

    Raises:
        OutputError: if the folder holds another run or cannot be written.
    """
    folder = spec.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "config.yaml", "x", encoding="utf-8") as file:
            file.write(parsing.dump(spec.config))
    except FileExistsError as error:
        if not _is_abandoned(spec):
            raise OutputError(f"{folder}: already holds a run; choose another hydra.run.dir") from error
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error


def _is_abandoned(spec: RunSpec) -> bool:
    """Whether the folder holds a run of this config that was killed before it could write its result."""
    try:
        same = (spec.folder / "config.yaml").read_bytes() == parsing.dump(spec.config).encode()
    except OSError:
        return False
    return same and not (spec.folder / "result.json").exists()

"""Who trains what in this folder: one entry for each config's hash, kept in outputs/.ledger.

    outputs/.ledger/HASH.json   where the latest run of this config is, and its run in MLflow
                    HASH.lock   held while a process trains it; the system lets go when that dies
                    TRAJECTORY-EPOCHS.json  a finished run that one with more epochs begins with
                    unsynced/   runs that the tracking store has not got in full

A process that holds a config's lock is the only one that trains it, so two sweeps at once train
nothing twice; an entry whose lock is free and whose run has no result was interrupted.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lenet_sweep.errors import OutputError
from lenet_sweep.paths import lock_file, write_atomic
from lenet_sweep.storage.result import Result, read_result

INDEX = Path("outputs") / ".ledger"  # below the folder that the command is run in
CHECKPOINT = "checkpoint.safetensors"  # in a run's folder: its state after the last whole epoch


@dataclass(frozen=True)
class Entry:
    """The latest run of one config: its folder, its store, and its id there (None if untracked)."""

    folder: Path
    store: str | None
    run_id: str | None


@contextmanager
def claim(config_hash: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a config's lock; if another process trains it, call `waiting` and wait until that ends.

    Raises:
        OutputError: if the ledger cannot be written.
    """
    try:
        INDEX.mkdir(parents=True, exist_ok=True)
        lock = lock_file(INDEX / f"{config_hash}.lock", waiting)
    except OSError as error:
        raise OutputError(f"{INDEX}: cannot be written: {error.strerror}") from error
    with lock:
        yield


def add(config_hash: str, entry: Entry) -> None:
    """Write down where the run of this config is; the caller holds its lock."""
    folder = entry.folder.absolute()
    here = Path.cwd()
    values = dataclasses.asdict(entry) | {
        # Relative where it can be, so that the whole folder may be moved.
        "folder": str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
    }
    write_atomic(INDEX / f"{config_hash}.json", json.dumps(values))


def look_up(config_hash: str) -> Entry | None:
    """The entry of this config; None if there is none that can be read."""
    try:
        values = json.loads((INDEX / f"{config_hash}.json").read_text(encoding="utf-8"))
        return Entry(Path(values["folder"]), values["store"], values["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def finished(config_hash: str) -> Result | None:
    """The result of the latest run of this config if that is finished, whatever store it is tracked in."""
    entry = look_up(config_hash)
    result = read_result(entry.folder) if entry else None
    return result if result and result.status == "FINISHED" else None


def add_trajectory(trajectory: str, epochs: int, entry: Entry) -> None:
    """Write down that a finished run holds the state of this trajectory after so many epochs."""
    add(f"{trajectory}-{epochs}", entry)


def longest_prefix(trajectory: str, epochs: int) -> Entry | None:
    """The finished run that got furthest along this trajectory in fewer than so many epochs, if any did."""
    known = (path.stem.rpartition("-")[2] for path in INDEX.glob(f"{trajectory}-*.json"))
    shorter = sorted((int(text) for text in known if text.isdecimal() and int(text) < epochs), reverse=True)
    entries = (look_up(f"{trajectory}-{length}") for length in shorter)
    return next((entry for entry in entries if entry and entry.folder.is_dir()), None)


@contextmanager
def claim_if_free(config_hash: str) -> Iterator[bool]:
    """Hold a config's lock if no process trains it; the block is told whether that is so."""
    INDEX.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(INDEX / f"{config_hash}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_claimed(config_hash: str) -> bool:
    """Whether a process trains this config now."""
    if not (INDEX / f"{config_hash}.lock").exists():
        return False
    with claim_if_free(config_hash) as free:
        return not free


def mark_unsynced(folder: Path) -> None:
    """Remember that the store has not got all of the run in `folder`."""
    (INDEX / "unsynced").mkdir(parents=True, exist_ok=True)
    write_atomic(_mark(folder), str(folder.absolute()))


def mark_synced(folder: Path) -> None:
    """Forget it again."""
    _mark(folder).unlink(missing_ok=True)


def unsynced() -> list[Path]:
    """The folder of each run that the store has not got in full."""
    folders = []
    for mark in sorted((INDEX / "unsynced").glob("[!.]*")):
        with suppress(FileNotFoundError):  # another process has just delivered it
            folders.append(Path(mark.read_text(encoding="utf-8")))
    return folders


def _mark(folder: Path) -> Path:
    return INDEX / "unsynced" / hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]

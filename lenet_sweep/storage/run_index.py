"""The index of all runs of a folder: an entry per config hash, in outputs/.ledger.

    outputs/.ledger/HASH.json               the folder of the latest run of this config, and its MLflow run
                    HASH.lock               held by the process that trains it, released by the system
                    TRAJECTORY-EPOCHS.json  a finished run from which one with more epochs can resume
                    unsynced/               runs that the tracking store does not have in full

Only the process that holds a config's lock trains it, so two concurrent sweeps train nothing twice. A run was
interrupted if its lock is free and it has no result.
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

INDEX = Path("outputs") / ".ledger"  # below the current folder; the name is that of older versions
CHECKPOINT = "checkpoint.safetensors"  # in a run's folder: its state after the last whole epoch


@dataclass(frozen=True)
class Entry:
    """The latest run of one config: its folder, its store, and its id there (None if untracked)."""

    folder: Path
    store: str | None
    run_id: str | None


@contextmanager
def claim(config_hash: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a config's lock. If another process trains the config, call `waiting` and wait for it.

    Raises:
        OutputError: if the index cannot be written.
    """
    try:
        INDEX.mkdir(parents=True, exist_ok=True)
        lock = lock_file(INDEX / f"{config_hash}.lock", waiting)
    except OSError as error:
        raise OutputError(f"{INDEX}: cannot be written: {error.strerror}") from error
    with lock:
        yield


def add(config_hash: str, entry: Entry) -> None:
    """Add the latest run of this config; the caller holds its lock."""
    folder = entry.folder.absolute()
    here = Path.cwd()
    values = dataclasses.asdict(entry) | {
        # Relative if possible, so that the whole folder can be moved.
        "folder": str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
    }
    write_atomic(INDEX / f"{config_hash}.json", json.dumps(values))


def look_up(config_hash: str) -> Entry | None:
    """The entry of this config; None if it is missing or damaged."""
    try:
        values = json.loads((INDEX / f"{config_hash}.json").read_text(encoding="utf-8"))
        return Entry(Path(values["folder"]), values["store"], values["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def finished(config_hash: str) -> Result | None:
    """The result of the latest run of this config, in any store; None if that run is not finished."""
    entry = look_up(config_hash)
    result = read_result(entry.folder) if entry else None
    return result if result and result.status == "FINISHED" else None


def add_trajectory(trajectory: str, epochs: int, entry: Entry) -> None:
    """Add a finished run that has the state of this trajectory after `epochs` epochs."""
    add(f"{trajectory}-{epochs}", entry)


def longest_prefix(trajectory: str, epochs: int) -> Entry | None:
    """The longest finished run of this trajectory with fewer than `epochs` epochs; None without one."""
    known = (path.stem.rpartition("-")[2] for path in INDEX.glob(f"{trajectory}-*.json"))
    shorter = sorted((int(text) for text in known if text.isdecimal() and int(text) < epochs), reverse=True)
    entries = (look_up(f"{trajectory}-{length}") for length in shorter)
    return next((entry for entry in entries if entry and entry.folder.is_dir()), None)


@contextmanager
def claim_if_free(config_hash: str) -> Iterator[bool]:
    """Hold a config's lock if it is free, and yield whether it is."""
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
    """Whether a process is training this config."""
    if not (INDEX / f"{config_hash}.lock").exists():
        return False
    with claim_if_free(config_hash) as free:
        return not free


def mark_unsynced(folder: Path) -> None:
    """Mark the run in `folder` as not fully in its tracking store."""
    (INDEX / "unsynced").mkdir(parents=True, exist_ok=True)
    write_atomic(_mark(folder), str(folder.absolute()))


def mark_synced(folder: Path) -> None:
    """Remove that mark."""
    _mark(folder).unlink(missing_ok=True)


def unsynced() -> list[Path]:
    """The folders of all marked runs."""
    folders = []
    for mark in sorted((INDEX / "unsynced").glob("[!.]*")):
        with suppress(FileNotFoundError):  # another process has just synced it
            folders.append(Path(mark.read_text(encoding="utf-8")))
    return folders


def _mark(folder: Path) -> Path:
    return INDEX / "unsynced" / hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]

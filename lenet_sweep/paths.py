"""Folders (package, shipped config, datasets, cache), atomic writes and a lock between processes."""

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lenet_sweep.errors import OutputError


def default_data_root() -> str:
    """The default folder of datasets, for commands without a config (same as in conf/data/*.yaml)."""
    return os.environ.get("LENET_SWEEP_DATA", "data")


PACKAGE = Path(__file__).resolve().parent


def conf_dir() -> Path:
    """The folder of the YAML files: inside the package in a wheel, next to it in a checkout."""
    packaged = PACKAGE / "conf"
    return packaged if packaged.is_dir() else PACKAGE.parent / "conf"


def check_writable(folder: Path) -> None:
    """Check that `folder`, or its closest existing parent, can be written. Nothing is created.

    Raises:
        OutputError: if it is a file, or a folder without write permission.
    """
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise OutputError(f"{existing}: is a file, so the folder {folder} cannot be created")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{existing}: cannot be written, so {folder} cannot be used; choose another folder")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; rename it to `path` if the block succeeds.

    The content is flushed to disk before the atomic rename. Readers therefore see the complete old
    file or the complete new one, even after a crash or a power failure. If the block raises, the
    temporary file is removed and `path` is unchanged.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def lock_file(
    path: Path, on_wait: Callable[[], None], patience_s: float = 0
) -> AbstractContextManager[object]:
    """Acquire the lock file `path` and return a context manager that releases it.

    If another process still holds the lock after `patience_s`, `on_wait` is called once; then wait without
    a limit. The operating system releases the locks of a process that dies.

    Raises:
        OSError: if the file cannot be created.
    """
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=patience_s)
    except Timeout:
        on_wait()
        return lock.acquire()


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/lenet_sweep` or `~/.cache/lenet_sweep`; else a temporary folder of this process.

    The temporary folder is the fallback if the cache cannot be created or other users can write to it:
    libraries in the cache are executed.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lenet_sweep"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        is_own = status.st_uid == os.getuid()
        if is_own and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # Path.home() raises RuntimeError if there is no home folder
        pass
    return _private_folder()


def _private_folder() -> Path:
    global _private
    if _private is None:
        _private = tempfile.TemporaryDirectory(prefix="lenet_sweep-")
    return Path(_private.name)


_private: tempfile.TemporaryDirectory[str] | None = None

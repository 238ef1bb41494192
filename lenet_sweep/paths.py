"""Where things lie: the shipped config, and writing a file so that nobody ever sees half of it."""

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lenet_sweep.errors import OutputError


def default_data_root() -> str:
    """Where datasets lie unless the config says otherwise (conf/data/fashion_mnist.yaml says the same)."""
    return os.environ.get("LENET_SWEEP_DATA", "data")


PACKAGE = Path(__file__).resolve().parent


def conf_dir() -> Path:
    """The folder of YAML files: inside the package in a wheel, beside it in a checkout."""
    packaged = PACKAGE / "conf"
    return packaged if packaged.is_dir() else PACKAGE.parent / "conf"


def check_writable(folder: Path) -> None:
    """Refuse if `folder`, or the nearest of its parents that exists, cannot be written; make nothing.

    Raises:
        OutputError: naming what is in the way.
    """
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise OutputError(f"{existing}: is no folder, so {folder} cannot be made")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{existing}: cannot be written, so {folder} cannot be used; choose another folder")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds.

    The rename is atomic and comes after the content has reached the disk, so a reader, a process
    killed half-way or a machine that lost power finds the old file or the new one, whole. On an
    error the temporary file is removed and `path` is left as it was.
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
    """Write `text` (UTF-8) to `path`, all of it or nothing."""
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
    """The cache folder; where there can be none, one for this process alone."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lenet_sweep"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        mine = status.st_uid == os.getuid()
        if mine and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # a home that cannot be found is a RuntimeError
        pass
    return _private_folder()


def _private_folder() -> Path:
    global _private
    if _private is None:
        _private = tempfile.TemporaryDirectory(prefix="lenet_sweep-")
    return Path(_private.name)


_private: tempfile.TemporaryDirectory[str] | None = None

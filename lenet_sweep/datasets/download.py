"""TODO datasets.download."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from lenet_sweep.datasets import sources
from lenet_sweep.datasets.catalog import DATASETS, FILES, Dataset
from lenet_sweep.datasets.sources import DEBIAN_PACKAGE, SOURCES, Fetch, SourceFailed
from lenet_sweep.errors import ConfigError, DataError, OutputError
from lenet_sweep.paths import lock_file


def ensure(name: str, root: Path, say: Callable[[str], None] = print) -> Path:
    """Return the folder that holds the four unpacked, verified IDX files of dataset `name`.

    Files that are there already need no right to write, and no network. `say` gets a line for
    whatever a user should know: a source that failed, a file that was refused, a wait.

    Raises ConfigError if there is no such dataset, DataError if no source works, and OutputError
    if `root` cannot be read or, when something is missing, written.
    """
    if name not in DATASETS:
        raise ConfigError(f"there is no dataset {name!r}; allowed: {', '.join(DATASETS)}")
    root = root.expanduser().absolute()
    folder = root / DATASETS[name].folder
    try:
        if _missing(DATASETS[name], folder):
            folder.mkdir(parents=True, exist_ok=True)
            with lock_file(
                root / f".{name}.lock",
                lambda: say(f"{name}: waiting for another process to fetch it"),
                WAIT_S,
            ):
                _fetch(DATASETS[name], root, say)
    except OSError as error:
        raise OutputError(
            f"no verified copy of {name} is in {folder}, and it cannot be fetched there: {error}. "
            "Name a folder that can be written with data.root=... or LENET_SWEEP_DATA."
        ) from error
    return folder


def is_here(name: str, root: Path) -> bool:
    """Whether `ensure` would find all files of the dataset in `root`, and fetch nothing."""
    try:
        return not _missing(DATASETS[name], root.expanduser().absolute() / DATASETS[name].folder)
    except OSError:
        return False


WAIT_S = 1  # waiting for another process is worth a line after this long


def _missing(dataset: Dataset, folder: Path) -> list[str]:
    return [f for f in FILES if not (folder / f).is_file() or sources.sum_of(folder / f) != dataset.sha256[f]]


def _fetch(dataset: Dataset, root: Path, say: Callable[[str], None]) -> None:
    """Try the sources in order until nothing is missing; the caller holds the lock."""
    for stale in root.glob(f".{dataset.name}.fetch-*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    folder = root / dataset.folder
    missing = _missing(dataset, folder)  # another process may have fetched it while we waited
    with TemporaryDirectory(dir=root, prefix=f".{dataset.name}.fetch-") as work, _bars() as bars:
        job = Fetch(
            dataset, folder, Path(work), list(missing), lambda text: say(f"{dataset.name}: {text}"), bars
        )
        _use_what_lies_there(job)
        tried: list[str] = []
        for label, source in SOURCES[dataset.name].items():
            if job.missing:
                if tried:
                    job.say(f"{tried[-1]}; trying the next source")
                sources.show(job, label)
                try:
                    source(job)
                except SourceFailed as error:
                    tried.append(f"{label}: {error}")
        if job.missing:
            raise DataError(_advice(job, tried))
        if missing:
            job.say(f"the verified files are in {folder}")


def _bars() -> Progress:
    """Bars on a terminal, nothing elsewhere (there `_run` says a line instead)."""
    console = Console(stderr=True)
    shrinking = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # so that the bar fits any width
    text = TextColumn("{task.description}", table_column=shrinking)
    columns = (text, BarColumn(bar_width=20), DownloadColumn(), TimeElapsedColumn())
    plain, piped = not console.is_terminal, not sys.stdout.isatty()
    return Progress(
        *columns, console=console, expand=True, transient=True, disable=plain, redirect_stdout=not piped
    )


def _advice(job: Fetch, tried: list[str]) -> str:
    debian = f"On Debian and Ubuntu, `apt-get install {DEBIAN_PACKAGE}` does.\n"
    return (
        f"{job.dataset.name}: no source works:\n"
        + "".join(f"- {failure}\n" for failure in tried)
        + f"By hand: put {', '.join(job.missing)} (as they are, or each as .gz) into {job.folder}; "
        "their SHA-256 sums are checked.\n"
        + (debian if job.dataset.name == "fashion_mnist" else "")
        + f"Or set LENET_SWEEP_DATA to a folder in which {job.dataset.folder} has them already."
    )


def _use_what_lies_there(job: Fetch) -> None:
    """Unpack what the folder holds as `.gz`; keep aside what it holds with a wrong sum."""
    for file in list(job.missing):
        for lying in (job.folder / file, job.folder / f"{file}.gz"):
            if file in job.missing and lying.exists():
                try:
                    sources.place(job, file, lying)
                except SourceFailed as error:
                    job.say(str(error))

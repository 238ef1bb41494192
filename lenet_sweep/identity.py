"""What a result depends on: the config that matters, the code that matters, and where it ran."""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenet_sweep import config as configs
from lenet_sweep.config import Config, CosineScheduleConfig
from lenet_sweep.paths import PACKAGE

# Files whose text can change a number. Editing any other one leaves every hash as it is.
RESULT_SOURCES = (
    "compiler.py",
    "data.py",
    "devices.py",
    "engine.py",
    "fused.py",
    "layers.py",
    "model.py",
    "native.cpp",
    "native.py",
    "optim.py",
    "randomness.py",
    "shapes.py",
)

# Fields that cannot change a number: where things lie, what is watched, and mere labels.
RESULT_FREE = ("data.root", "model.name", "profile", "sweep", "tracking")

_DIFF_LENGTH = 256 * 1024

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "hydra-core",
    "omegaconf",
    "mlflow",
    "safetensors",
    "matplotlib",
    "lenet-sweep",
)


@dataclass(frozen=True)
class Git:
    """The checkout that the code runs from; None and False where it is no checkout (a wheel)."""

    commit: str | None
    dirty: bool


def config_hash(config: Config) -> str:
    """16 hex digits over all that decides a run's numbers: the config and the code's version.

    It is the same on every machine and Python version. `device` and `threads` enter as they were
    written, so "auto" means whatever the machine at hand makes of it.
    """
    return _hash(config, RESULT_FREE)


def trajectory_hash(config: Config) -> str:
    """16 hex digits that runs share if the one with fewer epochs is the beginning of the other.

    That is all but the number of epochs, unless the schedule depends on it.
    """
    return _hash(config, RESULT_FREE if is_bound_to_its_end(config) else (*RESULT_FREE, "epochs"))


def is_bound_to_its_end(config: Config) -> bool:
    """Whether already the first epochs depend on how many there will be."""
    return isinstance(config.schedule, CosineScheduleConfig)


def _hash(config: Config, without: tuple[str, ...]) -> str:
    fields = {
        key: value
        for key, value in configs.flatten(configs.to_dict(config))
        if not any(key == free or key.startswith(f"{free}.") for free in without)
    }
    text = json.dumps([code_version(), fields], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def code_version() -> str:
    """SHA-256 over the sources that can change a number, line ends normalised."""
    digest = hashlib.sha256()
    for name in RESULT_SOURCES:
        source = (PACKAGE / name).read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{name} {len(source)}\n".encode() + source)
    return digest.hexdigest()


@functools.cache
def git() -> Git:
    """The commit that the package's own source was checked out from."""
    # A virtual environment inside somebody's repository is not that repository's code.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return Git(None, False)
    return Git(_git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "--untracked-files=no", ":/")))


@functools.cache
def uncommitted_diff() -> str | None:
    """What the code's checkout has on top of its commit, as a diff; None if that is nothing.

    At most 256 KiB are kept, with a note if that cut it.
    """
    if not git().dirty:
        return None
    diff = _git("diff", "HEAD", "--", ":/")
    if not diff:
        return None
    if len(diff) > _DIFF_LENGTH:
        return f"{diff[:_DIFF_LENGTH]}\n[cut here: the whole diff has {len(diff)} characters]\n"
    return f"{diff}\n"


def gpus() -> int:
    """How many CUDA GPUs this machine lets us use, as far as can be seen without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    here = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return here if visible is None else min(here, len([name for name in visible.split(",") if name.strip()]))


def trains_on_gpu(config: Config) -> bool:
    """Whether this config will be trained on a CUDA GPU here."""
    return config.device.startswith("cuda") or (config.device == "auto" and gpus() > 0)


def environment(device: str, threads: int, backend: str) -> dict[str, Any]:
    """Where a run took place, for `environment.json`. `device` is in words, `backend` torch or native."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "device": device,
        "threads": threads,
        "backend": backend,
        "code_version": code_version(),
        "git_commit": git().commit,
        "git_dirty": git().dirty,
        "uncommitted_diff": _digest(uncommitted_diff()),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _digest(text: str | None) -> str | None:
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else None


def _git(*arguments: str) -> str | None:
    """The output of a git command in the package's folder; None if it fails or there is no git."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=PACKAGE,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip("\n")


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()

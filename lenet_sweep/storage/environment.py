"""The environment of a run: machine, versions, and the state of the code's checkout."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import socket
import subprocess
from dataclasses import dataclass
from typing import Any

from lenet_sweep.paths import PACKAGE
from lenet_sweep.storage import fingerprint

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
    """The state of the code's checkout; None and False for an installed wheel."""

    commit: str | None
    dirty: bool


@functools.cache
def git_state() -> Git:
    """The commit of the package's own source, and whether the checkout has changes."""
    # A virtual environment inside another repository does not belong to that repository.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return Git(None, False)
    return Git(_git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "--untracked-files=no", ":/")))


@functools.cache
def uncommitted_diff() -> str | None:
    """The uncommitted changes of the code's checkout as a diff; None if there are none.

    It is cut after 256 KiB, with a note.
    """
    if not git_state().dirty:
        return None
    diff = _git("diff", "HEAD", "--", ":/")
    if not diff:
        return None
    if len(diff) > _DIFF_LENGTH:
        return f"{diff[:_DIFF_LENGTH]}\n[cut here: the whole diff has {len(diff)} characters]\n"
    return f"{diff}\n"


def describe_environment(device: str, threads: int, backend: str) -> dict[str, Any]:
    """The content of `environment.json`; `device` is text, `backend` is torch, native or fused."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "device": device,
        "threads": threads,
        "backend": backend,
        "code_version": fingerprint.code_version(),
        "git_commit": git_state().commit,
        "git_dirty": git_state().dirty,
        "uncommitted_diff": _digest(uncommitted_diff()),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _digest(text: str | None) -> str | None:
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else None


def _git(*arguments: str) -> str | None:
    """The output of a git command in the package's folder; None if it fails or git is not installed."""
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

"""Compiles native.cpp for one network and caches the library (`paths.cache_folder`).

The file name of a library is a hash of the source, the flags, the compiler and the CPU, so an outdated
library is never used. One process compiles while others wait for its file lock; the finished library is
renamed into the cache atomically.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lenet_sweep import shapes
from lenet_sweep.config.schema import ModelConfig
from lenet_sweep.paths import atomic_path, cache_folder
from lenet_sweep.shapes import CLASSES, IMAGE_SHAPE

SOURCE = Path(__file__).with_name("native.cpp")
# Without -ffast-math: it assumes that there are no NaNs, and its linker flag flushes denormals to zero in
# the whole process.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-ffp-contract=fast",
    "-fno-strict-aliasing",
    "-fopenmp",
    "-fPIC",
    "-shared",
)
# The structs of native.cpp, by the names of `config.schema`.
NATIVE_ACTIVATIONS = {
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "relu": "Relu",
    "leaky_relu": "LeakyRelu",
    "gelu": "Gelu",
    "silu": "Silu",
}
NATIVE_POOLS = {"avg": "Average", "max": "Maximum"}
_TIMEOUT_S = 300


class Unavailable(Exception):
    """The native backend cannot be used for this network on this machine; the message is the reason."""


def library(config: ModelConfig, extra: tuple[str, ...] = ()) -> Path:
    """Return the path of the shared library for this network. Compile it (about 2 s) unless it is cached.

    `extra` are additional compiler flags.

    Raises:
        Unavailable: if native.cpp lacks the activation or pool, there is no C++ compiler, or it fails.
    """
    command = [_compiler(), *FLAGS, _cpu_flag(), *extra, *_definitions(config)]
    path = cache_folder() / f"{_key(command)}.so"
    if path.exists():
        return path
    try:
        with FileLock(path.with_suffix(".lock"), timeout=_TIMEOUT_S):
            if not path.exists():
                with atomic_path(path) as temporary:
                    _compile([*command, str(SOURCE), "-o", str(temporary)])
    except (OSError, Timeout) as error:
        raise Unavailable(f"the compiled library cannot be written: {error}") from error
    return path


def compile_ahead(config: ModelConfig) -> None:
    """Start compiling in a background thread. A later call of `library` waits for it at the file lock."""

    def compile_quietly() -> None:
        with suppress(Unavailable):  # reported by the later call of `library`
            library(config)

    threading.Thread(target=compile_quietly, daemon=True).start()


def native_is_likely(backend: str, amp: bool) -> bool:
    """Whether a run on a CPU with these settings will probably use the native backend. Compiles nothing."""
    if backend == "torch" or amp:
        return False
    with suppress(Unavailable):
        return bool(_compiler())
    return False


def _definitions(config: ModelConfig) -> list[str]:
    """The network as macros of native.cpp: Conv<in channels, in side, out channels, kernel, padding>, ..."""
    convs, denses = [], []
    for layer in shapes.layers(config, IMAGE_SHAPE, CLASSES):
        inputs, outputs = layer.input_shape, layer.output_shape
        if layer.kind == "conv":
            convs.append(
                f"Conv<{inputs[0]}, {inputs[1]}, {outputs[0]}, {config.kernel_size}, {layer.padding}>"
            )
        elif layer.kind == "linear":
            denses.append(f"Dense<{inputs[0]}, {outputs[0]}>")
    return [
        f"-DCONVS={', '.join(convs)}",
        f"-DDENSES={', '.join(denses)}",
        f"-DACTIVATION={_struct('activation', config.activation, NATIVE_ACTIVATIONS)}",
        f"-DPOOL={_struct('pool', config.pool, NATIVE_POOLS)}",
    ]


def _struct(kind: str, name: str, structs: dict[str, str]) -> str:
    if name not in structs:
        raise Unavailable(f"it does not support {kind}={name}")
    return structs[name]


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++")):
        if path := shutil.which(name):
            return path
    raise Unavailable("no C++ compiler (g++) is installed")


def _cpu_flag() -> str:
    return "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the compiler could not run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or [done.stderr[-200:]]
        raise Unavailable(f"the compiler failed: {lines[0].rpartition('error: ')[2]}")


def _key(command: list[str]) -> str:
    digest = hashlib.sha256(SOURCE.read_bytes())
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=False).stdout
    for part in (*command, version, _cpu()):
        digest.update(f"{len(part)} {part}".encode())
    return digest.hexdigest()[:32]


def _cpu() -> str:
    """The properties of the CPU that -march=native depends on."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model"))}))
    return platform.processor()

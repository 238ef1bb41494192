"""Which device a run trains on, and the process-wide switches that decide its arithmetic."""

import contextlib
import ctypes
import os

import torch

from lenet_sweep.config.schema import PrecisionConfig
from lenet_sweep.errors import DeviceError


def resolve(name: str) -> torch.device:
    """Turn auto, cpu, mps, cuda or cuda:N into a device of this machine.

    Raises:
        DeviceError: if there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = _preferred_gpu if device.index is None else device.index
        if index >= count:
            here = ", ".join(f"cuda:{i}" for i in range(count)) or "none"
            raise DeviceError(
                f"device={name!r}: there is no such GPU here (CUDA GPUs that torch sees: {here}); "
                "use device=auto or device=cpu"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.mps.is_available():
        raise DeviceError("device='mps': torch sees no Apple GPU here; use device=auto or device=cpu")
    return device


def prefer_gpu(index: int) -> None:
    """Take this one of the GPUs, counted round, where a config leaves open which."""
    global _preferred_gpu
    if torch.cuda.is_available():
        _preferred_gpu = index % torch.cuda.device_count()


def describe(device: torch.device) -> str:
    """The device's name for people: 'cuda:0 (NVIDIA H100)', 'cpu (2 threads)'."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' if threads > 1 else ''})"
    return str(device)


def facts(device: torch.device) -> tuple[str, int]:
    """The device in words and the number of CPU threads in use, for `identity.environment`."""
    return describe(device), torch.get_num_threads()


def set_arithmetic(threads: int | str, precision: PrecisionConfig) -> None:
    """Set CPU threads, TF32 and cuDNN's choice of algorithms for this process.

    PyTorch's own default lets convolutions use TF32 and cuDNN pick by timing; both change the
    numbers from one machine, or one run, to the next.
    """
    keep_freed_memory()
    torch.set_num_threads(threads if isinstance(threads, int) else _default_threads)
    fp32 = "tf32" if precision.tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = fp32
    torch.backends.cudnn.fp32_precision = fp32
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if torch.cuda.is_available():
        # cuBLAS reads this when it is first used; see torch's notes on reproducibility.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of any size for the next step.

    It would give those of some MB back to the kernel, and the page faults cost half of an eager step.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    with contextlib.suppress(OSError, AttributeError):  # another C library
        glibc = ctypes.CDLL("libc.so.6")
        glibc.mallopt(trim_threshold, 2**31 - 1)
        glibc.mallopt(mmap_threshold, 1 << 30)


_default_threads = torch.get_num_threads()
_preferred_gpu = 0

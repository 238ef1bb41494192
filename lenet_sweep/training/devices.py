"""The device of a run, and the process-wide torch settings that affect its arithmetic.

`runs.hardware` counts GPUs without torch.
"""

import contextlib
import ctypes
import os
from typing import Any

import torch

from lenet_sweep.config.schema import PrecisionConfig
from lenet_sweep.errors import DeviceError


def resolve(name: str) -> torch.device:
    """Return the device for auto, cpu, mps, cuda or cuda:N.

    Raises:
        DeviceError: if this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = _preferred_gpu if device.index is None else device.index
        if index >= count:
            available = ", ".join(f"cuda:{i}" for i in range(count)) or "none"
            raise DeviceError(
                f"device={name!r}: is not available (CUDA GPUs that torch finds: {available}); "
                "use device=auto or device=cpu"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.mps.is_available():
        raise DeviceError("device='mps': torch finds no Apple GPU; use device=auto or device=cpu")
    return device


def prefer_gpu(index: int) -> None:
    """Use GPU `index` (modulo their number) for device=auto and device=cuda in this process."""
    global _preferred_gpu
    if torch.cuda.is_available():
        _preferred_gpu = index % torch.cuda.device_count()


def describe(device: torch.device) -> str:
    """A readable name, such as 'cuda:0 (NVIDIA H100)' or 'cpu (2 threads)'."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' if threads > 1 else ''})"
    return device.type  # tensors say mps:0


def facts(device: torch.device) -> tuple[str, int]:
    """The readable name and the number of CPU threads, for `storage.environment`."""
    return describe(device), torch.get_num_threads()


def set_arithmetic(threads: int | str, precision: PrecisionConfig) -> None:
    """Set the number of CPU threads, TF32 and cuDNN's deterministic algorithms for this process.

    By default PyTorch allows TF32 in convolutions, and cuDNN may use nondeterministic algorithms. Both change
    results from one machine, or one run, to the next.
    """
    keep_freed_memory()
    torch.set_num_threads(threads if isinstance(threads, int) else _default_threads)
    fp32 = "tf32" if precision.tf32 else "ieee"
    cudnn: Any = torch.backends.cudnn  # `conv` is not declared
    torch.backends.cuda.matmul.fp32_precision = fp32
    cudnn.fp32_precision = fp32
    cudnn.conv.fp32_precision = fp32  # torch 2.11 does not pass it on to its operators
    cudnn.deterministic = True
    cudnn.benchmark = False
    if torch.cuda.is_available():
        # cuBLAS reads this at its first use: https://docs.pytorch.org/docs/stable/notes/randomness.html.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Otherwise every uninitialized tensor is filled with NaN: about 60 more kernels a step.
        deterministic: Any = torch.utils.deterministic  # not declared either
        deterministic.fill_uninitialized_memory = False


def keep_freed_memory() -> None:
    """Configure glibc to reuse freed memory blocks of any size.

    By default it returns blocks of several MB to the kernel, and the page faults take half of an eager step.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        glibc = ctypes.CDLL("libc.so.6")
        glibc.mallopt(trim_threshold, 2**31 - 1)
        glibc.mallopt(mmap_threshold, 1 << 30)


_default_threads = torch.get_num_threads()
_preferred_gpu = 0

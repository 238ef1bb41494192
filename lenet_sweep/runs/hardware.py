"""The cores, GPUs and memory of a machine, found without torch.

`training.devices` chooses the device of a run with torch.
"""

import os
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import psutil

from lenet_sweep.config.schema import Config


@dataclass(frozen=True)
class Hardware:
    """CPU cores and CUDA GPUs that a process may use, and the memory that is available, in bytes."""

    cores: int
    gpus: int
    free_bytes: int

    def trains_on_gpu(self, config: Config) -> bool:
        """Whether `config` will be trained on a CUDA GPU there."""
        return config.device.startswith("cuda") or (config.device == "auto" and self.gpus > 0)


def here() -> Hardware:
    """The hardware of this machine."""
    return Hardware(cores(), _gpus(), psutil.virtual_memory().available)


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    installed = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if visible is None:
        return installed
    names = [name.strip() for name in visible.split(",")]
    # CUDA ignores what follows a name that is not valid, such as the -1 that hides all GPUs.
    return min(installed, len(list(takewhile(lambda name: name not in ("", "-1"), names))))

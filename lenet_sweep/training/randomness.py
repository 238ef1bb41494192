"""Random numbers. Every generator of a run is created here from the run's seed."""

import hashlib

import torch
from torch import Tensor


def generator(seed: int, stream: str) -> torch.Generator:
    """A CPU generator for one purpose (`stream`) of the run with this `seed`.

    Different streams are independent. Each epoch has its own stream ("order/3"), so its random numbers depend
    on the seed and the epoch only, and a resumed run needs no saved generator state.
    """
    digest = hashlib.sha256(f"{stream}/{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def epoch_order(examples: int, seed: int, epoch: int) -> Tensor:
    """The order of training examples in `epoch` (from 1): a permutation of `range(examples)`, int64, CPU."""
    return torch.randperm(examples, generator=generator(seed, f"order/{epoch}"))

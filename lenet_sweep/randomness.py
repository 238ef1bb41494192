"""Every random number of a run comes from an explicit generator made here from the run's seed."""

import hashlib

import torch


def generator(seed: int, stream: str) -> torch.Generator:
    """A CPU generator for one purpose (`stream`) of the run with this `seed`.

    Streams are independent, and a stream for each epoch ("order/3") makes an epoch's randomness a
    function of the seed and the epoch alone: a run that goes on in the middle needs no saved state.
    """
    digest = hashlib.sha256(f"{stream}/{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))

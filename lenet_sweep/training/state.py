"""The state of training (data, network, backend, optimizer, schedule), built from a config and its seed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lenet_sweep.config.schema import Config
from lenet_sweep.training import devices, model, optim
from lenet_sweep.training.backend import Backend, choose_backend
from lenet_sweep.training.data import Data, load_data
from lenet_sweep.training.fused import MemberBackend
from lenet_sweep.training.randomness import generator


@dataclass
class TrainingState:
    """The objects that training uses. Training changes network, optimizer and schedule in place."""

    data: Data
    backend: Backend
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    @property
    def network(self) -> nn.Sequential:
        return self.backend.network

    @property
    def device(self) -> torch.device:
        return self.data.train.labels_N.device


def prepare(
    config: Config, *, fused: bool = False, data: Data | None = None, say: Callable[[str], None] = print
) -> TrainingState:
    """Build the initial state of a run on the device of its config. Sets torch's process-wide arithmetic.

    Args:
        config: the config of the run; `config.seed` determines weights and data split.
        fused: whether the run will be a member of an array (`fused.train`).
        data: the data of this config, if it is loaded already.
        say: called with a line for each download, and if the native backend is not available.

    Raises:
        DataError: if the dataset is not available.
        DeviceError: if the device or the requested backend is not available.
    """
    device = devices.resolve(config.device)
    devices.set_arithmetic(config.threads, config.precision)
    data = data or load_data(config.data, config.seed, device, say)
    network = model.build(config.model, generator(config.seed, "init")).to(device)
    backend: Backend
    if fused:
        backend = MemberBackend(network, config.precision.amp)
    else:
        backend, fallback_reason = choose_backend(
            network, device, config.model, config.backend, config.precision.amp
        )
        if fallback_reason:
            say(fallback_reason)
    optimizer = optim.optimizer(config.optimizer, network.parameters())
    return TrainingState(data, backend, optimizer, optim.schedule(config.schedule, optimizer, config.epochs))

"""What the measured steps train: the two networks on a part of the dataset, alone or as an array."""

import dataclasses
import functools
import gc
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from lenet_sweep.cli.compose import compose
from lenet_sweep.config.schema import Config
from lenet_sweep.errors import RunFailed
from lenet_sweep.training import cuda_graph, devices, engine, fused
from lenet_sweep.training.data import Data, Split, load_data
from lenet_sweep.training.metrics import EpochMetrics
from lenet_sweep.training.state import TrainingState, prepare
from tools.gpu.record import DATASET, DEVICE, ON_GPU, SMALL

BATCH = 256
TEST_EXAMPLES = 50 if SMALL else 500  # of a short epoch
NETWORKS = {"sigmoid/avg": ("lenet", 0.9), "ReLU/max": ("lenet_relu_max", 0.1)}  # preset, lr of SGD
LEARNING_RATES = {"sgd": None, "adam": 0.001}  # None: the network's
ENDLESS = 10**6  # epochs


@functools.cache
def config_of(network: str, *overrides: str, optimizer: str = "sgd", device: str = DEVICE) -> Config:
    """The config of `network` with torch's backend on the device of the check."""
    preset, lr = NETWORKS[network]
    lr = LEARNING_RATES[optimizer] or lr
    common = [f"model={preset}", f"optimizer={optimizer}", f"lr={lr}", f"data={DATASET}", f"device={device}"]
    return compose([*common, "backend=torch", "tracking=none", *overrides])


def load(config: Config) -> Data:
    return load_data(config.data, config.seed, devices.resolve(config.device))


def part_of(data: Data, batches: float) -> Data:
    """The first training and test examples of `data`. A fraction in `batches` makes a smaller last batch."""
    train, test = _first(data.train, int(batches * BATCH)), _first(data.test, TEST_EXAMPLES)
    return dataclasses.replace(data, train=train, test=test, val=None)


def _first(split: Split, count: int) -> Split:
    return Split(split.images_NCHW[:count].clone(), split.labels_N[:count].clone())


def train_alone(
    config: Config, data: Data, epochs: int, state: TrainingState | None = None, first_epoch: int = 1
) -> tuple[TrainingState, list[EpochMetrics]]:
    """Train one run, from the start or from `state` on, and return its final state and metrics."""
    state = state or prepare(config, data=data)
    trained = engine.train(state, epochs=epochs, batch_size=BATCH, seed=config.seed, first_epoch=first_epoch)
    return state, list(trained)


def members_of(config: Config, seeds: Sequence[int], data: Data, epochs: int) -> list[fused.Member]:
    """A member of an array for each seed. Equal seeds share the order of examples."""
    members = []
    for seed in seeds:
        state = prepare(dataclasses.replace(config, seed=seed), fused=True, data=data)
        members.append(fused.Member(state.network, state.optimizer, state.schedule, seed, epochs))
    return members


def epochs_of_array(
    members: list[fused.Member], data: Data, amp: bool = False
) -> Iterator[list[EpochMetrics]]:
    """Train `members` as one array and yield the metrics of all members after each epoch.

    Raises:
        RunFailed: if the loss of a member is not a finite number.
    """
    results = fused.train(members, data, batch_size=BATCH, amp=amp)
    while epoch := list(itertools.islice(results, len(members))):
        metrics = []
        for _, result in epoch:
            if isinstance(result, RunFailed):
                raise result
            metrics.append(result)
        yield metrics


@contextmanager
def cuda_graphs(enabled: bool) -> Iterator[None]:
    """Whether the steps of an array are captured as CUDA graphs."""
    before = cuda_graph.WARM_UP
    cuda_graph.WARM_UP = before if enabled else 10**12  # the number of steps before a capture
    try:
        yield
    finally:
        cuda_graph.WARM_UP = before


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def free_memory() -> None:
    """Return the memory of deleted tensors to the device, and start counting its peak anew."""
    gc.collect()
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

"""Which results are bit-identical on this device, and how far apart the others are."""

import copy
from collections.abc import Sequence

from torch import nn

from lenet_sweep.config.schema import Config
from lenet_sweep.storage.checkpoint import digest
from lenet_sweep.training.data import Data
from lenet_sweep.training.metrics import EpochMetrics
from lenet_sweep.training.state import prepare
from tools.gpu.record import ON_GPU, SMALL, StepRecord
from tools.gpu.workload import (
    NETWORKS,
    config_of,
    cuda_graphs,
    epochs_of_array,
    free_memory,
    load,
    members_of,
    part_of,
    train_alone,
)

# After five epochs even the smaller batch at the end of each was replayed as a CUDA graph.
EPOCHS = 3 if SMALL else 5
BATCHES = 1.5 if SMALL else 8.5
CLOSE = 1e-3  # in nats; float32 rounding moves the losses of so few steps by less


def equality(record: StepRecord) -> None:
    """Train a few steps in several ways that should agree, and compare weights and losses."""
    whole = load(config_of("sigmoid/avg"))
    data = part_of(whole, BATCHES)
    for network in NETWORKS:
        with record.attempt(network):
            compare_network(record, network, data)
            free_memory()
    identical = sum(claim.holds for claim in record.claims if "bit-identical" in claim.claim)
    claimed = sum("bit-identical" in claim.claim for claim in record.claims)
    distances = ", ".join(f"{key} {value:.1e}" for key, value in record.values["loss_distance"].items())
    record.summarize(f"{identical} of {claimed} bit-identical", f"loss distances: {distances}")


def compare_network(record: StepRecord, network: str, data: Data) -> None:
    config = config_of(network, f"epochs={EPOCHS}")
    state, metrics = train_alone(config, data, EPOCHS)
    weights = weights_digest(state.network)
    record.claim(f"{network}: a repeated run is bit-identical", weights == alone(config, data))
    record.claim(f"{network}: a resumed run is bit-identical", weights == resumed(config, data))

    first, array_metrics = array(config, [0, 1, 2], data)
    again, _ = array(config, [0, 1, 2], data)
    record.claim(f"{network}: a repeated array is bit-identical", first == again)
    if ON_GPU:
        with cuda_graphs(False):
            eager, _ = array(config, [0, 1, 2], data)
        record.claim(f"{network}: arrays with and without CUDA graphs are bit-identical", first == eager)
    # Not claimed: libraries choose kernels by shape, so a member's last bits depend on the array's width.
    narrow, _ = array(config, [0, 1], data)
    same_bits = {f"{network}, member of 3 and of 2": first[0] == narrow[0]}
    same_bits[f"{network}, member and alone"] = first[0] == weights
    record.keep(same_bits=record.values.get("same_bits", {}) | same_bits)

    close(record, f"{network}: array and alone", network, array_metrics, metrics)
    if ON_GPU:
        on_cpu = config_of(network, f"epochs={EPOCHS}", device="cpu")
        _, cpu_metrics = train_alone(on_cpu, part_of(load(on_cpu), BATCHES), EPOCHS)
        close(record, f"{network}: GPU and CPU", network, metrics, cpu_metrics)


def alone(config: Config, data: Data) -> str:
    """The digest of a run's final weights."""
    state, _ = train_alone(config, data, EPOCHS)
    return weights_digest(state.network)


def resumed(config: Config, data: Data) -> str:
    """The same for a run that continues in fresh objects after two epochs."""
    state, _ = train_alone(config, data, epochs=2)
    fresh = prepare(config, data=data)
    for ours, theirs in (
        (fresh.network, state.network),
        (fresh.optimizer, state.optimizer),
        (fresh.schedule, state.schedule),
    ):
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train_alone(config, data, EPOCHS, fresh, first_epoch=3)
    return weights_digest(fresh.network)


def array(config: Config, seeds: Sequence[int], data: Data) -> tuple[list[str], list[EpochMetrics]]:
    """The digests of all members' final weights, and the metrics of the first member."""
    members = members_of(config, seeds, data, EPOCHS)
    metrics = [epoch[0] for epoch in epochs_of_array(members, data)]
    return [weights_digest(member.network) for member in members], metrics


def weights_digest(network: nn.Module) -> str:
    return digest(network.state_dict())


def close(
    record: StepRecord, name: str, network: str, ours: list[EpochMetrics], others: list[EpochMetrics]
) -> None:
    """Keep the largest distance of the train losses. Claim that it is small where nothing amplifies it."""
    distance = max(abs(a.train_loss - b.train_loss) for a, b in zip(ours, others, strict=True))
    record.keep(loss_distance=record.values.get("loss_distance", {}) | {name: distance})
    if network == "sigmoid/avg":  # ReLU with max pooling amplifies rounding
        record.claim(f"{name}: losses are equal within {CLOSE}", distance < CLOSE, f"{distance:.1e}")

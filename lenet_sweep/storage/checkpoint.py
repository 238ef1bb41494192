"""A run's state after an epoch, in one file that is written atomically.

The file is safetensors (no pickle): weights and optimizer state as tensors; epoch, schedule, learning rates
and metrics so far as JSON in its metadata. A SHA-256 over everything detects damage. No generator state is
stored: the randomness of an epoch follows from the seed and the epoch's number (`training.randomness`).
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lenet_sweep.paths import atomic_path
from lenet_sweep.storage import metrics_file

Schedule = torch.optim.lr_scheduler.LRScheduler


class Damaged(Exception):
    """The file is not a checkpoint of this run, or it is incomplete."""


def save(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    trajectory: str,
    lines: Iterable[metrics_file.EpochRecord],
) -> None:
    """Write the state after the epoch of the last of `lines`."""
    tensors = _tensors(network, optimizer)
    state = {
        "trajectory": trajectory,
        "lines": [line.dump() for line in lines],
        "schedule": {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"},
        "lr": [group["lr"] for group in optimizer.param_groups],
    }
    text = json.dumps(state)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"state": text, "sha256": digest(tensors, text)})


def restore(
    path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, trajectory: str
) -> list[metrics_file.EpochRecord]:
    """Put the state of `path` into the given objects; return the metrics of the epochs so far.

    Raises:
        Damaged: and nothing has been changed.
    """
    tensors, text = _read(path)
    try:
        state = json.loads(text)
        lines = [metrics_file.parse(line) for line in state["lines"]]
        rates, schedule_state = [float(rate) for rate in state["lr"]], dict(state["schedule"])
        if state["trajectory"] != trajectory:
            raise Damaged(f"{path}: belongs to another config, or to another kind of step")
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path}: is not a checkpoint ({error})") from error
    weights = _below("network.", tensors)
    mine = network.state_dict()
    if {k: t.shape for k, t in weights.items()} != {k: t.shape for k, t in mine.items()}:
        raise Damaged(f"{path}: holds the weights of another network")

    network.load_state_dict(weights)
    # load_state_dict moves each tensor to its parameter's device.
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _below("optimizer.", tensors).items():
        index, _, key = name.partition(".")
        optimizer_state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(
        {"state": optimizer_state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    schedule.load_state_dict(schedule_state | _lambdas(schedule))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return lines


def _tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if value is not None:  # SGD without momentum keeps an empty buffer
                tensors[f"optimizer.{index}.{key}"] = value
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise Damaged(f"{path}: cannot be read ({error})") from error
    text = metadata.get("state", "")
    if digest(tensors, text) != metadata.get("sha256"):
        raise Damaged(f"{path}: is damaged (its SHA-256 does not fit)")
    return tensors, text


def digest(tensors: dict[str, Tensor], text: str = "") -> str:
    """SHA-256 over the names, shapes, types and bits of `tensors`, on any device, and over `text`."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}\n".encode())
        digest.update(tensors[name].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _lambdas(schedule: Schedule) -> dict[str, Any]:
    """LambdaLR wants its functions, which are code and not in the file, back as they are."""
    return {key: value for key, value in schedule.state_dict().items() if key == "lr_lambdas"}

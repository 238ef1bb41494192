"""Every backend trains to the recorded numbers of golden.json.

With the torch version and the CPU instructions that recorded them they are met to the bit. Other kernels
round differently, which two epochs enlarge to at most 1e-3. A change that is meant to alter numbers
records them anew: `LENET_SWEEP_RECORD_GOLDEN=1 python -m pytest tests/test_golden.py`.
"""

import json
import os
import platform
from pathlib import Path

import pytest
import torch

from lenet_sweep.storage import checkpoint
from lenet_sweep.storage.metrics_file import EpochRecord
from lenet_sweep.training import engine, fused
from lenet_sweep.training.state import prepare

GOLDEN = Path(__file__).parent / "golden.json"
MODELS = ("lenet", "lenet_relu_max")
OPTIMIZERS = {"sgd": 0.5, "momentum": 0.05, "adam": 0.002}
COMMON = (
    "data=fashion_mnist_mini",
    "data.train_size=300",
    "batch_size=64",
    "epochs=2",
    "threads=2",
    "device=cpu",
)


def start(make_config, *overrides):
    return prepare(make_config(*COMMON, *overrides), say=lambda line: None)


def train(state, epochs=2, first_epoch=1):
    return list(engine.train(state, epochs=epochs, batch_size=64, seed=0, first_epoch=first_epoch))


def facts(epochs, network):
    """Losses and accuracies of every epoch, and each tensor's sum in float64."""
    return {
        "epochs": [[m.train_loss, m.train_acc, m.test_loss, m.test_acc] for m in epochs],
        "curve": [[p.train_loss, p.train_acc] for m in epochs for p in m.curve],
        "weights": {name: float(t.double().sum()) for name, t in network.state_dict().items()},
    }


def alone(make_config, backend, model, optimizer):
    state = start(
        make_config,
        f"backend={backend}",
        f"model={model}",
        f"optimizer={optimizer}",
        f"lr={OPTIMIZERS[optimizer]}",
    )
    return facts(train(state), state.network)


def resumed(make_config, tmp_path, backend, optimizer):
    """Two epochs, with the state saved and restored between them."""
    chosen = (f"backend={backend}", f"optimizer={optimizer}", f"lr={OPTIMIZERS[optimizer]}")
    first, second = start(make_config, *chosen, "epochs=1"), start(make_config, *chosen)
    begun = train(first, epochs=1)
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(
        path, first.network, first.optimizer, first.schedule, "t", [EpochRecord(m, 0) for m in begun]
    )
    records = checkpoint.restore(path, second.network, second.optimizer, second.schedule, "t")
    return facts([*(record.metrics for record in records), *train(second, first_epoch=2)], second.network)


def array(make_config, model, optimizer):
    """Three runs with other seeds and learning rates as one array."""
    states = [
        start(
            make_config,
            "backend=torch",
            f"model={model}",
            f"optimizer={optimizer}",
            f"seed={seed}",
            f"lr={OPTIMIZERS[optimizer] / (seed + 1)}",
        )
        for seed in range(3)
    ]
    members = [
        fused.Member(s.network, s.optimizer, s.schedule, seed=seed, epochs=2) for seed, s in enumerate(states)
    ]
    epochs = [[], [], []]
    for index, metrics in fused.train(members, states[0].data, batch_size=64):
        epochs[index].append(metrics)
    return [facts(epochs[i], states[i].network) for i in range(3)]


def environment():
    """What decides how kernels round."""
    info = Path("/proc/cpuinfo")
    words = info.read_text().split() if info.exists() else []
    flags = " ".join(sorted({word for word in words if word.startswith(("avx", "fma"))}))
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": flags,
    }


GOLDEN_VALUES = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
EXACT = GOLDEN_VALUES.get("environment") == environment()


def check(kind, name, found):
    """Compare with golden.json, or write it anew where that is asked for."""
    if os.environ.get("LENET_SWEEP_RECORD_GOLDEN") == "1":
        values = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        values.setdefault(kind, {})[name] = found
        GOLDEN.write_text(json.dumps(values | {"environment": environment()}, indent=1) + "\n")
        return
    expected = GOLDEN_VALUES[kind][name]
    if EXACT:
        assert found == expected
        return
    for mine, its in zip(found, expected, strict=True) if kind == "array" else [(found, expected)]:
        # Of 300 and 500 examples, some are right or wrong by a hair.
        assert flat(mine["epochs"]) == pytest.approx(flat(its["epochs"]), abs=0.02)
        assert mine["weights"] == pytest.approx(its["weights"], abs=0.02)


def flat(rows):
    return [value for row in rows for value in row]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_run_alone_meets_the_recorded_numbers(make_config, backend, model, optimizer):
    check("alone", f"{backend} {model} {optimizer}", alone(make_config, backend, model, optimizer))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_resumed_run_meets_the_recorded_numbers_of_an_uninterrupted_one(
    make_config, tmp_path, backend, optimizer
):
    found = resumed(make_config, tmp_path, backend, optimizer)
    check("resumed", f"{backend} {optimizer}", found)
    assert GOLDEN_VALUES["resumed"] == {
        name: GOLDEN_VALUES["alone"][name.replace(" ", " lenet ")] for name in GOLDEN_VALUES["resumed"]
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_array_of_three_runs_meets_the_recorded_numbers(make_config, model, optimizer):
    check("array", f"{model} {optimizer}", array(make_config, model, optimizer))


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_one_epoch_is_the_beginning_of_two(make_config, backend):
    state = start(make_config, f"backend={backend}", "optimizer=adam", "lr=0.002", "epochs=1")
    (first,) = facts(train(state, epochs=1), state.network)["epochs"]
    if EXACT:
        assert first == GOLDEN_VALUES["alone"][f"{backend} lenet adam"]["epochs"][0]
    else:
        assert (
            first
            == facts(
                train(start(make_config, f"backend={backend}", "optimizer=adam", "lr=0.002")), state.network
            )["epochs"][0]
        )

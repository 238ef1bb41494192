"""The training loop: one gradient step, one epoch, one pass over held-out examples.

`train` yields an `EpochMetrics` after every epoch and does nothing else: progress display, tracking,
checkpoints and early stopping are the job of its consumer (`runs.run`).

Shape suffixes: N examples.
"""

import math
import time
from collections.abc import Callable, Iterator

import torch

from lenet_sweep.training.backend import Backend, total_dtype
from lenet_sweep.training.data import Split
from lenet_sweep.training.metrics import CurvePoint, EpochMeter, EpochMetrics, curve_steps
from lenet_sweep.training.randomness import epoch_order
from lenet_sweep.training.state import TrainingState
from lenet_sweep.training.threads import torch_threads


def train(
    state: TrainingState,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    first_epoch: int = 1,
    on_point: Callable[[CurvePoint], None] | None = None,
) -> Iterator[EpochMetrics]:
    """Train the network of `state` in place and yield once an epoch; all tensors stay on the data's device.

    The order of examples is a fresh permutation each epoch, drawn on the CPU from `seed` and the epoch's
    number. A run that is restored to its state after epoch e and trained with `first_epoch` e + 1 is
    therefore bit-identical to an uninterrupted one. `on_point` is called five times an epoch.

    Raises:
        RunFailed: at the first curve point where the loss is not a finite number.
    """
    data, device, backend = state.data, state.device, state.backend
    steps = math.ceil(len(data.train) / batch_size)
    points = curve_steps(steps)

    for epoch in range(first_epoch, epochs + 1):
        started = time.perf_counter()
        meter = EpochMeter(epoch, steps, on_point)
        order_N = epoch_order(len(data.train), seed, epoch).to(device)
        totals = torch.zeros(2, dtype=total_dtype(device), device=device)
        seen = 0
        # A backend has threads of its own; torch's would synchronise at every tensor of a small update.
        with torch_threads(1):
            for step, indices_N in enumerate(order_N.split(batch_size), start=1):
                # One gradient step is `loss.backward(); optimizer.step()`. `gradients` is the forward and
                # backward pass: autograd split over threads (backend.TorchBackend), or compiled for this CPU
                # (native.NativeBackend). Arrays of runs have the third, vmapped (fused_step.gradient_step).
                totals += backend.gradients(data.train, indices_N)
                state.optimizer.step()
                seen += len(indices_N)
                if step in points:
                    meter.add(step, *(totals / seen).tolist())  # host-device sync: five an epoch
        train_s = time.perf_counter() - started
        state.schedule.step()

        test = evaluate(backend, data.test)
        val = evaluate(backend, data.val) if data.val else (None, None)
        yield meter.finish(test, val, seen / train_s, time.perf_counter() - started)


def evaluate(backend: Backend, examples: Split) -> tuple[float, float]:
    """Mean loss and accuracy over `examples`."""
    loss, accuracy = (backend.totals(examples) / len(examples)).tolist()  # host-device sync: one a pass
    return loss, accuracy

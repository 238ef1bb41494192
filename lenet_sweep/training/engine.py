"""The training loop of one run, and evaluation.

`train` is a generator of `EpochMetrics`, one after every epoch. Progress display, tracking, checkpoints and
early stopping are left to its consumer (`runs.session`).

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
    """Train `state` in place from `first_epoch` to `epochs`; yield the metrics of every epoch.

    The order of examples is a new permutation in every epoch, which depends on `seed` and the epoch only. A
    run that is restored to its state after epoch e and trained with `first_epoch` e + 1 is therefore
    bit-identical to an uninterrupted run. `on_point` is called five times an epoch.

    Raises:
        RunFailed: at the first curve point, or test, with a loss that is not finite.
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
        # Backends use their own threads; for the optimizer's small tensors torch's are only overhead.
        with torch_threads(1):
            for step, indices_N in enumerate(order_N.split(batch_size), start=1):
                # A gradient step is `loss.backward(); optimizer.step()`. `gradients` computes the forward and
                # backward pass: with autograd (backend.TorchBackend) or with compiled code for this CPU
                # (native.NativeBackend). Runs trained as one array use fused_step.gradient_step instead.
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
    """Mean loss (nats) and accuracy (in [0, 1]) over `examples`, in eval mode."""
    loss, accuracy = (backend.totals(examples) / len(examples)).tolist()  # host-device sync: one a pass
    return loss, accuracy

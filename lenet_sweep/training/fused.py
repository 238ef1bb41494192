"""Trains several runs together as one array: `train` is the counterpart of `engine.train` for many runs.

The method is that of horizontally fused training arrays (Wang et al., MLSys 2021), implemented with vmap.
Row r of every tensor belongs to run r. `fused_step.gradient_step` and the optimizers are written for one
run, without side effects, and `torch.func.vmap` applies them to all rows at once. Runs may differ in seed,
number of epochs, schedule and all hyperparameters of the optimizer (`sweeps.plan.array_key` lists what must
agree). Each result equals that of training the run alone, up to rounding. One LeNet leaves most of a GPU
idle, so on a GPU an array takes little more time than one run.

Shape suffixes: R runs, P weights of a run (all its parameters, flat), H hyperparameters of an optimizer,
N examples, C channels, H height, W width (after N and C), K classes.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from lenet_sweep.errors import RunFailed
from lenet_sweep.shapes import IMAGE_SHAPE
from lenet_sweep.training import backend
from lenet_sweep.training.backend import TorchBackend, batches, loss_and_correct, total_dtype
from lenet_sweep.training.cuda_graph import GraphedStep
from lenet_sweep.training.data import Data, Split
from lenet_sweep.training.fused_step import (
    Update,
    adam,
    flatten,
    forward_with,
    gradient_step,
    rates_of,
    sgd,
    unflatten,
)
from lenet_sweep.training.metrics import CurvePoint, EpochMeter, EpochMetrics, curve_steps
from lenet_sweep.training.randomness import epoch_order


@dataclass(eq=False)
class Member:
    """One run of the array. Its objects hold its current state whenever `train` yields its metrics.

    The consumer of `train` may set `stopped`; the member then leaves the array before its next epoch.
    """

    network: nn.Sequential
    optimizer: torch.optim.Optimizer  # from `optim.optimizer`, for all parameters of the network
    schedule: torch.optim.lr_scheduler.LRScheduler
    seed: int
    epochs: int
    first_epoch: int = 1
    stopped: bool = False


class MemberBackend(TorchBackend):
    """The backend of a member outside the array: for evaluation, and for the name stored with the run."""

    name = "fused"


def width(device: torch.device, network: nn.Sequential, batch_size: int) -> int:
    """The number of runs like `network` that fit into the free memory of `device`; at least 1."""
    free = _free_gpu_memory(device) if device.type == "cuda" else psutil.virtual_memory().available
    examples = max(batch_size, backend.EVALUATION_BATCH)
    indexable = 2**31 // (examples * max(_outputs(network)))  # CUDA kernels use 32-bit element indices
    return max(1, min(int(free * 0.8 / run_bytes(network, batch_size)), indexable))


def _free_gpu_memory(device: torch.device) -> int:
    """Free bytes of a GPU, including those that torch's allocator holds unused, as after another array."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def run_bytes(network: nn.Sequential, batch_size: int) -> int:
    """The most memory that one run of an array takes, in bytes, the shared dataset left out.

    A step keeps every layer's output and up to as many gradients and copies; the graphs of a whole
    batch and of an epoch's last one each hold that for themselves, and evaluation holds at most the
    outputs. The weights have gradients, two slots, and successors of these while they are computed.
    """
    weight = next(network.parameters())
    weights = sum(p.numel() for p in network.parameters())
    outputs = sum(_outputs(network)) * (5 * batch_size + backend.EVALUATION_BATCH)
    return weight.element_size() * (outputs + 12 * weights)


def train(
    members: Sequence[Member],
    data: Data,
    *,
    batch_size: int,
    amp: bool = False,
    on_point: Callable[[int, CurvePoint], None] | None = None,
) -> Iterator[tuple[int, EpochMetrics | RunFailed]]:
    """Train all `members` together; yield (index of the member, its metrics) for each, after every epoch.

    When an epoch is yielded, the member's network, optimizer and schedule hold its state after that epoch, as
    with `engine.train`. It can therefore be saved, and resumed by either function. The order of examples is
    that of `engine.train`; if it is the same for all members, they share each batch.

    A member leaves the array after its last epoch, when it is `stopped`, or when its loss is not finite. In
    the last case a `RunFailed` is yielded instead of metrics, and the other members continue.

    All members must have the same `sweeps.plan.array_key`, and tensors of one floating dtype on the device of
    `data`. `examples_per_s` counts the examples of the member, so the throughput of the array is the sum over
    members; `epoch_s` is the time of the array's epoch. `on_point` is called with the member's index, five
    times an epoch.
    """
    epochs = [member.first_epoch for member in members]  # the next epoch of each member
    failed: set[int] = set()
    array: _Array | None = None
    step: Callable[[Tensor], None] | None = None
    device = data.train.labels_N.device
    while indices := [
        i for i, m in enumerate(members) if epochs[i] <= m.epochs and not m.stopped and i not in failed
    ]:
        if array is None or array.indices != indices:
            array = step = None  # free their memory before the new array is allocated
            array = _Array(indices, [members[i] for i in indices], data, amp)
            step = GraphedStep(array.step, device) if device.type == "cuda" else array.step
        assert step
        results = _epoch(array, step, [epochs[i] for i in indices], data, batch_size, on_point)
        for index, result in zip(indices, results, strict=True):
            epochs[index] += 1
            if isinstance(result, RunFailed):
                failed.add(index)
            yield index, result


class _Array:
    """The stacked state of `members`. Their objects are read once, and updated after each epoch.

    All tensors are changed in place and never replaced, because CUDA graphs are replayed on them.
    """

    def __init__(self, indices: list[int], members: list[Member], data: Data, amp: bool) -> None:
        first = members[0]
        assert len({str(m.network) for m in members}) == 1, "members of one array have the same layers"
        device = data.train.labels_N.device
        precise = total_dtype(device)
        self.indices, self.members, self.amp, self._train = indices, members, amp, data.train
        self._update: Update = sgd if isinstance(first.optimizer, torch.optim.SGD) else adam
        self.weights_RP = torch.stack([flatten(m.network.parameters()) for m in members])
        self.slots = {name: torch.stack([_slot(m, name) for m in members]) for name in self._slot_names()}
        names = rates_of(first.optimizer)
        self.rates_RH = torch.empty(len(members), len(names), dtype=precise, device=device)
        self.rates = dict(zip(names, self.rates_RH.unbind(1), strict=True))  # views: R each
        self.steps_R = torch.tensor([_steps(m) for m in members], dtype=precise, device=device)
        self.totals_R2 = torch.zeros(len(members), 2, dtype=precise, device=device)
        for member in members:
            # A step without gradients changes nothing. Schedules warn if they step before the optimizer does.
            member.optimizer.zero_grad()
            member.optimizer.step()

    def begin_epoch(self) -> None:
        """Reset the totals and read the current learning rates."""
        self.totals_R2.zero_()
        rates = [[*rates_of(m.optimizer).values()] for m in self.members]
        self.rates_RH.copy_(torch.tensor(rates, dtype=torch.float64))

    def step(self, indices: Tensor) -> None:
        """One gradient step of all runs. `indices` has shape RN, or N if all runs share the batch."""
        self.steps_R += 1
        batch = self._train.take(indices)
        per_run = 0 if indices.ndim == 2 else None
        weights_RP, slots, totals_R2 = vmap(
            partial(gradient_step, self.members[0].network, self._update, self.amp),
            in_dims=(0, 0, 0, 0, per_run, per_run),
        )(self.weights_RP, self.slots, self.rates, self.steps_R, batch.images_NCHW, batch.labels_N)
        self.weights_RP.copy_(weights_RP)
        for name, slot_RP in slots.items():
            self.slots[name].copy_(slot_RP)
        self.totals_R2 += totals_R2

    @torch.no_grad()
    def evaluate(self, split: Split) -> list[tuple[float, float]]:
        """Mean loss and accuracy of every run over `split`."""

        def assess(weights_P: Tensor, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
            logits_NK = forward_with(self.members[0].network, weights_P, images_NCHW, self.amp)
            loss = F.cross_entropy(logits_NK, labels_N, reduction="sum")
            return loss_and_correct(loss, logits_NK, labels_N)

        self.members[0].network.eval()
        totals_R2 = torch.zeros_like(self.totals_R2)
        for batch in batches(split, backend.EVALUATION_BATCH):
            totals_R2 += vmap(assess, (0, None, None))(self.weights_RP, *batch)
        self.members[0].network.train()
        means: list[tuple[float, float]] = (totals_R2 / len(split)).tolist()  # host-device sync: one a pass
        return means

    @torch.no_grad()
    def end_epoch(self, steps: int) -> None:
        """Copy the state of each row to the objects of its member, after `steps` steps of this epoch."""
        for row, member in enumerate(self.members):
            parameters = list(member.network.parameters())
            for parameter, value in zip(parameters, unflatten(self.weights_RP[row], parameters), strict=True):
                parameter.copy_(value)
            (group,), state = member.optimizer.param_groups, member.optimizer.state
            if self._update is adam:
                for parameter in parameters:
                    state[parameter]["step"] = state[parameter].get("step", torch.zeros(())) + steps
            for name, slot_RP in self.slots.items() if group.get("momentum") != 0 else ():
                for parameter, value in zip(parameters, unflatten(slot_RP[row], parameters), strict=True):
                    state[parameter][name] = value.clone()
            member.schedule.step()

    def _slot_names(self) -> tuple[str, ...]:
        if self._update is adam:
            return ("exp_avg", "exp_avg_sq")
        has_momentum = any(m.optimizer.param_groups[0]["momentum"] != 0 for m in self.members)
        return ("momentum_buffer",) if has_momentum else ()


def _epoch(
    array: _Array,
    gradient_steps: Callable[[Tensor], None],
    epochs: list[int],
    data: Data,
    batch_size: int,
    on_point: Callable[[int, CurvePoint], None] | None,
) -> list[EpochMetrics | RunFailed]:
    """Train one epoch of every member, numbered by `epochs`: the loop of `engine.train`, row by row."""
    steps = math.ceil(len(data.train) / batch_size)
    points = curve_steps(steps)

    started = time.perf_counter()
    array.begin_epoch()
    meters = [
        EpochMeter(epoch, steps, partial(on_point, index) if on_point else None)
        for index, epoch in zip(array.indices, epochs, strict=True)
    ]
    failures: dict[int, RunFailed] = {}
    order = _orders(array.members, epochs, len(data.train)).to(data.train.labels_N.device)
    seen = 0
    for step, indices in enumerate(order.split(batch_size, dim=-1), start=1):
        gradient_steps(indices)
        seen += indices.shape[-1]
        if step in points:
            means = (array.totals_R2 / seen).tolist()  # host-device sync: five an epoch
            for row in range(len(meters)):
                if row not in failures:
                    with _recording_failure(failures, row):
                        meters[row].add(step, *means[row])
    train_s = time.perf_counter() - started
    array.end_epoch(steps)

    tests = array.evaluate(data.test)
    vals = array.evaluate(data.val) if data.val else [(None, None)] * len(tests)
    epoch_s = time.perf_counter() - started
    results: dict[int, EpochMetrics | RunFailed] = {}
    for row, meter in enumerate(meters):
        if row not in failures:
            with _recording_failure(failures, row):
                results[row] = meter.finish(tests[row], vals[row], seen / train_s, epoch_s)
    return [(results | failures)[row] for row in range(len(meters))]


@contextmanager
def _recording_failure(failures: dict[int, RunFailed], row: int) -> Iterator[None]:
    """Record the failure of one row instead of raising it, so that the others can continue."""
    try:
        yield
    except RunFailed as failure:
        failures[row] = failure


def _orders(members: list[Member], epochs: list[int], examples: int) -> Tensor:
    """The order of examples of every member: shape RN, or N if all members have the same order."""
    draws = [(member.seed, epoch) for member, epoch in zip(members, epochs, strict=True)]
    orders = {draw: epoch_order(examples, *draw) for draw in draws}
    return orders[draws[0]] if len(orders) == 1 else torch.stack([orders[draw] for draw in draws])


def _slot(member: Member, name: str) -> Tensor:
    """The optimizer state `name` of `member`, flat; zeros before the first step, as in torch."""
    parameters, state = list(member.network.parameters()), member.optimizer.state
    return flatten(
        state.get(parameter, {}).get(name, torch.zeros_like(parameter)) for parameter in parameters
    )


def _steps(member: Member) -> float:
    """The number of steps of an Adam optimizer so far; 0 for SGD, which does not count them."""
    first = next(member.network.parameters())
    return float(member.optimizer.state.get(first, {}).get("step", 0.0))


def _outputs(network: nn.Sequential) -> list[int]:
    """The number of outputs of each layer for one image."""
    weight = next(network.parameters())
    x_NCHW = torch.zeros(1, *IMAGE_SHAPE, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        return [(x_NCHW := layer(x_NCHW)).numel() for layer in network]

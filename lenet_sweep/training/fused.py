"""Several runs trained together as one array: what `engine.train` is to one run, `train` is to many.

Row r of every tensor belongs to run r. `gradient_step` and the optimizers are written for a single
run, as functions without side effects, and `torch.func.vmap` carries them out for all rows at once.
Runs may differ in seed, number of epochs, schedule and all numbers of the optimizer (`plan.array_key`
says what must agree), and come out as if each had been trained alone, but for rounding. On a GPU,
where LeNet alone leaves most of the device idle, the array costs little more than one run.

Shape suffixes: R runs, P weights of a run (all its parameters, flat), H numbers of an optimizer,
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
from lenet_sweep.training.backend import TorchBackend, batches, loss_and_right, total_dtype
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
    """One run of the array. Its objects hold its state whenever `train` yields something of it.

    Whoever consumes `train` may set `stopped`: the member then leaves before its next epoch.
    """

    network: nn.Sequential
    optimizer: torch.optim.Optimizer  # of `optim.optimizer`, over all of the network's parameters
    schedule: torch.optim.lr_scheduler.LRScheduler
    seed: int
    epochs: int
    first_epoch: int = 1
    stopped: bool = False


class MemberBackend(TorchBackend):
    """A member's own step, outside of the array: it evaluates, and names the arithmetic."""

    name = "fused"


def width(device: torch.device, network: nn.Sequential, batch_size: int) -> int:
    """How many runs like `network` fit in the memory that is free on `device`; at least 1."""
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    examples = max(batch_size, backend.EVALUATION_BATCH)
    indexable = 2**31 // (examples * max(_outputs(network)))  # kernels count elements in 32 bits
    return max(1, min(int(free * 0.8 / run_bytes(network, batch_size)), indexable))


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
    """Train all `members` at once, yielding (index of member, its metrics) for each after each epoch.

    Then the member's network, optimizer and schedule hold its state after that epoch just as
    `engine.train` leaves them, so it can be saved, and resumed by either. The examples come in
    the order of `engine.train`; where all orders agree, one batch serves all runs. Members leave
    the array after their last epoch, when they are `stopped`, or when their loss is no longer a
    finite number: that yields a `RunFailed` in place of metrics, and the others go on.

    All members must agree in `plan.array_key`, their tensors lie on the data's device and have one
    floating type. `examples_per_s` counts the member's own examples, so the array's throughput is
    the sum over members; `epoch_s` is the time of the whole array's epoch. `on_point` is called
    with the member's index, five times an epoch.
    """
    epochs = [member.first_epoch for member in members]  # that each trains next
    failed: set[int] = set()
    array: _Array | None = None
    step: Callable[[Tensor], None] | None = None
    device = data.train.labels_N.device
    while indices := [
        i for i, m in enumerate(members) if epochs[i] <= m.epochs and not m.stopped and i not in failed
    ]:
        if array is None or array.indices != indices:
            array = step = None  # their memory goes before the next ones' comes
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
    """The stacked state of `members`; their own objects are read once and written after each epoch.

    All tensors are changed in place and never replaced, so that CUDA graphs can be replayed on them.
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
            # Without gradients this changes nothing; schedules warn unless it has been called.
            member.optimizer.zero_grad()
            member.optimizer.step()

    def begin_epoch(self) -> None:
        self.totals_R2.zero_()
        rates = [[*rates_of(m.optimizer).values()] for m in self.members]
        self.rates_RH.copy_(torch.tensor(rates, dtype=torch.float64))

    def step(self, indices: Tensor) -> None:
        """One gradient step of all runs, on the examples `indices`: RN, or N for all runs alike."""
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
        """Mean loss and accuracy over `split` of every run."""

        def assess(weights_P: Tensor, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
            logits_NK = forward_with(self.members[0].network, weights_P, images_NCHW, self.amp)
            loss = F.cross_entropy(logits_NK, labels_N, reduction="sum")
            return loss_and_right(loss, logits_NK, labels_N)

        self.members[0].network.eval()
        totals_R2 = torch.zeros_like(self.totals_R2)
        for batch in batches(split, backend.EVALUATION_BATCH):
            totals_R2 += vmap(assess, (0, None, None))(self.weights_RP, *batch)
        self.members[0].network.train()
        means: list[tuple[float, float]] = (totals_R2 / len(split)).tolist()  # host-device sync: one a pass
        return means

    @torch.no_grad()
    def end_epoch(self, steps: int) -> None:
        """Give every member its state after `steps` more steps."""
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
    """Train each member through its epoch of `epochs`: the loop of `engine.train`, row by row."""
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
                    with _noting_failure(failures, row):
                        meters[row].add(step, *means[row])
    train_s = time.perf_counter() - started
    array.end_epoch(steps)

    tests = array.evaluate(data.test)
    vals = array.evaluate(data.val) if data.val else [(None, None)] * len(tests)
    epoch_s = time.perf_counter() - started
    results: dict[int, EpochMetrics | RunFailed] = {}
    for row, meter in enumerate(meters):
        if row not in failures:
            with _noting_failure(failures, row):
                results[row] = meter.finish(tests[row], vals[row], seen / train_s, epoch_s)
    return [(results | failures)[row] for row in range(len(meters))]


@contextmanager
def _noting_failure(failures: dict[int, RunFailed], row: int) -> Iterator[None]:
    """Keep the failure of one row, so that the others can continue."""
    try:
        yield
    except RunFailed as failure:
        failures[row] = failure


def _orders(members: list[Member], epochs: list[int], examples: int) -> Tensor:
    """The order of examples of every member: RN, or N if all members have the same."""
    draws = [(member.seed, epoch) for member, epoch in zip(members, epochs, strict=True)]
    orders = {draw: epoch_order(examples, *draw) for draw in draws}
    return orders[draws[0]] if len(orders) == 1 else torch.stack([orders[draw] for draw in draws])


def _slot(member: Member, name: str) -> Tensor:
    """What the optimizer of `member` remembers as `name`; zeros before its first step, as torch has it."""
    parameters, state = list(member.network.parameters()), member.optimizer.state
    return flatten(
        state.get(parameter, {}).get(name, torch.zeros_like(parameter)) for parameter in parameters
    )


def _steps(member: Member) -> float:
    """Steps that an Adam has taken; SGD does not count them."""
    first = next(member.network.parameters())
    return float(member.optimizer.state.get(first, {}).get("step", 0.0))


def _outputs(network: nn.Sequential) -> list[int]:
    """How many numbers each layer puts out for one image."""
    weight = next(network.parameters())
    x_NCHW = torch.zeros(1, *IMAGE_SHAPE, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        return [(x_NCHW := layer(x_NCHW)).numel() for layer in network]

"""Several runs trained together as one array: what `engine.train` is to one run, `train` is to many.

Row r of every tensor belongs to run r. `gradient_step` and the optimizers are written for a single
run, as functions without side effects, and `torch.func.vmap` carries them out for all rows at once.
Runs may differ in seed, number of epochs, schedule and all numbers of the optimizer (`plan.array_key`
says what must agree), and come out as if each had been trained alone, but for rounding. On a GPU,
where LeNet alone leaves most of the device idle, the array costs little more than one run.

Shape suffixes: R runs, P weights of a run (all its parameters, flat), H numbers of an optimizer,
N examples, C channels, H height, W width (after N and C), K classes.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lenet_sweep import engine
from lenet_sweep.config import IMAGE_SHAPE, Config
from lenet_sweep.data import Data, Split, scaled
from lenet_sweep.engine import CURVE_POINTS, CurvePoint, EpochMetrics
from lenet_sweep.errors import RunFailed
from lenet_sweep.randomness import generator

log = logging.getLogger(__name__)

Slots = dict[str, Tensor]  # an optimizer's memory, by torch's names: each like the weights
Rates = dict[str, Tensor]  # an optimizer's numbers: float64 scalars
Update = Callable[[Tensor, Tensor, Slots, Rates, Tensor], tuple[Tensor, Slots]]

WARM_UP = 3  # steps before a CUDA graph is captured, in which libraries set themselves up


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


class Part(engine.Autograd):
    """A member's own step, outside of the array: it evaluates, and names the arithmetic."""

    name = "fused"


def step(config: Config, network: nn.Sequential, device: torch.device) -> tuple[engine.Step, None]:
    """What `engine.choose_step` is for a run by itself."""
    return Part(network, config.precision.amp), None


def width(device: torch.device, network: nn.Sequential, batch_size: int) -> int:
    """How many runs like `network` fit in the memory that is free on `device`; at least 1."""
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    examples = max(batch_size, engine.EVALUATION_BATCH)
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
    outputs = sum(_outputs(network)) * (5 * batch_size + engine.EVALUATION_BATCH)
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
    `engine.train` leaves them, so it can be saved, and gone on with by either. The examples come in
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
            step = _Graphs(array.step, device) if device.type == "cuda" else array.step
        assert step
        results = _epoch(array, step, [epochs[i] for i in indices], data, batch_size, on_point)
        for index, result in zip(indices, results, strict=True):
            epochs[index] += 1
            if isinstance(result, RunFailed):
                failed.add(index)
            yield index, result


def gradient_step(
    network: nn.Module,
    update: Update,
    amp: bool,
    weights_P: Tensor,
    slots: Slots,
    rates: Rates,
    step: Tensor,
    images_NCHW: Tensor,
    labels_N: Tensor,
) -> tuple[Tensor, Slots, Tensor]:
    """One step of one run: its next weights and slots, and [sum of its losses, number right].

    `network` lends its layers, not its weights; `step` counts from 1. Nothing is changed in place.
    """

    def loss_of(weights_P: Tensor) -> tuple[Tensor, Tensor]:
        logits_NK = forward(network, weights_P, images_NCHW, amp)
        loss = F.cross_entropy(logits_NK, labels_N, reduction="sum")
        return loss / len(labels_N), engine.loss_and_right(loss, logits_NK, labels_N)

    gradient_P, totals = grad(loss_of, has_aux=True)(weights_P)
    weights_P, slots = update(weights_P, gradient_P, slots, rates, step)
    return weights_P, slots, totals


def forward(network: nn.Module, weights_P: Tensor, images_NCHW: Tensor, amp: bool) -> Tensor:
    """uint8 images to logits NK through the layers of `network`, with other weights."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    weights = dict(zip(names, _unflatten(weights_P, parameters), strict=True))
    device, dtype = images_NCHW.device.type, weights_P.dtype
    # The cache of casts would outlive the step, and a captured graph with it.
    with torch.autocast(device, torch.bfloat16, cache_enabled=False) if amp else nullcontext():
        logits_NK: Tensor = functional_call(network, weights, (scaled(images_NCHW, dtype),))
    return logits_NK.to(dtype)


def sgd(weights: Tensor, gradient: Tensor, slots: Slots, rates: Rates, step: Tensor) -> tuple[Tensor, Slots]:
    """torch.optim.SGD. Without momentum anywhere in the array there are no `slots`."""
    gradient = gradient + rates["weight_decay"] * weights
    if slots:
        buffer = rates["momentum"] * slots["momentum_buffer"] + gradient
        ahead = gradient + rates["momentum"] * buffer
        gradient = torch.where(rates["nesterov"] > 0, ahead, buffer)
        slots = {"momentum_buffer": buffer}
    return weights - rates["lr"] * gradient, slots


def adam(weights: Tensor, gradient: Tensor, slots: Slots, rates: Rates, step: Tensor) -> tuple[Tensor, Slots]:
    """torch.optim.Adam (weight_decay) and AdamW (decoupled_weight_decay)."""
    gradient = gradient + rates["weight_decay"] * weights
    weights = weights * (1 - rates["lr"] * rates["decoupled_weight_decay"])
    mean, square = slots["exp_avg"], slots["exp_avg_sq"]
    mean = mean + (1 - rates["beta1"]) * (gradient - mean)
    square = rates["beta2"] * square + (1 - rates["beta2"]) * gradient * gradient
    step_size = rates["lr"] / (1 - rates["beta1"] ** step)
    scale = square.sqrt() / (1 - rates["beta2"] ** step).sqrt() + rates["eps"]
    return weights - step_size * (mean / scale), {"exp_avg": mean, "exp_avg_sq": square}


def _rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The numbers of one run's optimizer as they are now."""
    (group,) = optimizer.param_groups
    rates = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
    if isinstance(optimizer, torch.optim.SGD):
        return {**rates, "momentum": group["momentum"], "nesterov": float(group["nesterov"])}
    decoupled = isinstance(optimizer, torch.optim.AdamW)
    decays = {"weight_decay": 0.0, "decoupled_weight_decay": rates["weight_decay"]}
    beta1, beta2 = group["betas"]
    rates |= {"beta1": beta1, "beta2": beta2, "eps": group["eps"]}
    return rates | (decays if decoupled else {"decoupled_weight_decay": 0.0})


class _Array:
    """The stacked state of `members`; their own objects are read once and written after each epoch.

    All tensors are changed in place and never replaced, so that CUDA graphs can be replayed on them.
    """

    def __init__(self, indices: list[int], members: list[Member], data: Data, amp: bool) -> None:
        first = members[0]
        assert len({str(m.network) for m in members}) == 1, "members of one array have the same layers"
        device = data.train.labels_N.device
        precise = engine.total_dtype(device)
        self.indices, self.members, self.amp, self._train = indices, members, amp, data.train
        self._update: Update = sgd if isinstance(first.optimizer, torch.optim.SGD) else adam
        self.weights_RP = torch.stack([_flatten(m.network.parameters()) for m in members])
        self.slots = {name: torch.stack([_slot(m, name) for m in members]) for name in self._slot_names()}
        names = _rates(first.optimizer)
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
        rates = [[*_rates(m.optimizer).values()] for m in self.members]
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
            logits_NK = forward(self.members[0].network, weights_P, images_NCHW, self.amp)
            loss = F.cross_entropy(logits_NK, labels_N, reduction="sum")
            return engine.loss_and_right(loss, logits_NK, labels_N)

        self.members[0].network.eval()
        totals_R2 = torch.zeros_like(self.totals_R2)
        for batch in engine.batches(split, engine.EVALUATION_BATCH):
            totals_R2 += vmap(assess, (0, None, None))(self.weights_RP, *batch)
        self.members[0].network.train()
        means: list[tuple[float, float]] = (totals_R2 / len(split)).tolist()  # host-device sync: one a pass
        return means

    @torch.no_grad()
    def end_epoch(self, steps: int) -> None:
        """Give every member its state after `steps` more steps."""
        for row, member in enumerate(self.members):
            parameters = list(member.network.parameters())
            for parameter, value in zip(
                parameters, _unflatten(self.weights_RP[row], parameters), strict=True
            ):
                parameter.copy_(value)
            (group,), state = member.optimizer.param_groups, member.optimizer.state
            if self._update is adam:
                for parameter in parameters:
                    state[parameter]["step"] = state[parameter].get("step", torch.zeros(())) + steps
            for name, slot_RP in self.slots.items() if group.get("momentum") != 0 else ():
                for parameter, value in zip(parameters, _unflatten(slot_RP[row], parameters), strict=True):
                    state[parameter][name] = value.clone()
            member.schedule.step()

    def _slot_names(self) -> tuple[str, ...]:
        if self._update is adam:
            return ("exp_avg", "exp_avg_sq")
        has_momentum = any(m.optimizer.param_groups[0]["momentum"] != 0 for m in self.members)
        return ("momentum_buffer",) if has_momentum else ()


class _Graphs:
    """Calls `step`, as a CUDA graph for each shape of `indices` once it is warm; eagerly where that fails.

    A graph repeats the very kernels on the very memory that it was captured with: `step` reads and
    writes only tensors that stay where they are, and `indices` are copied to where it expects them.
    """

    def __init__(self, step: Callable[[Tensor], None], device: torch.device) -> None:
        self._step, self._works = step, True
        self._stream = torch.cuda.Stream(device)
        self._calls: dict[torch.Size, int] = {}
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, indices: Tensor) -> None:
        if indices.shape in self._graphs:
            graph, its_indices = self._graphs[indices.shape]
            its_indices.copy_(indices)
            graph.replay()
            return
        calls = self._calls[indices.shape] = self._calls.get(indices.shape, 0) + 1
        # Captured work runs on another stream than the default one, and so must its warm-up.
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step(indices)
        current.wait_stream(self._stream)
        if calls == WARM_UP and self._works:
            self._capture(indices.clone())

    def _capture(self, its_indices: Tensor) -> None:
        """Record a step; it is not carried out."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._step(its_indices)
        except RuntimeError as error:  # out of memory among them
            self._works = False
            log.warning("no CUDA graph, the steps run one by one: %s", error)
        else:
            self._graphs[its_indices.shape] = graph, its_indices


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
    points = {math.ceil(steps * k / CURVE_POINTS) for k in range(1, CURVE_POINTS + 1)}

    started = time.perf_counter()
    array.begin_epoch()
    order = _order(array.members, epochs, len(data.train)).to(data.train.labels_N.device)
    seen = 0
    curves: list[list[CurvePoint]] = [[] for _ in epochs]
    failures: dict[int, RunFailed] = {}
    for step, indices in enumerate(order.split(batch_size, dim=-1), start=1):
        gradient_steps(indices)
        seen += indices.shape[-1]
        if step in points:
            means = (array.totals_R2 / seen).tolist()  # host-device sync: five an epoch
            for row, (loss, accuracy) in enumerate(means):
                if row in failures:
                    continue
                if not math.isfinite(loss):
                    reason = f"the loss became {loss} in epoch {epochs[row]}, by step {step} of {steps}"
                    failures[row] = RunFailed(reason)
                    continue
                curves[row].append(CurvePoint(epochs[row] - 1 + step / steps, loss, accuracy))
                if on_point:
                    on_point(array.indices[row], curves[row][-1])
    train_s = time.perf_counter() - started
    array.end_epoch(steps)

    tests = array.evaluate(data.test)
    vals = array.evaluate(data.val) if data.val else [(None, None)] * len(tests)
    epoch_s = time.perf_counter() - started
    results: list[EpochMetrics | RunFailed] = []
    for row, (epoch, curve, test, val) in enumerate(zip(epochs, curves, tests, vals, strict=True)):
        if row not in failures and not math.isfinite(test[0]):
            failures[row] = RunFailed(f"the test loss became {test[0]} after epoch {epoch}")
        if row in failures:
            results.append(failures[row])
            continue
        last = curve[-1]
        speed = seen / train_s
        results.append(
            EpochMetrics(epoch, last.train_loss, last.train_acc, *test, *val, speed, epoch_s, tuple(curve))
        )
    return results


def _order(members: list[Member], epochs: list[int], examples: int) -> Tensor:
    """The order of examples, drawn as `engine.train` does: RN, or N if all members have the same."""
    draws = [(member.seed, epoch) for member, epoch in zip(members, epochs, strict=True)]
    orders = {
        (seed, epoch): torch.randperm(examples, generator=generator(seed, f"order/{epoch}"))
        for seed, epoch in draws
    }
    return orders[draws[0]] if len(orders) == 1 else torch.stack([orders[draw] for draw in draws])


def _flatten(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _unflatten(weights_P: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = weights_P.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _slot(member: Member, name: str) -> Tensor:
    """What the optimizer of `member` remembers as `name`; zeros before its first step, as torch has it."""
    parameters, state = list(member.network.parameters()), member.optimizer.state
    return _flatten(
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

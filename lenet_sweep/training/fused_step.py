"""One gradient step of one run as a pure function: gradients and optimizer update.

`fused` applies `gradient_step` to all runs of an array with `torch.func.vmap`. torch's optimizers work in
place, so SGD and Adam are written here as pure functions; the tests compare them with torch's.

Shape suffixes: P weights of a run (all its parameters, flat), N examples, C channels, H height, W width,
K classes.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from lenet_sweep.training.backend import loss_and_correct
from lenet_sweep.training.data import scaled

Slots = dict[str, Tensor]  # optimizer state by torch's names, each of the shape of the weights
Rates = dict[str, Tensor]  # hyperparameters of the optimizer, float64 scalars
Update = Callable[[Tensor, Tensor, Slots, Rates, Tensor], tuple[Tensor, Slots]]


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
    """One gradient step of one run. Returns the new weights and slots, and [sum of losses, number correct].

    Only the layers of `network` are used, not its parameters. `step` counts from 1. Nothing is changed in
    place.
    """

    def loss_of(weights_P: Tensor) -> tuple[Tensor, Tensor]:
        logits_NK = forward_with(network, weights_P, images_NCHW, amp)
        loss = F.cross_entropy(logits_NK, labels_N, reduction="sum")
        return loss / len(labels_N), loss_and_correct(loss, logits_NK, labels_N)

    gradient_P, totals = grad(loss_of, has_aux=True)(weights_P)
    weights_P, slots = update(weights_P, gradient_P, slots, rates, step)
    return weights_P, slots, totals


def forward_with(network: nn.Module, weights_P: Tensor, images_NCHW: Tensor, amp: bool) -> Tensor:
    """Compute logits NK of uint8 images with the layers of `network` and the weights `weights_P`."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    weights = dict(zip(names, unflatten(weights_P, parameters), strict=True))
    device, dtype = images_NCHW.device.type, weights_P.dtype
    # Autocast's cache is off, because cached casts would outlive the step, and also a captured CUDA graph.
    with torch.autocast(device, torch.bfloat16, cache_enabled=False) if amp else nullcontext():
        logits_NK: Tensor = functional_call(network, weights, (scaled(images_NCHW, dtype),))
    return logits_NK.to(dtype)


def sgd(weights: Tensor, gradient: Tensor, slots: Slots, rates: Rates, step: Tensor) -> tuple[Tensor, Slots]:
    """The update of torch.optim.SGD. `slots` is empty if no run of the array uses momentum."""
    gradient = gradient + rates["weight_decay"] * weights
    if slots:
        buffer = rates["momentum"] * slots["momentum_buffer"] + gradient
        lookahead = gradient + rates["momentum"] * buffer
        gradient = torch.where(rates["nesterov"] > 0, lookahead, buffer)
        slots = {"momentum_buffer": buffer}
    return weights - rates["lr"] * gradient, slots


def adam(weights: Tensor, gradient: Tensor, slots: Slots, rates: Rates, step: Tensor) -> tuple[Tensor, Slots]:
    """The update of torch.optim.Adam (with `weight_decay`) and AdamW (with `decoupled_weight_decay`)."""
    gradient = gradient + rates["weight_decay"] * weights
    weights = weights * (1 - rates["lr"] * rates["decoupled_weight_decay"])
    mean, square = slots["exp_avg"], slots["exp_avg_sq"]
    mean = mean + (1 - rates["beta1"]) * (gradient - mean)
    square = rates["beta2"] * square + (1 - rates["beta2"]) * gradient * gradient
    step_size = rates["lr"] / (1 - rates["beta1"] ** step)
    scale = square.sqrt() / (1 - rates["beta2"] ** step).sqrt() + rates["eps"]
    return weights - step_size * (mean / scale), {"exp_avg": mean, "exp_avg_sq": square}


def rates_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The current hyperparameters of an optimizer, by the names that `sgd` and `adam` use."""
    (group,) = optimizer.param_groups
    rates = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
    if isinstance(optimizer, torch.optim.SGD):
        return {**rates, "momentum": group["momentum"], "nesterov": float(group["nesterov"])}
    decoupled = isinstance(optimizer, torch.optim.AdamW)
    decays = {"weight_decay": 0.0, "decoupled_weight_decay": rates["weight_decay"]}
    beta1, beta2 = group["betas"]
    rates |= {"beta1": beta1, "beta2": beta2, "eps": group["eps"]}
    return rates | (decays if decoupled else {"decoupled_weight_decay": 0.0})


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """All values in one vector, detached from autograd."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def unflatten(weights_P: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of `weights_P` with the shapes of the tensors `like`."""
    parts = weights_P.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]

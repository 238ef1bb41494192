"""Optimizers and learning-rate schedules of torch, built from their config."""

from collections.abc import Iterable

import torch
from torch.optim import lr_scheduler

from lenet_sweep.config.schema import (
    AdamConfig,
    ConstantScheduleConfig,
    CosineScheduleConfig,
    SGDConfig,
    StepScheduleConfig,
)


def optimizer(
    config: SGDConfig | AdamConfig, parameters: Iterable[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer of `config` for `parameters`."""
    parameters = list(parameters)
    # On a CPU, launch overhead dominates, so use torch's fused kernel. Plain SGD is the exception: it is one
    # operation per tensor anyway.
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    is_plain = isinstance(config, SGDConfig) and not config.momentum and not config.weight_decay
    fused = True if on_cpu and not is_plain else None
    if isinstance(config, SGDConfig):
        return torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    make = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    beta1, beta2 = config.betas
    return make(
        parameters,
        lr=config.lr,
        betas=(beta1, beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused,
    )


def schedule(
    config: ConstantScheduleConfig | StepScheduleConfig | CosineScheduleConfig,
    optimizer: torch.optim.Optimizer,
    epochs: int,
) -> lr_scheduler.LRScheduler:
    """The schedule of `config`. Call its `step()` after every epoch.

    Only the cosine schedule depends on the total number of `epochs`. With any other schedule, a run is a
    prefix of the same run with more epochs.
    """
    match config:
        case StepScheduleConfig():
            return lr_scheduler.StepLR(optimizer, config.step_size, config.gamma)
        case CosineScheduleConfig():
            # SGDR (Loshchilov and Hutter, ICLR 2017), without restarts.
            return lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs, eta_min=config.eta_min)
        case ConstantScheduleConfig():
            return lr_scheduler.LambdaLR(optimizer, _constant)


def _constant(epoch: int) -> float:
    return 1.0

"""Learning-rate schedules against their closed forms."""

import math

import pytest
import torch

from lenet_sweep.training import optim


def rates(config):
    """The learning rate of every epoch."""
    optimizer = optim.optimizer(config.optimizer, [torch.nn.Parameter(torch.zeros(1))])
    schedule = optim.schedule(config.schedule, optimizer, config.epochs)
    seen = []
    for _ in range(config.epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_constant_schedule_keeps_the_learning_rate(make_config):
    assert rates(make_config("lr=0.3", "epochs=4")) == [0.3] * 4


def test_step_schedule_multiplies_by_gamma_after_every_step_size_epochs(make_config):
    config = make_config("lr=0.8", "epochs=5", "schedule=step", "schedule.step_size=2")
    assert rates(config) == pytest.approx([0.8, 0.8, 0.4, 0.4, 0.2])


def test_cosine_schedule_is_half_a_cosine_over_all_epochs(make_config):
    config = make_config("lr=0.8", "epochs=8", "schedule=cosine", "schedule.eta_min=0.1")
    expected = [0.1 + 0.7 * (1 + math.cos(math.pi * epoch / 8)) / 2 for epoch in range(8)]
    assert rates(config) == pytest.approx(expected)


def test_weight_decay_reaches_the_optimizer(make_config):
    for name in ("sgd", "adam", "adamw"):
        config = make_config(f"optimizer={name}", "optimizer.weight_decay=0.25")
        optimizer = optim.optimizer(config.optimizer, [torch.nn.Parameter(torch.zeros(1))])
        assert optimizer.param_groups[0]["weight_decay"] == 0.25


PLAIN = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=False),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01, foreach=False),
}


@pytest.mark.parametrize("name", PLAIN)
def test_one_kernel_for_all_tensors_does_what_torchs_plain_loop_does(make_config, name):
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=draw, dtype=torch.float64) for size in (1, 7, 1000)]
    steps = [[torch.randn(len(t), generator=draw, dtype=torch.float64) for t in start] for _ in range(5)]
    config = make_config(f"optimizer={name}", "lr=0.1")
    results = []
    for make in (lambda p: optim.optimizer(config.optimizer, p), PLAIN[name]):
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        optimizer = make(parameters)
        for gradients in steps:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        results.append(torch.cat(parameters).detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)

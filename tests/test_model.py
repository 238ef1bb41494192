"""The network against a plain `nn.Sequential`, and its weights against the formulas they are drawn by."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from lenet_sweep.config import schema
from lenet_sweep.training import model
from lenet_sweep.training.randomness import generator

LENET = schema.ModelConfig(
    name="lenet",
    activation="sigmoid",
    pool="avg",
    channels=(6, 16),
    kernel_size=5,
    padding="first",
    hidden=(120, 84),
    init="xavier_uniform",
)


def tutorial_network(activation: type[nn.Module], pool: type[nn.Module]) -> nn.Sequential:
    """The tutorial's table, typed out by hand."""
    return nn.Sequential(
        nn.Conv2d(1, 6, kernel_size=5, padding=2),
        activation(),
        pool(kernel_size=2, stride=2),
        nn.Conv2d(6, 16, kernel_size=5),
        activation(),
        pool(kernel_size=2, stride=2),
        nn.Flatten(),
        nn.Linear(400, 120),
        activation(),
        nn.Linear(120, 84),
        activation(),
        nn.Linear(84, 10),
    )


@pytest.mark.parametrize(
    ("activation", "pool", "modules"),
    [
        ("sigmoid", "avg", (nn.Sigmoid, nn.AvgPool2d)),
        ("relu", "max", (nn.ReLU, nn.MaxPool2d)),
        ("tanh", "avg", (nn.Tanh, nn.AvgPool2d)),
        ("leaky_relu", "max", (nn.LeakyReLU, nn.MaxPool2d)),
        ("gelu", "avg", (nn.GELU, nn.AvgPool2d)),
        ("silu", "max", (nn.SiLU, nn.MaxPool2d)),
    ],
)
def test_network_equals_the_tutorials_sequential(activation, pool, modules):
    config = dataclasses.replace(LENET, activation=activation, pool=pool)
    network = model.build(config, generator(0, "init"))
    oracle = tutorial_network(*modules)
    oracle.load_state_dict(dict(zip(oracle.state_dict(), network.state_dict().values(), strict=True)))
    images_NCHW = torch.rand(7, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(network(images_NCHW), oracle(images_NCHW))


def test_lenet_has_the_tutorials_number_of_weights():
    network = model.build(LENET, generator(0, "init"))
    by_hand = (6 * 25 + 6) + (16 * 6 * 25 + 16) + (400 * 120 + 120) + (120 * 84 + 84) + (84 * 10 + 10)
    assert sum(p.numel() for p in network.parameters()) == by_hand == 61_706


def test_same_seed_gives_same_weights_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second, other = (model.build(LENET, generator(seed, "init")) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
        assert not torch.equal(weight, other.state_dict()[name])


# The standard deviation of each initialisation, by fan-in and fan-out.
DEVIATIONS = {
    "xavier_uniform": lambda i, o: math.sqrt(2 / (i + o)),
    "xavier_normal": lambda i, o: math.sqrt(2 / (i + o)),
    "kaiming_uniform": lambda i, o: math.sqrt(2 / i),
    "kaiming_normal": lambda i, o: math.sqrt(2 / i),
    "pytorch": lambda i, o: math.sqrt(1 / (3 * i)),
}


@pytest.mark.parametrize("init", DEVIATIONS)
def test_weights_have_the_spread_of_their_initialisation(init):
    network = model.build(dataclasses.replace(LENET, init=init), generator(0, "init"))
    for module in network:
        if isinstance(module, nn.Linear | nn.Conv2d):
            receptive = math.prod(module.weight.shape[2:])
            fan_in, fan_out = module.weight.shape[1] * receptive, module.weight.shape[0] * receptive
            if module.weight.numel() < 1000:
                continue  # too few to estimate a deviation from
            assert module.weight.std().item() == pytest.approx(DEVIATIONS[init](fan_in, fan_out), rel=0.05)
            assert module.bias.abs().max().item() <= 1 / math.sqrt(fan_in)


def test_xavier_uniform_weights_stay_within_their_bound():
    network = model.build(LENET, generator(0, "init"))
    assert network.linear1.weight.abs().max().item() <= math.sqrt(6 / (400 + 120))
    assert network.conv1.weight.abs().max().item() <= math.sqrt(6 / (25 + 6 * 25))

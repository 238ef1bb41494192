"""The layers' own formulations against the library's operations: values, gradients, ties, NaN, vmap."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap

from lenet_sweep.training import layers, model

# Each pool and torch's function of the same result.
POOLS = [(layers.AvgPool2d, F.avg_pool2d), (layers.MaxPool2d, F.max_pool2d)]
SIDES = [(6, 4), (7, 8), (6, 5), (9, 3)]


@pytest.fixture
def draw():
    """Normal numbers in float64 that ask for gradients: draw(2, 3, 8, 8)."""
    generator = torch.Generator().manual_seed(0)
    return functools.partial(torch.randn, generator=generator, dtype=torch.float64, requires_grad=True)


def outcome(function, *inputs):
    """The value, and the gradients of its sum of squares by each input."""
    value = function(*inputs)
    return [value, *torch.autograd.grad(value.square().sum(), inputs)]


def convolution(layer, x, weight, bias):
    return functional_call(layer, {"weight": weight, "bias": bias}, (x,))


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("channels", [(1, 4), (3, 1), (6, 5)], ids=str)
def test_convolution_and_its_gradients_are_the_librarys(draw, channels, kernel, padding, sides):
    inputs, outputs = channels
    tensors = draw(4, inputs, *sides), draw(outputs, inputs, kernel, kernel), draw(outputs)
    ours = functools.partial(convolution, layers.Conv2d(inputs, outputs, kernel, padding=padding))
    library = functools.partial(F.conv2d, padding=padding)
    for found, expected in zip(outcome(ours, *tensors), outcome(library, *tensors), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize(("ours", "library"), POOLS)
def test_pool_and_its_gradient_are_the_librarys(draw, ours, library, sides):
    x = draw(4, 3, *sides)
    for found, expected in zip(outcome(ours(2), x), outcome(lambda x: library(x, 2), x), strict=True):
        torch.testing.assert_close(found, expected)


def test_every_pool_of_the_config_is_compared_with_the_librarys():
    assert {pool for pool, _ in POOLS} == set(model.POOLS.values())


@pytest.mark.parametrize("pool", model.POOLS.values())
def test_pool_of_windows_is_the_pool_of_the_whole(draw, pool):
    conv, x = layers.Conv2d(1, 3, 5, padding=2).double(), draw(2, 1, 12, 12)
    assert conv.prefers_windows
    torch.testing.assert_close(pool(2).of_windows(conv.windows(x)), pool(2)(conv(x)))


@pytest.mark.parametrize("padding", [0, 2])
def test_first_and_second_derivatives_of_the_convolution_are_those_of_finite_differences(draw, padding):
    layer = layers.Conv2d(2, 3, 3, padding=padding)
    tensors = draw(2, 2, 4, 3), draw(3, 2, 3, 3), draw(3)
    assert torch.autograd.gradcheck(functools.partial(convolution, layer), tensors)
    assert torch.autograd.gradgradcheck(functools.partial(convolution, layer), tensors)


@pytest.mark.parametrize("pool", model.POOLS.values())
def test_first_and_second_derivatives_of_a_pool_are_those_of_finite_differences(draw, pool):
    x = draw(2, 2, 4, 6)
    assert torch.autograd.gradcheck(pool(2), x)
    assert torch.autograd.gradgradcheck(pool(2), x)


def test_of_equals_in_a_window_the_librarys_learns():
    # All windows of 2x2 over three values: every pattern of ties there is.
    values = torch.cartesian_prod(*[torch.arange(3.0)] * 4).view(81, 1, 2, 2).requires_grad_()
    ours, library = outcome(layers.MaxPool2d(2), values), outcome(nn.MaxPool2d(2), values)
    assert torch.equal(ours[0], library[0])
    assert torch.equal(ours[1], library[1])


@pytest.mark.parametrize(("ours", "library"), POOLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_comes_through_a_pool(ours, library, bad):
    for place in range(4):
        x = torch.arange(16.0).view(1, 1, 4, 4)
        x.view(16)[[0, 1, 4, 5][place]] = bad
        torch.testing.assert_close(ours(2)(x), library(x, 2), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("pool", model.POOLS.values())
def test_gradients_of_many_networks_at_once_are_those_of_each_alone(draw, make_blocks, pool):
    network = make_blocks(1, 3, 5, 2, nn.Sigmoid, pool)
    x_RNCHW = draw(5, 2, 1, 12, 12).detach()
    weights = {name: draw(5, *weight.shape).detach() for name, weight in network.named_parameters()}

    def loss(weights, x_NCHW):
        return functional_call(network, weights, (x_NCHW,)).square().sum()

    together = vmap(grad(loss))(weights, x_RNCHW)
    for run in range(5):
        alone = {name: weight[run].clone().requires_grad_() for name, weight in weights.items()}
        expected = torch.autograd.grad(loss(alone, x_RNCHW[run]), list(alone.values()))
        for name, gradient in zip(alone, expected, strict=True):
            torch.testing.assert_close(together[name][run], gradient)


ACTIVATIONS = list(model.ACTIVATIONS.values())
BLOCKS = [  # channels in, channels out, kernel, padding
    (1, 3, 5, 2),
    (1, 2, 2, 0),
    (1, 4, 3, 4),
    (3, 5, 5, 0),
    (9, 2, 3, 1),
]


@pytest.fixture
def make_blocks():
    """A convolution, its activation and its pool, and another after them."""

    def make(inputs, outputs, kernel, padding, activation, pool):
        torch.manual_seed(0)
        return layers.Network(
            layers.Conv2d(inputs, outputs, kernel, padding=padding), activation(), pool(2),
            layers.Conv2d(outputs, 2, 2), activation(), pool(2),
            nn.Flatten(),
        ).double()  # fmt: skip

    return make


def library_layers(network):
    """The same layers with the same weights, of torch's own classes."""
    library = {layers.Conv2d: nn.Conv2d, layers.AvgPool2d: nn.AvgPool2d, layers.MaxPool2d: nn.MaxPool2d}
    twin = copy.deepcopy(network)
    for layer in twin:
        layer.__class__ = library.get(type(layer), type(layer))
    return nn.Sequential(*twin)


@pytest.mark.parametrize("sides", [(12, 12), (11, 12), (13, 13)], ids=str)
@pytest.mark.parametrize("pool", model.POOLS.values())
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_layers_taken_together_give_the_librarys_values_and_gradients(
    draw, make_blocks, block, activation, pool, sides
):
    network = make_blocks(*block, activation, pool)
    library = library_layers(network)
    x = draw(3, block[0], *sides)
    for found, expected in zip(
        outcome(lambda x, *_: network(x), x, *network.parameters()),
        outcome(lambda x, *_: library(x), x, *library.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_layers_by_themselves_end_in_what_the_network_gives(draw, make_blocks):
    network, x = make_blocks(1, 3, 5, 2, nn.ReLU, layers.MaxPool2d), draw(3, 1, 12, 12)
    assert isinstance(network[:6], layers.Network)  # whose parts are networks again
    y = x
    for layer in network:
        y = layer(y)
    torch.testing.assert_close(network(x), y)


def test_hooks_of_layers_are_called(draw, make_blocks):
    network, x = make_blocks(1, 3, 5, 2, nn.ReLU, layers.MaxPool2d), draw(3, 1, 12, 12)
    expected, seen = network(x), []
    for place in (1, 3, 5):
        network[place].register_forward_hook(lambda layer, inputs, output: seen.append(output.shape))
    torch.testing.assert_close(network(x), expected)
    assert seen == [(3, 3, 12, 12), (3, 2, 5, 5), (3, 2, 2, 2)]


@pytest.mark.parametrize("value", [0.0, 0.7])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_of_equals_in_a_window_the_librarys_learns_in_layers_taken_together(make_blocks, activation, value):
    network = make_blocks(1, 3, 5, 2, activation, layers.MaxPool2d)
    library = library_layers(network)
    x = torch.full((2, 1, 12, 12), value, dtype=torch.float64, requires_grad=True)
    x.data[1, 0, 3:5, 6:8] = 1  # in a blank image, whose windows hold equals
    for found, expected in zip(
        outcome(lambda x, *_: network(x), x, *network.parameters()),
        outcome(lambda x, *_: library(x), x, *library.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pool", model.POOLS.values())
def test_what_is_no_number_comes_through_layers_taken_together(make_blocks, pool):
    network = make_blocks(1, 3, 5, 2, nn.ReLU, pool)
    for bad in (float("nan"), float("inf")):
        x = torch.zeros(2, 1, 12, 12, dtype=torch.float64)
        x[1, 0, 5, 5] = bad
        torch.testing.assert_close(network(x), library_layers(network)(x), equal_nan=True)
        assert network(x)[0].isfinite().all()


@pytest.mark.parametrize("pool", model.POOLS.values())
def test_first_and_second_derivatives_of_layers_taken_together_are_those_of_finite_differences(
    draw, make_blocks, pool
):
    network, x = make_blocks(1, 2, 3, 1, nn.Sigmoid, pool), draw(1, 1, 6, 6)
    tensors = [x, *(p.detach().requires_grad_() for p in network.parameters())]
    names = [name for name, _ in network.named_parameters()]

    def function(x, *weights):
        return functional_call(network, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_convolution_is_the_librarys_on_a_gpu_and_ours_on_a_cpu():
    x, layer = torch.randn(2, 2, 8, 8, requires_grad=True), layers.Conv2d(2, 3, 3)
    assert layer(x).grad_fn.name() == "_ConvolutionBackward"
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer.to("cuda")(x.to("cuda")).grad_fn.name() == "ConvolutionBackward0"


@pytest.mark.parametrize("pool", model.POOLS.values())
def test_pool_has_channels_innermost_on_a_cpu_alone_and_so_has_its_gradient(pool):
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    y = pool(2)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y, memory_format=torch.contiguous_format))
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert pool(2)(x.to("cuda")).is_contiguous()


def test_windows_are_pooled_with_channels_innermost_there_and_back(monkeypatch):
    # Beside the windows in a row the sides are 4 and 1, so that the library goes by the strides alone.
    strides, library = [], F.max_pool2d

    def pool(x, size):
        y = library(x, size)
        y.register_hook(lambda gradient: strides.append(gradient.stride()))
        strides.append(x.stride())
        return y

    monkeypatch.setattr(F, "max_pool2d", pool)
    y = layers.MaxPool2d(2).of_windows(torch.randn(2, 3, 4, 5, 6, requires_grad=True))
    y.backward(torch.ones(y.shape))
    assert [s[1:] for s in strides] == [(1, 30, 30), (1, 30, 30)]


def test_convolution_under_autocast_is_the_librarys_with_its_gradients_in_float32(draw):
    layer, x = layers.Conv2d(2, 3, 3), draw(2, 2, 8, 8).detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert (y.dtype, layer.weight.grad.dtype) == (torch.bfloat16, torch.float32)

"""The layers' own formulations against the library's operations: values, gradients, ties, NaN, vmap."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap

from lenet_sweep import layers

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


@pytest.mark.parametrize("padding", [0, 2])
def test_first_and_second_derivatives_of_the_convolution_are_those_of_finite_differences(draw, padding):
    layer = layers.Conv2d(2, 3, 3, padding=padding)
    tensors = draw(2, 2, 4, 3), draw(3, 2, 3, 3), draw(3)
    assert torch.autograd.gradcheck(functools.partial(convolution, layer), tensors)
    assert torch.autograd.gradgradcheck(functools.partial(convolution, layer), tensors)


@pytest.mark.parametrize("pool", [pool for pool, _ in POOLS])
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


def test_gradients_of_many_networks_at_once_are_those_of_each_alone(draw):
    network = nn.Sequential(layers.Conv2d(2, 3, 3, padding=1), layers.MaxPool2d(2), layers.AvgPool2d(2))
    x_RNCHW = draw(5, 2, 2, 8, 8).detach()
    weights = {"0.weight": draw(5, 3, 2, 3, 3).detach(), "0.bias": draw(5, 3).detach()}

    def loss(weights, x_NCHW):
        return functional_call(network, weights, (x_NCHW,)).square().sum()

    together = vmap(grad(loss))(weights, x_RNCHW)
    for run in range(5):
        alone = {name: weight[run].clone().requires_grad_() for name, weight in weights.items()}
        expected = torch.autograd.grad(loss(alone, x_RNCHW[run]), list(alone.values()))
        for name, gradient in zip(alone, expected, strict=True):
            torch.testing.assert_close(together[name][run], gradient)


LAYERS = [
    (functools.partial(layers.Conv2d, 2, 3, 3), "ConvolutionBackward0"),
    (functools.partial(layers.AvgPool2d, 2), "AvgPool2DBackward0"),
    (functools.partial(layers.MaxPool2d, 2), "MaxPool2DWithIndicesBackward0"),
]


@pytest.mark.parametrize(("make", "kernel"), LAYERS)
def test_gpu_takes_the_librarys_kernel_and_the_cpu_does_not(make, kernel):
    layer, x = make(), torch.randn(2, 2, 8, 8, requires_grad=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer.to("cuda")(x.to("cuda")).grad_fn.name() == kernel
    assert make()(x).grad_fn.name() != kernel


def test_convolution_under_autocast_is_the_librarys_with_its_gradients_in_float32(draw):
    layer, x = layers.Conv2d(2, 3, 3), draw(2, 2, 8, 8).detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert (y.dtype, layer.weight.grad.dtype) == (torch.bfloat16, torch.float32)

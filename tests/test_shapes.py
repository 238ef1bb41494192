"""The arithmetic of layer shapes, held against torch's own layers."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lenet_sweep import shapes
from lenet_sweep.shapes import ShapeError


@dataclass(frozen=True)
class Net:
    channels: tuple[int, ...] = (6, 16)
    kernel_size: int = 5
    padding: str = "first"
    hidden: tuple[int, ...] = (120, 84)


NETS = st.builds(
    Net,
    channels=st.lists(st.integers(1, 4), min_size=1, max_size=6).map(tuple),
    kernel_size=st.integers(1, 40),
    padding=st.sampled_from(["first", "all", "none"]),
    hidden=st.lists(st.integers(1, 5), max_size=4).map(tuple),
)
IMAGES = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40))


def test_lenet_has_the_tutorials_shapes():
    sizes = [layer.output_shape for layer in shapes.layers(Net(), (1, 28, 28), 10)]
    assert sizes == [
        (6, 28, 28), (6, 28, 28), (6, 14, 14), (16, 10, 10), (16, 10, 10), (16, 5, 5),
        (400,), (120,), (120,), (84,), (84,), (10,),
    ]  # fmt: skip


@settings(max_examples=300)
@given(NETS, IMAGES, st.integers(1, 12))
def test_shapes_are_torchs_and_refused_exactly_where_torch_fails_or_crops(net, image_shape, classes):
    expected = _by_torch(net, image_shape, classes)
    if expected is None:
        with pytest.raises(ShapeError):
            shapes.layers(net, image_shape, classes)
    else:
        assert [layer.output_shape for layer in shapes.layers(net, image_shape, classes)] == expected


@given(NETS)
def test_each_layer_takes_what_the_one_before_puts_out(net):
    try:
        stack = shapes.layers(net, (1, 28, 28), 10)
    except ShapeError:
        return
    assert stack[0].input_shape == (1, 28, 28)
    for before, after in pairwise(stack):
        assert after.input_shape == before.output_shape
    assert len({layer.name for layer in stack}) == len(stack)


@pytest.mark.parametrize(
    ("net", "told"),
    [
        (Net(kernel_size=99), "the input of conv2 is 14x14, so its kernel can be at most 14"),
        (
            Net(kernel_size=29, padding="none"),
            "the input of conv1 is 28x28, so its kernel can be at most 28",
        ),
        (Net(kernel_size=4), "the output of conv1 is 29x29"),
        (Net(channels=(6, 16, 32)), "the output of conv3 is 1x1"),
        (Net(channels=(1,) * 6, kernel_size=1, padding="all"), "the output of conv3 is 7x7"),
    ],
)
def test_refusal_names_the_layer_its_input_and_the_field(net, told):
    with pytest.raises(ShapeError, match=told) as caught:
        shapes.layers(net, (1, 28, 28), 10)
    assert hasattr(net, caught.value.field)


def _by_torch(net, image_shape, classes):
    """Shapes of a forward pass through torch's layers, without memory; None if one fails or a pool crops."""
    x_NCHW = torch.empty(1, *image_shape, device="meta")
    sizes = []

    def put(x):
        sizes.append(tuple(x.shape[1:]))
        return x

    for i, channels in enumerate(net.channels):
        padded = net.padding == "all" or (net.padding == "first" and i == 0)
        conv = nn.Conv2d(
            x_NCHW.shape[1], channels, net.kernel_size, padding=net.kernel_size // 2 * padded, device="meta"
        )
        try:
            x_NCHW = put(put(conv(x_NCHW)))  # the convolution, and its activation
            pooled_NCHW = nn.AvgPool2d(2)(x_NCHW)
        except RuntimeError:
            return None
        if x_NCHW.shape[2] != 2 * pooled_NCHW.shape[2] or x_NCHW.shape[3] != 2 * pooled_NCHW.shape[3]:
            return None
        x_NCHW = put(pooled_NCHW)
    x_NK = put(nn.Flatten()(x_NCHW))
    for width in net.hidden:
        x_NK = put(put(nn.Linear(x_NK.shape[1], width, device="meta")(x_NK)))
    put(nn.Linear(x_NK.shape[1], classes, device="meta")(x_NK))
    return sizes

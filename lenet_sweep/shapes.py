"""The layers of LeNet and their output shapes.

This module does not import torch, so an impossible network is refused before the slow imports.
`training.model` builds exactly these layers; `config.schema` refuses a network for which `layers` raises.
"""

import math
from dataclasses import dataclass
from typing import Protocol

# The same for all datasets. The input size of the first linear layer follows from it.
IMAGE_SHAPE = (1, 28, 28)  # channels, height, width
CLASSES = 10

POOL_SIZE = 2  # side of the pooling window, and its stride: each pool halves height and width


class Architecture(Protocol):
    """The config fields that determine the shapes; `config.schema.ModelConfig` has them."""

    @property
    def channels(self) -> tuple[int, ...]: ...
    @property
    def kernel_size(self) -> int: ...
    @property
    def padding(self) -> str: ...
    @property
    def hidden(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Layer:
    """One layer. `kind` is conv, activation, pool, flatten or linear; shapes are without the batch size."""

    name: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    padding: int = 0


class ShapeError(ValueError):
    """The layers do not fit the image. `field` is the config field to change."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def layers(net: Architecture, image_shape: tuple[int, int, int], classes: int) -> list[Layer]:
    """List the layers of `net` for images of `image_shape` (C, H, W).

    The last layer is linear with `classes` outputs and no activation.

    Raises:
        ShapeError: if a kernel is larger than its (padded) input, or if a pool would silently
            drop the last row or column of an odd height or width.
    """
    stack: list[Layer] = []
    shape: tuple[int, ...] = image_shape

    def add(name: str, kind: str, output_shape: tuple[int, ...], padding: int = 0) -> None:
        nonlocal shape
        stack.append(Layer(name, kind, shape, output_shape, padding))
        shape = output_shape

    for i, channels in enumerate(net.channels, start=1):
        padding = _padding(net, i)
        add(f"conv{i}", "conv", (channels, *_convolved(net.kernel_size, padding, shape[1:], i)), padding)
        add(f"act{i}", "activation", shape)
        add(f"pool{i}", "pool", (channels, *_pooled(shape[1:], i)))

    flat = shape[0] * shape[1] * shape[2]
    add("flatten", "flatten", (flat,))
    for i, width in enumerate(net.hidden, start=1):
        add(f"linear{i}", "linear", (width,))
        add(f"act{len(net.channels) + i}", "activation", shape)
    add(f"linear{len(net.hidden) + 1}", "linear", (classes,))
    return stack


def training_flops(net: Architecture, image_shape: tuple[int, int, int], classes: int) -> int:
    """Floating-point operations of one gradient step on one example.

    Counted are the matrix products of the forward pass and of the gradients of weights and layer inputs.
    The gradient of the image itself is not computed, so it is not counted.
    """
    products = []
    for layer in layers(net, image_shape, classes):
        outputs = math.prod(layer.output_shape)
        if layer.kind == "conv":
            products.append(outputs * layer.input_shape[0] * net.kernel_size**2)
        elif layer.kind == "linear":
            products.append(outputs * layer.input_shape[0])
    return 2 * (3 * sum(products) - products[0])


def _padding(net: Architecture, i: int) -> int:
    """Zeros added on each side by conv `i` (from 1): half a kernel keeps the image's size, or none."""
    padded = net.padding == "all" or (net.padding == "first" and i == 1)
    return net.kernel_size // 2 if padded else 0


def _convolved(kernel: int, padding: int, size: tuple[int, ...], i: int) -> tuple[int, ...]:
    largest = min(size) + 2 * padding
    if kernel > largest:
        padded = f" ({largest} with padding)" if padding else ""
        raise ShapeError(
            "kernel_size",
            f"the input of conv{i} is {size[0]}x{size[1]}{padded}, so its kernel can be at most {largest}; "
            "choose a smaller model.kernel_size or fewer model.channels",
        )
    return tuple(side + 2 * padding - kernel + 1 for side in size)


def _pooled(size: tuple[int, ...], i: int) -> tuple[int, ...]:
    if any(side % POOL_SIZE for side in size):
        raise ShapeError(
            "kernel_size",
            f"the output of conv{i} is {size[0]}x{size[1]}, "
            f"which a {POOL_SIZE}x{POOL_SIZE} pool would silently crop; "
            "choose another model.kernel_size, model.padding or number of model.channels",
        )
    return tuple(side // POOL_SIZE for side in size)

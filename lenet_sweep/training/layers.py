"""LeNet's layers: torch's own modules, in formulations that are faster on a CPU.

Values and gradients are the library's but for rounding; other devices call its kernels as they are.
Its convolutions compute 16 channels at once, used or not: where LeNet has fewer, neighbouring places of
an image are taken for further channels. Its pools, and the gradients of kernels, are several times as
fast with the channels innermost in memory; the gradients of images are not.

Shape suffixes: N examples, C channels in, O channels out, K side of a kernel, H height, W width,
P the four places of a pool's window in reading order, Q and R height and width of the pool's result,
L, M and S several of these in one.
"""

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

_BLOCK = 16  # channels that oneDNN computes at once, with AVX-512
# Activations that never fall: the greatest is that of the greatest sum.
_MONOTONE = (nn.Sigmoid, nn.Tanh, nn.ReLU, nn.LeakyReLU)


class Network(nn.Sequential):
    """Layers one after the other; a convolution, its activation and its pool in one go where that pays.

    Layers that have hooks are called one by one, so that the hooks see what they are registered for.
    """

    def forward(self, x_NCHW: Tensor) -> Tensor:
        layers, x = list(self), x_NCHW
        while layers:
            match layers:
                case [Conv2d() as conv, act, AvgPool2d() | MaxPool2d() as pool, *rest] if _are_one(layers, x):
                    x, layers = _pooled(conv, act, pool, x), rest
                case [layer, *rest]:
                    x, layers = layer(x), rest
        return x


class Conv2d(nn.Conv2d):
    """A convolution of stride 1 with a bias, in one group."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        # One channel lies the same in every layout, and images of one are the data, which do not learn.
        if self.in_channels == 1 or not _is_ours(x_NCHW):
            return super().forward(x_NCHW)
        y_NOHW: Tensor = _Convolution.apply(_innermost(x_NCHW), self.weight, self.bias, self.padding)
        return y_NOHW

    def makes_windows(self, x_NCHW: Tensor) -> bool:
        """Whether `windows` can be had, and pays: with more channels in, `forward` is the faster."""
        # Padding on both sides leaves even what is even.
        are_even = all((side - self.kernel_size[0] + 1) % 2 == 0 for side in x_NCHW.shape[-2:])
        return self.in_channels == 1 and are_even

    def windows(self, x_NCHW: Tensor) -> Tensor:
        """What `forward` gives, as NOPQR: a convolution of the pool's stride with the places as channels."""
        assert self.bias is not None
        weight, bias = _shifted(self.weight, 2, 2), self.bias.repeat_interleave(4)
        y_NMQR: Tensor = F.conv2d(x_NCHW, weight, bias, stride=2, padding=self.padding)
        return torch.unflatten(y_NMQR, 1, (-1, 4))


class AvgPool2d(nn.AvgPool2d):
    """The mean of each 2x2 window, in strides of 2."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return super().forward(_innermost(x_NCHW))

    def of_windows(self, x_NOPQR: Tensor) -> Tensor:
        """The same from `Conv2d.windows`."""
        return x_NOPQR.sum(2) * 0.25


class MaxPool2d(nn.MaxPool2d):
    """The maximum of each 2x2 window, in strides of 2: NaN if one is in it. The first of equals learns."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        maximum: Tensor = super().forward(_innermost(x_NCHW))
        return maximum

    def of_windows(self, x_NOPQR: Tensor) -> Tensor:
        """The same from `Conv2d.windows`: all windows are channels of images with the places as rows."""
        x_MP1L = x_NOPQR.flatten(3).flatten(0, 1).unsqueeze(2)
        # The kernel goes by the strides: the permutation back gives them to the gradient.
        pooled_ML11 = F.max_pool2d(x_MP1L.permute(0, 3, 1, 2), (x_NOPQR.shape[2], 1))
        return pooled_ML11.permute(0, 2, 3, 1).reshape(*x_NOPQR.shape[:2], *x_NOPQR.shape[3:])


def _are_one(layers: list[nn.Module], x_NCHW: Tensor) -> bool:
    """Whether `_pooled` may take the first three layers."""
    have_hooks = any(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
        for layer in layers[:3]
    )
    return _is_ours(x_NCHW) and not have_hooks


def _pooled(conv: Conv2d, activation: nn.Module, pool: AvgPool2d | MaxPool2d, x_NCHW: Tensor) -> Tensor:
    """pool(activation(conv(x)))"""
    in_windows = conv.makes_windows(x_NCHW)
    sums, reduce = (conv.windows(x_NCHW), pool.of_windows) if in_windows else (conv(x_NCHW), pool)
    if isinstance(pool, MaxPool2d) and isinstance(activation, _MONOTONE):
        pooled: Tensor = activation(reduce(sums))  # of a quarter of the values
    else:
        pooled = reduce(activation(sums))
    if pooled.requires_grad and not in_windows:
        # The backward passes take the layout of what comes; nothing comes in some second derivatives.
        pooled.register_hook(lambda gradient: gradient if gradient is None else _innermost(gradient))
    return pooled


def _is_ours(x_NCHW: Tensor) -> bool:
    """Whether the library's kernel is not the faster one: the bfloat16 of autocast is left to it."""
    return x_NCHW.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def _innermost(x_NCHW: Tensor) -> Tensor:
    """The same, on a CPU with the channels innermost in memory: vmap knows no other way to ask for that."""
    if x_NCHW.device.type != "cpu":
        return x_NCHW
    return x_NCHW.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _shifted(w_OCKK: Tensor, rows: int, columns: int) -> Tensor:
    """Kernels for `rows` x `columns` neighbouring places, in one of that many more rows and columns less one.

    Channel (o * rows + r) * columns + c of the result is channel o of the kernel, r down and c to the right.
    A kernel that holds an infinite number becomes NaN as a whole.
    """
    side = w_OCKK.shape[-1]
    where_LS = torch.from_numpy(_where_it_goes(side, rows, columns)).to(w_OCKK.dtype)
    w_OPCS = (w_OCKK.flatten(2) @ where_LS).unflatten(2, (rows * columns, -1)).transpose(1, 2)
    return torch.unflatten(w_OPCS.flatten(0, 1), 2, (side + rows - 1, side + columns - 1))


@functools.cache  # of arrays: a tensor would remember the transform of `fused` that it was made under
def _where_it_goes(side: int, rows: int, columns: int) -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
    """A 1 wherever a number of a kernel comes to lie: all shifts are one product, each of one number."""
    one_L1KK = np.eye(side**2, dtype=np.float32).reshape(-1, 1, side, side)
    places = [(row, column) for row in range(rows) for column in range(columns)]
    margins = [((0, 0), (0, 0), (r, rows - 1 - r), (c, columns - 1 - c)) for r, c in places]
    return np.concatenate([np.pad(one_L1KK, margin) for margin in margins], 1).reshape(side**2, -1)


class _Convolution(torch.autograd.Function):
    """F.conv2d, whose gradients oneDNN takes in little more than half the time in these formulations."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_NCHW: Tensor, w_OCKK: Tensor, b_O: Tensor, padding: tuple[int, int]) -> Tensor:
        return F.conv2d(x_NCHW, w_OCKK, b_O, padding=padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_NCHW, w_OCKK, _, ctx.padding = inputs
        ctx.save_for_backward(x_NCHW, w_OCKK)

    @staticmethod
    def backward(ctx: Any, g_NOHW: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_NCHW, w_OCKK = ctx.saved_tensors
        return (
            _input_gradient(g_NOHW.contiguous(), w_OCKK, x_NCHW.shape[-1], ctx.padding),
            conv2d_weight(x_NCHW, w_OCKK.shape, _innermost(g_NOHW), padding=ctx.padding),
            g_NOHW.sum((0, 2, 3)),
            None,
        )


def _input_gradient(g_NOHW: Tensor, w_OCKK: Tensor, width: int, padding: tuple[int, int]) -> Tensor:
    """The gradient of a convolution's input: a convolution with the kernels turned, two columns at once."""
    channels, kernel = w_OCKK.shape[1], w_OCKK.shape[-1]
    if width % 2 or 2 * channels > _BLOCK or max(padding) >= kernel:
        return F.conv_transpose2d(g_NOHW, w_OCKK, padding=padding)
    pairs = _shifted(w_OCKK.flip(2, 3).transpose(0, 1), 1, 2)
    pairs_NMHW = F.conv2d(g_NOHW, pairs, stride=(1, 2), padding=tuple(kernel - 1 - p for p in padding))
    return torch.unflatten(pairs_NMHW, 1, (-1, 2)).movedim(2, -1).flatten(-2)

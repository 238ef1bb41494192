"""The layers of LeNet: subclasses of torch's modules that are faster on a CPU.

Values and gradients equal those of torch up to rounding. Other devices use torch's kernels unchanged. Two
properties of torch's CPU library (oneDNN) make these formulations faster:

- Convolutions always compute 16 output channels at once. LeNet has fewer, so neighbouring positions of an
  image are computed as additional channels.
- Pools and weight gradients are several times as fast in channels-last memory format. Gradients of inputs
  are not.

Shape suffixes: N examples, C input channels, O output channels, K side of a kernel, H height, W width,
P the four positions of a pooling window in reading order, Q and R height and width of the pooled output,
L, M and S products of several of these.
"""

import functools
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

_BLOCK = 16  # channels that oneDNN computes at once with AVX-512
# Non-decreasing activations: max(activation(x)) == activation(max(x)).
_MONOTONE = (nn.Sigmoid, nn.Tanh, nn.ReLU, nn.LeakyReLU)


class Pool(Protocol):
    """A pool over 2x2 windows with stride 2, as `Network` uses it.

    A new pool is an `nn.Module` with these two methods, which must agree up to rounding. Its constructor
    takes the side of the window. It also needs its name in `config.schema.Pool` and `model.POOLS`, a struct
    in native.cpp, and the struct's name in `compiler.NATIVE_POOLS`. A test fails if one of them is missing.
    """

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Pool a feature map of even height and width."""

    def of_windows(self, x_NOPQR: Tensor) -> Tensor:
        """Pool the windows that `Conv2d.windows` returns: reduce dimension 2."""


class Network(nn.Sequential):
    """A sequence of layers. Convolution, activation and pool are computed together on a CPU.

    Layers with hooks are called one by one, so that the hooks are called with the usual inputs and outputs.
    """

    def forward(self, x_NCHW: Tensor) -> Tensor:
        layers, x = list(self), x_NCHW
        while layers:
            match layers:
                case [Conv2d() as conv, act, pool, *rest] if _is_pool(pool) and _can_merge(layers, x):
                    x, layers = _merged_forward(conv, act, pool, x), rest
                case [layer, *rest]:
                    x, layers = layer(x), rest
        return x


class Conv2d(nn.Conv2d):
    """A convolution with stride 1, a bias and one group."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        # With one input channel both memory formats are the same, and the input is usually the images, which
        # need no gradient.
        if self.in_channels == 1 or not _is_faster_here(x_NCHW):
            return super().forward(x_NCHW)
        y_NOHW: Tensor = _Convolution.apply(_channels_last(x_NCHW), self.weight, self.bias, self.padding)
        return y_NOHW

    @property
    def prefers_windows(self) -> bool:
        """Whether `windows` is faster than `forward`, which it is for one input channel."""
        return self.in_channels == 1

    def windows(self, x_NCHW: Tensor) -> Tensor:
        """The output of `forward`, split into 2x2 windows: NOPQR.

        Computed as one convolution with stride 2 whose channels are the four positions of a window.
        """
        assert self.bias is not None
        weight, bias = _shifted_kernels(self.weight, 2, 2), self.bias.repeat_interleave(4)
        y_NMQR: Tensor = F.conv2d(x_NCHW, weight, bias, stride=2, padding=self.padding)
        return torch.unflatten(y_NMQR, 1, (-1, 4))


class AvgPool2d(nn.AvgPool2d):
    """The mean of each 2x2 window, with stride 2. A `Pool`."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return super().forward(_channels_last(x_NCHW))

    def of_windows(self, x_NOPQR: Tensor) -> Tensor:
        """The mean of each window of `Conv2d.windows`."""
        return x_NOPQR.sum(2) * 0.25


class MaxPool2d(nn.MaxPool2d):
    """The maximum of each 2x2 window, with stride 2. A `Pool`.

    The maximum is NaN if the window contains NaN. Of equal values, the first gets the gradient.
    """

    def forward(self, x_NCHW: Tensor) -> Tensor:
        maximum: Tensor = super().forward(_channels_last(x_NCHW))
        return maximum

    def of_windows(self, x_NOPQR: Tensor) -> Tensor:
        """The maximum of each window of `Conv2d.windows`: a pool over P rows; the windows are channels."""
        x_MP1L = x_NOPQR.flatten(3).flatten(0, 1).unsqueeze(2)
        # torch selects its kernel by the strides. The inverse permutation restores them for the gradient.
        pooled_ML11 = F.max_pool2d(x_MP1L.permute(0, 3, 1, 2), (x_NOPQR.shape[2], 1))
        return pooled_ML11.permute(0, 2, 3, 1).reshape(*x_NOPQR.shape[:2], *x_NOPQR.shape[3:])


def _is_pool(layer: nn.Module) -> TypeGuard[Pool]:
    return hasattr(layer, "of_windows")


def _can_merge(layers: list[nn.Module], x_NCHW: Tensor) -> bool:
    """Whether `_merged_forward` may compute the first three layers."""
    have_hooks = any(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
        for layer in layers[:3]
    )
    return _is_faster_here(x_NCHW) and not have_hooks


def _merged_forward(conv: Conv2d, activation: nn.Module, pool: Pool, x_NCHW: Tensor) -> Tensor:
    """Compute pool(activation(conv(x)))."""
    in_windows = conv.prefers_windows
    z, reduce = (conv.windows(x_NCHW), pool.of_windows) if in_windows else (conv(x_NCHW), pool.forward)
    if isinstance(pool, MaxPool2d) and isinstance(activation, _MONOTONE):
        pooled: Tensor = activation(reduce(z))  # the activation of a quarter of the values
    else:
        pooled = reduce(activation(z))
    if pooled.requires_grad and not in_windows:
        # The backward passes use the memory format of the incoming gradient. In some second derivatives there
        # is no gradient.
        pooled.register_hook(lambda gradient: gradient if gradient is None else _channels_last(gradient))
    return pooled


def _is_faster_here(x_NCHW: Tensor) -> bool:
    """Whether these formulations are faster than torch's: on a CPU, except in bfloat16 under autocast."""
    return x_NCHW.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def _channels_last(x_NCHW: Tensor) -> Tensor:
    """Convert to channels-last memory format, on a CPU only. vmap does not support `memory_format=`."""
    if x_NCHW.device.type != "cpu":
        return x_NCHW
    return x_NCHW.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _shifted_kernels(w_OCKK: Tensor, rows: int, columns: int) -> Tensor:
    """Kernels that compute `rows` x `columns` neighbouring outputs of a convolution as channels.

    They have K + rows - 1 rows and K + columns - 1 columns. Output channel (o * rows + r) * columns + c is
    kernel o, shifted down by r and right by c, and zero outside. All values of a kernel become NaN if one of
    them is infinite.
    """
    side = w_OCKK.shape[-1]
    shifts_LS = torch.from_numpy(_shift_matrix(side, rows, columns)).to(w_OCKK.dtype)
    w_OPCS = (w_OCKK.flatten(2) @ shifts_LS).unflatten(2, (rows * columns, -1)).transpose(1, 2)
    return torch.unflatten(w_OPCS.flatten(0, 1), 2, (side + rows - 1, side + columns - 1))


@functools.cache  # NumPy arrays: a cached tensor would belong to the vmap call that created it
def _shift_matrix(side: int, rows: int, columns: int) -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
    """The 0-1 matrix that maps a flat kernel to all its shifts; every product has one nonzero term."""
    one_L1KK = np.eye(side**2, dtype=np.float32).reshape(-1, 1, side, side)
    shifts = [(row, column) for row in range(rows) for column in range(columns)]
    margins = [((0, 0), (0, 0), (r, rows - 1 - r), (c, columns - 1 - c)) for r, c in shifts]
    return np.concatenate([np.pad(one_L1KK, margin) for margin in margins], 1).reshape(side**2, -1)


class _Convolution(torch.autograd.Function):
    """F.conv2d with a faster backward pass: little more than half the time of torch's."""

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
            conv2d_weight(x_NCHW, w_OCKK.shape, _channels_last(g_NOHW), padding=ctx.padding),
            g_NOHW.sum((0, 2, 3)),
            None,
        )


def _input_gradient(g_NOHW: Tensor, w_OCKK: Tensor, width: int, padding: tuple[int, int]) -> Tensor:
    """The input gradient of a convolution: a convolution with rotated kernels, two columns at once."""
    channels, kernel = w_OCKK.shape[1], w_OCKK.shape[-1]
    if width % 2 or 2 * channels > _BLOCK or max(padding) >= kernel:
        return F.conv_transpose2d(g_NOHW, w_OCKK, padding=padding)
    pairs = _shifted_kernels(w_OCKK.flip(2, 3).transpose(0, 1), 1, 2)
    pairs_NMHW = F.conv2d(g_NOHW, pairs, stride=(1, 2), padding=tuple(kernel - 1 - p for p in padding))
    return torch.unflatten(pairs_NMHW, 1, (-1, 2)).movedim(2, -1).flatten(-2)

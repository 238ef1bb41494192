"""LeNet's convolutions and pools: torch's own modules, in formulations that are faster on a CPU.

On other devices, and where a formulation does not apply, the library's kernels are called. Values and
gradients are the library's but for rounding.

Shape suffixes: N examples, C channels in, O channels out, K side of a kernel, H height, W width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight


class Conv2d(nn.Conv2d):
    """A convolution of stride 1 with a bias, in one group."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        # One channel lies the same in every layout; the bfloat16 of autocast is left to the library.
        if x_NCHW.device.type != "cpu" or self.in_channels == 1 or torch.is_autocast_enabled("cpu"):
            return super().forward(x_NCHW)
        y_NOHW: Tensor = _Convolution.apply(x_NCHW, self.weight, self.bias, self.padding)
        return y_NOHW


class AvgPool2d(nn.AvgPool2d):
    """The mean of each 2x2 window, in strides of 2."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if not _can_be_halved(x_NCHW):
            return super().forward(x_NCHW)
        left, right = _columns(torch.add(*_rows(x_NCHW)))
        mean: Tensor = (left + right) * 0.25
        return mean


class MaxPool2d(nn.MaxPool2d):
    """The maximum of each 2x2 window, in strides of 2: NaN if one is in it. The first of equals learns."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if not _can_be_halved(x_NCHW):
            library: Tensor = super().forward(x_NCHW)
            return library
        # Columns before rows, so that the first of equals is the library's: in reading order.
        of_columns: Tensor = _Maximum.apply(*_columns(x_NCHW))
        of_windows: Tensor = _Maximum.apply(*_rows(of_columns))
        return of_windows


def _can_be_halved(x_NCHW: Tensor) -> bool:
    height, width = x_NCHW.shape[-2:]
    return x_NCHW.device.type == "cpu" and height % 2 == width % 2 == 0


# The backward of unbind is one copy; that of a strided slice clears a whole image first.
def _rows(x_NCHW: Tensor) -> tuple[Tensor, ...]:
    """The even and the odd rows."""
    pair: tuple[Tensor, ...] = x_NCHW.unflatten(-2, (-1, 2)).unbind(-2)
    return pair


def _columns(x_NCHW: Tensor) -> tuple[Tensor, ...]:
    """The even and the odd columns."""
    pair: tuple[Tensor, ...] = x_NCHW.unflatten(-1, (-1, 2)).unbind(-1)
    return pair


class _Maximum(torch.autograd.Function):
    """torch.maximum, but of equals the first learns, as in a pool; there, both would by half."""

    generate_vmap_rule = True

    @staticmethod
    def forward(first: Tensor, second: Tensor) -> Tensor:
        return torch.maximum(first, second)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        first, second = ctx.saved_tensors
        # ReLU's backward is vectorised; a mask of bools costs five times as much.
        to_second = torch.ops.aten.threshold_backward(gradient, second - first, 0)
        return gradient - to_second, to_second


class _Convolution(torch.autograd.Function):
    """F.conv2d, whose weight gradient oneDNN takes in half the time from channels that lie innermost."""

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
        innermost = x_NCHW.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return (
            F.conv_transpose2d(g_NOHW, w_OCKK, padding=ctx.padding),
            conv2d_weight(innermost, w_OCKK.shape, g_NOHW, padding=ctx.padding),
            g_NOHW.sum((0, 2, 3)),
            None,
        )

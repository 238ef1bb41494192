"""Activations and class probabilities of a trained network, and its most confident errors.

Shape suffixes: N examples, C channels, H height, W width, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lenet_sweep.training.backend import forward
from lenet_sweep.training.data import Split, scaled

_ERRORS = 2_000  # errors whose probabilities are computed; an untrained network makes 9,000 in all


@dataclass(frozen=True)
class ConfidentError:
    """A misclassified example, and the probability of the predicted class."""

    image_HW: Tensor  # uint8
    label: int
    predicted: int
    probability: float


@dataclass(frozen=True)
class ActivationStats:
    """The activations and the confidence of a network on images of one kind."""

    kind: str
    values: dict[str, Tensor]  # name of an activation layer -> its outputs for all images, flat
    confidence_N: Tensor  # probability of the predicted class

    def mean(self, layer: str) -> float:
        """The mean activation of a layer."""
        return float(self.values[layer].mean())


@torch.no_grad()
def probabilities(network: nn.Sequential, images_NCHW: Tensor) -> Tensor:
    """The class probabilities (softmax), NK, for uint8 images. Sets the network to eval mode."""
    network.eval()
    return torch.cat([forward(network, part).softmax(1) for part in images_NCHW.split(1000)])


@torch.no_grad()
def activations(network: nn.Sequential, images_NCHW: Tensor) -> dict[str, Tensor]:
    """The output of every layer for uint8 images, by layer name. Sets the network to eval mode."""
    network.eval()
    x = scaled(images_NCHW, next(network.parameters()).dtype)
    return {name: (x := layer(x)) for name, layer in network.named_children()}


def one_of_each(examples: Split, classes: int) -> Tensor:
    """The first example of each class, uint8 KCHW."""
    first = [int((examples.labels_N == k).nonzero()[0]) for k in range(classes)]
    return examples.images_NCHW[first]


def per_class(counts: Sequence[Sequence[int]]) -> list[float]:
    """The recall of each class; `counts[i][j]` examples of class i were classified as j."""
    return [row[k] / max(sum(row), 1) for k, row in enumerate(counts)]


def confident_errors(
    network: nn.Sequential, examples: Split, predicted_N: Tensor, limit: int
) -> list[ConfidentError]:
    """At most `limit` errors, the most confident first, from the first 2,000 errors of `predicted_N`."""
    wrong_N = (predicted_N != examples.labels_N).nonzero().flatten()[:_ERRORS]
    if not len(wrong_N):
        return []
    images_NCHW, labels_N = examples.images_NCHW[wrong_N], examples.labels_N[wrong_N]
    classes_N = predicted_N[wrong_N]
    confidence_N = probabilities(network, images_NCHW).gather(1, classes_N.unsqueeze(1)).flatten()
    return [
        ConfidentError(images_NCHW[i, 0].cpu(), int(labels_N[i]), int(classes_N[i]), float(confidence_N[i]))
        for i in confidence_N.argsort(descending=True)[:limit].tolist()
    ]


def collect_stats(network: nn.Sequential, kind: str, images_NCHW: Tensor) -> ActivationStats:
    """The activations and the confidence of `network` on these uint8 images."""
    outputs = activations(network, images_NCHW)
    values = {name: x.flatten() for name, x in outputs.items() if name.startswith("act")}
    return ActivationStats(kind, values, probabilities(network, images_NCHW).amax(1))

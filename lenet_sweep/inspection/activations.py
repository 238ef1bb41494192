"""What a trained network does inside: activations, probabilities, and where it is surest and wrong.

Shape suffixes: N examples, C channels, H height, W width, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lenet_sweep.training.backend import forward
from lenet_sweep.training.data import Split, scaled

_LOOKED_AT = 2_000  # mistakes whose probabilities are taken; a network that guesses makes 9,000


@dataclass(frozen=True)
class ConfidentError:
    """A test example that was taken for another class, and how probable the network found that one."""

    image_HW: Tensor  # uint8
    label: int
    predicted: int
    probability: float


@dataclass(frozen=True)
class ActivationStats:
    """How a network takes pictures of one kind. Layers are named as in the network."""

    kind: str
    values: dict[str, Tensor]  # layer -> what it puts out for all pictures, flat
    surest: Tensor  # probability of the likeliest class, N

    def mean(self, layer: str) -> float:
        """The mean activation."""
        return float(self.values[layer].mean())


@torch.no_grad()
def probabilities(network: nn.Sequential, images_NCHW: Tensor) -> Tensor:
    """Softmax over the classes, NK, for uint8 images, in eval mode."""
    network.eval()
    return torch.cat([forward(network, part).softmax(1) for part in images_NCHW.split(1000)])


@torch.no_grad()
def activations(network: nn.Sequential, images_NCHW: Tensor) -> dict[str, Tensor]:
    """What every layer puts out for uint8 images, by the layer's name, in eval mode."""
    network.eval()
    x = scaled(images_NCHW, next(network.parameters()).dtype)
    return {name: (x := layer(x)) for name, layer in network.named_children()}


def one_of_each(examples: Split, classes: int) -> Tensor:
    """The first example of each class, uint8 KCHW."""
    first = [int((examples.labels_N == k).nonzero()[0]) for k in range(classes)]
    return examples.images_NCHW[first]


def per_class(counts: Sequence[Sequence[int]]) -> list[float]:
    """The share of each class's examples that were recognised, from a confusion matrix."""
    return [row[k] / max(sum(row), 1) for k, row in enumerate(counts)]


def confident_errors(
    network: nn.Sequential, examples: Split, predicted_N: Tensor, most: int
) -> list[ConfidentError]:
    """The wrong predictions that the network was surest of, the surest first (of the first 2,000)."""
    wrong = (predicted_N != examples.labels_N).nonzero().flatten()[:_LOOKED_AT]
    if not len(wrong):
        return []
    labels, taken_for = examples.labels_N[wrong], predicted_N[wrong]
    all_NK = probabilities(network, examples.images_NCHW[wrong])
    sure = all_NK.gather(1, taken_for.unsqueeze(1)).flatten()
    return [
        ConfidentError(
            examples.images_NCHW[wrong[i], 0].cpu(), int(labels[i]), int(taken_for[i]), float(sure[i])
        )
        for i in sure.argsort(descending=True)[:most].tolist()
    ]


def reaction(network: nn.Sequential, kind: str, images_NCHW: Tensor) -> ActivationStats:
    """How `network` takes these uint8 images."""
    outputs = activations(network, images_NCHW)
    values = {name: x.flatten() for name, x in outputs.items() if name.startswith("act")}
    return ActivationStats(kind, values, probabilities(network, images_NCHW).amax(1))

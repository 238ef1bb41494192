"""LeNet of any size, as an `nn.Sequential` with named layers.

Shape suffixes: N examples, C channels, H height, W width, K classes.
"""

import math
from collections import OrderedDict

import torch
from torch import nn

from lenet_sweep import shapes
from lenet_sweep.config.schema import ModelConfig
from lenet_sweep.shapes import CLASSES, IMAGE_SHAPE
from lenet_sweep.training import layers

# The modules of the names in `config.schema`. `layers.Pool` describes what a new pool needs.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
POOLS: dict[str, type[nn.Module]] = {"avg": layers.AvgPool2d, "max": layers.MaxPool2d}


def build(config: ModelConfig, generator: torch.Generator) -> nn.Sequential:
    """Build the network on the CPU. It maps float32 images NCHW in [0, 1] to logits NK.

    All parameters are drawn from `generator`, layer by layer, the weight before the bias. torch's global
    generator is not used.
    """
    network = layers.Network(
        OrderedDict(
            (layer.name, _module(layer, config)) for layer in shapes.layers(config, IMAGE_SHAPE, CLASSES)
        )
    )
    for module in network:
        if isinstance(module, nn.Conv2d | nn.Linear):
            _initialise(module, config.init, generator)
    return network


def _module(layer: shapes.Layer, config: ModelConfig) -> nn.Module:
    inputs, outputs = layer.input_shape[0], layer.output_shape[0]
    # skip_init, because torch's default initialisation uses the global generator.
    match layer.kind:
        case "conv":
            conv = nn.utils.skip_init(
                layers.Conv2d, inputs, outputs, config.kernel_size, padding=layer.padding
            )
            assert isinstance(conv, layers.Conv2d)
            return conv
        case "activation":
            return ACTIVATIONS[config.activation]()
        case "pool":
            return POOLS[config.pool](shapes.POOL_SIZE)
        case "flatten":
            return nn.Flatten()
        case "linear":
            linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
            assert isinstance(linear, nn.Linear)
            return linear
    raise AssertionError(layer.kind)


def _initialise(module: nn.Conv2d | nn.Linear, init: str, generator: torch.Generator) -> None:
    """Initialise weight and bias of a layer.

    Xavier: Glorot and Bengio, AISTATS 2010. Kaiming: He et al., ICCV 2015. 'pytorch' and all biases: the
    default of torch.nn.
    """
    weight, bias = module.weight, module.bias
    assert bias is not None
    match init:
        case "xavier_uniform":
            nn.init.xavier_uniform_(weight, generator=generator)
        case "xavier_normal":
            nn.init.xavier_normal_(weight, generator=generator)
        case "kaiming_uniform":
            nn.init.kaiming_uniform_(weight, nonlinearity="relu", generator=generator)
        case "kaiming_normal":
            nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
        case "pytorch":
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        case _:
            raise AssertionError(init)
    bound = 1 / math.sqrt(weight[0].numel())  # fan-in
    nn.init.uniform_(bias, -bound, bound, generator=generator)

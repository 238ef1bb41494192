"""A run's network at work on other pictures: what it takes them for, and what they set off inside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lenet_sweep.config import parsing
from lenet_sweep.config.schema import Config, DataConfig
from lenet_sweep.datasets import download
from lenet_sweep.datasets.catalog import DATASETS
from lenet_sweep.errors import ConfigError, DataError
from lenet_sweep.inspection import activations
from lenet_sweep.inspection.activations import ActivationStats
from lenet_sweep.inspection.images import read
from lenet_sweep.tracking.base import Store
from lenet_sweep.tracking.stored import stored
from lenet_sweep.training import model
from lenet_sweep.training.data import load_data
from lenet_sweep.training.randomness import generator

_WEIGHTS = "model/weights.safetensors"


@dataclass(frozen=True)
class TrainedModel:
    """A run's network with its final weights, on the CPU."""

    name: str
    config: Config
    network: nn.Sequential

    @property
    def class_names(self) -> tuple[str, ...]:
        return DATASETS[self.config.data.name].classes


@dataclass(frozen=True)
class Prediction:
    """A picture as the network saw it, and the probability of every class, the likeliest first."""

    path: Path
    image_CHW: Tensor  # uint8
    classes: tuple[tuple[str, float], ...]


def load(name: str, store: Store) -> TrainedModel:
    """The network of the run `name`: a folder, a config.yaml, or an id in `store`.

    What is stored may come from anywhere: the config is read as values, the weights as tensors.

    Raises:
        ConfigError: if there is no such run, it has no weights, or its config is none.
        DataError: if its weights are damaged, or another network's.
        TrackingError: if the store cannot be asked.
    """
    with stored(name, store, ("config.yaml", _WEIGHTS)) as (folder, run, _):
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"{name!r}: holds no run (there is no {folder / 'config.yaml'})")
        config = parsing.load(folder / "config.yaml")
        if not (folder / _WEIGHTS).is_file():
            raise ConfigError(f"{run}: has no weights; it did not reach its end")
        try:
            weights = load_file(folder / _WEIGHTS)
        except (OSError, SafetensorError, ValueError) as error:
            raise DataError(f"{run}: its weights are damaged: {error}") from error
    network = model.build(config.model, generator(0, "init"))
    mine = network.state_dict()
    if {k: (t.shape, t.dtype) for k, t in weights.items()} != {
        k: (t.shape, t.dtype) for k, t in mine.items()
    }:
        raise DataError(f"{run}: its weights are those of another network than its config's")
    network.load_state_dict(weights)
    return TrainedModel(run, config, network.eval())


def activation_stats(trained: TrainedModel, root: Path, most: int = 1000) -> list[ActivationStats]:
    """How the network takes test pictures, the same inverted, noise, and another dataset's test pictures.

    `root` is where datasets lie. The network's own is fetched if it is missing; another is left out.

    Raises:
        DataError: if no source has the network's own dataset.
    """
    own = _test_images(trained.config.data.name, root)[:most]
    noise = torch.randint(256, own.shape, dtype=torch.uint8, generator=generator(0, "noise"))
    kinds = {"test pictures": own, "inverted": 255 - own, "noise": noise}
    for other, title in (("mnist", "digits"), ("fashion_mnist", "clothes")):
        if not trained.config.data.name.startswith(other) and download.is_downloaded(other, root):
            kinds[title] = _test_images(other, root)[:most]
    return [activations.reaction(trained.network, kind, images) for kind, images in kinds.items()]


def _test_images(name: str, root: Path) -> Tensor:
    config = DataConfig(name=name, root=str(root), train_size=None, val_size=0)  # type: ignore[arg-type]
    return load_data(config, 0, torch.device("cpu")).test.images_NCHW


def classify(trained: TrainedModel, paths: Sequence[Path]) -> list[Prediction]:
    """What the network takes the pictures in `paths` for.

    Raises:
        ConfigError: if one of them is no picture, shows nothing, or is too large.
    """
    images = torch.stack([read(path, trained.config.data.name) for path in paths])
    all_NK = activations.probabilities(trained.network, images)
    return [
        Prediction(
            path, image, tuple((trained.class_names[k], float(row[k])) for k in row.argsort(descending=True))
        )
        for path, image, row in zip(paths, images, all_NK, strict=True)
    ]


def feature_maps(
    trained: TrainedModel, found: Sequence[Prediction]
) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """The pictures, uint8 NHW, and what the first two convolutions' activations make of them, NCHW."""
    images = torch.stack([prediction.image_CHW for prediction in found])
    outputs = activations.activations(trained.network, images)
    shown = [f"act{i}" for i in range(1, min(2, len(trained.config.model.channels)) + 1)]
    return images[:, 0], [(name, outputs[name]) for name in shown]

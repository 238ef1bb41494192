"""The network of a finished run applied to new images: predictions, feature maps, activation statistics."""

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
    """The network of a run with its final weights, on the CPU and in eval mode."""

    name: str
    config: Config
    network: nn.Sequential

    @property
    def class_names(self) -> tuple[str, ...]:
        return DATASETS[self.config.data.name].classes


@dataclass(frozen=True)
class Prediction:
    """The classes of an image with their probabilities, the most likely class first."""

    path: Path
    image_CHW: Tensor  # uint8, as the network received it
    classes: tuple[tuple[str, float], ...]


def load(name: str, store: Store) -> TrainedModel:
    """The network of the run `name`: a folder, a config.yaml, or an id in `store`.

    The stored files are not trusted: the config is read as plain values and the weights as tensors, so
    neither can execute code.

    Raises:
        ConfigError: if the run does not exist, has no weights, or has an invalid config.
        DataError: if the weights are damaged, or do not fit the network of the config.
        TrackingError: if the store cannot be reached.
    """
    with stored(name, store, ("config.yaml", _WEIGHTS)) as (folder, run, _):
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"{name!r}: contains no run (there is no {folder / 'config.yaml'})")
        config = parsing.load(folder / "config.yaml")
        if not (folder / _WEIGHTS).is_file():
            raise ConfigError(f"{run}: has no weights, because it did not finish")
        try:
            weights = load_file(folder / _WEIGHTS)
        except (OSError, SafetensorError, ValueError) as error:
            raise DataError(f"{run}: the weights are damaged: {error}") from error
    network = model.build(config.model, generator(0, "init"))
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in network.state_dict().items()}
    if {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()} != expected:
        raise DataError(f"{run}: the weights belong to another network than the config")
    network.load_state_dict(weights)
    return TrainedModel(run, config, network.eval())


def activation_stats(trained: TrainedModel, root: Path, limit: int = 1000) -> list[ActivationStats]:
    """Activations on test images and out of distribution: inverted, noise, and another dataset's test images.

    At most `limit` images of each kind are used. The run's own dataset is downloaded to `root` if it is
    missing; another dataset is used only if it is there.

    Raises:
        DataError: if the run's own dataset cannot be downloaded.
    """
    own = _test_images(trained.config.data.name, root)[:limit]
    noise = torch.randint(256, own.shape, dtype=torch.uint8, generator=generator(0, "noise"))
    kinds = {"test images": own, "inverted": 255 - own, "noise": noise}
    for other, title in (("mnist", "digits"), ("fashion_mnist", "clothes")):
        if not trained.config.data.name.startswith(other) and download.is_downloaded(other, root):
            kinds[title] = _test_images(other, root)[:limit]
    return [activations.collect_stats(trained.network, kind, images) for kind, images in kinds.items()]


def _test_images(name: str, root: Path) -> Tensor:
    config = DataConfig(name=name, root=str(root), train_size=None, val_size=0)  # type: ignore[arg-type]
    return load_data(config, 0, torch.device("cpu")).test.images_NCHW


def classify(trained: TrainedModel, paths: Sequence[Path]) -> list[Prediction]:
    """Predictions for the image files in `paths`.

    Raises:
        ConfigError: if one of them is not a readable image, is blank, or is too large.
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
    trained: TrainedModel, predictions: Sequence[Prediction]
) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """The images, uint8 NHW, and for each of the first two activation layers its name and outputs, NCHW."""
    images = torch.stack([prediction.image_CHW for prediction in predictions])
    outputs = activations.activations(trained.network, images)
    shown = [f"act{i}" for i in range(1, min(2, len(trained.config.model.channels)) + 1)]
    return images[:, 0], [(name, outputs[name]) for name in shown]

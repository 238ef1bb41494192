"""The catalogue of datasets: files, sizes, SHA-256 checksums and class names.

Sizes and checksums are those of the unpacked IDX files. The download sources are in `datasets.sources`.
"""

from dataclasses import dataclass
from typing import TypeVar

from lenet_sweep.config.schema import TRAIN_EXAMPLES

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class Dataset:
    """One dataset, with what is needed to verify its files."""

    name: str
    folder: str  # below the data root, in torchvision's layout, so that its downloads are reused
    classes: tuple[str, ...]  # classes[i] is the name of label i
    sizes: dict[str, int]  # file name -> bytes, unpacked
    sha256: dict[str, str]  # file name -> hex digest, unpacked
    packed_bytes: int  # approximate size of a download, for the progress bar only


T = TypeVar("T")


def _by_file(*values: T) -> dict[str, T]:
    return dict(zip(FILES, values, strict=True))


def _sizes(train: int, test: int) -> dict[str, int]:
    """File sizes in bytes: a header of 16 or 8 bytes, then 28x28 bytes an image or 1 byte a label."""
    return _by_file(16 + 784 * train, 8 + train, 16 + 784 * test, 8 + test)


CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"

DATASETS = {
    "fashion_mnist": Dataset(
        name="fashion_mnist",
        folder="FashionMNIST/raw",
        classes=tuple(CLOTHES.split(",")),
        sizes=_sizes(TRAIN_EXAMPLES["fashion_mnist"], 10_000),
        sha256=_by_file(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        packed_bytes=30_900_000,
    ),
    "mnist": Dataset(
        name="mnist",
        folder="MNIST/raw",
        classes=tuple("0123456789"),
        sizes=_sizes(TRAIN_EXAMPLES["mnist"], 10_000),
        sha256=_by_file(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        packed_bytes=11_600_000,
    ),
    # The first 200 training and 50 test images of each class of Fashion-MNIST (tools/make_mini.py).
    "fashion_mnist_mini": Dataset(
        name="fashion_mnist_mini",
        folder="FashionMNISTMini/raw",
        classes=tuple(CLOTHES.split(",")),
        sizes=_sizes(TRAIN_EXAMPLES["fashion_mnist_mini"], 500),
        sha256=_by_file(
            "a724cd72799a6b1c3a81c4263865a75a73bb6473673b3394e34adf222930f19e",
            "4738fd437c0f8d6498ae7f6f5c86f1cc3c878d4116ff169fc5635bd6847899cc",
            "8fdf02ada67d92f4db5ba3c2f6c5b1cc6186ba6e0efd4914661e4389e103b81e",
            "9c71808b3a0ebfc091442c0009a7aa35be2d9622bf6aaf6891ce9a0088e96c07",
        ),
        packed_bytes=1_100_000,
    ),
}

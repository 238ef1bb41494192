"""TODO datasets.catalog."""

from dataclasses import dataclass
from typing import TypeVar

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class Dataset:
    """What a dataset is made of, and what its files must be."""

    name: str
    folder: str  # below the data root; torchvision's layout, so that its downloads are found
    classes: tuple[str, ...]  # class i is called classes[i]
    sizes: dict[str, int]  # bytes of each unpacked file
    sha256: dict[str, str]  # of each unpacked file
    packed_bytes: int  # about what a source sends in all; only scales the progress bar


T = TypeVar("T")


def _by_file(*values: T) -> dict[str, T]:
    return dict(zip(FILES, values, strict=True))


FULL_SIZES = _by_file(47_040_016, 60_008, 7_840_016, 10_008)
CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"

DATASETS = {
    "fashion_mnist": Dataset(
        name="fashion_mnist",
        folder="FashionMNIST/raw",
        classes=tuple(CLOTHES.split(",")),
        sizes=FULL_SIZES,
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
        sizes=FULL_SIZES,
        sha256=_by_file(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        packed_bytes=11_600_000,
    ),
    # The first 200 (train) and 50 (test) images of each class of Fashion-MNIST, made by tools/make_mini.py.
    "fashion_mnist_mini": Dataset(
        name="fashion_mnist_mini",
        folder="FashionMNISTMini/raw",
        classes=tuple(CLOTHES.split(",")),
        sizes=_by_file(1_568_016, 2_008, 392_016, 508),
        sha256=_by_file(
            "a724cd72799a6b1c3a81c4263865a75a73bb6473673b3394e34adf222930f19e",
            "4738fd437c0f8d6498ae7f6f5c86f1cc3c878d4116ff169fc5635bd6847899cc",
            "8fdf02ada67d92f4db5ba3c2f6c5b1cc6186ba6e0efd4914661e4389e103b81e",
            "9c71808b3a0ebfc091442c0009a7aa35be2d9622bf6aaf6891ce9a0088e96c07",
        ),
        packed_bytes=1_100_000,
    ),
}

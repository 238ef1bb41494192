"""The tutorial's own training loop, independent of lenet_sweep: Dataset, DataLoader, autograd.

python -m benchmarks.tutorial --epochs 10 --lr 0.9     trains once and prints the result
"""

import argparse
import gzip
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class Pictures(Dataset[tuple[Tensor, int]]):
    """Fashion-MNIST as in torchvision's dataset class: one PIL image at a time, through ToTensor."""

    def __init__(self, root: Path, prefix: str) -> None:
        self._images = _read(root / f"{prefix}-images-idx3-ubyte", 16).reshape(-1, 28, 28)
        self._labels = _read(root / f"{prefix}-labels-idx1-ubyte", 8)
        self._transform = transforms.ToTensor()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self._transform(Image.fromarray(self._images[index])), int(self._labels[index])


def network(relu_max: bool) -> nn.Sequential:
    """The tutorial's LeNet, or the same network with ReLU and max pooling."""
    activation: type[nn.Module] = nn.ReLU if relu_max else nn.Sigmoid
    pool: type[nn.Module] = nn.MaxPool2d if relu_max else nn.AvgPool2d
    net = nn.Sequential(
        nn.Conv2d(1, 6, kernel_size=5, padding=2), activation(), pool(kernel_size=2, stride=2),
        nn.Conv2d(6, 16, kernel_size=5), activation(), pool(kernel_size=2, stride=2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120), activation(),
        nn.Linear(120, 84), activation(),
        nn.Linear(84, 10),
    )  # fmt: skip
    for module in net:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return net


def epochs(
    net: nn.Module, root: Path, lr: float, workers: int, device: torch.device
) -> Iterator[tuple[float, float, float, float]]:
    """Train without end; yield an epoch's train loss, train accuracy, test accuracy and seconds."""
    net.to(device)
    train = DataLoader(Pictures(root, "train"), 256, shuffle=True, num_workers=workers)
    test = DataLoader(Pictures(root, "t10k"), 256, shuffle=False, num_workers=workers)
    optimizer, loss_function = torch.optim.SGD(net.parameters(), lr=lr), nn.CrossEntropyLoss()
    while True:
        started = time.perf_counter()
        net.train()
        loss_sum = right = seen = 0.0
        for x, y in train:
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            outputs = net(x)
            loss = loss_function(outputs, y)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                loss_sum += float(loss * len(y))
                right += float((outputs.argmax(axis=1) == y).sum())
                seen += len(y)
        yield loss_sum / seen, right / seen, _accuracy(net, test, device), time.perf_counter() - started


@torch.no_grad()
def _accuracy(net: nn.Module, data: DataLoader[tuple[Tensor, int]], device: torch.device) -> float:
    net.eval()
    right = seen = 0.0
    for x, y in data:
        x, y = x.to(device), y.to(device)
        right += float((net(x).argmax(axis=1) == y).sum())
        seen += len(y)
    return right / seen


def _read(path: Path, header: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    packed = path.with_name(f"{path.name}.gz")
    content = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    return np.frombuffer(content, np.uint8, offset=header)


def raw_folder(data: str = "fashion_mnist") -> Path:
    """The folder of a dataset's raw files; downloads them if they are missing."""
    from lenet_sweep.datasets import download

    return download.ensure(data, Path(os.environ.get("LENET_SWEEP_DATA", "data")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.9)
    parser.add_argument("--workers", type=int, default=0, help="number of DataLoader workers")
    chosen = parser.parse_args()
    started = time.perf_counter()
    trained = epochs(network(False), raw_folder(), chosen.lr, chosen.workers, torch.device("cpu"))
    for _ in range(chosen.epochs):
        loss, train_acc, test_acc, _ = next(trained)
    seconds = time.perf_counter() - started
    print(f"loss {loss:.3f}, train acc {train_acc:.3f}, test acc {test_acc:.3f}")
    print(f"{70_000 * chosen.epochs / seconds:.1f} examples/sec, including the test pass")


if __name__ == "__main__":
    main()

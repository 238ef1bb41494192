"""Builds the small dataset that ships with the package from the full Fashion-MNIST.

    python tools/make_mini.py [DATA_ROOT]

It selects the first 200 training images and the first 50 test images of each class, in their original
order. It writes the four IDX files, gzipped, to lenet_sweep/datasets/embedded/fashion_mnist_mini/. The
unpacked files are the same on every machine. It prints their SHA-256 sums, which belong in
lenet_sweep/datasets/catalog.py.
"""

import gzip
import hashlib
import struct
import sys
from pathlib import Path

import numpy as np

from lenet_sweep.datasets import download, sources

PER_CLASS = {"train": 200, "t10k": 50}


def main() -> None:
    real = download.ensure("fashion_mnist", Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
    target = sources.EMBEDDED / "fashion_mnist_mini"
    target.mkdir(parents=True, exist_ok=True)
    for file, content in mini_files(real).items():
        (target / f"{file}.gz").write_bytes(gzip.compress(content, compresslevel=9, mtime=0))
        print(f'"{file}": "{hashlib.sha256(content).hexdigest()}",  # {len(content)} bytes')


def mini_files(real: Path) -> dict[str, bytes]:
    """Return each file's name and bytes, cut from the four unpacked IDX files in folder `real`."""
    files = {}
    for part, per_class in PER_CLASS.items():
        images_N28x28 = np.fromfile(real / f"{part}-images-idx3-ubyte", np.uint8, offset=16).reshape(
            -1, 28, 28
        )
        labels_N = np.fromfile(real / f"{part}-labels-idx1-ubyte", np.uint8, offset=8)
        chosen = np.sort(np.concatenate([np.flatnonzero(labels_N == i)[:per_class] for i in range(10)]))
        # IDX: a magic number (8 = uint8, then the number of dimensions), every dimension's size, the data.
        files[f"{part}-images-idx3-ubyte"] = (
            struct.pack(">4I", 0x0803, len(chosen), 28, 28) + images_N28x28[chosen].tobytes()
        )
        files[f"{part}-labels-idx1-ubyte"] = (
            struct.pack(">2I", 0x0801, len(chosen)) + labels_N[chosen].tobytes()
        )
    return files


if __name__ == "__main__":
    main()

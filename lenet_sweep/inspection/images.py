"""Converts image files to the format of a dataset: 28x28, greyscale, light on dark, cropped and centred."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lenet_sweep.errors import ConfigError
from lenet_sweep.shapes import IMAGE_SHAPE

SIDE = IMAGE_SHAPE[1]
MAX_PIXELS = 50_000_000  # a small file can decompress to any size
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")

# How each dataset places an object in the image. MNIST: within 20x20 pixels, centred by its mass (LeCun et
# al. 1998). Fashion-MNIST: as large as possible, centred by its outline (Xiao et al. 2017).
Placement = Literal["by mass", "by outline"]
PLACEMENTS: dict[str, Placement] = {"mnist": "by mass"}


def read(path: Path, dataset: str) -> Tensor:
    """The image in `path` in the format of `dataset`: uint8 of shape (1, 28, 28).

    An image of 28x28 pixels is not cropped or scaled, only inverted if it is dark on light.

    Raises:
        ConfigError: if the file is not a readable image, is blank, or has more than 50 million pixels.
    """
    grey = _light_on_dark(_grey(path))
    if grey.shape != (SIDE, SIDE):
        box = _outline(grey, path)
        grey = _by_mass(box) if PLACEMENTS.get(dataset) == "by mass" else _by_outline(box)
    return torch.from_numpy(grey.copy()).unsqueeze(0)


def _grey(path: Path) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ConfigError(
                    f"{path}: has {image.width}x{image.height} pixels, but at most {MAX_PIXELS:,} are "
                    "allowed; scale it down"
                )
            upright = ImageOps.exif_transpose(image)
            return np.asarray(_opaque(upright).convert("L"))
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: is not a readable image ({', '.join(FORMATS)})") from error
    except (OSError, SyntaxError, ValueError) as error:  # a missing, truncated or malformed file
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{path}: cannot be read: {reason}") from error


def _opaque(image: Image.Image) -> Image.Image:
    """Without transparency: the background becomes white for a dark object and black for a light one."""
    if image.mode.startswith("I"):  # 16 bits per pixel; `convert` would clip them at 255
        return Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    grey, alpha = np.asarray(image.convert("L")), np.asarray(image.getchannel("A"))
    dark = not (alpha > 127).any() or grey[alpha > 127].mean() < 128
    background = Image.new("RGBA", image.size, "white" if dark else "black")
    return Image.alpha_composite(background, image)


def _light_on_dark(
    grey: "np.ndarray[tuple[int, int], np.dtype[np.uint8]]",
) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    """Inverted if the border is light, because the datasets have light objects on black."""
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    return 255 - grey if np.median(border) > 127 else grey


def _outline(grey: "np.ndarray[tuple[int, int], np.dtype[np.uint8]]", path: Path) -> Image.Image:
    """The bounding box of the object, with the contrast stretched from black to white."""
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    light = np.clip(grey.astype(np.float64) - np.median(border), 0, None)
    if light.max() < 26:  # a tenth of the way from black to white
        raise ConfigError(f"{path}: is blank; all pixels have about the same brightness")
    visible = light > light.max() / 10
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    part = light[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Image.fromarray((part * (255 / light.max())).astype(np.uint8))


def _by_outline(box: Image.Image) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    """As large as possible, with the bounding box in the centre."""
    inner = ImageOps.contain(box, (SIDE, SIDE), Image.Resampling.LANCZOS)
    canvas = Image.new("L", (SIDE, SIDE))
    canvas.paste(inner, ((SIDE - inner.width + 1) // 2, (SIDE - inner.height + 1) // 2))
    return np.asarray(canvas)


def _by_mass(box: Image.Image) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    """Within 20x20 pixels, with the centre of mass in the centre."""
    inner = ImageOps.contain(box, (20, 20), Image.Resampling.LANCZOS)
    values = np.asarray(inner, dtype=np.float64)
    row, column = (
        np.average(np.arange(n), weights=values.sum(1 - axis)) for axis, n in enumerate(values.shape)
    )
    canvas = Image.new("L", (SIDE, SIDE))
    left, top = round(SIDE / 2 - 0.5 - column), round(SIDE / 2 - 0.5 - row)
    canvas.paste(inner, (min(max(left, 0), SIDE - inner.width), min(max(top, 0), SIDE - inner.height)))
    return np.asarray(canvas)

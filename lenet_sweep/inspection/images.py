"""Any picture file as the network sees one: 28x28, grey, light on dark, placed as the dataset's are."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lenet_sweep.errors import ConfigError
from lenet_sweep.shapes import IMAGE_SHAPE

SIDE = IMAGE_SHAPE[1]
MOST_PIXELS = 50_000_000  # a small file can unpack to any size
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")

# How each dataset places what it shows. MNIST: in a box of 20 pixels, centred by mass (LeCun et al.
# 1998); Fashion-MNIST: as large as it can be, centred by its outline (Xiao et al. 2017).
Placement = Literal["by mass", "by outline"]
PLACEMENTS: dict[str, Placement] = {"mnist": "by mass"}


def read(path: Path, dataset: str) -> Tensor:
    """The picture in `path` as `dataset` would have it: uint8 of shape (1, 28, 28).

    One that is 28x28 already is left as it is, but for being turned light on dark.

    Raises:
        ConfigError: if it is no picture, shows nothing, or is too large.
    """
    grey = _light_on_dark(_grey(path))
    if grey.shape != (SIDE, SIDE):
        box = _outline(grey, path)
        grey = _by_mass(box) if PLACEMENTS.get(dataset) == "by mass" else _by_outline(box)
    return torch.from_numpy(grey.copy()).unsqueeze(0)


def _grey(path: Path) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ConfigError(
                    f"{path}: {image.width}x{image.height} pixels are too many; shrink it first"
                )
            upright = ImageOps.exif_transpose(image)
            return np.asarray(_opaque(upright).convert("L"))
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: is no picture that can be read ({', '.join(FORMATS)})") from error
    except (OSError, SyntaxError, ValueError) as error:  # a picture that breaks off, or is none
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{path}: cannot be read: {reason}") from error


def _opaque(image: Image.Image) -> Image.Image:
    """Without transparency: what lies behind is white for a dark object, and black for a light one."""
    if image.mode.startswith("I"):  # 16 bits a pixel; `convert` would cut them off at 255
        return Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    grey, alpha = np.asarray(image.convert("L")), np.asarray(image.getchannel("A"))
    dark = not (alpha > 127).any() or grey[alpha > 127].mean() < 128
    behind = Image.new("RGBA", image.size, "white" if dark else "black")
    return Image.alpha_composite(behind, image)


def _light_on_dark(
    grey: "np.ndarray[tuple[int, int], np.dtype[np.uint8]]",
) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    """Inverted if its border is light: the datasets show light objects on black."""
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    return 255 - grey if np.median(border) > 127 else grey


def _outline(grey: "np.ndarray[tuple[int, int], np.dtype[np.uint8]]", path: Path) -> Image.Image:
    """The part that shows something, from black to white."""
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    light = np.clip(grey.astype(np.float64) - np.median(border), 0, None)
    if light.max() < 26:  # a tenth of the way from black to white
        raise ConfigError(f"{path}: shows nothing: all of it is about equally light")
    shown = light > light.max() / 10
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    part = light[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Image.fromarray((part * (255 / light.max())).astype(np.uint8))


def _by_outline(box: Image.Image) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    inner = ImageOps.contain(box, (SIDE, SIDE), Image.Resampling.LANCZOS)
    canvas = Image.new("L", (SIDE, SIDE))
    canvas.paste(inner, ((SIDE - inner.width + 1) // 2, (SIDE - inner.height + 1) // 2))
    return np.asarray(canvas)


def _by_mass(box: Image.Image) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    inner = ImageOps.contain(box, (20, 20), Image.Resampling.LANCZOS)
    values = np.asarray(inner, dtype=np.float64)
    row, column = (
        np.average(np.arange(n), weights=values.sum(1 - axis)) for axis, n in enumerate(values.shape)
    )
    canvas = Image.new("L", (SIDE, SIDE))
    left, top = round(SIDE / 2 - 0.5 - column), round(SIDE / 2 - 0.5 - row)
    canvas.paste(inner, (min(max(left, 0), SIDE - inner.width), min(max(top, 0), SIDE - inner.height)))
    return np.asarray(canvas)

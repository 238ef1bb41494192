"""The plots of one run as PNG files: learning curves, confusion matrix, filters, activations, errors.

Charts are drawn by matplotlib. Images that consist of pixels (filters, activations, examples) are composed
by Pillow, which needs a hundredth of the time.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lenet_sweep.inspection.activations import ActivationStats, ConfidentError
from lenet_sweep.inspection.colours import BLUE, GREEN, PURPLE, VERMILION, rgb
from lenet_sweep.paths import atomic_path
from lenet_sweep.training.metrics import EpochMetrics


def curves(history: Sequence[EpochMetrics], title: str, path: Path) -> None:
    """Learning curves: train loss and accuracy five times per epoch, test and validation accuracy once.

    `history` has at least one epoch.
    """
    points = [point for metrics in history for point in metrics.curve]
    x = [point.epoch for point in points]
    epochs = [metrics.epoch for metrics in history]

    figure = Figure(figsize=(6, 4), dpi=120)  # a layout engine would double the time
    figure.subplots_adjust(left=0.1, right=0.97, bottom=0.12, top=0.92)
    axes = figure.add_subplot()
    axes.plot(x, [point.train_loss for point in points], color=BLUE, label="train loss")
    axes.plot(x, [point.train_acc for point in points], "--", color=VERMILION, label="train acc")
    axes.plot(epochs, [m.test_acc for m in history], "-.o", ms=3, color=GREEN, label="test acc")
    if history[0].val_acc is not None:
        val_acc = [m.val_acc if m.val_acc is not None else float("nan") for m in history]
        axes.plot(epochs, val_acc, ":s", ms=3, color=PURPLE, label="val acc")
    axes.set(xlabel="epoch", xlim=(0, epochs[-1] * 1.02), title=title)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def confusion_matrix(counts: Sequence[Sequence[int]], class_names: Sequence[str], path: Path) -> None:
    """The confusion matrix: `counts[i][j]` test examples of class i were classified as j.

    A cell is shaded by its share of its row.
    """
    shares = [[n / max(sum(row), 1) for n in row] for row in counts]
    names = [f"{name}  {row[k]:.2f}" for k, (name, row) in enumerate(zip(class_names, shares, strict=True))]
    side, top, n = 52, 56, len(counts)
    left = 12 + max(int(_FONT.getlength(name)) for name in names)
    below = 16 + max(int(_FONT.getlength(name)) for name in class_names)
    canvas = Image.new("RGB", (left + n * side + 16, top + n * side + below), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((left, 8), "Confusion matrix of the test set", "black", _FONT)
    draw.text((left, 26), "Rows: true class and its recall. Columns: predicted class.", "black", _FONT)
    for i, row in enumerate(shares):
        y = top + i * side
        draw.text((6, y + side / 2), names[i], "black", _FONT, anchor="lm")
        for j, share in enumerate(row):
            x = left + j * side
            shade = tuple(round(255 + share * (dark - 255)) for dark in _DARKEST)
            draw.rectangle((x, y, x + side - 2, y + side - 2), shade)
            ink = "white" if share > 0.5 else "black"
            draw.text((x + side / 2, y + side / 2), str(counts[i][j]), ink, _FONT, anchor="mm")
    for j, name in enumerate(class_names):
        upright = Image.new("RGB", (below - 8, 20), "white")
        ImageDraw.Draw(upright).text((below - 8, 10), name, "black", _FONT, anchor="rm")
        canvas.paste(upright.rotate(90, expand=True), (left + j * side + side // 2 - 10, top + n * side + 4))
    _save_image(canvas, path)


def filters(weights: Sequence[tuple[str, Tensor]], path: Path) -> None:
    """The kernels of convolutions (name, OCHW), one row per output channel.

    Negative weights are blue, positive ones vermilion; the title has the largest absolute value.
    """
    parts = []
    for name, weight in weights:
        kernels = weight[:_MAPS, :_MAPS].detach().cpu().numpy()
        scale = float(np.abs(kernels).max()) or 1.0
        rows = [[_diverging(kernel / scale) for kernel in row] for row in kernels]
        parts.append(
            _mosaic(rows, 40, [str(k + 1) for k in range(len(rows))], f"{name}  (|w| up to {scale:.2f})")
        )
    _save_image(_side_by_side(parts), path)


def activations(
    images_NHW: Tensor, layers: Sequence[tuple[str, Tensor]], labels: Sequence[str], path: Path
) -> None:
    """One row per image: the input, then the feature maps of each layer (name, NCHW).

    Black is the smallest output of the layer for any of these images, white the largest.
    """
    parts = [_mosaic([[_grey(image.numpy() / 255)] for image in images_NHW.cpu()], 56, labels, "input")]
    for name, maps_NCHW in layers:
        maps = maps_NCHW[:, :_MAPS].cpu().numpy()
        low, high = float(maps.min()), float(maps.max())
        rows = [[_grey((values - low) / ((high - low) or 1.0)) for values in row] for row in maps]
        parts.append(_mosaic(rows, 56, [""] * len(rows), f"{name}  ({low:.2f} to {high:.2f})"))
    _save_image(_side_by_side(parts), path)


def errors(confident: Sequence[ConfidentError], class_names: Sequence[str], path: Path) -> None:
    """Misclassified images, five in a row, each with its true class, its predicted class and probability."""
    side, gap, below = 112, 28, 50
    rows = -(-len(confident) // 5) or 1
    canvas = Image.new("RGB", (5 * (side + gap) + gap, rows * (side + below) + 40), "white")
    draw = ImageDraw.Draw(canvas)
    title = (
        "Most confident errors on the test set: true class, predicted class and its probability"
        if confident
        else "No errors on the test set"
    )
    draw.text((gap, 10), title, "black", _FONT)
    for i, error in enumerate(confident):
        x, y = gap + (i % 5) * (side + gap), 36 + (i // 5) * (side + below)
        canvas.paste(_tile(_grey(error.image_HW.numpy() / 255), side), (x, y))
        draw.text((x, y + side + 2), class_names[error.label], GREEN, _FONT)
        predicted = f"{class_names[error.predicted]} {error.probability:.2f}"
        draw.text((x, y + side + 18), predicted, VERMILION, _FONT)
    _save_image(canvas, path)


def activation_stats(stats: Sequence[ActivationStats], title: str, path: Path) -> None:
    """Histograms of the activations of each layer, and of the confidence, for each kind of image."""
    layers = list(stats[0].values)
    figure = Figure(figsize=(3.2 * (len(layers) + 1), 3.6), dpi=120, layout="constrained")
    *panels, last = figure.subplots(1, len(layers) + 1)
    for panel, layer in zip(panels, layers, strict=True):
        values = [kind.values[layer] for kind in stats]
        everything = torch.cat(values)
        _histograms(panel, values, float(everything.min()), float(everything.max()))
        panel.set(title=layer, xlabel="activation", yscale="log")
    _histograms(last, [kind.confidence_N for kind in stats], 0.0, 1.0)
    last.set(title="output", xlabel="probability of the predicted class")
    panels[0].set_ylabel("share of the values")
    handles = last.get_legend_handles_labels()[0]
    names = [f"{kind.kind} (mean confidence {float(kind.confidence_N.mean()):.2f})" for kind in stats]
    figure.legend(handles, names, loc="outside lower center", ncols=len(stats), frameon=False)
    figure.suptitle(title)
    _save(figure, path)


def _histograms(axes: Axes, values: Sequence[Tensor], low: float, high: float) -> None:
    """A stepped histogram of each tensor over the same 40 bins."""
    edges = np.linspace(low, max(high, low + 1e-6), 41)
    for tensor, (colour, dash) in zip(values, _LINES, strict=False):
        counts, _ = np.histogram(tensor.numpy(), edges)
        axes.stairs(counts / counts.sum(), edges, color=colour, linestyle=dash, linewidth=1.5, label="kind")
    axes.grid(alpha=0.3)


_LINES = ((BLUE, "-"), (VERMILION, "--"), (GREEN, "-."), (PURPLE, ":"), ("black", "-"))
_DARKEST = (0x08, 0x30, 0x6B)  # the colour of a full row share in the confusion matrix
_MAPS = 16  # channels of a layer that are shown
_FONT = ImageFont.load_default(13)


def _grey(values_HW: np.ndarray) -> np.ndarray:
    """RGB pixels for values from 0 (black) to 1 (white)."""
    return np.repeat((np.clip(values_HW, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)


def _diverging(values_HW: np.ndarray) -> np.ndarray:
    """RGB pixels for values from -1 (blue) over 0 (white) to 1 (vermilion)."""
    ends = np.array([rgb(BLUE), rgb(VERMILION)], dtype=np.float64)
    strength = np.abs(values_HW)[..., None]
    pixels: np.ndarray = 255 + strength * (ends[(values_HW > 0).astype(int)] - 255)
    return pixels.astype(np.uint8)


def _tile(pixels: np.ndarray, side: int) -> Image.Image:
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def _mosaic(
    rows: Sequence[Sequence[np.ndarray]], side: int, labels: Sequence[str], title: str
) -> Image.Image:
    """Rows of tiles of equal size below a title, with a label to the left of each row."""
    left = max(int(_FONT.getlength(label)) for label in labels) + 6
    width = left + max(len(rows[0]) * (side + 2), int(_FONT.getlength(title)) + 2)
    canvas = Image.new("RGB", (width, 22 + len(rows) * (side + 2)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((left, 3), title, "black", _FONT)
    for i, row in enumerate(rows):
        y = 22 + i * (side + 2)
        draw.text((2, y + side / 2 - 8), labels[i], "black", _FONT)
        for j, pixels in enumerate(row):
            canvas.paste(_tile(pixels, side), (left + j * (side + 2), y))
    return canvas


def _side_by_side(parts: Sequence[Image.Image]) -> Image.Image:
    gap = 12
    width, height = sum(part.width + gap for part in parts) + gap, max(part.height for part in parts)
    canvas = Image.new("RGB", (width, height + 2 * gap), "white")
    x = gap
    for part in parts:
        canvas.paste(part, (x, gap))
        x += part.width + gap
    return canvas


def _save_image(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)

"""Pictures of one run: the tutorial's curves and the confusion matrix, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lenet_sweep.engine import EpochMetrics
from lenet_sweep.paths import atomic_path

# Okabe and Ito 2008: told apart by people with any kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


def curves(history: Sequence[EpochMetrics], title: str, path: Path) -> None:
    """The tutorial's picture: train loss and accuracy five times an epoch, test accuracy once."""
    points = [point for metrics in history for point in metrics.curve]
    x = [point.epoch for point in points]
    epochs = [metrics.epoch for metrics in history]

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(x, [point.train_loss for point in points], color=BLUE, label="train loss")
    axes.plot(x, [point.train_acc for point in points], "--", color=ORANGE, label="train acc")
    axes.plot(epochs, [m.test_acc for m in history], "-.o", ms=3, color=GREEN, label="test acc")
    if history and history[0].val_acc is not None:
        val_acc = [m.val_acc if m.val_acc is not None else float("nan") for m in history]
        axes.plot(epochs, val_acc, ":s", ms=3, color=PURPLE, label="val acc")
    axes.set(xlabel="epoch", xlim=(0, max(epochs, default=1) * 1.02), title=title)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def confusion_matrix(counts: Sequence[Sequence[int]], class_names: Sequence[str], path: Path) -> None:
    """`counts[i][j]`: test examples of class i that were taken for class j; shaded by row share."""
    figure = Figure(figsize=(8, 7), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    shares = [[n / max(sum(row), 1) for n in row] for row in counts]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            colour = "white" if shares[i][j] > 0.5 else "black"
            axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=8)
    ticks = range(len(class_names))
    axes.set_xticks(ticks, class_names, rotation=45, ha="right")
    axes.set_yticks(ticks, class_names)
    axes.set(xlabel="predicted", ylabel="true", title="Test examples")
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)

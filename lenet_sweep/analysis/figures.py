"""The plots of a comparison for papers, as PNG and SVG files drawn by matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lenet_sweep.analysis import charts
from lenet_sweep.analysis.comparison import Comparison, short
from lenet_sweep.paths import atomic_path
from lenet_sweep.storage.records import MORE_IS_BETTER

LINES = 12  # settings in a plot; more lines than that are hard to distinguish

_DASHES = dict(zip(charts.DASHES, ("-", "--", ":", "-."), strict=True))

_HORIZONTAL = 36  # characters of labels that fit below an axis; longer labels are rotated


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write curves, heatmap and choices as PNG and SVG files into `folder`; return their paths.

    Without two swept params there is no heatmap, and without any there are no choices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = {"curves": _curves(comparison), "heatmap": _heatmaps(comparison), "choices": _choices(comparison)}
    return [path for name, figure in plots.items() if figure for path in _save(figure, folder / name)]


def _curves(comparison: Comparison) -> Figure:
    metrics = charts.curve_metrics(comparison)
    figure = Figure(figsize=(4 * max(len(metrics), 1), 3.6), layout="constrained")
    all_axes = figure.subplots(1, max(len(metrics), 1), squeeze=False)[0]
    for axes, metric in zip(all_axes, metrics, strict=False):
        _draw_curves(axes, comparison, metric)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _draw_curves(axes: Axes, comparison: Comparison, metric: str) -> None:
    for i, setting in enumerate(comparison.settings[:LINES]):
        line = charts.curve(setting, metric)
        if not line.epochs:
            continue
        colour, dash = charts.style(i)
        low = [m - s for m, s in zip(line.mean, line.sd, strict=True)]
        high = [m + s for m, s in zip(line.mean, line.sd, strict=True)]
        axes.fill_between(line.epochs, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(
            line.epochs,
            line.mean,
            color=colour,
            linestyle=_DASHES[dash],
            label=_text(comparison.label(setting)),
        )
    axes.set(xlabel="epoch", ylabel=metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _heatmaps(comparison: Comparison) -> Figure | None:
    grids = charts.grids(comparison)
    values = [x for grid in grids for row in grid.means for x in row if x is not None]
    if not values:
        return None
    figure = Figure(figsize=(4 * len(grids), 3.4), layout="constrained")
    all_axes = figure.subplots(1, len(grids), squeeze=False)[0]
    name = "cividis" if MORE_IS_BETTER[comparison.metric] else "cividis_r"
    low, high = min(values), max(values)
    for axes, grid in zip(all_axes, grids, strict=True):
        cells = [[float("nan") if x is None else x for x in row] for row in grid.means]
        image = axes.imshow(cells, cmap=name, vmin=low, vmax=high, aspect="auto", origin="lower")
        _label_cells(axes, grid, (low + high) / 2, dark_is_low=not name.endswith("_r"))
    figure.colorbar(image, ax=list(all_axes), label=f"final {comparison.metric}")
    return figure


def _label_cells(axes: Axes, grid: charts.Grid, middle: float, *, dark_is_low: bool) -> None:
    for i, row in enumerate(grid.means):
        for j, x in enumerate(row):
            if x is not None:
                colour = "white" if (x < middle) == dark_is_low else "black"
                axes.text(j, i, f"{x:.3f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(grid.x)), [_text(x) for x in grid.x])
    axes.set_yticks(range(len(grid.y)), [_text(y) for y in grid.y])
    keys = (short(grid.x_key), short(grid.y_key))
    axes.set(xlabel=keys[0], ylabel=keys[1], title=_text(grid.title))


def _choices(comparison: Comparison) -> Figure | None:
    if not comparison.by:
        return None
    figure = Figure(figsize=(3.6 * len(comparison.by), 3.4), layout="constrained")
    for axes, key in zip(
        figure.subplots(1, len(comparison.by), squeeze=False)[0], comparison.by, strict=True
    ):
        _draw_choice(axes, comparison, key, charts.levels(comparison, key))
    return figure


def _draw_choice(axes: Axes, comparison: Comparison, key: str, names: Sequence[str]) -> None:
    for i, (setting, x) in enumerate(
        zip(comparison.settings, charts.positions(comparison, key), strict=True)
    ):
        if setting.final:
            half = 0.0 if setting.final.high is None else setting.final.high - setting.final.mean
            colour = charts.style(i)[0]
            axes.errorbar(x, setting.final.mean, half, fmt="o", ms=4, capsize=2, color=colour)
    labels = [_text(name) for name in names]
    if sum(map(len, labels)) > _HORIZONTAL:
        axes.set_xticks(range(len(names)), labels, rotation=30, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(range(len(names)), labels)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set(xlabel=short(key), ylabel=f"final {comparison.metric}")
    axes.grid(axis="y", alpha=0.3)


def _save(figure: Figure, stem: Path) -> list[Path]:
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    for path in paths:
        # Equal numbers give equal files: no date and no random ids.
        metadata = {"Date": None} if path.suffix == ".svg" else None
        with atomic_path(path) as temporary, rc_context({"svg.hashsalt": "lenet_sweep"}):
            figure.savefig(temporary, dpi=200, bbox_inches="tight", metadata=metadata)
    return paths


def _text(text: str) -> str:
    """Text that matplotlib draws literally: an unescaped dollar sign starts a formula."""
    return "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")

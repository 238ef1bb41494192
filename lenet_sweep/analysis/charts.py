"""The numbers in the plots of a comparison, for the report (plotly) and the figures (matplotlib) alike."""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lenet_sweep.analysis.comparison import Comparison, Setting, level, short
from lenet_sweep.inspection.colours import COLOURS
from lenet_sweep.storage.records import Record

DASHES = ("solid", "dash", "dot", "dashdot")  # one for each round of colours

FACETS = 4  # heatmaps side by side; one averaged heatmap replaces more than that


@dataclass(frozen=True)
class Curve:
    """The mean over a setting's runs after each epoch, and the standard deviation (0 for a single run)."""

    epochs: tuple[int, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]


@dataclass(frozen=True)
class Grid:
    """Mean final values for each pair of values of two params, and the number of runs in each mean."""

    title: str
    x_key: str
    y_key: str
    x: tuple[str, ...]
    y: tuple[str, ...]
    means: tuple[tuple[float | None, ...], ...]  # by y, then x
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Axis:
    """One axis of the parallel coordinates: its title, and its labels with their heights from 0 to 1."""

    title: str
    labels: tuple[tuple[float, str], ...]


def style(index: int) -> tuple[str, str]:
    """Colour and dash of the line with this index."""
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def curve_metrics(comparison: Comparison) -> list[str]:
    """The metrics to plot by epoch: losses and accuracies, and the metric of the comparison."""
    names = dict.fromkeys(("train/loss", "train/acc", "test/acc", "val/acc", comparison.metric))
    return [name for name in names if any(name in run.history for run in comparison.runs)]


def curve(setting: Setting, metric: str) -> Curve:
    """The learning curve of a setting."""
    histories = [run.history[metric] for run in setting.counted if metric in run.history]
    epochs = sorted(set(itertools.chain.from_iterable(histories)))
    values = [[history[epoch] for history in histories if epoch in history] for epoch in epochs]
    return Curve(
        tuple(epochs),
        tuple(statistics.fmean(xs) for xs in values),
        tuple(statistics.stdev(xs) if len(xs) > 1 else 0.0 for xs in values),
    )


def levels(comparison: Comparison, key: str) -> tuple[str, ...]:
    """The values of a param in this comparison, sorted."""
    index = comparison.by.index(key)
    return tuple(sorted({setting.key[index] for setting in comparison.settings}, key=level))


def positions(comparison: Comparison, key: str) -> list[float]:
    """The x position of each setting on the axis of a param.

    The levels of the param are at 0, 1, 2, ...; settings with the same level are spread around it, within
    a quarter to both sides, so that they do not overlap.
    """
    values = [setting.key[comparison.by.index(key)] for setting in comparison.settings]
    xs = [0.0] * len(values)
    for centre, name in enumerate(levels(comparison, key)):
        members = [i for i, value in enumerate(values) if value == name]
        for offset, i in enumerate(members):
            xs[i] = centre + 0.5 * ((offset + 0.5) / len(members) - 0.5)
    return xs


def grids(comparison: Comparison) -> list[Grid]:
    """Heatmaps of two params: learning rate and epochs, or else the first two with several values.

    There is one heatmap for each combination of the remaining params, or a single one that averages over
    them if there are more than FACETS combinations.
    """
    pair = _heatmap_params(comparison)
    if pair is None:
        return []
    others = [key for key in comparison.by if key not in pair]
    facets = list(itertools.product(*(levels(comparison, key) for key in others)))
    if len(facets) > FACETS:
        return [
            _grid(comparison, pair, comparison.settings, "averaged over " + ", ".join(map(short, others)))
        ]
    all_grids = []
    for values in facets:
        fixed = dict(zip(others, values, strict=True))
        members = [s for s in comparison.settings if fixed.items() <= _values_of(comparison, s).items()]
        title = " ".join(f"{short(key)}={value}" for key, value in fixed.items())
        all_grids.append(_grid(comparison, pair, members, title))
    return [grid for grid in all_grids if any(map(any, grid.counts))]


def parallel_axes(comparison: Comparison) -> list[Axis]:
    """The axes of the parallel coordinates: every param, then the metric, then the seconds."""
    axes = []
    for key in comparison.by:
        names = levels(comparison, key)
        axes.append(Axis(short(key), tuple((_height(i, len(names)), name) for i, name in enumerate(names))))
    for title, values in _measures(comparison):
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        axes.append(Axis(title, ((0.0, f"{low:.3g}"), (1.0, f"{high:.3g}"))))
    return axes


def parallel_lines(comparison: Comparison) -> Iterator[tuple[int, Record, list[float]]]:
    """For every averaged run: the index of its setting, the run, and its heights (0 to 1) on the axes."""
    indices = [{name: i for i, name in enumerate(levels(comparison, key))} for key in comparison.by]
    ranges = [(min(xs, default=0.0), max(xs, default=1.0)) for _, xs in _measures(comparison)]
    for number, setting in enumerate(comparison.settings):
        params = [_height(index[v], len(index)) for index, v in zip(indices, setting.key, strict=True)]
        for run in setting.counted:
            values = (run.last(comparison.metric), run.seconds)
            heights = [
                (x - low) / (high - low) if x is not None and high > low else 0.5
                for x, (low, high) in zip(values, ranges, strict=True)
            ]
            yield number, run, params + heights


def thresholds(comparison: Comparison) -> list[float]:
    """Accuracies from 0.5 up to the best one reached, for the table of epochs to an accuracy."""
    metric = speed_metric(comparison)
    reached = [best[1] for run in comparison.runs if (best := run.best(metric))]
    return [
        x for x in (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.88, 0.9, 0.95, 0.98) if x <= max(reached, default=0)
    ]


def speed_metric(comparison: Comparison) -> str:
    """The metric of the thresholds: the comparison's metric if it is an accuracy, else test/acc."""
    return comparison.metric if comparison.metric.endswith("/acc") else "test/acc"


def _heatmap_params(comparison: Comparison) -> tuple[str, str] | None:
    swept = [key for key in comparison.by if len(levels(comparison, key)) > 1]
    ordered = sorted(swept, key=lambda key: {"lr": 0, "epochs": 1}.get(key, 2))
    return (ordered[0], ordered[1]) if len(ordered) > 1 else None


def _grid(comparison: Comparison, pair: tuple[str, str], settings: Sequence[Setting], title: str) -> Grid:
    columns, rows = levels(comparison, pair[0]), levels(comparison, pair[1])
    cells: dict[tuple[str, str], list[float]] = {}
    for setting in settings:
        params = _values_of(comparison, setting)
        values = [x for run in setting.counted if (x := run.last(comparison.metric)) is not None]
        cells.setdefault((params[pair[0]], params[pair[1]]), []).extend(values)
    means = tuple(
        tuple(statistics.fmean(cell) if (cell := cells.get((a, b))) else None for a in columns) for b in rows
    )
    counts = tuple(tuple(len(cells.get((a, b), ())) for a in columns) for b in rows)
    return Grid(title, *pair, columns, rows, means, counts)


def _values_of(comparison: Comparison, setting: Setting) -> dict[str, str]:
    return dict(zip(comparison.by, setting.key, strict=True))


def _measures(comparison: Comparison) -> list[tuple[str, list[float]]]:
    counted = [run for setting in comparison.settings for run in setting.counted]
    finals = [x for run in counted if (x := run.last(comparison.metric)) is not None]
    seconds = [run.seconds for run in counted if run.seconds is not None]
    return [(comparison.metric, finals), ("seconds", seconds)]


def _height(i: int, n: int) -> float:
    return i / (n - 1) if n > 1 else 0.5

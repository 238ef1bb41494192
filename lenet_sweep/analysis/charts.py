"""What the pictures of a comparison show, as plain numbers: the page and the figures draw the same."""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lenet_sweep.analysis.comparison import Comparison, Setting, level, short
from lenet_sweep.inspection.colours import COLOURS
from lenet_sweep.storage.records import Record

DASHES = ("solid", "dash", "dot", "dashdot")  # one for each round of colours

FACETS = 4  # heatmaps beside each other; with more choices than that they are averaged


@dataclass(frozen=True)
class Curve:
    """A setting's mean over its runs by epoch, and its standard deviation (0 where one run is left)."""

    epochs: tuple[int, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]


@dataclass(frozen=True)
class Grid:
    """Mean final values over two choices; `counts` says over how many runs each."""

    title: str
    x_key: str
    y_key: str
    x: tuple[str, ...]
    y: tuple[str, ...]
    means: tuple[tuple[float | None, ...], ...]  # by y, then x
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Axis:
    """One axis of the parallel coordinates: its title, and labels at heights from 0 to 1."""

    title: str
    labels: tuple[tuple[float, str], ...]


def style(number: int) -> tuple[str, str]:
    """Colour and dash of the setting with this number."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def measured(comparison: Comparison) -> list[str]:
    """The metrics to draw curves of: the tutorial's three, validation's, and the chosen one."""
    wanted = dict.fromkeys(("train/loss", "train/acc", "test/acc", "val/acc", comparison.metric))
    return [name for name in wanted if any(name in run.history for run in comparison.runs)]


def curve(setting: Setting, metric: str) -> Curve:
    """The setting's learning curve."""
    histories = [run.history[metric] for run in setting.counted if metric in run.history]
    epochs = sorted(set(itertools.chain.from_iterable(histories)))
    values = [[history[epoch] for history in histories if epoch in history] for epoch in epochs]
    return Curve(
        tuple(epochs),
        tuple(statistics.fmean(xs) for xs in values),
        tuple(statistics.stdev(xs) if len(xs) > 1 else 0.0 for xs in values),
    )


def levels(comparison: Comparison, key: str) -> tuple[str, ...]:
    """The values that a choice took, in order."""
    index = comparison.by.index(key)
    return tuple(sorted({setting.key[index] for setting in comparison.settings}, key=level))


def places(comparison: Comparison, key: str) -> list[float]:
    """Where each setting stands on the axis of a choice: at its level, beside the others of that level."""
    index = comparison.by.index(key)
    found = [0.0] * len(comparison.settings)
    for place, name in enumerate(levels(comparison, key)):
        there = [number for number, setting in enumerate(comparison.settings) if setting.key[index] == name]
        for rank, number in enumerate(there):
            found[number] = place + 0.5 * ((rank + 0.5) / len(there) - 0.5)
    return found


def grids(comparison: Comparison) -> list[Grid]:
    """Learning rate by epochs, or the first two choices that there are: a grid for each of the others."""
    pair = _pair(comparison)
    if pair is None:
        return []
    others = [key for key in comparison.by if key not in pair]
    facets = list(itertools.product(*(levels(comparison, key) for key in others)))
    if len(facets) > FACETS:
        return [
            _grid(comparison, pair, comparison.settings, "averaged over " + ", ".join(map(short, others)))
        ]
    found = []
    for values in facets:
        chosen = dict(zip(others, values, strict=True))
        members = [g for g in comparison.settings if chosen.items() <= _values_of(comparison, g).items()]
        title = " ".join(f"{short(key)}={value}" for key, value in chosen.items())
        found.append(_grid(comparison, pair, members, title))
    return [grid for grid in found if any(map(any, grid.counts))]


def axes(comparison: Comparison) -> list[Axis]:
    """Axes of the parallel coordinates: every choice, then the metric, then the seconds."""
    found = []
    for key in comparison.by:
        names = levels(comparison, key)
        found.append(Axis(short(key), tuple((_height(i, len(names)), name) for i, name in enumerate(names))))
    for title, values in _measures(comparison):
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        found.append(Axis(title, ((0.0, f"{low:.3g}"), (1.0, f"{high:.3g}"))))
    return found


def lines(comparison: Comparison) -> Iterator[tuple[int, Record, list[float]]]:
    """For every counted run its setting's number and its heights on the axes, from 0 to 1."""
    places = [{name: i for i, name in enumerate(levels(comparison, key))} for key in comparison.by]
    ranges = [(min(xs, default=0.0), max(xs, default=1.0)) for _, xs in _measures(comparison)]
    for number, setting in enumerate(comparison.settings):
        settings = [_height(place[v], len(place)) for place, v in zip(places, setting.key, strict=True)]
        for run in setting.counted:
            values = (run.last(comparison.metric), run.seconds)
            heights = [
                (x - low) / (high - low) if x is not None and high > low else 0.5
                for x, (low, high) in zip(values, ranges, strict=True)
            ]
            yield number, run, settings + heights


def thresholds(comparison: Comparison) -> list[float]:
    """Accuracies whose speed of being reached says something: those between a tenth and the best."""
    metric = speed_metric(comparison)
    reached = [best[1] for run in comparison.runs if (best := run.best(metric))]
    return [
        x for x in (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.88, 0.9, 0.95, 0.98) if x <= max(reached, default=0)
    ]


def speed_metric(comparison: Comparison) -> str:
    """The accuracy whose thresholds are counted: the chosen metric if it is one, else the test set's."""
    return comparison.metric if comparison.metric.endswith("/acc") else "test/acc"


def _pair(comparison: Comparison) -> tuple[str, str] | None:
    many = [key for key in comparison.by if len(levels(comparison, key)) > 1]
    ranked = sorted(many, key=lambda key: {"lr": 0, "epochs": 1}.get(key, 2))
    return (ranked[0], ranked[1]) if len(ranked) > 1 else None


def _grid(comparison: Comparison, pair: tuple[str, str], settings: Sequence[Setting], title: str) -> Grid:
    columns, rows = levels(comparison, pair[0]), levels(comparison, pair[1])
    cells: dict[tuple[str, str], list[float]] = {}
    for setting in settings:
        chosen = _values_of(comparison, setting)
        values = [x for run in setting.counted if (x := run.last(comparison.metric)) is not None]
        cells.setdefault((chosen[pair[0]], chosen[pair[1]]), []).extend(values)
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

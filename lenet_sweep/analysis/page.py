"""The report: a comparison as one HTML file with tables and interactive plots that works offline.

page.html is its template, with style and script; plotly.js is embedded once. Text that comes from a store
is not trusted: `_text` escapes it for HTML and for plotly's labels, which interpret some HTML too.
"""

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from lenet_sweep.analysis import charts, tables
from lenet_sweep.analysis.comparison import Comparison, Setting, epochs_to, notes, short
from lenet_sweep.analysis.selection import Selection
from lenet_sweep.inspection.colours import rgb
from lenet_sweep.paths import write_atomic
from lenet_sweep.storage.records import MORE_IS_BETTER

SHOWN = 12  # settings that are selected when the page opens
_EXCLUDED = 200  # rows in the table of excluded runs
_HEADINGS = (
    "n",
    "final",
    "95 % interval",
    "verdict",
    "best",
    "at epoch",
    "seconds",
    "examples/s",
    "excluded",
)

Spec = dict[str, Any]  # a plot: title, caption, plotly's traces and layout, the axis with a log button


def write(comparison: Comparison, selection: Selection, path: Path) -> None:
    """Write the report about `comparison`, whose runs are those of `selection`, to `path`."""
    parts = {
        "title": _text(f"{comparison.metric}: {selection.title}"),
        "counts": _text(_counts(comparison)),
        "answer": _text(tables.answer(comparison)),
        "notes": "".join(f'<p class="dim">{_text(note)}</p>' for note in notes(comparison)),
        "table": _table(comparison),
        "plots": _text(_how_to_read(comparison)),
        "speed": _speed(comparison),
        "excluded": _excluded(comparison),
        "origin": _origin(comparison, selection),
        "data": _json({"groups": _legend(comparison), "sections": _sections(comparison)}),
        "plotly": get_plotlyjs(),
    }
    # Split the template once: text that looks like a placeholder must not be replaced.
    pieces = Path(__file__).with_name("page.html").read_text(encoding="utf-8").split("@@")
    write_atomic(path, "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces)))


def _text(text: str) -> str:
    return html.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def _json(values: Spec) -> str:
    """JSON for a script element; no text in it can close the element."""
    return json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")


def _counts(comparison: Comparison) -> str:
    settings = comparison.settings
    reasons = sorted({reason for setting in settings for reason in setting.excluded})
    averaged = sum(len(setting.counted) for setting in settings)
    parts = [f"{len(comparison.runs)} runs of {len(settings)} settings", f"{averaged} averaged"]
    parts += [f"{sum(s.excluded.get(reason, 0) for s in settings)} {reason}" for reason in reasons]
    return f"{', '.join(parts)}.  {tables.common(comparison)}"


def _how_to_read(comparison: Comparison) -> str:
    more = (
        f" Only the first {SHOWN} settings are selected; select others in the legend."
        if len(comparison.settings) > SHOWN
        else ""
    )
    return (
        "Lines are means over the runs of a setting, bands are one standard deviation, and error bars are "
        f"95 % intervals. Hover to read values, drag to zoom, double-click to reset.{more}"
    )


def _table(comparison: Comparison) -> str:
    titles = [f"final {comparison.metric}" if heading == "final" else heading for heading in _HEADINGS]
    head = [*map(short, comparison.by or ("setting",)), *titles]
    rows = [(s.verdict, tables.cells(comparison, s, _HEADINGS)) for s in comparison.settings]
    return _html_table(head, rows, numbers=range(len(head) - len(titles), len(head) - 1))


def _speed(comparison: Comparison) -> str:
    """The mean number of epochs to each threshold of the accuracy, for each setting."""
    metric, thresholds = charts.speed_metric(comparison), charts.thresholds(comparison)
    rows = []
    for setting in comparison.settings:
        if setting.counted:
            cells = [_mean_epochs(epochs_to(setting, metric, x)) for x in thresholds]
            rows.append((setting.verdict, [comparison.label(setting), *cells]))
    if not thresholds or not rows:
        return ""
    head = ["setting", *(f"{x:g}" for x in thresholds)]
    title = f"<h2>Mean number of epochs to reach a {_text(metric)} of ...</h2>"
    return title + _html_table(head, rows, numbers=range(1, len(head)))


def _mean_epochs(epochs: Sequence[int | None]) -> str:
    """'4.5', or '4.5 (2 of 3)' if only two of three runs reached the threshold."""
    reached = [epoch for epoch in epochs if epoch is not None]
    if not reached:
        return ""
    share = "" if len(reached) == len(epochs) else f" ({len(reached)} of {len(epochs)})"
    return f"{sum(reached) / len(reached):.1f}{share}"


def _excluded(comparison: Comparison) -> str:
    runs = tables.excluded_runs(comparison)
    if not runs:
        return ""
    rows = [
        ("none", [tables.run_label(comparison, setting, run), tables.outcome(run)])
        for setting, run in runs[:_EXCLUDED]
    ]
    more = f'<p class="dim">and {len(runs) - _EXCLUDED} more</p>' if len(runs) > _EXCLUDED else ""
    return "<h2>Excluded runs</h2>" + _html_table(["run", "outcome"], rows, reasons={1}) + more


def _origin(comparison: Comparison, selection: Selection) -> str:
    parts = [f"<pre>{_text(command)}</pre>" for command in selection.commands]
    commits = sorted({run.commit for run in comparison.runs if run.commit})
    if commits:
        parts.append(f'<p class="dim">Code version (git): {_text(", ".join(commits))}</p>')
    params = _text("\n".join(f"{key}={value}" for key, value in comparison.constant.items()))
    parts.append(f"<details><summary>Params that all runs share</summary><pre>{params}</pre></details>")
    return "".join(parts)


def _html_table(
    head: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    numbers: Iterable[int] = (),
    reasons: Iterable[int] = (),
) -> str:
    """An HTML table. Each row is a CSS class and its cells.

    `numbers` are the indices of columns that are aligned right, `reasons` those of columns that wrap.
    """
    kinds = dict.fromkeys(numbers, "number") | dict.fromkeys(reasons, "reason")

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(f'<{tag} class="{kinds.get(i, "")}">{_text(c)}</{tag}>' for i, c in enumerate(cells))

    body = "".join(f'<tr class="{kind}">{line("td", cells)}</tr>' for kind, cells in rows)
    return f'<div class="scroll"><table><tr>{line("th", head)}</tr>{body}</table></div>'


def _legend(comparison: Comparison) -> list[Spec]:
    """The settings for the legend of the page. Its script inserts labels as text, so they are not escaped."""
    shown = [i for i, setting in enumerate(comparison.settings) if setting.counted][:SHOWN]
    return [
        {"label": comparison.label(setting), "colour": colour, "dash": dash, "on": i in shown}
        for i, setting in enumerate(comparison.settings)
        for colour, dash in [charts.style(i)]
    ]


def _sections(comparison: Comparison) -> list[Spec]:
    parallel = [_parallel(comparison)] if comparison.by else []
    sections = [
        ("Learning curves", False, [_curves(comparison, name) for name in charts.curve_metrics(comparison)]),
        ("Pairs of hyperparameters", False, _heatmaps(comparison)),
        ("Single hyperparameters", False, [_choice(comparison, key) for key in comparison.by]),
        ("Training time", False, [_cost(comparison)]),
        ("All runs", True, parallel),
    ]
    return [{"title": title, "wide": wide, "charts": specs} for title, wide, specs in sections if specs]


def _curves(comparison: Comparison, metric: str) -> Spec:
    traces: list[Spec] = []
    for i, setting in enumerate(comparison.settings):
        line = charts.curve(setting, metric)
        if any(line.sd):
            traces.append(_band(i, line))
        if line.epochs:
            colour, dash = charts.style(i)
            traces.append(
                {
                    "group": i,
                    "name": _text(comparison.label(setting)),
                    "x": line.epochs,
                    "y": line.mean,
                    "customdata": line.sd,
                    "mode": "lines+markers" if len(line.epochs) < 30 else "lines",
                    "marker": {"size": 5},
                    "line": {"color": colour, "dash": dash, "width": 2},
                    "hovertemplate": "epoch %{x}: %{y:.4f} ± %{customdata:.4f}",
                }
            )
    layout = {"xaxis": {"title": {"text": "epoch"}}, "yaxis": {"title": {"text": metric}}}
    return {"title": metric, "caption": "", "traces": traces, "layout": layout, "log": "y"}


def _band(index: int, line: charts.Curve) -> Spec:
    """A polygon of one standard deviation to both sides: along its upper edge, and back along its lower."""
    upper = [m + s for m, s in zip(line.mean, line.sd, strict=True)]
    lower = [m - s for m, s in zip(line.mean, line.sd, strict=True)]
    red, green, blue = rgb(charts.style(index)[0])
    return {
        "group": index,
        "x": [*line.epochs, *reversed(line.epochs)],
        "y": [*upper, *reversed(lower)],
        "mode": "lines",
        "fill": "toself",
        "fillcolor": f"rgba({red},{green},{blue},0.18)",
        "line": {"width": 0},
        "hoverinfo": "skip",
    }


def _heatmaps(comparison: Comparison) -> list[Spec]:
    grids = charts.grids(comparison)
    values = [x for grid in grids for row in grid.means for x in row if x is not None]
    if not values:
        return []
    return [_heatmap(grid, comparison, min(values), max(values)) for grid in grids]


def _heatmap(grid: charts.Grid, comparison: Comparison, low: float, high: float) -> Spec:
    decimals = tables.digits(comparison)
    texts = [["" if x is None else f"{x:.{decimals}f}" for x in row] for row in grid.means]
    trace = {
        "type": "heatmap",
        "x": [_text(x) for x in grid.x],
        "y": [_text(y) for y in grid.y],
        "z": grid.means,
        "text": texts,
        "customdata": grid.counts,
        "texttemplate": "%{text}",
        "zmin": low,
        "zmax": high,
        "xgap": 2,
        "ygap": 2,
        "colorscale": "Cividis",  # readable with red-green colour blindness
        "reversescale": not MORE_IS_BETTER[comparison.metric],
        "colorbar": {"thickness": 12, "outlinewidth": 0},
        "hovertemplate": "%{y}, %{x}: %{z:.4f} (%{customdata} runs)<extra></extra>",
    }
    layout = {
        "xaxis": {"type": "category", "title": {"text": _text(short(grid.x_key))}},
        "yaxis": {"type": "category", "title": {"text": _text(short(grid.y_key))}},
    }
    title = grid.title or f"{short(grid.x_key)} and {short(grid.y_key)}"
    caption = f"Mean final {comparison.metric}; brighter is better."
    if not MORE_IS_BETTER[comparison.metric]:
        caption = f"Mean final {comparison.metric}; brighter is better (lower)."
    return {"title": title, "caption": caption, "traces": [trace], "layout": layout}


def _choice(comparison: Comparison, key: str) -> Spec:
    """The mean of every setting over one param; points with the same value are side by side."""
    names = charts.levels(comparison, key)
    xs = charts.positions(comparison, key)
    traces = [_point(comparison, i, s, xs[i]) for i, s in enumerate(comparison.settings) if s.final]
    ticks = {"tickvals": list(range(len(names))), "ticktext": [_text(name) for name in names]}
    x = {**ticks, "title": {"text": _text(short(key))}, "range": [-0.5, len(names) - 0.5]}
    layout = {"xaxis": x, "yaxis": {"title": {"text": comparison.metric}}}
    caption = f"Mean final {comparison.metric} of each setting, with its 95 % interval."
    title = short(key)
    return {"title": title, "caption": caption, "traces": traces, "layout": layout, "shadow": 0.2}


def _point(comparison: Comparison, index: int, setting: Setting, x: float) -> Spec:
    final = setting.final
    assert final is not None
    half = 0.0 if final.high is None else final.high - final.mean
    return {
        "group": index,
        "name": _text(comparison.label(setting)),
        "x": [x],
        "y": [final.mean],
        "customdata": [final.n],
        "mode": "markers",
        "marker": {"color": charts.style(index)[0], "size": 9},
        "error_y": {"array": [half], "thickness": 1.5, "width": 4},
        "hovertemplate": "%{y:.4f} (%{customdata} runs)",
    }


def _cost(comparison: Comparison) -> Spec:
    traces = [
        _point(comparison, i, setting, setting.seconds.mean) | {"hovertemplate": "%{y:.4f} in %{x:.1f} s"}
        for i, setting in enumerate(comparison.settings)
        if setting.final and setting.seconds
    ]
    x = {"title": {"text": "mean seconds per run"}, "rangemode": "tozero"}
    layout = {"xaxis": x, "yaxis": {"title": {"text": comparison.metric}}}
    caption = (
        "Wall-clock time of a run. Epochs that were resumed from a shorter run are not included; "
        "runs that share a machine slow each other down."
    )
    return {
        "title": f"{comparison.metric} and seconds",
        "caption": caption,
        "traces": traces,
        "layout": layout,
        "log": "x",
        "shadow": 0.2,
    }


def _parallel(comparison: Comparison) -> Spec:
    """Parallel coordinates as plain lines, because plotly's own type needs WebGL and cannot be printed."""
    axes = charts.parallel_axes(comparison)
    traces: dict[int, Spec] = {}
    for index, run, heights in charts.parallel_lines(comparison):
        empty: Spec = {
            "group": index,
            "name": _text(comparison.label(comparison.settings[index])),
            "x": [],
            "y": [],
            "text": [],
            "mode": "lines",
            "line": {"color": charts.style(index)[0], "width": 1.5},
            "hovertemplate": "%{text}",
        }
        trace = traces.setdefault(index, empty)
        trace["x"] += [*range(len(heights)), None]
        trace["y"] += [*heights, None]
        trace["text"] += [_text(f"seed={run.params.get('seed', '')}")] * (len(heights) + 1)
    return {
        "title": "parallel coordinates",
        "caption": "One line for each averaged run. Select settings in the legend to highlight them.",
        "traces": list(traces.values()),
        "layout": _parallel_layout(axes),
        "shadow": 0.06,
    }


def _parallel_layout(axes: Sequence[charts.Axis]) -> Spec:
    labels = [
        {"x": i, "y": y, "text": _text(label), "showarrow": False, "xanchor": "right", "xshift": -5}
        for i, axis in enumerate(axes)
        for y, label in axis.labels
    ]
    shapes = [{"type": "line", "x0": i, "x1": i, "y0": 0, "y1": 1} for i in range(len(axes))]
    ticks = {"tickvals": list(range(len(axes))), "ticktext": [_text(axis.title) for axis in axes]}
    return {
        "xaxis": {**ticks, "range": [-0.4, len(axes) - 0.9], "showgrid": False, "side": "top"},
        "yaxis": {"visible": False, "range": [-0.05, 1.05]},
        "annotations": labels,
        "shapes": shapes,
        "margin": {"t": 40, "b": 16},
    }

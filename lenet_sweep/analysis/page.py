"""A comparison as one HTML file that needs no network: pictures, tables, what failed, how it was made.

page.html is the frame, with its style and script; plotly.js is put into it once. Whatever comes from
a store is only text: `_text` escapes it for HTML and for plotly's labels, which know some of HTML too.
"""

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from lenet_sweep.analysis import charts, comparison, tables
from lenet_sweep.analysis.comparison import Comparison, Setting
from lenet_sweep.analysis.selection import Selection
from lenet_sweep.inspection.colours import rgb
from lenet_sweep.paths import write_atomic
from lenet_sweep.storage.records import MORE_IS_BETTER

SHOWN = 12  # settings that are drawn at first; the others a click away
_FAILURES = 200  # rows in the table of what failed

Spec = dict[str, Any]  # of a chart: title, caption, plotly's traces and layout, which axis may be log


def write(found: Comparison, selection: Selection, path: Path) -> None:
    """Write the page about `found`, whose runs are those of `selection`, to `path`."""
    parts = {
        "title": _text(f"{found.metric}: {selection.title}"),
        "counts": _text(_counts(found)),
        "answer": _text(tables.answer(found)),
        "notes": "".join(f'<p class="dim">{_text(note)}</p>' for note in comparison.notes(found)),
        "table": _table(found),
        "pictures": _text(_how_to_read(found)),
        "speed": _speed(found),
        "failures": _failures(found),
        "origin": _origin(found, selection),
        "data": _json({"groups": _legend(found), "sections": _sections(found)}),
        "plotly": get_plotlyjs(),
    }
    # Split, not replaced in turn: a text that looks like a placeholder must not become one.
    pieces = Path(__file__).with_name("page.html").read_text(encoding="utf-8").split("@@")
    write_atomic(path, "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces)))


def _text(text: str) -> str:
    return html.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def _json(values: Spec) -> str:
    """JSON that can stand in a script element: no text in it can end that."""
    return json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")


def _counts(found: Comparison) -> str:
    runs = found.runs
    flags = {reason: n for g in found.settings for reason, n in g.flags.items()}
    totals = {reason: sum(g.flags.get(reason, 0) for g in found.settings) for reason in flags}
    counted = sum(len(setting.counted) for setting in found.settings)
    words = [f"{len(runs)} runs in {len(found.settings)} groups", f"{counted} averaged over"]
    words += [f"{n} {reason}" for reason, n in sorted(totals.items())]
    return f"{', '.join(words)}.  {tables.common(found)}"


def _how_to_read(found: Comparison) -> str:
    more = (
        f" The first {SHOWN} settings are ticked; the others are shadows."
        if len(found.settings) > SHOWN
        else ""
    )
    return (
        "Lines are means over the runs of a setting, bands one standard deviation, bars 95 % intervals. "
        f"Hover for numbers, drag to zoom, double-click to go back.{more}"
    )


# ---------------------------------------------------------------- tables


def _table(found: Comparison) -> str:
    places = tables.digits(found)
    head = [*(comparison.short(key) for key in found.by or ("group",)), "n", f"final {found.metric}"]
    head += ["95 % interval", "verdict", "best", "at epoch", "seconds", "examples/s", "left out"]
    rows = []
    for setting in found.settings:
        p = f" p={setting.p:.2g}" if setting.p is not None else ""
        cells = [
            *(setting.key or ("all runs",)),
            str(len(setting.counted)),
            tables.spread(setting.final, places),
            tables.interval(setting.final, places),
            (tables.MARKS[setting.verdict] + p).strip(),
            tables.spread(setting.best, places),
            tables.spread(setting.best_epoch, 1),
            tables.spread(setting.seconds, 1),
            f"{setting.examples_per_s.mean:,.0f}" if setting.examples_per_s else "",
            ", ".join(f"{n} {reason}" for reason, n in setting.flags.items()),
        ]
        rows.append((setting.verdict, cells))
    return _html_table(head, rows, numbers=range(len(head) - 9, len(head) - 1))


def _speed(found: Comparison) -> str:
    """How many epochs it took to reach an accuracy, for each setting."""
    metric, marks = charts.speed_metric(found), charts.thresholds(found)
    rows = []
    for setting in found.settings:
        if setting.counted:
            cells = [_reached(comparison.epochs_to(setting, metric, x)) for x in marks]
            rows.append((setting.verdict, [found.label(setting), *cells]))
    if not marks or not rows:
        return ""
    head = ["group", *(f"{x:g}" for x in marks)]
    title = f"<h2>Epochs to reach a {_text(metric)}</h2>"
    return title + _html_table(head, rows, numbers=range(1, len(head)))


def _reached(epochs: Sequence[int | None]) -> str:
    """'4.5', or '4.5 (2 of 3)' if some runs never got there."""
    there = [epoch for epoch in epochs if epoch is not None]
    if not there:
        return ""
    share = "" if len(there) == len(epochs) else f" ({len(there)} of {len(epochs)})"
    return f"{sum(there) / len(there):.1f}{share}"


def _failures(found: Comparison) -> str:
    out = tables.left_out(found)
    if not out:
        return ""
    rows = [("none", [tables.run_label(found, g, run), tables.fate(run)]) for g, run in out[:_FAILURES]]
    more = f'<p class="dim">and {len(out) - _FAILURES} more</p>' if len(out) > _FAILURES else ""
    return "<h2>Left out, and why</h2>" + _html_table(["run", "how it ended"], rows, reasons={1}) + more


def _origin(found: Comparison, selection: Selection) -> str:
    parts = [f"<pre>{_text(command)}</pre>" for command in selection.commands]
    commits = sorted({run.commit for run in found.runs if run.commit})
    if commits:
        parts.append(f'<p class="dim">Code version (git): {_text(", ".join(commits))}</p>')
    common = [f"{key}={value}" for key, value in found.constant.items()]
    listed = _text("\n".join(common))
    parts.append(f"<details><summary>What all runs have in common</summary><pre>{listed}</pre></details>")
    return "".join(parts)


def _html_table(
    head: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    numbers: Iterable[int] = (),
    reasons: Iterable[int] = (),
) -> str:
    """A table; each row comes with its class. `numbers` and `reasons` are columns of these kinds."""
    kinds = dict.fromkeys(numbers, "number") | dict.fromkeys(reasons, "reason")

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(f'<{tag} class="{kinds.get(i, "")}">{_text(c)}</{tag}>' for i, c in enumerate(cells))

    body = "".join(f'<tr class="{kind}">{line("td", cells)}</tr>' for kind, cells in rows)
    return f'<div class="scroll"><table><tr>{line("th", head)}</tr>{body}</table></div>'


# ---------------------------------------------------------------- charts


def _legend(found: Comparison) -> list[Spec]:
    """The settings, in order, as the page's own legend has them; its script shows labels as text."""
    shown = [i for i, setting in enumerate(found.settings) if setting.counted][:SHOWN]
    return [
        {"label": found.label(setting), "colour": colour, "dash": dash, "on": i in shown}
        for i, setting in enumerate(found.settings)
        for colour, dash in [charts.style(i)]
    ]


def _sections(found: Comparison) -> list[Spec]:
    parallel = [_parallel(found)] if found.by else []
    sections = [
        ("Learning curves", False, [_curves(found, name) for name in charts.measured(found)]),
        ("Two choices together", False, _heatmaps(found)),
        ("Each choice by itself", False, [_choice(found, key) for key in found.by]),
        ("What it costs", False, [_cost(found)]),
        ("All runs", True, parallel),
    ]
    return [{"title": title, "wide": wide, "charts": specs} for title, wide, specs in sections if specs]


def _curves(found: Comparison, metric: str) -> Spec:
    traces: list[Spec] = []
    for i, setting in enumerate(found.settings):
        line = charts.curve(setting, metric)
        if any(line.sd):
            traces.append(_band(i, line))
        if line.epochs:
            colour, dash = charts.style(i)
            traces.append(
                {
                    "group": i,
                    "name": _text(found.label(setting)),
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


def _band(number: int, line: charts.Curve) -> Spec:
    """One standard deviation to both sides: along the upper edge, and back along the lower one."""
    upper = [m + s for m, s in zip(line.mean, line.sd, strict=True)]
    lower = [m - s for m, s in zip(line.mean, line.sd, strict=True)]
    red, green, blue = rgb(charts.style(number)[0])
    return {
        "group": number,
        "x": [*line.epochs, *reversed(line.epochs)],
        "y": [*upper, *reversed(lower)],
        "mode": "lines",
        "fill": "toself",
        "fillcolor": f"rgba({red},{green},{blue},0.18)",
        "line": {"width": 0},
        "hoverinfo": "skip",
    }


def _heatmaps(found: Comparison) -> list[Spec]:
    grids = charts.grids(found)
    values = [x for grid in grids for row in grid.means for x in row if x is not None]
    if not values:
        return []
    return [_heatmap(grid, found, min(values), max(values)) for grid in grids]


def _heatmap(grid: charts.Grid, found: Comparison, low: float, high: float) -> Spec:
    places = tables.digits(found)
    shown = [["" if x is None else f"{x:.{places}f}" for x in row] for row in grid.means]
    trace = {
        "type": "heatmap",
        "x": [_text(x) for x in grid.x],
        "y": [_text(y) for y in grid.y],
        "z": grid.means,
        "text": shown,
        "customdata": grid.counts,
        "texttemplate": "%{text}",
        "zmin": low,
        "zmax": high,
        "xgap": 2,
        "ygap": 2,
        "colorscale": "Cividis",  # also for those who do not see red or green
        "reversescale": not MORE_IS_BETTER[found.metric],
        "colorbar": {"thickness": 12, "outlinewidth": 0},
        "hovertemplate": "%{y}, %{x}: %{z:.4f} (%{customdata} runs)<extra></extra>",
    }
    layout = {
        "xaxis": {"type": "category", "title": {"text": _text(comparison.short(grid.x_key))}},
        "yaxis": {"type": "category", "title": {"text": _text(comparison.short(grid.y_key))}},
    }
    title = grid.title or f"{comparison.short(grid.x_key)} and {comparison.short(grid.y_key)}"
    caption = f"Mean final {found.metric}; brighter is better."
    if not MORE_IS_BETTER[found.metric]:
        caption = f"Mean final {found.metric}; brighter is better, which is less."
    return {"title": title, "caption": caption, "traces": [trace], "layout": layout}


def _choice(found: Comparison, key: str) -> Spec:
    """Every setting's mean over one choice; points of a level stand side by side."""
    names = charts.levels(found, key)
    placed = zip(found.settings, charts.places(found, key), strict=True)
    traces = [_point(found, i, setting, x) for i, (setting, x) in enumerate(placed) if setting.final]
    ticks = {"tickvals": list(range(len(names))), "ticktext": [_text(name) for name in names]}
    x = {**ticks, "title": {"text": _text(comparison.short(key))}, "range": [-0.5, len(names) - 0.5]}
    layout = {"xaxis": x, "yaxis": {"title": {"text": found.metric}}}
    caption = f"Mean final {found.metric} of each setting, with its 95 % interval."
    title = comparison.short(key)
    return {"title": title, "caption": caption, "traces": traces, "layout": layout, "shadow": 0.2}


def _point(found: Comparison, number: int, setting: Setting, x: float) -> Spec:
    final = setting.final
    assert final is not None
    half = 0.0 if final.high is None else final.high - final.mean
    return {
        "group": number,
        "name": _text(found.label(setting)),
        "x": [x],
        "y": [final.mean],
        "customdata": [final.n],
        "mode": "markers",
        "marker": {"color": charts.style(number)[0], "size": 9},
        "error_y": {"array": [half], "thickness": 1.5, "width": 4},
        "hovertemplate": "%{y:.4f} (%{customdata} runs)",
    }


def _cost(found: Comparison) -> Spec:
    traces = [
        _point(found, i, setting, setting.seconds.mean) | {"hovertemplate": "%{y:.4f} in %{x:.1f} s"}
        for i, setting in enumerate(found.settings)
        if setting.final and setting.seconds
    ]
    x = {"title": {"text": "seconds of a run, mean"}, "rangemode": "tozero"}
    layout = {"xaxis": x, "yaxis": {"title": {"text": found.metric}}}
    caption = (
        "Wall-clock time of a run, without epochs that it took over from a shorter one; "
        "runs that shared a machine slow each other."
    )
    return {
        "title": "time and result",
        "caption": caption,
        "traces": traces,
        "layout": layout,
        "log": "x",
        "shadow": 0.2,
    }


def _parallel(found: Comparison) -> Spec:
    """Parallel coordinates; plain lines, as plotly's own need WebGL and cannot be printed."""
    axes = charts.axes(found)
    traces: dict[int, Spec] = {}
    for number, run, heights in charts.lines(found):
        empty: Spec = {
            "group": number,
            "name": _text(found.label(found.settings[number])),
            "x": [],
            "y": [],
            "text": [],
            "mode": "lines",
            "line": {"color": charts.style(number)[0], "width": 1.5},
            "hovertemplate": "%{text}",
        }
        trace = traces.setdefault(number, empty)
        trace["x"] += [*range(len(heights)), None]
        trace["y"] += [*heights, None]
        trace["text"] += [_text(f"seed={run.params.get('seed', '')}")] * (len(heights) + 1)
    return {
        "title": "parallel coordinates",
        "caption": "A line for each run that is averaged over; click settings above to single them out.",
        "traces": list(traces.values()),
        "layout": _parallel_layout(axes),
        "shadow": 0.06,
    }


def _parallel_layout(axes: Sequence[charts.Axis]) -> Spec:
    notes = [
        {"x": i, "y": y, "text": _text(label), "showarrow": False, "xanchor": "right", "xshift": -5}
        for i, axis in enumerate(axes)
        for y, label in axis.labels
    ]
    shapes = [{"type": "line", "x0": i, "x1": i, "y0": 0, "y1": 1} for i in range(len(axes))]
    ticks = {"tickvals": list(range(len(axes))), "ticktext": [_text(axis.title) for axis in axes]}
    return {
        "xaxis": {**ticks, "range": [-0.4, len(axes) - 0.9], "showgrid": False, "side": "top"},
        "yaxis": {"visible": False, "range": [-0.05, 1.05]},
        "annotations": notes,
        "shapes": shapes,
        "margin": {"t": 40, "b": 16},
    }

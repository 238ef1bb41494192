"""The ladder as a bar chart: one bar per contender, with its range over the rounds."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.rungs import Ladder, Rung, flops
from lenet_sweep.inspection.colours import COLOURS

WIDTH = 8  # inches; 100 points per inch on a page 800 points wide


def draw(ladder: Ladder, machine: dict[str, Any]) -> Figure:
    """Draw examples/s of all contenders, grouped by network, with whole sweeps at the bottom."""
    groups = list(dict.fromkeys(map(_group, ladder.measured)))
    rungs = sorted(ladder.measured, key=lambda rung: groups.index(_group(rung)))
    figure = Figure(figsize=(WIDTH, 1.6 + 0.32 * len(rungs)), layout="constrained")
    axes = figure.subplots()
    for number, group in enumerate(groups):
        places = [place for place, rung in enumerate(rungs) if _group(rung) == group]
        medians = [statistics.median(rungs[place].rates) for place in places]
        ends = [
            [median - min(rungs[place].rates) for place, median in zip(places, medians, strict=True)],
            [max(rungs[place].rates) - median for place, median in zip(places, medians, strict=True)],
        ]
        drawn = axes.barh(places, medians, xerr=ends, color=COLOURS[number], label=group,
                          error_kw={"capsize": 2.5, "elinewidth": 1})  # fmt: skip
        axes.bar_label(drawn, [f"{median:,.0f}" for median in medians], padding=4, fontsize=8)
    roof = min(ladder.roof / flops(rung.network) for rung in rungs)
    axes.axvline(roof, color="#8C8C8C", linestyle="--", linewidth=1, label="roof: float32 matrix product")
    axes.set_yticks(range(len(rungs)), [rung.name for rung in rungs], fontsize=9)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.set_xlim(0, 1.15 * max(roof, *(max(rung.rates) for rung in rungs)))
    axes.set_xlabel("examples/s, including the test pass\nand, for a sweep, everything else")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_title(where(machine), fontsize=10, loc="left")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _group(rung: Rung) -> str:
    return f"{rung.network}, whole sweeps" if rung.name.startswith("sweep") else rung.network


def where(machine: dict[str, Any]) -> str:
    """The machine as a line of text."""
    torch = machine["packages"]["torch"]
    return f"{machine['cpu']}, {machine['cpu_count']} cores, {machine['device']}, torch {torch}"


def save(figure: Figure, path: Path) -> None:
    """Write the chart in the format of the file name; the same numbers give the same file."""
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context({"svg.hashsalt": "lenet_sweep"}):
        figure.savefig(path, dpi=200, metadata=metadata)

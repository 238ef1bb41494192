"""The ladder as a picture: a bar for each contender, with its range over the rounds."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.ladder import Ladder, Rung, flops
from lenet_sweep.inspection.colours import COLOURS

WIDTH = 8  # inches, at 100 points each in a page of 800


def draw(ladder: Ladder, machine: dict[str, Any]) -> Figure:
    """Examples/s of all that was measured, from the top, grouped by network, whole sweeps last."""
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
    axes.set_xlabel("examples/s, test pass and,\nfor a sweep, everything else included")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_title(where(machine), fontsize=10, loc="left")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _group(rung: Rung) -> str:
    return f"{rung.network}, whole sweeps" if rung.name.startswith("sweep") else rung.network


def where(machine: dict[str, Any]) -> str:
    """The machine in words."""
    torch = machine["packages"]["torch"]
    return f"{machine['cpu']}, {machine['cpu_count']} cores, {machine['device']}, torch {torch}"


def save(figure: Figure, path: Path) -> None:
    """Write the picture in the format of its name; the same numbers give the same file."""
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context({"svg.hashsalt": "lenet_sweep"}):
        figure.savefig(path, dpi=200, metadata=metadata)

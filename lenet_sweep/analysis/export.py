"""A comparison as Markdown, CSV or JSON, and predictions as JSON."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenet_sweep.analysis import tables
from lenet_sweep.analysis.comparison import ALPHA, Comparison, Summary, notes, short
from lenet_sweep.analysis.tables import HEADINGS
from lenet_sweep.paths import atomic_path, write_atomic

if TYPE_CHECKING:
    from lenet_sweep.inspection.predict import Prediction


def comparison_markdown(comparison: Comparison) -> str:
    """The answer, the best result for each value of each hyperparameter, the table and its notes."""
    lists = [
        f"- {short(key)}: {', '.join(_best_by_value(comparison, index))}"
        for index, key in enumerate(comparison.by)
        if len(comparison.by) > 1
    ]
    best = ["Best result for each value of each hyperparameter:", "", *lists, ""] if lists else []
    # Seconds depend on the machine and its load, so they are omitted from documents.
    shown = [heading for heading in HEADINGS if heading != "seconds"]
    headings = [*map(short, comparison.by or ("",)), *shown]
    rows = [
        headings,
        ["---"] * len(headings),
        *(tables.cells(comparison, setting, shown) for setting in comparison.settings),
    ]
    table = [f"| {' | '.join(map(_markdown, row))} |" for row in rows]
    return (
        "\n".join([tables.answer(comparison), "", *best, *table, "", *tables.comparison_lines(comparison)])
        + "\n"
    )


def _best_by_value(comparison: Comparison, index: int) -> list[str]:
    """For each value of the param `comparison.by[index]` the best result of its settings, best first."""
    firsts = {setting.key[index]: setting for setting in reversed(comparison.settings) if setting.final}
    ranked = [setting for setting in comparison.settings if firsts.get(setting.key[index]) is setting]
    return [
        f"**{_markdown(setting.key[index])}** {tables.spread(setting.final, tables.digits(comparison))}"
        for setting in ranked
    ]


def _markdown(text: str) -> str:
    """Text from a store for a cell, with all markup escaped."""
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", tables.plain(text).plain)


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A flat dict for every setting, with full precision, as CSV and JSON contain them."""
    return [
        {
            **dict(zip(comparison.by, setting.key, strict=True)),
            "metric": comparison.metric,
            "n": len(setting.counted),
            **_columns("final", setting.final),
            **_columns("best", setting.best),
            **_columns("best_epoch", setting.best_epoch),
            "p": setting.p,
            "verdict": setting.verdict,
            **_columns("seconds", setting.seconds),
            **_columns("examples_per_s", setting.examples_per_s),
            "left_out": "; ".join(f"{n} {reason}" for reason, n in setting.excluded.items()),
        }
        for setting in comparison.settings
    ]


def write_csv(comparison: Comparison, path: Path) -> None:
    """Write one line for every setting."""
    values = rows(comparison)
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(values[0]))
        writer.writeheader()
        writer.writerows(values)


def write_json(comparison: Comparison, path: Path) -> None:
    """Write the settings, all their runs, and the notes."""
    values = {
        "metric": comparison.metric,
        "by": comparison.by,
        "test": f"Welch's t-test against the best, Holm's correction, {ALPHA}",
        "groups": rows(comparison),
        "runs": [
            {
                **asdict(run),
                "final": run.last(comparison.metric),
                "best": run.best(comparison.metric),
                "counted": run.name in {counted.name for counted in setting.counted},
            }
            for setting in comparison.settings
            for run in setting.runs
        ],
        "notes": notes(comparison),
    }
    write_atomic(path, json.dumps(values, indent=1) + "\n")


def write_predictions(predictions: Sequence["Prediction"], path: Path) -> None:
    """Write the probabilities of all classes for every image as JSON."""
    values = [{"picture": str(p.path), "probabilities": dict(p.classes)} for p in predictions]
    write_atomic(path, json.dumps(values, indent=1) + "\n")


def _columns(name: str, summary: Summary | None) -> dict[str, float | None]:
    values = {"mean": None, "sd": None, "low": None, "high": None} if summary is None else asdict(summary)
    return {f"{name}_{part}": values[part] for part in ("mean", "sd", "low", "high")}

"""Results as tables: every run at the end of a sweep, and settings compared over seeds; CSV and JSON too."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from lenet_sweep.analysis.comparison import Comparison, Setting, Summary, notes, short
from lenet_sweep.storage.records import Record
from lenet_sweep.storage.result import Result

if TYPE_CHECKING:
    from lenet_sweep.inspection.activations import ActivationStats
    from lenet_sweep.inspection.predict import Prediction


MARKS = {"best": "best", "tied": "~", "worse": "", "unknown": "?", "none": ""}
HEADINGS = ("n", "final", "95 % interval", "best", "at epoch", "seconds", "verdict", "left out")
_ASIDE = ("best", "at epoch", "seconds")  # not shown where the screen is narrow
_WIDE = 100
_LISTED = 20  # runs that did not end, below a table
_COMMON = ("data.name", "model.name", "lr", "epochs", "optimizer.name", "batch_size")


@dataclass(frozen=True)
class Row:
    """One job of a sweep.

    `folder` is None if it was finished before the sweep; `result` is None if it did not end (it was
    killed, or never started).
    """

    overrides: tuple[str, ...]
    folder: Path | None
    result: Result | None

    @property
    def failed(self) -> bool:
        return self.result is None or self.result.status != "FINISHED"

    @property
    def status(self) -> str:
        if self.result is None:
            return "LOST" if self.folder and self.folder.exists() else "not started"
        notes = [
            note
            for note, holds in (("collapsed", self.result.collapsed), ("before", not self.folder))
            if holds
        ]
        return f"{self.result.status} ({', '.join(notes)})" if notes else self.result.status


def sweep_table(rows: list[Row]) -> Table:
    """A row for every run, with a column for each key that differs between them; the title has the others."""
    settings = [settings_of(row.overrides) for row in rows]
    varied = varied_keys([row.overrides for row in rows])
    same = [f"{key}={value}" for key, value in settings[0].items() if key not in varied]
    count = f"All {len(rows)} runs" if len(rows) > 1 else "One run"
    table = Table(title=f"{count}  {' '.join(same)}".rstrip(), title_justify="left")
    table.add_column("run", justify="right")
    for key in varied:
        table.add_column(key.lstrip("+"), overflow="fold")
    for heading in ("train loss", "train acc", "test acc", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("status")
    for number, (row, values) in enumerate(zip(rows, settings, strict=True), start=1):
        table.add_row(
            str(number),
            *(values.get(key, "") for key in varied),
            *_numbers(row.result),
            row.status,
            style="red" if row.failed else None,
        )
    return table


def varied_keys(jobs: Sequence[Sequence[str]]) -> list[str]:
    """The keys whose values are not the same in the overrides of all jobs."""
    settings = [settings_of(job) for job in jobs]
    keys = dict.fromkeys(key for values in settings for key in values)
    return [key for key in keys if len({values.get(key) for values in settings}) > 1]


def settings_of(overrides: Sequence[str]) -> dict[str, str]:
    """The overrides of a job as a dict: {"lr": "0.1"}."""
    return dict(override.partition("=")[::2] for override in overrides)


def failures(rows: list[Row]) -> list[str]:
    """A line for each run that failed: which, why, and where its log is."""
    varied = varied_keys([row.overrides for row in rows])
    return [
        f"run {number} ({label(row.overrides, varied)}): {_reason(row)}; see {row.folder}"
        for number, row in enumerate(rows, start=1)
        if row.failed and row.status != "not started"
    ]


def label(overrides: Sequence[str], varied: Sequence[str]) -> str:
    """What tells a job from the others of its sweep."""
    return " ".join(override for override in overrides if override.partition("=")[0] in varied)


def comparison_table(comparison: Comparison, width: int, at_most: int | None = None) -> Table:
    """A row for every setting, the best first: means, spreads, and what can be told from the best.

    With more than `at_most` settings the others are only counted. Fewer than 100 characters of `width`
    leave out what is not about the final value.
    """
    title = f"{comparison.metric}  {common(comparison)}".rstrip()
    table = Table(title=plain(title), title_justify="left")
    for key in comparison.by or ("",):
        table.add_column(plain(short(key)), overflow="fold")
    shown = [heading for heading in HEADINGS if width >= _WIDE or heading not in _ASIDE]
    for heading in shown:
        table.add_column(heading, justify="left" if heading in ("verdict", "left out") else "right")
    for setting in comparison.settings[:at_most]:
        values = setting.key or ("all runs",)
        named = dict(zip(HEADINGS, cells(comparison, setting)[-len(HEADINGS) :], strict=True))
        table.add_row(*map(plain, [*values, *(named[heading] for heading in shown)]), style=_style(setting))
    if at_most and len(comparison.settings) > at_most:
        table.caption = f"and {len(comparison.settings) - at_most} more: python -m lenet_sweep compare"
    return table


def answer(found: Comparison) -> str:
    """The sweep's answer in a sentence or two."""
    places = digits(found)
    judged = [setting for setting in found.settings if setting.final]
    if not judged:
        return "No run ended well, so there is nothing to compare."
    best, final = judged[0], judged[0].final
    assert final is not None
    runs = "one run" if final.n == 1 else f"{final.n} runs, 95 % interval {interval(final, places)}"
    text = f"Best: {found.label(best)} with {found.metric} {spread(final, places)} ({runs})."
    tied = sum(setting.verdict == "tied" for setting in judged)
    unknown = sum(setting.verdict == "unknown" for setting in judged)
    if tied:
        text += f" {tied} of the {len(judged) - 1} others cannot be told from it."
    elif unknown:
        text += " With one run each, nothing can be told from it: add seeds."
    elif len(judged) > 1:
        text += " All others are worse by more than chance."
    return text


def comparison_lines(comparison: Comparison) -> list[str]:
    """What stands below the table: how to read it, and the runs that did not end, with their reasons."""
    broken = [
        f"{run_label(comparison, setting, run)}: {fate(run)}"
        for setting, run in left_out(comparison)
        if run.status != "FINISHED"
    ]
    if len(broken) > _LISTED:
        broken[_LISTED:] = [f"and {len(broken) - _LISTED} more, which --json lists"]
    return [*notes(comparison), *broken]


def left_out(comparison: Comparison) -> list[tuple[Setting, Record]]:
    """The runs that are not averaged over."""
    return [
        (setting, run)
        for setting in comparison.settings
        for run in setting.runs
        if run.name not in {counted.name for counted in setting.counted}
    ]


def run_label(comparison: Comparison, setting: Setting, run: Record) -> str:
    """A run in words: its setting, its seed and its name."""
    seed = "" if "seed" in comparison.by else f" seed={run.params.get('seed', '')}"
    return f"{comparison.label(setting)}{seed} ({run.name})"


def fate(run: Record) -> str:
    """How a run ended, with the reason that was recorded."""
    status = "collapsed to guessing" if run.collapsed and run.status == "FINISHED" else run.status
    return f"{status}, {run.reason}" if run.reason else status


def prediction_table(predictions: Sequence["Prediction"]) -> Table:
    """A row for each image: the three most likely classes and their probabilities."""
    table = Table()
    for heading in ("image", "class", "p", "second", "p", "third", "p"):
        table.add_column(heading, justify="right" if heading == "p" else "left")
    for prediction in predictions:
        top = [cell for name, p in prediction.classes[:3] for cell in (name, f"{p:.3f}")]
        table.add_row(plain(str(prediction.path)), *top)
    return table


def activation_table(stats: Sequence["ActivationStats"]) -> Table:
    """A row for each kind of image: the mean activation of every layer, and the mean confidence."""
    table = Table(title="mean activations and confidence", title_justify="left")
    table.add_column("images")
    for layer in stats[0].values:
        table.add_column(layer, justify="right")
    table.add_column("confidence", justify="right")
    for kind in stats:
        means = [f"{kind.mean(layer):.3f}" for layer in kind.values]
        table.add_row(kind.kind, *means, f"{float(kind.confidence_N.mean()):.3f}")
    return table


def plain(text: str) -> Text:
    """Text from a store for a terminal: no markup, no control characters."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def spread(summary: Summary | None, digits: int) -> str:
    """Mean and standard deviation."""
    if summary is None:
        return ""
    mean = f"{summary.mean:.{digits}f}"
    return mean if summary.sd is None else f"{mean} ± {summary.sd:.{digits}f}"


def interval(summary: Summary | None, digits: int) -> str:
    """The 95 % interval, or that there is none."""
    if summary is None:
        return ""
    if summary.low is None or summary.high is None:
        return "none (n=1)"
    return f"{summary.low:.{digits}f} to {summary.high:.{digits}f}"


def digits(comparison: Comparison) -> int:
    """Decimal places that the metric is shown with."""
    return 1 if comparison.metric == "speed/examples_per_s" else 3


def cells(comparison: Comparison, setting: Setting) -> list[str]:
    places = digits(comparison)
    p = f" p={setting.p:.2g}" if setting.p is not None else ""
    return [
        *(setting.key or ("all runs",)),
        str(len(setting.counted)),
        spread(setting.final, places),
        interval(setting.final, places),
        spread(setting.best, places),
        spread(setting.best_epoch, 1),
        spread(setting.seconds, 1),
        f"{MARKS[setting.verdict]}{p}".strip(),
        ", ".join(f"{n} {reason}" for reason, n in setting.flags.items()),
    ]


def _style(setting: Setting) -> str | None:
    return {"best": "bold green", "tied": "green", "none": "red"}.get(setting.verdict)


def common(comparison: Comparison) -> str:
    """The params that matter most, where all runs share them: 'data=mnist epochs=5'."""
    shared = {key: comparison.constant[key] for key in _COMMON if key in comparison.constant}
    return " ".join(f"{short(key)}={value}" for key, value in shared.items())


def _reason(row: Row) -> str:
    return (row.result.reason if row.result else None) or row.status


def _numbers(result: Result | None) -> list[str]:
    if result is None:
        return [""] * 4
    metrics = [result.metrics.get(name) for name in ("train/loss", "train/acc", "test/acc")]
    return [*("" if value is None else f"{value:.3f}" for value in metrics), f"{result.seconds:.1f}"]

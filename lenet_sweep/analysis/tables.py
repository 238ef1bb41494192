"""Tables for the terminal: the runs of a sweep, settings compared over their seeds, and predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from lenet_sweep.analysis.comparison import Comparison, Setting, Summary, notes, short, tied_settings
from lenet_sweep.storage.records import Record
from lenet_sweep.storage.result import Result

if TYPE_CHECKING:
    from lenet_sweep.inspection.activations import ActivationStats
    from lenet_sweep.inspection.predict import Prediction


MARKS = {"best": "best", "tied": "~", "worse": "", "unknown": "?", "none": ""}
HEADINGS = ("n", "final", "95 % interval", "best", "at epoch", "seconds", "verdict", "excluded")
_WIDE = 100  # characters; a narrower screen omits some columns
_WIDE_ONLY = ("best", "at epoch", "seconds")
_LISTED = 20  # failed or unfinished runs that are listed below a table
_COMMON_KEYS = ("data.name", "model.name", "lr", "epochs", "optimizer.name", "batch_size")


@dataclass(frozen=True)
class Row:
    """One job of a sweep.

    `folder` is None if the job was finished before the sweep. `result` is None if the job was killed or
    never started.
    """

    overrides: tuple[str, ...]
    folder: Path | None
    result: Result | None

    @property
    def failed(self) -> bool:
        return self.result is None or self.result.status != "FINISHED"

    @property
    def is_lost(self) -> bool:
        """Whether the run was started and left no result, as after SIGKILL or a power cut."""
        return self.result is None and self.folder is not None and self.folder.exists()

    @property
    def status(self) -> str:
        if self.result is None:
            return "LOST" if self.is_lost else "not started"
        notes = [
            note
            for note, holds in (("collapsed", self.result.collapsed), ("before", not self.folder))
            if holds
        ]
        return f"{self.result.status} ({', '.join(notes)})" if notes else self.result.status


def sweep_table(rows: list[Row]) -> Table:
    """A row for every run, a column for every key that differs; the title has the overrides they share."""
    settings = [settings_of(row.overrides) for row in rows]
    varied = varied_keys([row.overrides for row in rows])
    shared = [f"{key}={value}" for key, value in settings[0].items() if key not in varied]
    count = f"All {len(rows)} runs" if len(rows) > 1 else "One run"
    table = Table(title=f"{count}  {' '.join(shared)}".rstrip(), title_justify="left")
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
    """The keys whose values differ between the overrides of the jobs."""
    settings = [settings_of(job) for job in jobs]
    keys = dict.fromkeys(key for values in settings for key in values)
    return [key for key in keys if len({values.get(key) for values in settings}) > 1]


def settings_of(overrides: Sequence[str]) -> dict[str, str]:
    """The overrides of a job as a dict: {"lr": "0.1"}."""
    return dict(override.partition("=")[::2] for override in overrides)


def failures(rows: list[Row]) -> list[str]:
    """One line for each failed run: its number and overrides, the reason, and the folder of its log."""
    varied = varied_keys([row.overrides for row in rows])
    return [
        f"run {number} ({label(row.overrides, varied)}): {_reason(row)}; see {row.folder}"
        for number, row in enumerate(rows, start=1)
        if row.failed and row.status != "not started"
    ]


def label(overrides: Sequence[str], varied: Sequence[str]) -> str:
    """The overrides of a job that differ within its sweep."""
    return " ".join(override for override in overrides if override.partition("=")[0] in varied)


def comparison_table(comparison: Comparison, width: int, at_most: int | None = None) -> Table:
    """A row for every setting, best first: means, standard deviations, and the verdict.

    Only the first `at_most` settings are shown; the caption counts the rest. If `width` is below 100
    characters, columns that are not about the final value are omitted.
    """
    title = f"{comparison.metric}  {common(comparison)}".rstrip()
    table = Table(title=plain(title), title_justify="left")
    for key in comparison.by or ("",):
        table.add_column(plain(short(key)), overflow="fold")
    shown = [heading for heading in HEADINGS if width >= _WIDE or heading not in _WIDE_ONLY]
    for heading in shown:
        table.add_column(heading, justify="left" if heading in ("verdict", "excluded") else "right")
    for setting in comparison.settings[:at_most]:
        table.add_row(*map(plain, cells(comparison, setting, shown)), style=_style(setting))
    if at_most and len(comparison.settings) > at_most:
        table.caption = f"and {len(comparison.settings) - at_most} more: python -m lenet_sweep compare"
    return table


def answer(comparison: Comparison) -> str:
    """The result of a comparison in one or two sentences."""
    decimals = digits(comparison)
    averaged = [setting for setting in comparison.settings if setting.final]
    if not averaged:
        return "No run finished without collapsing, so there is nothing to compare."
    best, final = averaged[0], averaged[0].final
    assert final is not None
    runs = "one run" if final.n == 1 else f"{final.n} runs, 95 % interval {interval(final, decimals)}"
    text = f"Best: {comparison.label(best)} with {comparison.metric} {spread(final, decimals)} ({runs})."
    if tied := tied_settings(comparison):
        text += f" {tied}."
    elif any(setting.verdict == "unknown" for setting in averaged):
        text += " With one run per setting, no difference is significant: add seeds."
    elif len(averaged) > 1:
        text += " All others are significantly worse."
    return text


def comparison_lines(comparison: Comparison) -> list[str]:
    """The lines below the table: notes, then the failed and unfinished runs with their reasons."""
    unfinished = [
        f"{run_label(comparison, setting, run)}: {outcome(run)}"
        for setting, run in excluded_runs(comparison)
        if run.status != "FINISHED"
    ]
    if len(unfinished) > _LISTED:
        unfinished[_LISTED:] = [f"and {len(unfinished) - _LISTED} more; --json lists them all"]
    return [*notes(comparison), *unfinished]


def excluded_runs(comparison: Comparison) -> list[tuple[Setting, Record]]:
    """The runs that are not averaged, with their settings."""
    return [
        (setting, run)
        for setting in comparison.settings
        for run in setting.runs
        if run.name not in {counted.name for counted in setting.counted}
    ]


def run_label(comparison: Comparison, setting: Setting, run: Record) -> str:
    """The setting, seed and name of a run: 'lr=0.1 seed=0 (outputs/sweeps/X/3)'."""
    seed = "" if "seed" in comparison.by else f" seed={run.params.get('seed', '')}"
    return f"{comparison.label(setting)}{seed} ({run.name})"


def outcome(run: Record) -> str:
    """How a run ended, and the reason if one was recorded."""
    status = (
        "collapsed (no better than guessing)" if run.collapsed and run.status == "FINISHED" else run.status
    )
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
    """Text from a store, safe to print: without markup and control characters."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def spread(summary: Summary | None, digits: int) -> str:
    """Mean and standard deviation, the latter if there are several values."""
    if summary is None:
        return ""
    mean = f"{summary.mean:.{digits}f}"
    return mean if summary.sd is None else f"{mean} ± {summary.sd:.{digits}f}"


def interval(summary: Summary | None, digits: int) -> str:
    """The 95 % confidence interval of the mean; a single value has none."""
    if summary is None:
        return ""
    if summary.low is None or summary.high is None:
        return "none (n=1)"
    return f"{summary.low:.{digits}f} to {summary.high:.{digits}f}"


def digits(comparison: Comparison) -> int:
    """The number of decimals of the metric."""
    return 1 if comparison.metric == "speed/examples_per_s" else 3


def cells(comparison: Comparison, setting: Setting, headings: Sequence[str]) -> list[str]:
    """The row of a setting: the values of its key, then the cells below these headings."""
    decimals = digits(comparison)
    p = f" p={setting.p:.2g}" if setting.p is not None else ""
    texts = {
        "n": str(len(setting.counted)),
        "final": spread(setting.final, decimals),
        "95 % interval": interval(setting.final, decimals),
        "best": spread(setting.best, decimals),
        "at epoch": spread(setting.best_epoch, 1 if len(setting.counted) > 1 else 0),
        "seconds": spread(setting.seconds, 1),
        "examples/s": f"{setting.examples_per_s.mean:,.0f}" if setting.examples_per_s else "",
        "verdict": f"{MARKS[setting.verdict]}{p}".strip(),
        "excluded": ", ".join(f"{n} {reason}" for reason, n in setting.excluded.items()),
    }
    return [*(setting.key or ("all runs",)), *(texts[heading] for heading in headings)]


def _style(setting: Setting) -> str | None:
    return {"best": "bold green", "tied": "green", "none": "red"}.get(setting.verdict)


def common(comparison: Comparison) -> str:
    """The most important params that all runs share: 'data=mnist epochs=5'."""
    shared = {key: comparison.constant[key] for key in _COMMON_KEYS if key in comparison.constant}
    return " ".join(f"{short(key)}={value}" for key, value in shared.items())


def _reason(row: Row) -> str:
    if row.is_lost:
        return "stopped without a result (was its process killed?)"
    return (row.result.reason if row.result else None) or row.status


def _numbers(result: Result | None) -> list[str]:
    if result is None:
        return [""] * 4
    metrics = [result.metrics.get(name) for name in ("train/loss", "train/acc", "test/acc")]
    return [*("" if value is None else f"{value:.3f}" for value in metrics), f"{result.seconds:.1f}"]

"""Compares settings over their seeds: which one is best, and which are not significantly worse.

Works on records alone, without a store, a table or a plot. Runs that collapsed, failed or did not finish
are counted by reason and excluded from all averages. SciPy is imported only when a statistic is computed.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lenet_sweep.errors import ConfigError, suggestion
from lenet_sweep.storage.fingerprint import RESULT_FREE
from lenet_sweep.storage.records import MORE_IS_BETTER, Record, without_repeats

ALPHA = 0.05

Verdict = Literal["best", "tied", "worse", "unknown", "none"]


@dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation and 95 % confidence interval of the mean of `n` values.

    The last three are None for a single value.
    """

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Setting:
    """Runs with the same values of all keys that are compared.

    `verdict` compares `final` with that of the best setting: worse if `p` (corrected by Holm's method) is
    below 0.05, else tied; unknown if one of the two has a single run; none if no run could be averaged.
    """

    key: tuple[str, ...]  # the values of Comparison.by
    runs: tuple[Record, ...]
    counted: tuple[Record, ...]  # the runs that are averaged
    final: Summary | None
    best: Summary | None
    best_epoch: Summary | None
    seconds: Summary | None
    examples_per_s: Summary | None
    p: float | None = None
    verdict: Verdict = "none"

    @property
    def excluded(self) -> dict[str, int]:
        """The number of runs that are not averaged, by reason."""
        counted = {run.name for run in self.counted}
        reasons = [_exclusion_reason(run) for run in self.runs if run.name not in counted]
        return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


@dataclass(frozen=True)
class Comparison:
    """All settings, best first."""

    metric: str
    by: tuple[str, ...]
    settings: tuple[Setting, ...]
    constant: dict[str, str]  # the params that all runs share
    averaged: tuple[str, ...]  # keys that differ within settings
    repeats: int  # runs dropped because another run has the same config

    @property
    def runs(self) -> list[Record]:
        return [run for setting in self.settings for run in setting.runs]

    def label(self, setting: Setting) -> str:
        """The setting as overrides: 'lr=0.1 model=lenet'."""
        pairs = zip(self.by, setting.key, strict=True)
        return " ".join(f"{short(key)}={value}" for key, value in pairs) or "all runs"


def compare(runs: Sequence[Record], metric: str, by: Sequence[str] | None = None) -> Comparison:
    """Group the runs into settings by the keys `by`, and rank the settings by `metric`.

    By default these are all keys that differ between the runs, except the seed.

    Raises:
        ConfigError: if the metric or a key is unknown, or if no run has the metric.
    """
    check_metric(metric)
    records = without_repeats(runs)
    if any(run.ended_well for run in records) and not any(run.history.get(metric) for run in records):
        held_out = "; validation needs data.val_size above 0" if metric.startswith("val/") else ""
        raise ConfigError(f"--metric {metric}: none of these runs has it{held_out}")
    differing = varied(records)
    keys = tuple(key for key in differing if key != "seed") if by is None else _resolve_keys(by, records)
    members: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        members.setdefault(tuple(record.params.get(key, "") for key in keys), []).append(record)
    settings = rank([_setting(key, group, metric) for key, group in members.items()], metric)
    constant = {
        key: value for key, value in records[0].params.items() if key not in varied(records, all=True)
    }
    averaged = tuple(key for key in differing if key not in keys and _differs_within(members.values(), key))
    return Comparison(metric, keys, settings, constant, averaged, len(runs) - len(records))


def check_metric(metric: str) -> None:
    """Check that `metric` is one that runs log.

    Raises:
        ConfigError: if it is not; the message lists all metrics.
    """
    if metric not in MORE_IS_BETTER:
        near = suggestion(metric, set(MORE_IS_BETTER))
        raise ConfigError(f"unknown metric {metric!r}.{near}\nMetrics: {', '.join(MORE_IS_BETTER)}.")


def varied(records: Sequence[Record], *, all: bool = False) -> list[str]:
    """The params that differ between the runs.

    Without `all`, params that cannot change a result are omitted (`tracking.uri`, `data.root`), and so are
    those that another one determines: `lr` determines `optimizer.lr`, and `model=lenet,lenet_relu_max`
    sets activation and pool, so only `model.name` is listed.
    """
    keys = dict.fromkeys(key for record in records for key in record.params)
    differing = [key for key in keys if len({record.params.get(key) for record in records}) > 1]
    if all:
        return differing
    relevant = [key for key in differing if not _is_result_free(key)]
    if _determines(records, "lr", "optimizer.lr"):
        relevant = [key for key in relevant if key != "optimizer.lr"]
    return [
        key
        for key in relevant
        if (name := f"{key.rpartition('.')[0]}.name") == key
        or name not in relevant
        or not _determines(records, name, key)
    ]


def short(key: str) -> str:
    """A key as it is typed on the command line: `model` for `model.name`."""
    return key.removesuffix(".name")


def level(value: str) -> tuple[float, str]:
    """A sort key for the values of a param: numbers by size, then words by alphabet."""
    try:
        return float(value), ""
    except ValueError:
        return math.inf, value


def summarize(values: Sequence[float]) -> Summary | None:
    """Mean, sample standard deviation and Student's 95 % interval of the mean; None without values."""
    n = len(values)
    if n == 0:
        return None
    mean = statistics.mean(values)  # exact, rounded once; fmean of equal values can depend on their number
    if n == 1:
        return Summary(1, mean, None, None, None)
    from scipy.special import stdtrit

    sd = statistics.stdev(values)
    half = float(stdtrit(n - 1, 1 - ALPHA / 2)) * sd / math.sqrt(n)
    return Summary(n, mean, sd, mean - half, mean + half)


def welch(a: Summary, b: Summary) -> float | None:
    """The two-sided p-value of Welch's t-test; None if one of the two is a single value.

    No common variance is assumed, because a high learning rate scatters more. Welch, "The generalization
    of Student's problem when several different population variances are involved", Biometrika 34, 1947.
    """
    if a.sd is None or b.sd is None:
        return None
    va, vb = a.sd**2 / a.n, b.sd**2 / b.n
    if va + vb == 0:
        return 1.0 if a.mean == b.mean else 0.0
    from scipy.special import stdtr

    t = abs(a.mean - b.mean) / math.sqrt(va + vb)
    df = (va + vb) ** 2 / (va**2 / (a.n - 1) + vb**2 / (b.n - 1))
    return 2 * float(stdtr(df, -t))


def holm(ps: Sequence[float]) -> list[float]:
    """P-values corrected for multiple tests (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected, largest = [0.0] * len(ps), 0.0
    for smaller, i in enumerate(order):  # the number of smaller p-values
        largest = max(largest, min(1.0, (len(ps) - smaller) * ps[i]))
        corrected[i] = largest
    return corrected


def rank(settings: Sequence[Setting], metric: str) -> tuple[Setting, ...]:
    """The settings sorted by mean, best first, each with its verdict.

    Every setting is tested against the best one (Welch's t-test, Holm's correction for the number of
    tests). The best one is selected by the same numbers, so the test is slightly too liberal: "worse" is
    found a little too often. More seeds reduce this effect.
    """
    sign = -1 if MORE_IS_BETTER[metric] else 1
    ranked = sorted(
        settings,
        key=lambda s: (s.final is None, sign * s.final.mean if s.final else 0, [level(v) for v in s.key]),
    )
    if not ranked or ranked[0].final is None:
        return tuple(ranked)
    best = ranked[0].final
    raw = [welch(best, setting.final) if setting.final else None for setting in ranked[1:]]
    corrected = iter(holm([p for p in raw if p is not None]))
    ps = [None if p is None else next(corrected) for p in raw]
    others = [replace(s, p=p, verdict=_verdict(s, p)) for s, p in zip(ranked[1:], ps, strict=True)]
    return (replace(ranked[0], verdict="best"), *others)


def epochs_to(setting: Setting, metric: str, threshold: float) -> list[int | None]:
    """For each averaged run, the first epoch at which the metric is at least as good as `threshold`."""
    sign = 1 if MORE_IS_BETTER[metric] else -1
    return [
        min((e for e, x in run.history.get(metric, {}).items() if sign * x >= sign * threshold), default=None)
        for run in setting.counted
    ]


def tied_settings(comparison: Comparison) -> str:
    """How many settings are not significantly worse than the best, in words; '' if there are none."""
    others = [setting for setting in comparison.settings if setting.final][1:]
    tied = sum(setting.verdict == "tied" for setting in others)
    if not tied:
        return ""
    if len(others) == 1:
        return "The other setting is not significantly worse"
    return f"{tied} of the {len(others)} others {'is' if tied == 1 else 'are'} not significantly worse"


def notes(comparison: Comparison) -> list[str]:
    """What a reader needs to know to interpret the table, one line each."""
    lines = []
    settings = [setting for setting in comparison.settings if setting.final]
    if len(settings) > 1 and any(setting.verdict == "unknown" for setting in settings):
        lines.append(
            "A significance test needs at least two runs per setting (verdict ?); add seeds: seed='range(3)'."
        )
    if tied := tied_settings(comparison):
        lines.append(
            f"{tied} than the best (~: Welch's t-test, Holm's correction, 5 %); "
            "add seeds to detect smaller differences."
        )
    if comparison.averaged:
        lines.append(f"Averaged over {', '.join(map(short, comparison.averaged))}.")
    if any(setting.excluded for setting in settings):
        lines.append("Failed and collapsed runs are excluded from the averages.")
    if comparison.repeats:
        lines.append(f"Runs with equal configs are counted once ({comparison.repeats} repeated).")
    if comparison.metric.startswith("test/") and len(settings) > 1:
        lines.append(_test_note(comparison))
    return lines


def _test_note(comparison: Comparison) -> str:
    metric = comparison.metric.replace("test/", "val/")
    held_out = all(metric in run.history for setting in comparison.settings for run in setting.counted)
    how = (
        f"compare --metric {metric}; these runs have it"
        if held_out
        else f"train with data.val_size=N, then compare --metric {metric}"
    )
    return (
        "The best setting was selected by its result on test data, so that result is slightly too good. "
        f"To avoid this, {how}."
    )


def _setting(key: tuple[str, ...], runs: Sequence[Record], metric: str) -> Setting:
    counted = [run for run in runs if run.ended_well and run.last(metric) is not None]
    bests = [best for run in counted if (best := run.best(metric))]
    return Setting(
        key=key,
        runs=tuple(runs),
        counted=tuple(counted),
        final=summarize(_present(run.last(metric) for run in counted)),
        best=summarize([value for _, value in bests]),
        best_epoch=summarize([float(epoch) for epoch, _ in bests]),
        seconds=summarize(_present(run.seconds for run in counted)),
        examples_per_s=summarize(_present(run.last("speed/examples_per_s") for run in counted)),
    )


def _exclusion_reason(run: Record) -> str:
    if run.status == "FAILED":
        return "failed"
    if run.status != "FINISHED":
        return "unfinished"
    return "collapsed" if run.collapsed else "without this metric"


def _verdict(setting: Setting, p: float | None) -> Verdict:
    if setting.final is None:
        return "none"
    if p is None:
        return "unknown"
    return "worse" if p < ALPHA else "tied"


def _resolve_keys(by: Sequence[str], records: Sequence[Record]) -> tuple[str, ...]:
    """The full names of the params in `by`: model.name for `model`, model.pool for `pool`."""
    known = {key for record in records for key in record.params}
    return tuple(dict.fromkeys(_resolve_key(name, known, records) for name in by))


def _resolve_key(name: str, known: set[str], records: Sequence[Record]) -> str:
    if name in known:
        return name
    if f"{name}.name" in known:
        return f"{name}.name"
    ends = [key for key in known if key.endswith(f".{name}")]
    if len(ends) == 1:
        return ends[0]
    differ = ", ".join(map(short, varied(records))) or "nothing"
    raise ConfigError(
        f"--by {name}: the runs have no such param.{suggestion(name, known)}\n"
        f"Params that differ between the runs: {differ}."
    )


def _is_result_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in RESULT_FREE if free != "model.name")


def _determines(records: Sequence[Record], key: str, other: str) -> bool:
    """Whether runs with the same value of `key` always have the same value of `other`."""
    pairs = {(record.params.get(key), record.params.get(other)) for record in records}
    return len(pairs) == len({first for first, _ in pairs})


def _differs_within(groups: Iterable[Sequence[Record]], key: str) -> bool:
    return any(len({run.params.get(key) for run in runs}) > 1 for runs in groups)


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]

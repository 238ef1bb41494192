"""Which setting is best, and which cannot be told from it: runs grouped over seeds, in numbers.

Knows no store, no table and no picture; SciPy is imported when there is something to compute. A run
that collapsed, failed or did not end is counted and named, and never averaged over.
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
    """Mean, standard deviation and 95 % interval of the mean; one value alone has but a mean."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Setting:
    """Runs that agree in everything that is compared.

    `verdict` is about `final`: worse if `p` (against the best, Holm's correction included) is below
    0.05, tied if not; unknown if one of the two is a single run; none if nothing could be averaged.
    """

    key: tuple[str, ...]  # its values of Comparison.by
    runs: tuple[Record, ...]
    counted: tuple[Record, ...]  # those of them that are averaged over
    final: Summary | None
    best: Summary | None
    best_epoch: Summary | None
    seconds: Summary | None
    examples_per_s: Summary | None
    p: float | None = None
    verdict: Verdict = "none"

    @property
    def flags(self) -> dict[str, int]:
        """How many runs were left out, by reason."""
        counted = {run.name for run in self.counted}
        reasons = [_left_out(run) for run in self.runs if run.name not in counted]
        return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


@dataclass(frozen=True)
class Comparison:
    """All settings, the best first; `constant` is what all runs have in common."""

    metric: str
    by: tuple[str, ...]
    settings: tuple[Setting, ...]
    constant: dict[str, str]
    averaged: tuple[str, ...]  # keys that differ within settings
    repeats: int  # runs left out because an equal config is there

    @property
    def runs(self) -> list[Record]:
        return [run for setting in self.settings for run in setting.runs]

    def label(self, setting: Setting) -> str:
        """A setting in words: 'lr=0.1 model=lenet'."""
        pairs = zip(self.by, setting.key, strict=True)
        return " ".join(f"{short(key)}={value}" for key, value in pairs) or "all runs"


def compare(found: Sequence[Record], metric: str, by: Sequence[str] | None = None) -> Comparison:
    """Group the runs by the keys `by` (default: every one that differs, but for the seed) and judge them.

    Raises:
        ConfigError: for an unknown metric or key, or if no run measured the metric.
    """
    check_metric(metric)
    records = without_repeats(found)
    if any(run.ended_well for run in records) and not any(run.history.get(metric) for run in records):
        held_out = "; validation needs data.val_size above 0" if metric.startswith("val/") else ""
        raise ConfigError(f"--metric {metric}: none of these runs measured it{held_out}")
    telling = varied(records)
    keys = tuple(key for key in telling if key != "seed") if by is None else _chosen(by, records)
    members: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        members.setdefault(tuple(record.params.get(key, "") for key in keys), []).append(record)
    settings = judged([_group(key, runs, metric) for key, runs in members.items()], metric)
    constant = {
        key: value for key, value in records[0].params.items() if key not in varied(records, all=True)
    }
    averaged = tuple(key for key in telling if key not in keys and _differs_within(members.values(), key))
    return Comparison(metric, keys, settings, constant, averaged, len(found) - len(records))


def check_metric(metric: str) -> None:
    """Refuse a metric that no run has.

    Raises:
        ConfigError: naming those there are.
    """
    if metric not in MORE_IS_BETTER:
        near = suggestion(metric, set(MORE_IS_BETTER))
        raise ConfigError(f"there is no metric {metric!r}.{near}\nMetrics: {', '.join(MORE_IS_BETTER)}.")


def varied(records: Sequence[Record], *, all: bool = False) -> list[str]:
    """The params that differ between the runs; without `all`, each choice once, by its leading name.

    Where `model=lenet,lenet_relu_max` sets activation and pool, `model.name` stands for them; `lr`
    stands for `optimizer.lr`; where runs are tracked, or data lies, is no choice at all.
    """
    keys = dict.fromkeys(key for record in records for key in record.params)
    differing = [key for key in keys if len({record.params.get(key) for record in records}) > 1]
    if all:
        return differing
    own = [key for key in differing if not _changes_nothing(key)]
    if _follows(records, "lr", "optimizer.lr"):
        own = [key for key in own if key != "optimizer.lr"]
    return [
        key
        for key in own
        if (name := f"{key.rpartition('.')[0]}.name") == key
        or name not in own
        or not _follows(records, name, key)
    ]


def short(key: str) -> str:
    """A key as one types it: `model` for `model.name`."""
    return key.removesuffix(".name")


def level(value: str) -> tuple[float, str]:
    """A sort key under which '10' comes after '9', and words after numbers."""
    try:
        return float(value), ""
    except ValueError:
        return math.inf, value


def summarize(values: Sequence[float]) -> Summary | None:
    """Mean, sample standard deviation and Student's 95 % interval of the mean; None for no values."""
    n = len(values)
    if n == 0:
        return None
    mean = statistics.mean(values)  # exact but for one rounding, as fmean is not: equal runs, equal means
    if n == 1:
        return Summary(1, mean, None, None, None)
    from scipy.special import stdtrit

    sd = statistics.stdev(values)
    half = float(stdtrit(n - 1, 1 - ALPHA / 2)) * sd / math.sqrt(n)
    return Summary(n, mean, sd, mean - half, mean + half)


def welch(a: Summary, b: Summary) -> float | None:
    """The two-sided p of Welch's t-test; None if one of the two is a single value.

    Welch, "The generalization of Student's problem when several different population variances are
    involved", Biometrika 34, 1947: spreads of settings differ (a high lr swings more), so no common
    variance is assumed.
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
    """P-values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return corrected


def judged(settings: Sequence[Setting], metric: str) -> tuple[Setting, ...]:
    """The settings in order, the best mean first, each with its verdict.

    Every setting is tested against the best one (Welch), with Holm's correction for the number of
    tests. As the best is chosen by the same numbers, "worse" is a little too easily said; more seeds
    are the cure.
    """
    sign = -1 if MORE_IS_BETTER[metric] else 1
    ranked = sorted(
        settings,
        key=lambda g: (g.final is None, sign * g.final.mean if g.final else 0, [level(v) for v in g.key]),
    )
    if not ranked or ranked[0].final is None:
        return tuple(ranked)
    best = ranked[0].final
    raw = [welch(best, setting.final) if setting.final else None for setting in ranked[1:]]
    corrected = iter(holm([p for p in raw if p is not None]))
    ps = [None if p is None else next(corrected) for p in raw]
    others = [replace(g, p=p, verdict=_verdict(g, p)) for g, p in zip(ranked[1:], ps, strict=True)]
    return (replace(ranked[0], verdict="best"), *others)


def epochs_to(setting: Setting, metric: str, threshold: float) -> list[int | None]:
    """For each counted run, the first epoch at which the metric is at least as good as `threshold`."""
    sign = 1 if MORE_IS_BETTER[metric] else -1
    return [
        min((e for e, x in run.history.get(metric, {}).items() if sign * x >= sign * threshold), default=None)
        for run in setting.counted
    ]


def notes(comparison: Comparison) -> list[str]:
    """What a reader must know before believing the table, a line each."""
    lines = []
    settings = [setting for setting in comparison.settings if setting.final]
    tied = [setting for setting in settings if setting.verdict == "tied"]
    if len(settings) > 1 and any(setting.verdict == "unknown" for setting in settings):
        lines.append(
            "With a single run on either side nothing can be told from the best (verdict ?); "
            "add seeds: seed='range(3)'."
        )
    if tied:
        lines.append(
            f"{len(tied)} of {len(settings) - 1} others cannot be told from the best "
            "(~: Welch's t-test, Holm's correction, 5 %); more seeds tell more."
        )
    if comparison.averaged:
        lines.append(f"Averaged over {', '.join(map(short, comparison.averaged))}.")
    if any(setting.flags for setting in settings):
        lines.append("Runs that were left out count for nothing: a row with some is about those that worked.")
    if comparison.repeats:
        lines.append(f"{comparison.repeats} repeated runs of equal configs are counted once.")
    if comparison.metric.startswith("test/") and len(settings) > 1:
        lines.append(_test_note(comparison))
    return lines


def _test_note(comparison: Comparison) -> str:
    metric = comparison.metric.replace("test/", "val/")
    held_out = all(metric in run.history for setting in comparison.settings for run in setting.counted)
    how = (
        f"these runs held out examples: compare --metric {metric}"
        if held_out
        else f"hold out examples with data.val_size=5000, then compare --metric {metric}"
    )
    return f"Chosen on test data, so the best number is too good by a little; {how}."


def _group(key: tuple[str, ...], runs: Sequence[Record], metric: str) -> Setting:
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


def _left_out(run: Record) -> str:
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


def _chosen(by: Sequence[str], records: Sequence[Record]) -> tuple[str, ...]:
    """The params that `by` names; `model` is model.name, `pool` is model.pool."""
    known = {key for record in records for key in record.params}
    return tuple(dict.fromkeys(_key(name, known, records) for name in by))


def _key(name: str, known: set[str], records: Sequence[Record]) -> str:
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
        f"What differs between them: {differ}."
    )


def _changes_nothing(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in RESULT_FREE if free != "model.name")


def _follows(records: Sequence[Record], leader: str, key: str) -> bool:
    """Whether the value of `leader` decides that of `key`."""
    pairs = {(record.params.get(leader), record.params.get(key)) for record in records}
    return len(pairs) == len({first for first, _ in pairs})


def _differs_within(settings: Iterable[Sequence[Record]], key: str) -> bool:
    return any(len({run.params.get(key) for run in runs}) > 1 for runs in settings)


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]

"""The numbers of a comparison equal SciPy's; what is grouped, named and left out is what should be."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lenet_sweep.analysis import comparison
from lenet_sweep.analysis.comparison import compare, holm, summarize, varied, welch
from lenet_sweep.config import parsing
from lenet_sweep.errors import ConfigError
from lenet_sweep.storage import metrics_file, records, run_index
from lenet_sweep.storage.metrics_file import EpochRecord
from lenet_sweep.storage.records import MORE_IS_BETTER, Record, of_sweep, read_history, without_repeats
from lenet_sweep.storage.result import Result, write_result
from lenet_sweep.training.metrics import EpochMetrics

ACC = "test/acc"
values = st.lists(st.floats(0.01, 1), min_size=2, max_size=9).filter(lambda xs: np.std(xs) > 1e-6)


def record(lr, seed, *accuracies, metric=ACC, status="FINISHED", **fields):
    history = {metric: dict(enumerate(accuracies, start=1))}
    params = {"lr": str(lr), "seed": str(seed), "epochs": "2", **fields.pop("params", {})}
    name = f"{lr}-{seed}-{sorted(params.items())}"
    return Record(name, status, params, fields.pop("config_hash", name), history=history, **fields)


def group(comparison, *key):
    (found,) = [g for g in comparison.settings if g.key == tuple(map(str, key))]
    return found


def test_params_are_cut_where_mlflow_refuses_them():
    from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

    found = records.params({"lr": 0.1, "model": {"hidden": "x" * 9000}})
    assert found == {"lr": "0.1", "model.hidden": "x" * MAX_PARAM_VAL_LENGTH}


def test_metrics_are_those_of_the_journal():
    assert list(MORE_IS_BETTER) == list(metrics_file.NAMES.values())
    less_is_better = [name for name, more in MORE_IS_BETTER.items() if not more]
    assert less_is_better == ["train/loss", "test/loss", "val/loss", "speed/epoch_s"]


@given(values)
def test_mean_deviation_and_interval_are_scipys(xs):
    summary = summarize(xs)
    assert summary.mean == pytest.approx(np.mean(xs))
    assert summary.sd == pytest.approx(np.std(xs, ddof=1))
    low, high = stats.t.interval(0.95, len(xs) - 1, loc=np.mean(xs), scale=stats.sem(xs))
    assert (summary.low, summary.high) == pytest.approx((low, high))


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3])
def test_equal_numbers_are_never_told_apart_however_many_there_are(value):
    # 0.1 + 0.1 + 0.1 is not 3 * 0.1: a mean that is rounded on the way would differ from another's.
    summaries = [summarize([value] * n) for n in range(2, 12)]
    assert {(summary.mean, summary.sd) for summary in summaries} == {(value, 0.0)}
    assert {welch(a, b) for a in summaries for b in summaries} == {1.0}


def test_single_value_has_neither_deviation_nor_interval():
    assert summarize([0.5]) == comparison.Summary(1, 0.5, None, None, None)
    assert summarize([]) is None


@given(values, values)
def test_welch_is_scipys(a, b):
    assert welch(summarize(a), summarize(b)) == pytest.approx(
        stats.ttest_ind(a, b, equal_var=False).pvalue, abs=1e-12
    )


def test_holm_is_the_worked_example():
    # Holm 1979: the smallest times 4, the next times 3, never falling, at most 1.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_best_is_named_with_those_that_cannot_be_told_from_it():
    runs = [record(0.1, s, 0.2, x) for s, x in enumerate((0.80, 0.82, 0.81))]
    runs += [record(0.2, s, 0.2, x) for s, x in enumerate((0.79, 0.83, 0.80))]
    runs += [record(0.9, s, 0.2, x) for s, x in enumerate((0.50, 0.52, 0.51))]
    found = compare(runs, ACC)
    assert found.by == ("lr",)
    assert [(g.key, g.verdict) for g in found.settings] == [
        (("0.1",), "best"),
        (("0.2",), "tied"),
        (("0.9",), "worse"),
    ]
    raw = [stats.ttest_ind((0.80, 0.82, 0.81), xs, equal_var=False).pvalue for xs in
           ((0.79, 0.83, 0.80), (0.50, 0.52, 0.51))]  # fmt: skip
    assert [g.p for g in found.settings[1:]] == pytest.approx([raw[0], 2 * raw[1]])


def test_less_loss_is_better_and_more_accuracy():
    for metric, best in (("test/loss", "0.2"), (ACC, "0.1")):
        runs = [record(0.1, 0, 0.9, metric=metric), record(0.2, 0, 0.3, metric=metric)]
        assert compare(runs, metric).settings[0].key == (best,)


def test_one_run_each_tells_nothing_apart_and_says_so():
    found = compare([record(0.1, 0, 0.9), record(0.2, 0, 0.3)], ACC)
    assert [g.verdict for g in found.settings] == ["best", "unknown"]
    assert "needs at least two runs per setting" in "\n".join(comparison.notes(found))


def test_collapsed_failed_and_unfinished_runs_are_counted_and_not_averaged():
    runs = [
        record(0.1, 0, 0.6, 0.8),
        record(0.1, 1, 0.6, 0.7),
        record(0.1, 2, 0.1, 0.1, collapsed=True),
        record(0.1, 3, 0.1, status="FAILED"),
        record(0.1, 4, 0.1, status="RUNNING"),
        record(0.1, 5, 0.1, status="LOST"),
        record(0.1, 6, 0.5, math.nan),
        record(0.5, 0, 0.1, status="FAILED"),
    ]
    found = compare(runs, ACC)
    assert group(found, 0.1).final.mean == pytest.approx(0.75)
    assert group(found, 0.1).excluded == {
        "collapsed": 1,
        "failed": 1,
        "unfinished": 2,
        "without this metric": 1,
    }
    assert group(found, 0.5).final is None
    assert found.settings[-1].key == ("0.5",)


def test_best_value_and_its_epoch_come_from_the_history():
    runs = [record(0.1, 0, 0.3, 0.9, 0.5), record(0.1, 1, 0.7, 0.2, 0.7)]
    (only,) = compare(runs, ACC).settings
    assert (only.final.mean, only.best.mean) == pytest.approx((0.6, 0.8))
    assert only.best_epoch.mean == 1.5  # epochs 2 and 1: of equal values the first


def test_equal_configs_count_once_and_the_finished_one_counts():
    old = record(0.1, 0, 0.5, config_hash="h", start_ms=1)
    new = dataclasses.replace(old, name="new", start_ms=2)
    failed = dataclasses.replace(old, name="failed", start_ms=3, status="FAILED")
    assert without_repeats([old, new, failed]) == [new]
    assert compare([old, new, failed], ACC).repeats == 2


def test_a_choice_is_one_column_and_its_consequences_are_none():
    lenet = {"model.name": "lenet", "model.activation": "sigmoid", "model.pool": "avg"}
    relu = {"model.name": "lenet_relu_max", "model.activation": "relu", "model.pool": "max"}
    runs = [
        record(lr, 0, 0.5, params={**model, "optimizer.lr": str(lr), "tracking.uri": str(lr)})
        for lr in (0.1, 0.2)
        for model in (lenet, relu)
    ]
    assert varied(runs) == ["lr", "model.name"]
    runs.append(record(0.1, 0, 0.5, params={**lenet, "model.pool": "max", "optimizer.lr": "0.1"}))
    assert varied(runs) == ["lr", "model.name", "model.pool"]


def test_by_takes_short_names_and_names_what_differs_when_it_does_not_know_one():
    runs = [
        record(0.1, 0, 0.5, params={"model.pool": pool, "model.name": "lenet"}) for pool in ("avg", "max")
    ]
    assert compare(runs, ACC, ["pool"]).by == ("model.pool",)
    assert compare(runs, ACC, ["model"]).by == ("model.name",)
    assert compare(runs, ACC, ["seed"]).averaged == ("model.pool",)
    with pytest.raises(ConfigError, match=r"--by pol: .*\nParams that differ between the runs: model\.pool"):
        compare(runs, ACC, ["pol"])


def test_metric_that_no_run_measured_is_refused():
    with pytest.raises(ConfigError, match=r"--metric val/acc: none of these .*data\.val_size"):
        compare([record(0.1, 0, 0.5)], "val/acc")


def test_levels_are_sorted_as_numbers_where_they_are():
    assert sorted(["10", "9", "b", "a", "1e-3"], key=comparison.level) == ["1e-3", "9", "10", "a", "b"]


def test_val_accuracy_is_offered_where_the_choice_was_made_on_test_data():
    runs = [record(lr, 0, 0.5) for lr in (0.1, 0.2)]
    assert (
        "train with data.val_size=N, then compare --metric val/acc."
        in comparison.notes(compare(runs, ACC))[-1]
    )
    for run in runs:
        run.history["val/acc"] = {1: 0.5}
    assert "compare --metric val/acc; these runs have it." in comparison.notes(compare(runs, ACC))[-1]
    assert "test data" not in "".join(comparison.notes(compare(runs, "val/acc")))


def test_epochs_to_an_accuracy_are_counted_for_each_run():
    (only,) = compare([record(0.1, 0, 0.3, 0.9, 0.5), record(0.1, 1, 0.2, 0.2)], ACC).settings
    assert comparison.epochs_to(only, ACC, 0.5) == [2, None]


def test_job_that_waited_for_another_sweeps_run_has_that_ones_result(tmp_path, make_config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config("lr=0.3")
    elsewhere, sweep = tmp_path / "elsewhere", tmp_path / "sweep"
    for folder in (elsewhere, sweep / "0"):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(parsing.dump(config))
    jobs = [{"config": parsing.to_dict(config), "config_hash": "abc"}]
    (sweep / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    assert [run.status for run in of_sweep(sweep)] == ["LOST"]

    with run_index.claim("abc", lambda: pytest.fail("nobody else has it")):
        run_index.add("abc", run_index.Entry(elsewhere, None, None))
    write_result(elsewhere, Result("FINISHED", None, False, None, "abc", 1.0, {}))
    (run,) = of_sweep(sweep)
    assert (run.status, run.name, run.params["optimizer.lr"]) == ("FINISHED", "elsewhere", "0.3")


def test_damaged_line_of_a_journal_is_left_out_with_a_warning(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    whole = EpochRecord(EpochMetrics(1, 2.0, 0.25, 1.0, 0.5, None, None, 10.0, 1.0, ()), 0).dump()
    path.write_text(f'{whole}\n[]\n{{"epoch": "x"}}\n{whole[:-9]}')
    history = read_history(path)
    assert (history["train/loss"], history[ACC]) == ({1: 2.0}, {1: 0.5})
    assert "val/acc" not in history
    assert caplog.messages == [f"{path}: skipped 3 damaged lines"]

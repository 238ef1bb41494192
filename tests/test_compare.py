"""`compare` on real sweeps: from the database, from folders and from a server, with the same numbers."""

import csv
import functools
import json
import re
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

MINI = ("data=fashion_mnist_mini", "threads=1", "model=lenet_relu_max")


@pytest.fixture(scope="module")
def original(tmp_path_factory, command_in, put_database, without_pictures):
    """A folder with two sweeps: `first` of two lrs and three seeds, `second` that adds an lr which fails."""
    here = tmp_path_factory.mktemp("sweeps")
    put_database(here)

    def sweep(*arguments):
        with without_pictures():
            return command_in(here, *MINI, *arguments, "-m")

    first = sweep(
        "epochs=2", "data.val_size=100", "lr=0.1,0.2", "seed=range(3)", "hydra.sweep.dir=outputs/sweeps/first"
    )
    assert first.returncode == 0, first.stderr
    bad = ("data.val_size=100", "lr=0.1,0.2,1000", "optimizer.momentum=0,0.9", "seed=0")
    second = sweep("epochs=2", *bad, "hydra.sweep.dir=outputs/sweeps/second")
    assert second.returncode == 1, second.stderr
    return here


@pytest.fixture
def sweeps(original, tmp_path):
    """A copy that a test may spoil, of what the numbers are in."""
    others = shutil.ignore_patterns("plots", "model", "artifacts", ".hydra")
    shutil.copytree(original, tmp_path, dirs_exist_ok=True, ignore=others)
    return tmp_path


@pytest.fixture
def compare(sweeps, monkeypatch, command):
    """`compare` in a folder with two sweeps."""
    monkeypatch.chdir(sweeps)
    return functools.partial(command, "compare")


def settings(path="t.json"):
    return json.loads(Path(path).read_text())["groups"]


def journals(sweep):
    """Test accuracies by lr, straight from the files."""
    found = {}
    for folder in sorted(sweep.glob("[0-9]*")):
        lr = json.loads((sweep / "sweep.json").read_text())["jobs"][int(folder.name)]["config"]["lr"]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.setdefault(str(lr), []).append([line["test/acc"] for line in lines])
    return {lr: np.array(runs) for lr, runs in found.items()}


def test_report_of_a_sweep_has_the_numbers_computed_from_its_journals(original):
    sweep = original / "outputs" / "sweeps" / "first"
    text = (sweep / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])
    charts = {(s["title"], c["title"]): c for s in data["sections"] for c in s["charts"]}
    curves = {t["name"]: t for t in charts["Learning curves", "test/acc"]["traces"] if "name" in t}
    points = {t["name"]: t for t in charts["Single hyperparameters", "lr"]["traces"]}
    found = journals(sweep)
    assert set(curves) == set(points) == {f"lr={lr}" for lr in found}
    for lr, runs in found.items():
        curve, point = curves[f"lr={lr}"], points[f"lr={lr}"]
        assert curve["y"] == pytest.approx(list(runs.mean(0)), abs=1e-12)
        assert curve["customdata"] == pytest.approx(list(runs.std(0, ddof=1)), abs=1e-12)
        assert point["y"] == [pytest.approx(runs[:, -1].mean(), abs=1e-12)]
        half = stats.t.ppf(0.975, 2) * stats.sem(runs[:, -1])
        assert point["error_y"]["array"] == [pytest.approx(half)]
        # And as text, in the table.
        mean, sd = runs[:, -1].mean(), runs[:, -1].std(ddof=1)
        assert f">{lr}</td>" in text
        assert f">{mean:.3f} ± {sd:.3f}</td>" in text


@pytest.mark.parametrize("source", [["first"], ["first", "tracking=none"], ["outputs/sweeps/first"]])
def test_numbers_are_those_computed_from_the_journals(compare, sweeps, source):
    done = compare(*source, "--csv", "t.csv", "--json", "t.json")
    assert done.returncode == 0, done.stderr
    found = settings()
    assert len(found) == 2
    for lr, runs in journals(sweeps / "outputs" / "sweeps" / "first").items():
        (setting,) = [g for g in found if g["lr"] == lr]
        final, best = runs[:, -1], runs.max(1)
        assert setting["n"] == 3
        assert setting["final_mean"] == pytest.approx(final.mean(), abs=1e-12)
        assert setting["final_sd"] == pytest.approx(final.std(ddof=1), abs=1e-12)
        low, high = stats.t.interval(0.95, 2, loc=final.mean(), scale=stats.sem(final))
        assert (setting["final_low"], setting["final_high"]) == pytest.approx((low, high))
        assert setting["best_mean"] == pytest.approx(best.mean())
        assert setting["best_epoch_mean"] == pytest.approx((runs.argmax(1) + 1).mean())
        assert f"{final.mean():.3f} ± {final.std(ddof=1):.3f}" in done.stdout
    with open("t.csv", newline="") as file:
        again = list(csv.DictReader(file))
    for row, setting in zip(again, found, strict=True):
        assert {key: str("" if value is None else value) for key, value in setting.items()} == row


def test_no_name_is_the_latest_sweep_and_has_the_runs_that_were_finished_before(compare):
    for where in ([], ["tracking=none"]):
        done = compare("--json", "t.json", *where)
        assert done.returncode == 0, done.stderr
        assert {(g["lr"], g["optimizer.momentum"]) for g in settings()} == {
            (lr, momentum) for lr in ("0.1", "0.2", "1000.0") for momentum in ("0.0", "0.9")
        }
        assert "the loss became" in done.stdout
        assert [g["final_mean"] for g in settings() if "failed" in g["left_out"]] == [None, None]
        assert "needs at least two runs per setting" in done.stdout


def test_several_sweeps_are_compared_as_one_and_no_run_counts_twice(compare):
    compare("first", "second", "--json", "t.json")
    assert sum(g["n"] for g in settings()) == 6 + 2
    (setting,) = [g for g in settings() if (g["lr"], g["optimizer.momentum"]) == ("0.1", "0.0")]
    assert setting["n"] == 3


def test_single_runs_are_named_by_the_start_of_their_ids(compare, sweeps):
    results = [json.loads((sweeps / f"outputs/sweeps/first/{n}/result.json").read_text()) for n in (0, 3)]
    done = compare(*(result["run_id"][:8] for result in results), "--json", "t.json")
    assert done.returncode == 0, done.stderr
    assert sorted(g["final_mean"] for g in settings()) == sorted(r["metrics"]["test/acc"] for r in results)


def test_run_of_a_sweep_is_named_by_its_number(compare):
    done = compare("first/1", "tracking=none", "--json", "t.json")
    assert done.returncode == 0, done.stderr
    (group,) = settings()
    assert group["n"] == 1


def test_damaged_manifest_is_named(compare, sweeps):
    path = sweeps / "outputs" / "sweeps" / "first" / "sweep.json"
    path.write_text(path.read_text()[:-20])
    done = compare("first", "tracking=none")
    assert done.returncode == 2
    assert "error: outputs/sweeps/first/sweep.json: is damaged (JSONDecodeError(" in done.stderr
    assert compare("first").returncode == 0  # MLflow has all its runs


def test_filter_is_mlflows_and_narrows_a_sweep_or_selects_of_all(compare):
    chosen = ("--filter", "params.lr = '0.1'", "--json", "t.json")
    compare("first", *chosen)
    assert [g["n"] for g in settings()] == [3]
    compare(*chosen)
    assert sorted(g["n"] for g in settings()) == [1, 3]  # with momentum and without


def test_unfinished_and_collapsed_runs_are_not_averaged(compare, sweeps):
    ids = [
        json.loads((sweeps / f"outputs/sweeps/first/{n}/result.json").read_text())["run_id"] for n in (0, 1)
    ]
    with sqlite3.connect(sweeps / "mlruns" / "mlflow.db") as connection:
        connection.execute("update runs set status = 'RUNNING' where run_uuid = ?", ids[:1])
        connection.execute("insert into tags (key, value, run_uuid) values ('collapsed', 'true', ?)", ids[1:])
    connection.close()
    compare("first", "--json", "t.json")
    (setting,) = [g for g in settings() if g["lr"] == "0.1"]
    third = json.loads((sweeps / "outputs/sweeps/first/2/result.json").read_text())["metrics"]["test/acc"]
    assert (setting["n"], setting["final_mean"]) == (1, third)
    assert setting["left_out"] == "1 collapsed; 1 unfinished"


def test_by_groups_by_what_is_asked_and_says_what_it_averages_over(compare):
    done = compare("first", "--by", "seed", "--json", "t.json")
    assert [set(g) & {"lr", "seed"} for g in settings()] == [{"seed"}] * 3
    assert "Averaged over lr." in done.stdout


def test_less_is_better_for_a_loss(compare):
    compare("first", "--metric", "test/loss", "--json", "t.json")
    means = [g["final_mean"] for g in settings()]
    assert means == sorted(means)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "'nobody': is neither a folder, nor the id of a sweep"),
        (["abc123"], "no run has an id that starts with 'abc123'"),
        (["--by", "bath_size"], "Did you mean 'batch_size'?"),
        (["--metric", "tst/acc"], "Did you mean 'test/acc'?"),
        (["--filter", "params.lr = 0.1"], "MLflow does not understand the filter"),
        (["lr=0.1"], "lr=0.1: only tracking=... and tracking.uri=..."),
        (["nobody", "tracking=none"], "'nobody': there is no such folder"),
        (["tracking=none", "--filter", "params.lr = '0.1'"], "only MLflow can filter runs"),
        (["tracking.uri=sqlite:///other.db"], "there are no runs yet in sqlite:///other.db"),
        (["tracking.experiment=other"], "there is no sweep yet"),
        (["--filter", "params.lr = '7'"], "no run satisfies params.lr"),
    ],
)
def test_mistake_is_told_in_two_lines_at_most(compare, arguments, message):
    done = compare(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_text_from_the_store_is_only_text(compare, sweeps):
    with sqlite3.connect(sweeps / "mlruns" / "mlflow.db") as connection:
        connection.execute("update tags set value = '[/red]\x1b[2J<script>' where key = 'failure_reason'")
        connection.execute("update params set value = '[/bold]' where key = 'model.pool'")
    connection.close()
    done = compare("second")
    assert done.returncode == 0, done.stderr
    assert "[/red]\N{REPLACEMENT CHARACTER}[2J<script>" in done.stdout


def test_commands_of_the_readme_work(compare, sweeps):
    assert compare("first", "second", "--by", "model", "lr", "--metric", "val/acc").returncode == 0
    done = compare("first", "--html", "report.html", "--figures", "figures")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (sweeps / "figures").iterdir()} == {
        f"{name}.{kind}" for name in ("curves", "choices") for kind in ("png", "svg")
    }
    assert "report.html" in done.stdout


def test_sweep_writes_its_report_and_prints_its_answer(original):
    (page,) = (original / "outputs" / "sweeps" / "second").glob("*.html")
    text = page.read_text()
    assert "lr=0.1,0.2,1000" in text  # the command
    assert "the loss became" in text
    assert text.count("* plotly.js v") == 1  # plotly.js, once
    assert "Content-Security-Policy" in text


@pytest.fixture
def server(sweeps, mlflow_server):
    """The address of a real MLflow server on the sweeps' database."""
    begin, uri = mlflow_server(sweeps, "mlruns/mlflow.db")
    begin()
    return uri


@pytest.mark.slow
@pytest.mark.server
def test_server_gives_the_same_numbers_as_its_database(compare, server):
    compare("first", "--json", "t.json")
    done = compare("first", f"tracking.uri={server}", "--json", "remote.json")
    assert done.returncode == 0, done.stderr
    assert settings("remote.json") == settings()


def test_markdown_has_the_answer_and_a_row_for_every_group_and_no_markup_of_others(compare, sweeps):
    done = compare("second", "--markdown", "t.md", "--json", "t.json")
    assert done.returncode == 0, done.stderr
    text = Path("t.md").read_text()
    assert text.splitlines()[0].startswith("Best: ")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(settings())
    for row, setting in zip(rows, settings(), strict=True):
        assert row[0] == f"| {setting['lr']}"
        assert (row[3] or None) == (setting["final_mean"] and f"{setting['final_mean']:.3f}")
    best = {}
    for setting in settings():
        if setting["final_mean"] is not None:
            best.setdefault(setting["lr"], f"**{setting['lr']}** {setting['final_mean']:.3f}")
    assert f"- lr: {', '.join(best.values())}" in text

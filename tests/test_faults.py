"""Real processes, real signals, real servers that die: nothing is lost, nothing is there twice.

docs/reliability.md lists what each of these shows.
"""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

MINI = ("data=fashion_mnist_mini", "data.train_size=600", "threads=1")


@pytest.fixture
def start(tmp_path, data_root):
    """Start the real command in `tmp_path` and return its process; all are gone at the end."""
    started = []

    def run(*arguments, cwd=tmp_path):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "LENET_SWEEP_"))}
        log = (cwd / f"output-{len(started)}.txt").open("w+")
        process = subprocess.Popen(
            [sys.executable, "-m", "lenet_sweep", *arguments],
            cwd=cwd,
            env=clean | {"LENET_SWEEP_DATA": str(data_root), "PYTHONUNBUFFERED": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        process.output = Path(log.name)
        started.append((process, log))
        return process

    yield run
    for process, log in started:
        process.kill()
        process.wait()
        log.close()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def query(folder, sql):
    connection = sqlite3.connect(folder / "mlruns" / "mlflow.db", timeout=30)
    rows = connection.execute(sql).fetchall()
    connection.close()
    return rows


def journals(folder):
    return {path: path.read_text() for path in (folder / "outputs").glob("*/*/**/metrics.jsonl")}


def epochs_written(folder):
    return sum(text.count("\n") for text in journals(folder).values())


def bits(run):
    """All numbers of a run but speed and time, and its weights."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k != "time_ms" and "speed" not in k} for line in lines]
    return kept, {k: t.numpy().tobytes() for k, t in load_file(run / "model/weights.safetensors").items()}


def finished(folder):
    """The folder of every finished run, by its seed and optimizer."""
    runs = {}
    for result in (folder / "outputs").rglob("result.json"):
        config = yaml.safe_load((result.parent / "config.yaml").read_text())
        if json.loads(result.read_text())["status"] == "FINISHED":
            key = config["seed"], config["optimizer"]["name"]
            assert key not in runs, "trained twice"
            runs[key] = result.parent
    return runs


@pytest.mark.slow
def test_sweep_killed_twenty_times_ends_with_every_run_once_and_to_the_bit(start, cli, command_in, tmp_path):
    sweep = (*MINI, "epochs=24", "lr=0.05", "seed=0,1,2", "optimizer=momentum,adam", "-m")
    chance = random.Random(1)
    kills = 0
    while kills < 20:
        before = epochs_written(tmp_path)
        process = start(*sweep)
        # Half of the kills fall somewhere in start-up, half when there is progress to lose.
        if kills % 2:
            wait_for(lambda b=before, p=process: epochs_written(tmp_path) != b or p.poll() is not None)
            time.sleep(chance.uniform(0, 0.4))
        else:
            time.sleep(chance.uniform(0, 5))
        assert process.poll() is None, process.output.read_text()
        process.kill()
        process.wait()
        kills += 1
    last = cli(*sweep, timeout=300)
    assert last.returncode == 0, last.stdout + last.stderr

    assert query(tmp_path, "select count(*) from runs where status = 'FINISHED'") == [(6,)]
    assert query(tmp_path, "select count(*) from runs where status = 'RUNNING'") == [(0,)]
    points = "select count(*), count(distinct step) from metrics m join runs r using (run_uuid)"
    per_run = query(tmp_path, f"{points} where status = 'FINISHED' and key = 'test/acc' group by run_uuid")
    assert per_run == [(24, 24)] * 6
    runs = finished(tmp_path)
    assert len(runs) == 6

    other = tmp_path / "uninterrupted"
    other.mkdir()
    whole = command_in(other, *sweep, "tracking=none")
    assert whole.returncode == 0, whole.stderr
    for key, run in finished(other).items():
        assert bits(run) == bits(runs[key])


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_ends_in_order_within_five_seconds_and_goes_on_in_the_same_mlflow_run(
    start, cli, tmp_path, sign
):
    process = start(*MINI, "epochs=200")
    wait_for(lambda: epochs_written(tmp_path) >= 2)
    sent = time.monotonic()
    process.send_signal(sign)
    assert process.wait(10) == 130
    assert time.monotonic() - sent < 5
    assert "Traceback" not in process.output.read_text()
    ((run_id, status),) = query(tmp_path, "select run_uuid, status from runs")
    assert status == "KILLED"
    done = cli(*MINI, "epochs=200")
    assert done.returncode == 0, done.stderr
    assert "resuming after epoch" in done.stdout
    assert query(tmp_path, "select run_uuid, status from runs") == [(run_id, "FINISHED")]


@pytest.mark.slow
def test_two_overlapping_sweeps_at_once_train_nothing_twice(start, tmp_path):
    first = start(*MINI, "epochs=3", "lr=0.05", "optimizer=sgd,momentum", "seed=0,1", "-m")
    second = start(*MINI, "epochs=3", "lr=0.05", "optimizer=sgd,momentum", "seed=2,1,0", "-m")
    assert [first.wait(120), second.wait(120)] == [0, 0]
    assert query(tmp_path, "select count(*) from runs") == [(6,)]
    assert len(finished(tmp_path)) == 6
    assert second.output.read_text().count("FINISHED") == 6
    for sweep in (first, second):  # in their rankings, too
        assert "verdict" in sweep.output.read_text()
        assert "unfinished" not in sweep.output.read_text()


@pytest.mark.slow
def test_config_file_edited_while_a_sweep_runs_changes_no_later_job(start, tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    model = tmp_path / "mine" / "model" / "small.yaml"
    model.write_text("defaults: [lenet]\nname: small\nhidden: [20]\n")
    process = start(*MINI, "--config-dir=mine", "model=small", "epochs=6", "seed=0,1", "tracking=none", "-m")
    wait_for(lambda: epochs_written(tmp_path) >= 1)
    model.write_text("defaults: [lenet]\nname: small\nhidden: [30]\nbroken: true\n")
    assert process.wait(60) == 0, process.output.read_text()
    configs = [(run / "config.yaml").read_text() for run in finished(tmp_path).values()]
    assert len(configs) == 2
    assert all("- 20\n" in config for config in configs)


@pytest.mark.slow
def test_fail_fast_stops_at_the_first_failure_and_the_next_sweep_tries_it_again(command_in, tmp_path):
    bad = (*MINI, "epochs=4", "model=lenet_relu_max", "optimizer=momentum", "lr=1000,0.01")
    stopped = command_in(tmp_path, *bad, "sweep.fail_fast=true", "-m")
    assert stopped.returncode == 1
    assert "not started" in stopped.stdout
    again = command_in(tmp_path, *bad, "sweep.dry_run=true", "-m")
    assert "train (failed before: the loss became" in again.stdout
    assert "train (not trained before)" in again.stdout


@pytest.mark.slow
def test_finished_sweep_run_again_trains_nothing_and_shows_all_results(command_in, tmp_path):
    sweep = (*MINI, "epochs=1", "seed=range(9)", "-m")
    assert command_in(tmp_path, *sweep).returncode == 0
    written = journals(tmp_path)
    again = command_in(tmp_path, *sweep)
    assert again.returncode == 0, again.stderr
    assert again.stderr == ""
    assert "9 of 9 runs are finished already" in again.stdout
    assert again.stdout.count("FINISHED (") == 9
    assert journals(tmp_path) == written
    planned = command_in(tmp_path, *sweep, "sweep.rerun=true", "sweep.dry_run=true")
    assert "9 runs would be trained" in planned.stdout


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mounted)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr}")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.slow
def test_full_disk_fails_its_run_with_a_clear_reason_and_others_go_on(cli, tmp_path, small_disk):
    # Each run leaves about half a megabyte, so the second one finds the disk full.
    done = cli(*MINI, "epochs=1", "seed=0,1,2", "hydra.sweep.dir=small/sweep", "-m")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "No space left on device" in done.stdout
    statuses = sorted(status for (status,) in query(tmp_path, "select status from runs"))
    assert statuses[-1] == "FINISHED"
    assert "FAILED" in statuses
    assert "RUNNING" not in statuses


@pytest.fixture
def server(tmp_path, mlflow_server):
    """A function that starts a real MLflow server on one port of loopback, as often as it is called."""
    return mlflow_server(tmp_path, "server.db")


@pytest.mark.slow
@pytest.mark.server
def test_server_that_dies_in_the_middle_gets_everything_once_it_is_back(start, cli, tmp_path, server):
    begin, uri = server
    running = begin()
    process = start(*MINI, "epochs=40", "tracking=server", f"tracking.uri={uri}")
    wait_for(lambda: epochs_written(tmp_path) >= 3)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert process.wait(60) == 0, process.output.read_text()
    assert "send the rest later: python -m lenet_sweep sync" in process.output.read_text()
    assert cli("sync").returncode == 2  # still dead: said, and nothing forgotten

    begin()
    done = cli("sync")
    assert done.returncode == 0, done.stderr
    assert "1 run synced" in done.stdout
    from mlflow import MlflowClient

    (text,) = journals(tmp_path).values()
    lines = [json.loads(line) for line in text.splitlines()]
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("lenet_sweep").experiment_id])
    assert run.info.status == "FINISHED"
    for name in ("train/loss", "speed/epoch_s"):
        history = [(m.step, m.value, m.timestamp) for m in client.get_metric_history(run.info.run_id, name)]
        assert history == [(line["epoch"], line[name], line["time_ms"]) for line in lines]
    (folder,) = (tmp_path / "outputs" / "runs").iterdir()
    drawn = sorted(f"plots/{picture.name}" for picture in (folder / "plots").iterdir())
    assert {"plots/confusion_matrix.png", "plots/curves.png"} <= set(drawn)
    assert [f.path for f in client.list_artifacts(run.info.run_id, "plots")] == drawn
    assert "0 runs synced" in cli("sync").stdout


@pytest.mark.slow
@pytest.mark.server
def test_server_that_dies_in_a_sweep_stops_no_later_job(start, cli, tmp_path, server):
    begin, uri = server
    running = begin()
    process = start(*MINI, "epochs=20", "seed=0,1,2", "tracking=server", f"tracking.uri={uri}", "-m")
    wait_for(lambda: epochs_written(tmp_path) >= 2)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert process.wait(120) == 0, process.output.read_text()
    assert process.output.read_text().count("FINISHED") == 3
    begin()
    assert "3 runs synced" in cli("sync").stdout
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("lenet_sweep").experiment_id])
    assert sorted((run.data.params["seed"], run.info.status) for run in runs) == [
        (seed, "FINISHED") for seed in "012"
    ]
    for run in runs:
        assert len(client.get_metric_history(run.info.run_id, "test/acc")) == 20


def test_listener_that_goes_away_does_not_end_the_run(tmp_path, data_root):
    # `| head` closes the pipe after a few lines; the run must not care.
    command = [sys.executable, "-m", "lenet_sweep", *MINI, "epochs=3", "tracking=none"]
    environment = os.environ | {"LENET_SWEEP_DATA": str(data_root), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0
    ((_, text),) = journals(tmp_path).items()
    assert text.count("\n") == 3


def test_runs_of_one_config_in_two_stores_are_both_remembered_until_they_are_sent(tmp_path, monkeypatch):
    from lenet_sweep.storage import run_index

    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        run_index.mark_unsynced(tmp_path / name)
    assert sorted(folder.name for folder in run_index.unsynced()) == ["one", "two"]
    run_index.mark_synced(tmp_path / "one")
    assert [folder.name for folder in run_index.unsynced()] == ["two"]


def test_clock_set_back_leaves_times_in_order(monkeypatch):
    from lenet_sweep.storage.metrics_file import EpochRecord
    from lenet_sweep.training.metrics import EpochMetrics

    metrics = EpochMetrics(1, 1.0, 0.5, 1.0, 0.5, None, None, 1.0, 1.0, ())
    monkeypatch.setattr(time, "time", lambda: 1_000.0)
    assert EpochRecord.now(metrics, [EpochRecord(metrics, 5_000_000)]).time_ms == 5_000_000
    assert EpochRecord.now(metrics, [EpochRecord(metrics, 500_000)]).time_ms == 1_000_000

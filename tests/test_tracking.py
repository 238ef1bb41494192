"""MLflow through the front door: what was logged is what its own client reads back."""

import contextlib
import json
import multiprocessing
import signal
import sqlite3
import time
from pathlib import Path

import pytest
import yaml

from lenet_sweep.config.schema import MlflowConfig, NoTrackingConfig
from lenet_sweep.errors import ConfigError, OutputError, TrackingError
from lenet_sweep.storage import run_index
from lenet_sweep.storage.metrics_file import EpochRecord
from lenet_sweep.storage.result import Result, write_result
from lenet_sweep.tracking import mlflow_client, mlflow_page, mlflow_query, mlflow_run, processes, recovery
from lenet_sweep.tracking.stores import open_store
from lenet_sweep.training.metrics import EpochMetrics


def local(folder: Path) -> MlflowConfig:
    return MlflowConfig(name="mlflow", uri=f"sqlite:///{folder}/mlruns/mlflow.db", experiment="lenet_sweep")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return local(tmp_path_factory.mktemp("tracked"))


def client(config: MlflowConfig):
    from mlflow import MlflowClient

    return MlflowClient(config.uri)


def open_run(config, folder, params=(), tags=None, start_ms=1_000, **options):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(params)))
    tags = tags or {"config_hash": "cafe"}
    return open_store(config).open_run(folder, "a name", tags, start_ms, **options)


def end(run, folder, status="FINISHED", reason=None):
    result = Result(status, reason, False, run.run_id, "cafe", 1.0, {})
    write_result(folder, result)
    return run.end(result)


def test_run_holds_what_was_logged_with_its_true_times(store, tmp_path):
    run = open_run(store, tmp_path, {"lr": 0.1, "model": {"pool": "avg"}})
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "curves.png").write_bytes(b"a picture")
    (tmp_path / "private.txt").write_text("stays behind\n")
    run.log(1, {"train/loss": 2.5, "test/acc": 0.1}, 2_000)
    run.log(2, {"train/loss": 1.5, "test/acc": 0.2}, 3_000)
    assert end(run, tmp_path) is None

    kept = client(store).get_run(run.run_id)
    ended_ms = int((tmp_path / "result.json").stat().st_mtime * 1000)
    assert (kept.info.status, kept.info.start_time, kept.info.end_time) == ("FINISHED", 1_000, ended_ms)
    assert kept.data.params == {"lr": "0.1", "model.pool": "avg"}
    assert kept.data.tags["config_hash"] == "cafe"
    assert kept.info.run_name == "a name"
    history = client(store).get_metric_history(run.run_id, "train/loss")
    assert [(m.step, m.value, m.timestamp) for m in history] == [(1, 2.5, 2_000), (2, 1.5, 3_000)]
    artifacts = [f.path for f in client(store).list_artifacts(run.run_id)]
    assert artifacts == ["config.yaml", "plots"]
    assert Path(client(store).download_artifacts(run.run_id, "plots/curves.png")).read_bytes() == b"a picture"


def test_failed_run_keeps_its_reason_until_it_goes_on(store, tmp_path):
    run = open_run(store, tmp_path)
    end(run, tmp_path, "FAILED", "the loss became nan")
    kept = client(store).get_run(run.run_id)
    assert kept.info.status == "FAILED"
    assert kept.data.tags["failure_reason"] == "the loss became nan"
    again = open_run(store, tmp_path, run_id=run.run_id)
    assert again.run_id == run.run_id
    kept = client(store).get_run(run.run_id)
    assert kept.info.status == "RUNNING"
    assert "failure_reason" not in kept.data.tags


def test_database_uses_a_write_ahead_log(store, tmp_path):
    open_run(store, tmp_path)
    with sqlite3.connect(store.uri.removeprefix("sqlite:///")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_untracked_run_has_no_id_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = open_store(NoTrackingConfig(name="none")).open_run(tmp_path, "any", {}, 0)
    run.log(1, {"train/loss": 1.0}, 0)
    assert run.run_id is None
    assert list(tmp_path.iterdir()) == []


def test_finished_run_is_found_by_its_configs_hash_and_no_other_is(tmp_path, put_database):
    put_database(tmp_path)
    store = local(tmp_path)
    run = open_run(store, tmp_path)
    assert open_store(store).finished(["cafe"]) == {}
    run.log(1, {"test/acc": 0.5}, 2_000)
    end(run, tmp_path)
    found = open_store(store).finished(["cafe", "beef"])
    assert {key: (result.run_id, result.metrics) for key, result in found.items()} == {
        "cafe": (run.run_id, {"test/acc": 0.5})
    }


@pytest.mark.parametrize(("page", "questions_a_page"), [(2, 1), (1000, 1), (2, 3), (1000, 400)])
def test_finished_runs_are_the_same_however_they_are_looked_for(
    tmp_path, monkeypatch, put_database, page, questions_a_page
):
    """By pages alone, in one page, by pages and then one by one, and one by one alone."""
    put_database(tmp_path)
    store, wanted = local(tmp_path), ("a0", "a1", "a2", "a3", "never")
    latest = {}
    for number, config_hash in enumerate(("a0", "a1", "a2", "a3", "a0", "other", "more")):
        run = open_run(store, tmp_path, tags={"config_hash": config_hash}, start_ms=1_000 + number)
        end(run, tmp_path, "FAILED" if config_hash == "a2" else "FINISHED")
        latest[config_hash] = run.run_id
    monkeypatch.setattr(mlflow_query, "_PAGE", page)
    monkeypatch.setattr(mlflow_query, "_QUERIES_PER_PAGE", questions_a_page)
    found = open_store(store).finished(wanted)
    assert {key: result.run_id for key, result in found.items()} == {
        key: latest[key] for key in ("a0", "a1", "a3")
    }


def test_running_run_of_a_dead_process_is_ended_and_of_a_living_one_is_not(store, tmp_path):
    alive, dead, other = (open_run(store, tmp_path) for _ in range(3))
    client(store).set_tag(dead.run_id, "pid", "4194305")  # above the highest a Linux kernel gives
    client(store).set_tag(other.run_id, "process_start", "12345.00")  # this number, but another process
    assert set(open_store(store).close_stale_runs()) == {dead.run_id, other.run_id}
    found = {run.run_id: client(store).get_run(run.run_id).info.status for run in (alive, dead, other)}
    assert found == {alive.run_id: "RUNNING", dead.run_id: "KILLED", other.run_id: "KILLED"}


def _open_at(moment: float, folder: Path, number: int) -> None:
    time.sleep(max(0.0, moment - time.time()))
    run = open_run(local(folder), folder / str(number), {"seed": number})
    run.log(1, {"train/loss": float(number)}, 0)
    end(run, folder / str(number))


@pytest.mark.slow
def test_eight_processes_creating_the_database_at_once_all_find_their_runs_there(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    moment = time.time() + 3
    workers = [spawn.Process(target=_open_at, args=(moment, tmp_path, i)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(180)
    assert [worker.exitcode for worker in workers] == [0] * 8
    reader = client(local(tmp_path))
    experiments = [e for e in reader.search_experiments() if e.name == "lenet_sweep"]
    assert len(experiments) == 1
    runs = reader.search_runs([experiments[0].experiment_id])
    assert sorted(int(run.data.params["seed"]) for run in runs) == list(range(8))
    assert all(run.data.metrics["train/loss"] == int(run.data.params["seed"]) for run in runs)
    leftovers = [p.name for p in (tmp_path / "mlruns").iterdir() if p.name.startswith(".")]
    assert leftovers == []


def test_deleted_experiment_is_named_with_what_to_do(store, tmp_path):
    config = MlflowConfig(name="mlflow", uri=store.uri, experiment="gone")
    open_run(config, tmp_path)
    reader = client(config)
    reader.delete_experiment(reader.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(TrackingError, match=r"tracking\.experiment='gone': was deleted; .*restore"):
        open_run(config, tmp_path)


def test_file_that_is_no_database_is_refused(tmp_path):
    config = local(tmp_path)
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / "mlflow.db").write_text("not a database, but long enough to look at\n")
    with pytest.raises(TrackingError, match="is not an SQLite database"):
        mlflow_client.check(config)


def test_database_that_another_process_made_meanwhile_is_left_alone(tmp_path, monkeypatch):
    database = tmp_path / "mlflow.db"

    @contextlib.contextmanager
    def late_lock(path, timeout):
        database.write_text("made by another process")
        yield

    monkeypatch.setattr(mlflow_client, "FileLock", late_lock)
    mlflow_client._create_database(database)
    assert database.read_text() == "made by another process"


def test_sync_names_a_server_that_is_not_there(tmp_path):
    registration = {
        "uri": "http://127.0.0.1:9",
        "experiment": "x",
        "name": "a run",
        "tags": {},
        "start_ms": 1,
    }
    (tmp_path / "tracking.json").write_text(json.dumps(registration | {"run_id": "abc"}))
    problem = recovery.sync_run(tmp_path, Result("FINISHED", None, False, "abc", "cafe", 1.0, {}))
    assert "http://127.0.0.1:9" in problem
    (tmp_path / "tracking.json").write_text("{}")
    assert recovery.sync_run(tmp_path, Result("FINISHED", None, False, "abc", "cafe", 1.0, {})).startswith(
        f"{tmp_path}: "
    )


def test_database_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "mlruns" / "mlflow.db").mkdir(parents=True)
    with pytest.raises(TrackingError, match=r"mlflow\.db: cannot be read: Is a directory"):
        mlflow_client.check(local(tmp_path))


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "mlruns").write_text("a file is in the way\n")
    with pytest.raises(OutputError, match="mlruns: is a file, so the folder"):
        mlflow_client.check(local(tmp_path))


def test_ui_command_says_again_where_the_store_is():
    overrides = ("lr=0.1", "tracking.uri=sqlite:///my runs/mlflow.db", "++tracking.experiment=x")
    assert mlflow_page.ui_command("abc", overrides) == (
        "python -m lenet_sweep ui abc 'tracking.uri=sqlite:///my runs/mlflow.db' ++tracking.experiment=x"
    )
    assert mlflow_page.ui_command("", ()) == "python -m lenet_sweep ui"


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_waits_until_the_store_has_what_is_being_written(sign):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(sign, interrupt)
    written = []

    def write():
        with processes.defer_interrupts():
            signal.raise_signal(sign)
            written.append("all")

    try:
        with pytest.raises(KeyboardInterrupt):
            write()
        assert signal.getsignal(sign) is interrupt
    finally:
        signal.signal(sign, before)
    assert written == ["all"]


@pytest.mark.parametrize(("later_s", "alive"), [(0, True), (1, True), (-1, True), (3, False), (-3, False)])
def test_process_is_known_by_its_start_within_two_seconds(later_s, alive):
    tags = processes.tags()
    tags["process_start"] = str(float(tags["process_start"]) + later_s)
    assert processes.is_alive(tags) is alive


@pytest.mark.parametrize("tags", [{}, {"pid": "x", "process_start": "1"}, {"pid": "1"}])
def test_process_without_usable_tags_is_not_alive(tags):
    assert not processes.is_alive(tags)


def test_mistake_in_a_filter_is_the_users_and_any_other_error_is_the_stores(store, tmp_path):
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE

    open_run(store, tmp_path)

    def query(where, code):
        with mlflow_client.querying(store, where):
            raise MlflowException("no such thing", code)

    with pytest.raises(ConfigError, match=r"filter lr=1: no such thing"):
        query("lr=1", INVALID_PARAMETER_VALUE)
    for where, code in (("", INVALID_PARAMETER_VALUE), ("lr=1", INTERNAL_ERROR)):
        with pytest.raises(TrackingError, match=r"tracking\.uri='sqlite.*no such thing"):
            query(where, code)


def test_run_is_there_unless_it_is_unknown_or_deleted(store, tmp_path):
    from mlflow.exceptions import MlflowException

    run_id = open_run(store, tmp_path).run_id
    reader = client(store)
    assert mlflow_client.is_there(reader, run_id)
    assert not mlflow_client.is_there(reader, "0" * 32)
    reader.delete_run(run_id)
    assert not mlflow_client.is_there(reader, run_id)

    class Broken:
        def get_run(self, run_id):
            raise MlflowException("out of order")

    with pytest.raises(MlflowException, match="out of order"):
        mlflow_client.is_there(Broken(), run_id)


def test_prefix_finds_the_one_run_or_tells_how_many_there_are(store, tmp_path):
    first, second = (open_run(store, tmp_path).run_id for _ in range(2))
    for run_id in (first, second):
        assert mlflow_query.find_run(store, run_id) == mlflow_query.find_run(store, run_id[:12]) == run_id
    with pytest.raises(ConfigError, match=r"\d runs have ids that start with ''"):
        mlflow_query.find_run(store, "")
    with pytest.raises(ConfigError, match="no run has an id that starts with 'zz'"):
        mlflow_query.find_run(store, "zz")


def test_sweeps_are_found_by_the_start_of_their_ids_the_latest_first(tmp_path, put_database):
    put_database(tmp_path)
    store = local(tmp_path)
    for number, sweep_id in enumerate(("2026-1", "2026-10", "2025-1", "2026-1")):
        open_run(store, tmp_path, tags={"sweep_id": sweep_id}, start_ms=1_000 + number)
    assert mlflow_query.sweeps(store, "2026-1") == ["2026-1"]  # a whole id is no start of another
    assert mlflow_query.sweeps(store, "2026") == ["2026-1", "2026-10"]
    assert mlflow_query.sweeps(store, "2024") == []
    assert open_store(store).latest_sweep() == "2026-1"
    assert open_store(store).find("2025") == ("2025-1", "")
    with pytest.raises(ConfigError, match="2 sweeps start"):
        open_store(store).find("2026")
    with pytest.raises(ConfigError, match="neither a folder"):
        open_store(store).find("nonsense")


def test_text_is_quoted_for_filters_which_know_no_escapes():
    assert mlflow_query.sweep_filter("it's") == 'tags.sweep_id = "it\'s"'
    assert mlflow_query.runs_filter(["a", 'b"']) == "attributes.run_id IN ('a', 'b\"')"
    with pytest.raises(ConfigError, match="both kinds of quotes"):
        mlflow_query.sweep_filter("\"'")


def test_metrics_of_a_run_that_was_created_late_are_all_sent_in_several_batches(
    tmp_path, monkeypatch, put_database
):
    put_database(tmp_path)
    store = local(tmp_path)
    records = [
        EpochRecord(EpochMetrics(epoch, 2.0, 0.5, 1.0, 0.5, None, None, 10.0, 1.0, ()), 1_000 + epoch)
        for epoch in range(1, 5)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(record.dump() + "\n" for record in records))
    run = open_run(store, tmp_path)  # only now, after the training
    monkeypatch.setattr(mlflow_run, "_BATCH", 5)
    assert end(run, tmp_path) is None
    history = client(store).get_metric_history(run.run_id, "test/acc")
    assert [(m.step, m.timestamp) for m in history] == [(e, 1_000 + e) for e in range(1, 5)]
    assert len(client(store).get_metric_history(run.run_id, "speed/epoch_s")) == 4


def test_store_that_failed_once_is_left_alone_for_a_while_and_then_tried_again(
    tmp_path, monkeypatch, put_database
):
    put_database(tmp_path)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    store = local(tmp_path)
    run = open_run(store, tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    now, calls = [100.0], []

    def refuse(self, *arguments, **options):
        calls.append(options)
        raise MlflowException("refused")

    monkeypatch.setattr(mlflow_run.time, "monotonic", lambda: now[0])
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", refuse)
        for epoch, moment in ((1, 100.0), (2, 129.0), (3, 131.0)):
            now[0] = moment
            run.log(epoch, {"test/acc": 0.5}, 0)
    assert len(calls) == 2  # not within 30 s after the first failure
    assert not run._complete


def test_late_note_keeps_what_was_said_of_the_sweep(tmp_path, put_database):
    put_database(tmp_path)
    store = local(tmp_path)
    run = open_run(store, tmp_path, tags={"sweep_id": "mine"})
    end(run, tmp_path)
    report = tmp_path / "report.html"
    report.write_text("a report")
    for sweep_id in ("mine", "another", "another"):
        assert open_store(store).attach_report(run.run_id, sweep_id, report, "Best: lr=0.1") is None
    paths = [f.path for f in client(store).list_artifacts(run.run_id)]
    assert {"report.html", "another"} <= set(paths)
    before = client(store).get_run(run.run_id).data.tags["mlflow.note.content"]
    assert before.count("`mine`") >= 1
    assert before.count("`another/report.html`") == 1
    assert before.count("Best: lr=0.1") == 2
    end(run, tmp_path)
    after = client(store).get_run(run.run_id).data.tags["mlflow.note.content"]
    assert after == before
    assert open_store(store).attach_report("0" * 32, "mine", report, "Best") is not None


def test_only_epochs_before_the_wanted_one_are_a_prefix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_index.INDEX.mkdir(parents=True)
    for epochs in (2, 5, 10):
        (tmp_path / str(epochs)).mkdir()
        run_index.add_trajectory("abc", epochs, run_index.Entry(tmp_path / str(epochs), None, None))
    (run_index.INDEX / "abc-x.json").write_text("{}")
    assert run_index.longest_prefix("abc", 10).folder.name == "5"
    assert run_index.longest_prefix("abc", 11).folder.name == "10"
    assert run_index.longest_prefix("abc", 2) is None
    (tmp_path / "5").rmdir()
    assert run_index.longest_prefix("abc", 10).folder.name == "2"


@pytest.mark.parametrize("start", ["This is the best run of sweep ", "This run stands for sweep "])
def test_note_about_sweeps_is_kept_in_the_wording_of_every_version(start):
    about = f"{start}`x`.\n\n`Best: lr=0.1`"
    assert mlflow_page.note_about_sweeps(f"`lr=0.1`\n\n{about}") == about
    assert mlflow_page.note_about_sweeps(about) == about
    assert mlflow_page.note_about_sweeps("`lr=0.1`") == ""


@pytest.mark.parametrize(("count", "told"), [(0, "0 runs synced"), (1, "1 run synced"), (2, "2 runs synced")])
def test_sync_counts_its_runs(command, tmp_path, monkeypatch, count, told, put_database):
    put_database(tmp_path)
    monkeypatch.chdir(tmp_path)
    store = local(tmp_path)
    for number in range(count):
        folder = tmp_path / str(number)
        run = open_run(store, folder)
        write_result(folder, Result("FINISHED", None, False, run.run_id, f"{number}", 1.0, {}))
        run_index.mark_unsynced(folder)
    assert command("sync").stdout == f"{told}\n"
    assert run_index.unsynced() == []

"""A folder made before the package had rooms (commit 64eb61f) is still of use.

folder_before_rooms.zip holds its outputs/ and mlruns/: a sweep of four small runs without plots, its database
as SQL, and the table that `compare` wrote then. /FOLDER stands for the path that it had.
"""

import json
import sqlite3
import zipfile
from pathlib import Path

import pytest

from lenet_sweep.storage import run_index

ARCHIVE = Path(__file__).parent / "folder_before_rooms.zip"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    with zipfile.ZipFile(ARCHIVE) as archive:
        for name in archive.namelist():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name).replace(b"/FOLDER", str(tmp_path).encode()))
    sql = tmp_path / "mlruns" / "mlflow.sql"
    with sqlite3.connect(tmp_path / "mlruns" / "mlflow.db") as connection:
        connection.executescript(sql.read_text())
    connection.close()
    sql.unlink()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def best_run(folder):
    (sweep,) = (folder / "outputs" / "sweeps").iterdir()
    return json.loads((sweep / "2" / "result.json").read_text())["run_id"]


def table(path, seconds=True):
    """The lines of a table, cell by cell, with or without the columns about time."""
    header, *rows = [line.split(",") for line in path.read_text().splitlines()]
    kept = [i for i, name in enumerate(header) if seconds or not name.startswith("seconds_")]
    return [[line[i] for i in kept] for line in (header, *rows)]


def test_compare_writes_the_table_that_it_wrote_then(command, folder):
    done = command("compare", "--csv", "now.csv")
    assert done.returncode == 0, done.stderr
    assert table(folder / "now.csv") == table(folder / "compare.csv")


def test_compare_reads_the_same_from_the_folders(command, folder):
    done = command("compare", "tracking=none", "--csv", "now.csv")
    assert done.returncode == 0, done.stderr
    # MLflow's durations include imports, those of folders do not.
    assert table(folder / "now.csv", seconds=False) == table(folder / "compare.csv", seconds=False)


def test_reproduce_says_that_the_code_version_differs(command, folder):
    done = command("reproduce", best_run(folder)[:8], "tracking.uri=sqlite:///mlruns/mlflow.db")
    assert done.returncode in (0, 3)  # another machine's rounding may differ
    assert "different" in done.stdout if done.returncode else "bit-identical: " in done.stdout
    assert "the code version differs: code that computes the results has changed since then\n" in done.stdout


def test_ui_finds_the_sweep(folder, make_config):
    from lenet_sweep.analysis import mlflow_server
    from lenet_sweep.tracking.mlflow_store import MlflowStore

    store = MlflowStore(make_config("tracking.uri=sqlite:///mlruns/mlflow.db").tracking)
    assert "viewStateShareKey=" in mlflow_server.page_address(None, store)
    assert best_run(folder) in mlflow_server.page_address(best_run(folder)[:8], store)


def test_sync_sends_what_the_store_had_missed(command, folder):
    (sweep,) = (folder / "outputs" / "sweeps").iterdir()
    run_index.mark_unsynced(sweep / "2")
    with sqlite3.connect(folder / "mlruns" / "mlflow.db") as connection:
        connection.execute("delete from metrics where run_uuid = ?", (best_run(folder),))
    connection.close()
    done = command("sync")
    assert (done.returncode, run_index.unsynced()) == (0, []), done.stderr
    assert command("compare", "--csv", "now.csv").returncode == 0
    # When the run ended is told by its result.json, which has just been unpacked.
    assert table(folder / "now.csv", seconds=False) == table(folder / "compare.csv", seconds=False)


def test_its_runs_are_trained_again_as_their_code_version_is_another(command, folder):
    done = command("data=fashion_mnist_mini", "lr=0.1,0.3", "sweep.dry_run=true", "-m")
    assert done.returncode == 0, done.stderr
    assert "2 runs would be trained, 0 resumed, 0 skipped" in done.stdout

"""MLflow's client: connecting, checking a server or database, its errors, creating a database."""

import http.client
import json
import logging
import os
import queue
import sqlite3
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from lenet_sweep.config.schema import MlflowConfig
from lenet_sweep.errors import ConfigError, TrackingError
from lenet_sweep.paths import atomic_path, check_writable

if TYPE_CHECKING:
    from mlflow import MlflowClient


_SILENCE_S = 3.0  # a server that sends nothing for this long does not respond
_ANSWER_S = 4.0  # a server whose complete response takes longer does not, either
SQLITE = "sqlite:///"
NOTE = "mlflow.note.content"  # the tag that MLflow shows as the description, in Markdown
_ABOUT = """Each run is one training of a LeNet variant, tagged with the `sweep_id` it belongs to.

- `python -m lenet_sweep ui` opens the latest sweep: its runs, their curves, the swept keys
- `python -m lenet_sweep compare` shows which setting is best, and which are not significantly worse
- `python -m lenet_sweep reproduce RUN` trains a run again and compares every bit

The report of a sweep, `report.html`, is an artifact of its best run.
"""
# With MLflow's defaults, each call to a server that is down blocks for minutes. `recovery` retries later.
_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def check(config: MlflowConfig) -> None:
    """Refuse a store that cannot be reached, within four seconds and without importing mlflow.

    Raises:
        TrackingError: if the server does not respond, or the database is not one or cannot be written.
        OutputError: if the database's folder cannot be written.
    """
    if is_server(config.uri):
        check_server(config.uri)
    elif config.uri.startswith(SQLITE):
        database = database_path(config.uri)
        check_writable(database.parent)
        if database.exists():
            _check_database(database)


def check_filled(config: MlflowConfig) -> None:
    """Refuse a store that has no runs yet, or that `check` refuses.

    Raises:
        ConfigError, OutputError, TrackingError
    """
    check(config)
    if not exists(config.uri):
        raise ConfigError(f"there are no runs yet in {config.uri}; another store is tracking.uri=...")


def serves_store(address: str, config: MlflowConfig) -> bool:
    """Whether the server at `address` is MLflow's and serves the store of `config`."""
    from mlflow import MlflowClient

    # MLflow's client is not used, because it would send its password to an unknown server.
    name = urllib.parse.quote(config.experiment)
    try:
        check_server(address)
        page = f"{address}/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}"
        with urllib.request.urlopen(page, timeout=3) as answer:
            there = json.loads(answer.read(1 << 20))["experiment"]
        here = MlflowClient(absolute(config.uri)).get_experiment_by_name(config.experiment)
    except any_errors():
        return False
    except (KeyError, TypeError, ValueError, http.client.HTTPException):  # not an MLflow server
        return False
    return here is not None and all(
        str(there.get(part)) == str(getattr(here, part))
        for part in ("experiment_id", "creation_time", "artifact_location")
    )


def responds(address: str) -> bool:
    """Whether a server responds at `address`."""
    try:
        urllib.request.urlopen(f"{address}/health", timeout=1).close()
    except (OSError, http.client.HTTPException):
        return False
    return True


def connect(uri: str) -> "MlflowClient":
    """A client of the store (MLflow keeps its connections); a missing local database is created."""
    for key, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    for verbose in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(verbose).setLevel(logging.WARNING)
    uri = absolute(uri)
    if uri.startswith(SQLITE):
        _create_database(database_path(uri))
    return MlflowClient(uri)


@contextmanager
def querying(config: MlflowConfig, where: str = "") -> Iterator["MlflowClient"]:
    """A client of the store; its errors become ours. `where` is the filter that is queried with.

    Raises:
        ConfigError: if the store has no runs yet, or does not understand the filter.
        TrackingError: if it cannot be reached.
    """
    check_filled(config)
    try:
        yield connect(config.uri)
    except store_errors() as error:
        if getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE" and where:
            raise ConfigError(
                f"MLflow does not understand the filter {where}: {first_line(error)}\n"
                "Write it as in --filter \"params.lr = '0.1' and metrics.`test/acc` > 0.8\"."
            ) from error
        raise TrackingError(f"tracking.uri={config.uri!r}: {first_line(error)}") from error


def store_errors() -> tuple[type[Exception], ...]:
    """What a store raises if it is down, full or damaged, rejects a request, or sends broken JSON."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError, json.JSONDecodeError


def any_errors() -> tuple[type[Exception], ...]:
    """The same, and our own error for them."""
    return (*store_errors(), TrackingError)


def is_there(client: "MlflowClient", run_id: str) -> bool:
    """Whether the store has this run and it is not deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def experiment_id_of(client: "MlflowClient", name: str, uri: str) -> str:
    """The experiment's id; a missing one is created."""
    from mlflow.exceptions import MlflowException

    # Only create_experiment can set where artifacts go; a server decides that for itself.
    location = (database_path(uri).parent / "artifacts").as_uri() if uri.startswith(SQLITE) else None
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=location, tags={NOTE: _ABOUT}))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
            assert experiment is not None
    if experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"tracking.experiment={name!r}: was deleted; choose another name, or restore it with "
            f"'mlflow experiments restore --experiment-id {experiment.experiment_id}'"
        )
    return str(experiment.experiment_id)


def _create_database(database: Path) -> None:
    """Create MLflow's database atomically: no process ever sees a part of it.

    MLflow's own creation crashes if several processes do it at once, and leaves a broken database if it is
    killed.
    """
    if database.exists():
        return
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{database}.lock", timeout=120):
            if database.exists():
                return
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            with atomic_path(database) as temporary, _without_syncing(temporary):
                store = SqlAlchemyStore(f"{SQLITE}{temporary}", (database.parent / "artifacts").as_uri())
                store.engine.dispose()
                connection = sqlite3.connect(temporary)
                # With a write-ahead log, concurrent writers wait a sixth as long.
                connection.execute("PRAGMA journal_mode=WAL")
                connection.close()
    except Timeout as error:
        raise TrackingError(
            f"{database}: another process did not finish creating it within two minutes"
        ) from error
    except OSError as error:
        raise TrackingError(f"{database}: cannot be created: {error.strerror}") from error


@contextmanager
def _without_syncing(database: Path) -> Iterator[None]:
    """Let SQLite write this database without waiting for the disk, which takes a fifth of the time.

    MLflow creates its tables in seventy migrations, each of which waits for the disk. The file is still
    temporary, and `atomic_path` syncs it before it is renamed.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def disable_sync(connection: sqlite3.Connection, record: object) -> None:
        main, *_ = connection.execute("PRAGMA database_list").fetchall()
        if main[2] and Path(main[2]).samefile(database):
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute("PRAGMA journal_mode=MEMORY")

    event.listen(Engine, "connect", disable_sync)
    try:
        yield
    finally:
        event.remove(Engine, "connect", disable_sync)


def check_server(uri: str) -> None:
    """Query the server's health, for at most four seconds in total, however slowly it sends."""
    answer: queue.Queue[Exception | None] = queue.Queue()

    def query() -> None:
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_SILENCE_S).close()
            answer.put(None)
        except (OSError, ValueError, http.client.HTTPException) as error:
            answer.put(error)

    # A thread, because a socket's time-out restarts with each byte.
    threading.Thread(target=query, daemon=True).start()
    try:
        error = answer.get(timeout=_ANSWER_S)
    except queue.Empty:
        error = TimeoutError("timed out")
    if error is None:
        return
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # it holds the connection
        if error.code in (401, 403):
            return  # the server needs a login, for which MLflow's client has the credentials
        raise TrackingError(
            f"tracking.uri={uri!r}: the server there is not an MLflow server (HTTP {error.code})"
        ) from error
    reason = getattr(error, "reason", None) or error
    raise TrackingError(
        f"tracking.uri={uri!r}: no MLflow server responds there ({reason}); "
        "start it, or use tracking=mlflow (a local database) or tracking=none"
    ) from error


def _check_database(database: Path) -> None:
    try:
        with database.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise TrackingError(f"{database}: cannot be read: {error.strerror}") from error
    if start != b"SQLite format 3\0":
        raise TrackingError(f"{database}: is not an SQLite database; move it away, or set tracking.uri")
    if not os.access(database, os.W_OK):
        raise TrackingError(f"{database}: cannot be written; set tracking.uri or tracking=none")


def is_server(uri: str) -> bool:
    """Whether the store is a server, not a database."""
    return uri.startswith(("http://", "https://"))


def exists(uri: str) -> bool:
    """Whether the store exists: false only for a local database that is not created yet."""
    return not uri.startswith(SQLITE) or database_path(uri).exists()


def database_path(uri: str) -> Path:
    """The absolute path of the SQLite database at `uri`."""
    return Path(uri.removeprefix(SQLITE)).absolute()


def absolute(uri: str) -> str:
    """The URI with an absolute path, if it is a database."""
    return f"{SQLITE}{database_path(uri)}" if uri.startswith(SQLITE) else uri


def first_line(error: Exception) -> str:
    """The first line of the error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

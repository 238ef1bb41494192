"""TODO tracking.mlflow_client."""

import http.client
import json
import logging
import os
import queue
import signal
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


_SILENCE_S = 3.0  # a server that sends nothing for so long does not respond
_ANSWER_S = 4.0  # nor does one whose whole answer takes longer
SQLITE = "sqlite:///"
NOTE = "mlflow.note.content"  # the tag whose Markdown MLflow's pages show as a description
_ABOUT = """Each run is one training of a LeNet variant, tagged with the `sweep_id` it belongs to.

- `python -m lenet_sweep ui` opens the latest sweep's runs, with curves and what was swept
- `python -m lenet_sweep compare` says which setting is best, and which cannot be told from it
- `python -m lenet_sweep reproduce RUN` trains a run again, and compares every bit

The best run of a sweep stands for it: `report.html` is among its artifacts.
"""
# A dead server blocks each call for minutes at MLflow's own defaults; what is lost is sent again by us.
_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def check(config: MlflowConfig) -> None:
    """Refuse a store that cannot be reached, within four seconds and without importing mlflow.

    Raises:
        TrackingError: if the server does not answer, or the database is none or cannot be written.
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
    """Refuse a store that there is nothing in yet, or that cannot be reached, as `check` does.

    Raises:
        ConfigError, OutputError, TrackingError
    """
    check(config)
    if not exists(config.uri):
        raise ConfigError(f"there are no runs yet in {config.uri}; another store is tracking.uri=...")


def serves(address: str, config: MlflowConfig) -> bool:
    """Whether the server at `address`, of whatever kind, is MLflow's and has this very store."""
    from mlflow import MlflowClient

    # Not by MLflow's client: it would show its password to whoever listens there.
    name = urllib.parse.quote(config.experiment)
    try:
        check_server(address)
        page = f"{address}/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}"
        with urllib.request.urlopen(page, timeout=3) as answer:
            there = json.loads(answer.read(1 << 20))["experiment"]
        here = MlflowClient(absolute(config.uri)).get_experiment_by_name(config.experiment)
    except any_errors():
        return False
    except (KeyError, TypeError, ValueError, http.client.HTTPException):  # of what is no MLflow server
        return False
    return here is not None and all(
        str(there.get(part)) == str(getattr(here, part))
        for part in ("experiment_id", "creation_time", "artifact_location")
    )


def answers(address: str) -> bool:
    """Whether a server answers there by now."""
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

    for chatty in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    uri = absolute(uri)
    if uri.startswith(SQLITE):
        _create_database(database_path(uri))
    return MlflowClient(uri)


@contextmanager
def querying(config: MlflowConfig, chosen: str = "") -> Iterator["MlflowClient"]:
    """A client of a store that answers; errors in our words. `chosen` is the filter that it is asked with.

    Raises:
        ConfigError: if there is nothing in the store yet, or it does not understand the filter.
        TrackingError: if it cannot be asked.
    """
    check_filled(config)
    try:
        yield connect(config.uri)
    except store_errors() as error:
        if getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE" and chosen:
            raise ConfigError(
                f"MLflow does not understand the filter {chosen}: {first_line(error)}\n"
                "Write it as in --filter \"params.lr = '0.1' and metrics.`test/acc` > 0.8\"."
            ) from error
        raise TrackingError(f"tracking.uri={config.uri!r}: {first_line(error)}") from error


def store_errors() -> tuple[type[Exception], ...]:
    """What a store raises when it is dead, full, damaged or unwilling (or is sent half a JSON line)."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError, json.JSONDecodeError


def any_errors() -> tuple[type[Exception], ...]:
    """The same, and what we make of it."""
    return (*store_errors(), TrackingError)


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM until the end of the block.

    A transaction that they break stays open, and keeps SQLite locked for what is then written of the
    run's end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = {
        sign: signal.signal(sign, lambda sign, frame: caught.append(sign))
        for sign in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
    for number in caught[:1]:
        signal.raise_signal(number)


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
    """Create MLflow's database so that no process, started or killed at any moment, sees half of it.

    MLflow's own creation crashes when several processes do it at once, and a kill in the middle
    leaves a database that is broken for good.
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
                # With a write-ahead log, many writers wait for each other a sixth as long.
                connection.execute("PRAGMA journal_mode=WAL")
                connection.close()
    except Timeout as error:
        raise TrackingError(f"{database}: another process has been creating it for two minutes") from error
    except OSError as error:
        raise TrackingError(f"{database}: cannot be created: {error.strerror}") from error


@contextmanager
def _without_syncing(database: Path) -> Iterator[None]:
    """Let SQLite write this database without waiting for the disk: a fifth of the time.

    MLflow makes its tables by seventy migrations, each on the disk before the next one begins. Nobody
    misses a file that has no name yet, and `atomic_path` waits for the disk before it gives it one.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def hurry(connection: sqlite3.Connection, record: object) -> None:
        main, *_ = connection.execute("PRAGMA database_list").fetchall()
        if main[2] and Path(main[2]).samefile(database):
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute("PRAGMA journal_mode=MEMORY")

    event.listen(Engine, "connect", hurry)
    try:
        yield
    finally:
        event.remove(Engine, "connect", hurry)


def check_server(uri: str) -> None:
    """Ask the server for a sign of life, for four seconds at most, however slowly its bytes arrive."""
    answer: queue.Queue[Exception | None] = queue.Queue()

    def ask() -> None:
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_SILENCE_S).close()
            answer.put(None)
        except (OSError, ValueError, http.client.HTTPException) as error:
            answer.put(error)

    # A thread, because a socket's time-out starts anew with each byte.
    threading.Thread(target=ask, daemon=True).start()
    try:
        error = answer.get(timeout=_ANSWER_S)
    except queue.Empty:
        error = TimeoutError("timed out")
    if error is None:
        return
    if isinstance(error, urllib.error.HTTPError):
        if error.code in (401, 403):
            return  # a guarded server; MLflow's client brings the credentials
        raise TrackingError(
            f"tracking.uri={uri!r}: what answers there is no MLflow server (HTTP {error.code})"
        ) from error
    reason = getattr(error, "reason", None) or error
    raise TrackingError(
        f"tracking.uri={uri!r}: no MLflow server answers there ({reason}); "
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
    """Whether the store is a server already, not a database."""
    return uri.startswith(("http://", "https://"))


def exists(uri: str) -> bool:
    """Whether there is a store to be asked: false only for a local database that is not created yet."""
    return not uri.startswith(SQLITE) or database_path(uri).exists()


def database_path(uri: str) -> Path:
    return Path(uri.removeprefix(SQLITE)).absolute()


def absolute(uri: str) -> str:
    """The URI that means the same store in any folder."""
    return f"{SQLITE}{database_path(uri)}" if uri.startswith(SQLITE) else uri


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

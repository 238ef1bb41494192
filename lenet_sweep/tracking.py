"""MLflow: the one module that imports it.

`check` answers in seconds whether a tracking store can be used; `open_run` starts a run there.
What a run logs goes to its output folder first, so a server that dies costs no number: what could
not be sent is sent with the next epoch or at the end.
"""

import logging
import os
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from filelock import FileLock, Timeout

from lenet_sweep.config import MlflowConfig, NoTrackingConfig
from lenet_sweep.errors import TrackingError
from lenet_sweep.paths import atomic_path, check_writable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

Status = Literal["FINISHED", "FAILED", "KILLED"]

log = logging.getLogger(__name__)

_PARAM_LENGTH = 6000  # MLflow refuses longer values
_SQLITE = "sqlite:///"
# A dead server blocks each call for minutes at MLflow's own defaults.
_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


class Run(Protocol):
    """A run being tracked; all methods return within seconds and raise nothing when a server dies."""

    run_id: str | None

    def log(self, epoch: int, metrics: dict[str, float], time_ms: int) -> None: ...
    def end(self, status: Status, reason: str | None, artifacts: Path, time_ms: int) -> str | None: ...
    def where(self) -> list[str]: ...


def check(config: MlflowConfig | NoTrackingConfig) -> None:
    """Refuse a store that cannot be reached, within four seconds and without importing mlflow.

    Raises:
        TrackingError: if the server does not answer, or the database is none or cannot be written.
        OutputError: if the database's folder cannot be written.
    """
    if isinstance(config, NoTrackingConfig):
        return
    if config.uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{config.uri.rstrip('/')}/health", timeout=3).close()
        except urllib.error.HTTPError as error:
            if error.code not in (401, 403):  # a guarded server; MLflow's client brings the credentials
                raise TrackingError(
                    f"tracking.uri={config.uri!r}: what answers there is no MLflow server (HTTP {error.code})"
                ) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise TrackingError(
                f"tracking.uri={config.uri!r}: no MLflow server answers there ({reason}); "
                "start it, or use tracking=mlflow (a local database) or tracking=none"
            ) from error
    elif config.uri.startswith(_SQLITE):
        database = _database(config.uri)
        check_writable(database.parent)
        if database.exists():
            _check_database(database)


def open_run(
    config: MlflowConfig | NoTrackingConfig,
    name: str,
    params: Iterable[tuple[str, Any]],
    tags: dict[str, str],
    time_ms: int,
) -> Run:
    """Start a run with these params and tags; the store is created if it is a missing local database.

    Raises:
        TrackingError: if the store cannot be reached or created.
    """
    if isinstance(config, NoTrackingConfig):
        return _Untracked()
    for key, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient
    from mlflow.entities import Param

    for chatty in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)

    uri = _absolute(config.uri)
    if uri.startswith(_SQLITE):
        _create_database(_database(uri))
    try:
        client = MlflowClient(uri)
        experiment_id = _experiment(client, config.experiment, uri)
        run = client.create_run(experiment_id, start_time=time_ms, tags=tags, run_name=name)
        run_id = run.info.run_id
        client.log_batch(run_id, params=[Param(key, str(value)[:_PARAM_LENGTH]) for key, value in params])
    except _store_errors() as error:
        raise TrackingError(f"tracking.uri={config.uri!r}: {_first_line(error)}") from error
    return _MlflowRun(client, uri, experiment_id, run_id)


def ui_command(uri: str) -> str | None:
    """A complete shell command that serves the MLflow UI on a local database; None for a server."""
    uri = _absolute(uri)
    if uri.startswith(("http://", "https://")):
        return None
    return f"python -m mlflow ui --workers 1 --backend-store-uri '{uri}'"


class _Untracked:
    run_id: str | None = None

    def log(self, epoch: int, metrics: dict[str, float], time_ms: int) -> None:
        pass

    def end(self, status: Status, reason: str | None, artifacts: Path, time_ms: int) -> None:
        pass

    def where(self) -> list[str]:
        return []


class _MlflowRun:
    def __init__(self, client: "MlflowClient", uri: str, experiment_id: str, run_id: str) -> None:
        self.run_id: str | None = run_id
        self._id = run_id
        self._client = client
        self._uri = uri
        self._experiment_id = experiment_id
        self._unsent: list[Metric] = []

    def log(self, epoch: int, metrics: dict[str, float], time_ms: int) -> None:
        from mlflow.entities import Metric

        self._unsent += [Metric(key, value, time_ms, epoch) for key, value in metrics.items()]
        problem = self._send()
        if problem:
            log.warning("epoch %d could not be tracked yet: %s", epoch, problem)

    def end(self, status: Status, reason: str | None, artifacts: Path, time_ms: int) -> str | None:
        """Send what is left and close the run; return what went wrong, if anything did."""
        problem = self._send()
        try:
            if reason:
                self._client.set_tag(self._id, "failure_reason", reason[:_PARAM_LENGTH])
            for path in sorted(artifacts.rglob("*")):
                relative = path.relative_to(artifacts)
                if path.is_file() and _is_artifact(relative):
                    parent = relative.parent.as_posix()
                    self._client.log_artifact(self._id, str(path), None if parent == "." else parent)
            self._client.set_terminated(self._id, status, end_time=time_ms)
        except _store_errors() as error:
            problem = problem or _first_line(error)
        return problem

    def where(self) -> list[str]:
        """Lines that say where the run is and how to open it."""
        page = f"#/experiments/{self._experiment_id}/runs/{self._id}"
        command = ui_command(self._uri)
        lines = [f"MLflow run {self._id}"]
        if command:
            return [*lines, command, f"    then open http://127.0.0.1:5000/{page}"]
        return [*lines, f"{self._uri.rstrip('/')}/{page}"]

    def _send(self) -> str | None:
        try:
            # Sending a point twice leaves one, so nothing is lost or doubled if an answer got lost.
            for i in range(0, len(self._unsent), 1000):
                self._client.log_batch(self._id, metrics=self._unsent[i : i + 1000])
        except _store_errors() as error:
            return _first_line(error)
        self._unsent.clear()
        return None


# Of an output folder, these go to MLflow; Hydra's own files and the log stay behind.
_ARTIFACTS = ("config.yaml", "environment.json", "metrics.jsonl", "model", "plots", "profile")


def _is_artifact(relative: Path) -> bool:
    return relative.parts[0] in _ARTIFACTS


def _store_errors() -> tuple[type[Exception], ...]:
    """What a store raises when it is dead, full, damaged or unwilling."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError


def _experiment(client: "MlflowClient", name: str, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    # Only create_experiment can set where artifacts go; a server decides that for itself.
    location = (_database(uri).parent / "artifacts").as_uri() if uri.startswith(_SQLITE) else None
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=location))
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

            with atomic_path(database) as temporary:
                store = SqlAlchemyStore(f"{_SQLITE}{temporary}", (database.parent / "artifacts").as_uri())
                store.engine.dispose()
                connection = sqlite3.connect(temporary)
                # With a write-ahead log, many writers wait for each other a sixth as long.
                connection.execute("PRAGMA journal_mode=WAL")
                connection.close()
    except Timeout as error:
        raise TrackingError(f"{database}: another process has been creating it for two minutes") from error
    except OSError as error:
        raise TrackingError(f"{database}: cannot be created: {error.strerror}") from error


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


def _database(uri: str) -> Path:
    return Path(uri.removeprefix(_SQLITE)).absolute()


def _absolute(uri: str) -> str:
    return f"{_SQLITE}{_database(uri)}" if uri.startswith(_SQLITE) else uri


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

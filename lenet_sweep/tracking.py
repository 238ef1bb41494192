"""MLflow: the one module that imports it.

`check` answers in seconds whether a tracking store can be used; `open_run` starts a run there, or
goes on with one. What a run logs goes to its output folder first, so a server that dies costs no
number: training goes on, and `deliver` sends what is missing, with its true times, at the end of the
run or at any later command. Sending anything twice leaves it there once.
"""

import base64
import http.client
import json
import logging
import os
import queue
import re
import shlex
import signal
import socket
import sqlite3
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil
import yaml
from filelock import FileLock, Timeout

from lenet_sweep import config as configs
from lenet_sweep import ledger
from lenet_sweep.config import MlflowConfig, NoTrackingConfig, is_about_tracking
from lenet_sweep.errors import ConfigError, TrackingError
from lenet_sweep.ledger import Result
from lenet_sweep.paths import atomic_path, check_writable, write_atomic
from lenet_sweep.records import PARAM_LENGTH, History, Record

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowEntity

log = logging.getLogger(__name__)

_BATCH = 1000  # metrics in one call, MLflow's limit
_PAGE = 1000  # runs in one answer
_AT_ONCE = 8  # requests to a server
_QUESTIONS_A_PAGE = 400  # questions for one run each that take longer than reading a page (1.9 s, 8 ms)
_TOLD = ("train/loss", "train/acc", "val/acc", "test/acc")  # metrics in a run's description
_RETRY_S = 30  # after a call failed, how long none is tried
_SILENCE_S = 3.0  # a server that sends nothing for so long does not answer
_ANSWER_S = 4.0  # it does not either if its answer takes longer, however it arrives
_SQLITE = "sqlite:///"
_NOTE = "mlflow.note.content"  # the tag whose Markdown MLflow's pages show as a description
_STANDS = "This run stands for sweep "
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


@dataclass(frozen=True)
class Registration:
    """What a run is in its store, as `tracking.json` in its folder keeps it."""

    uri: str
    experiment: str
    name: str
    tags: dict[str, str]
    start_ms: int
    run_id: str | None  # None: the store was out of reach, so the run is still to be created there


class Run(Protocol):
    """A run being tracked; each method returns within seconds and raises nothing when a server dies."""

    run_id: str | None

    def log(self, epoch: int, metrics: dict[str, float], time_ms: int) -> None: ...
    def end(self, result: Result) -> str | None: ...
    def where(self) -> list[str]: ...


def check(config: MlflowConfig | NoTrackingConfig) -> None:
    """Refuse a store that cannot be reached, within four seconds and without importing mlflow.

    Raises:
        TrackingError: if the server does not answer, or the database is none or cannot be written.
        OutputError: if the database's folder cannot be written.
    """
    if isinstance(config, NoTrackingConfig):
        return
    if is_server(config.uri):
        _check_server(config.uri)
    elif config.uri.startswith(_SQLITE):
        database = _database(config.uri)
        check_writable(database.parent)
        if database.exists():
            _check_database(database)


def check_filled(config: MlflowConfig) -> None:
    """Refuse a store that there is nothing in yet, or that cannot be reached, as `check` does.

    Raises:
        ConfigError, OutputError, TrackingError
    """
    check(config)
    if config.uri.startswith(_SQLITE) and not _database(config.uri).exists():
        raise ConfigError(f"there are no runs yet in {config.uri}; another store is tracking.uri=...")


def open_run(
    config: MlflowConfig | NoTrackingConfig,
    folder: Path,
    name: str,
    tags: dict[str, str],
    start_ms: int,
    run_id: str | None = None,
) -> Run:
    """Start a run, or go on with `run_id`; its params are those of `folder`/config.yaml.

    A local database that is missing is created. A store that is out of reach is only noted: the
    run is then created by `deliver`, when it can be.

    Raises:
        TrackingError: if the store refuses the run.
    """
    if isinstance(config, NoTrackingConfig):
        return _Untracked()
    uri = absolute(config.uri)
    registration = Registration(uri, config.experiment, name, tags | _process(), start_ms, run_id)
    run = _MlflowRun(registration, folder)
    run.begin()
    return run


def finished(config: MlflowConfig | NoTrackingConfig, hashes: Collection[str]) -> dict[str, Result]:
    """The results, by config hash, of those of these configs that have a finished run in this store.

    Of several such runs it is the latest.

    Raises:
        TrackingError: if the store cannot be asked.
    """
    if isinstance(config, NoTrackingConfig):
        entries = {config_hash: ledger.look_up(config_hash) for config_hash in hashes}
        results = {key: ledger.read_result(entry.folder) for key, entry in entries.items() if entry}
        return {key: result for key, result in results.items() if result and result.status == "FINISHED"}
    if config.uri.startswith(_SQLITE) and not _database(config.uri).exists():
        return {}
    try:
        return _finished(_client(config.uri), config, frozenset(hashes))
    except _store_errors() as error:
        raise TrackingError(f"tracking.uri={config.uri!r}: {_first_line(error)}") from error


def end_the_dead(config: MlflowConfig | NoTrackingConfig) -> list[str]:
    """Mark as KILLED what stands as RUNNING though its process on this machine is gone; return the ids.

    A process that was killed, or a machine that lost power, could not do so itself.
    """
    if isinstance(config, NoTrackingConfig):
        return []
    if config.uri.startswith(_SQLITE) and not _database(config.uri).exists():
        return []
    ended = []
    try:
        client = _client(config.uri)
        experiment = client.get_experiment_by_name(config.experiment)
        host = socket.gethostname().replace("'", "")
        running = f"attributes.status = 'RUNNING' and tags.host = '{host}'"
        for run in client.search_runs([experiment.experiment_id], running) if experiment else []:
            if not _is_alive(run.data.tags):
                client.set_tag(run.info.run_id, "failure_reason", "its process was killed")
                client.set_terminated(run.info.run_id, "KILLED")
                ended.append(run.info.run_id)
    except _store_errors() as error:
        log.warning("stale runs could not be looked for: %s", _first_line(error))
    return ended


def fetch(
    config: MlflowConfig, name: str, folder: Path, files: Iterable[str]
) -> tuple[str, dict[int, dict[str, float]]]:
    """Fetch a run's metrics, and those of its artifacts in `files` that it has, into `folder`.

    `name` is the run's id or a prefix of it that no other run has. Returns the id, and every metric
    by epoch and name.

    Raises:
        ConfigError: if no run, or more than one, has such an id.
        TrackingError: if the store cannot be asked.
    """
    if not re.fullmatch("[0-9a-f]{1,32}", name):
        raise ConfigError(
            f"{name!r}: is neither a folder, nor a config.yaml, nor a run id (hexadecimal digits)"
        )
    with _asking(config) as client:
        run_id = _find(client, name)
        metrics: dict[int, dict[str, float]] = {}
        for metric in client.get_run(run_id).data.metrics:
            for point in client.get_metric_history(run_id, metric):
                metrics.setdefault(point.step, {})[metric] = point.value
        for file in files:
            parent = file.rpartition("/")[0]
            if any(found.path == file for found in client.list_artifacts(run_id, parent or None)):
                (folder / parent).mkdir(exist_ok=True)
                # Where below the folder it lands depends on the kind of store.
                os.replace(client.download_artifacts(run_id, file, str(folder)), folder / file)
    return run_id, metrics


def sweeps(config: MlflowConfig, prefix: str = "") -> list[str]:
    """`prefix` itself if it is a sweep's id; else the ids of all sweeps that start so, the latest first.

    Raises:
        TrackingError: if the store cannot be asked.
    """
    given = f"tags.sweep_id LIKE {_quoted(prefix + '%')}"
    with _asking(config) as client:
        if list(_search(client, config, of_sweep(prefix), at_most=1)):
            return [prefix]
        found = [run.data.tags["sweep_id"] for run in _search(client, config, given)]
    return list(dict.fromkeys(sweep_id for sweep_id in found if sweep_id.startswith(prefix)))


def latest_sweep(config: MlflowConfig) -> str | None:
    """The id of the sweep whose run started last.

    Raises:
        TrackingError: if the store cannot be asked.
    """
    with _asking(config) as client:
        for run in _search(client, config, "tags.sweep_id LIKE '%'", at_most=1):
            return str(run.data.tags["sweep_id"])
    return None


def records(config: MlflowConfig, chosen: str, metrics: Sequence[str]) -> list[Record]:
    """The runs that MLflow's filter `chosen` selects ('' for all), with the histories of `metrics`.

    Raises:
        ConfigError: if MLflow does not understand the filter.
        TrackingError: if the store cannot be asked.
    """
    with _asking(config, chosen) as client:
        runs = list(_search(client, config, chosen))
        found = {run.info.run_id: _record(run) for run in runs}
        for metric in metrics:
            ids = [run.info.run_id for run in runs if metric in run.data.metrics]
            for run_id, history in _histories(client, ids, metric):
                found[run_id].history[metric] = history
    # In the order of a sweep's table: runs are found newest first.
    return list(reversed(found.values()))


def records_of(
    config: MlflowConfig, run_ids: Sequence[str], metrics: Sequence[str], chosen: str | None = None
) -> list[Record]:
    """Those of the runs with these ids that the store has and the filter `chosen` selects; as `records`."""
    found = []
    for i in range(0, len(run_ids), _PAGE):
        condition = of_runs(run_ids[i : i + _PAGE])
        found += records(config, f"{condition} and {chosen}" if chosen else condition, metrics)
    return found


def find_run(config: MlflowConfig, prefix: str) -> str:
    """The whole id of the one run whose id starts with `prefix`.

    Raises:
        ConfigError: if no run, or more than one, has such an id.
        TrackingError: if the store cannot be asked.
    """
    with _asking(config) as client:
        return _find(client, prefix)


def of_sweep(sweep_id: str) -> str:
    """MLflow's filter for the runs of a sweep."""
    return f"tags.sweep_id = {_quoted(sweep_id)}"


def of_runs(run_ids: Iterable[str]) -> str:
    """MLflow's filter for the runs with these ids."""
    return f"attributes.run_id IN ({', '.join(map(_quoted, run_ids))})"


def experiment_of(config: MlflowConfig, run_id: str) -> str:
    """The id of the experiment that a run is in.

    Raises:
        TrackingError: if the store cannot be asked.
    """
    with _asking(config) as client:
        return str(client.get_run(run_id).info.experiment_id)


def deliver_all() -> tuple[int, list[str]]:
    """Deliver every ended run that its store has not got in full; return how many, and what went wrong."""
    sent, problems = 0, []
    for folder in ledger.unsynced():
        result = ledger.read_result(folder)
        if result is None:
            continue  # it has not ended, or was killed before it could: it is resumed, not delivered
        with ledger.claim_if_free(result.config_hash) as free:
            if not free:
                continue  # somebody trains it, or delivers it now
            if problem := deliver(folder, result):
                problems.append(problem)
            else:
                ledger.mark_synced(folder)
                sent += 1
    return sent, problems


def deliver(folder: Path, result: Result) -> str | None:
    """Send everything that the ended run in `folder` has; return what went wrong, None if nothing did."""
    try:
        values = json.loads((folder / "tracking.json").read_text(encoding="utf-8"))
        run = _MlflowRun(Registration(**values), folder)
    except (OSError, ValueError, TypeError) as error:
        return f"{folder}: {error}"
    try:
        if run.is_remote():
            _check_server(run.uri)
        run.begin()
    except TrackingError as error:
        return str(error)
    return run.end(result)


def ui_command(name: str, overrides: Iterable[str]) -> str:
    """The shell command that opens MLflow's pages on a sweep or run, by name; '' is the latest sweep.

    `overrides` are the user's own: those that say where the store is are needed again.
    """
    store = [override for override in overrides if is_about_tracking(override)]
    return shlex.join(["python", "-m", "lenet_sweep", "ui", *filter(None, [name]), *store])


def run_page(experiment_id: str, run_id: str) -> str:
    """The page of a run, below a server's address."""
    return f"#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def share_view(config: MlflowConfig, key: str, name: str, state: dict[str, Any]) -> str:
    """Save a view of the experiment's runs for MLflow's pages; return the experiment's id.

    MLflow documents neither where its pages keep a view nor its form (`views.state`): a tag of the
    experiment, whose value is the zipped state in an envelope. A browser test holds both.

    Raises:
        ConfigError: if there is nothing in the store yet, or no such experiment.
        TrackingError: if it cannot be asked.
    """
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    now = int(time.time() * 1000)
    envelope = {"name": name, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"}
    with _asking(config) as client:
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is None:
            names = ", ".join(repr(other.name) for other in client.search_experiments())
            raise ConfigError(
                f"tracking.experiment={config.experiment!r}: is not in {config.uri}, which has {names}"
            )
        client.set_experiment_tag(
            experiment.experiment_id, f"mlflow.sharedViewState.{key}", json.dumps(envelope)
        )
    return str(experiment.experiment_id)


def serves(address: str, config: MlflowConfig) -> bool:
    """Whether the server at `address`, of whatever kind, is MLflow's and has this very store."""
    from mlflow import MlflowClient

    # Not by MLflow's client: it would show its password to whoever listens there.
    name = urllib.parse.quote(config.experiment)
    try:
        _check_server(address)
        page = f"{address}/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}"
        with urllib.request.urlopen(page, timeout=3) as answer:
            there = json.loads(answer.read(1 << 20))["experiment"]
        here = MlflowClient(absolute(config.uri)).get_experiment_by_name(config.experiment)
    except _any_errors():
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


def log_report(config: MlflowConfig, run_id: str, sweep_id: str, report: Path, answer: str) -> str | None:
    """Keep a sweep's report with the run that stands for the sweep; return what went wrong, if anything."""
    try:
        client = _client(config.uri)
        tags = client.get_run(run_id).data.tags
        # A run can be the best of later sweeps too, which had not to train it again.
        folder = None if tags.get("sweep_id") == sweep_id else sweep_id
        client.log_artifact(run_id, str(report), folder)
        note = tags.get(_NOTE, "")
        stands = f"{_STANDS}{_code(sweep_id)}"
        if stands not in note:
            where = _code(f"{folder}/{report.name}" if folder else report.name)
            about = f"{stands}: {where} among its artifacts compares all of its runs."
            client.set_tag(run_id, _NOTE, f"{note}\n\n{about}\n\n{_code(answer)}".strip())
    except _any_errors() as error:
        return _first_line(error)
    return None


class _Untracked:
    run_id: str | None = None

    def log(self, epoch: int, metrics: dict[str, float], time_ms: int) -> None:
        pass

    def end(self, result: Result) -> None:
        pass

    def where(self) -> list[str]:
        return []


class _MlflowRun:
    def __init__(self, registration: Registration, folder: Path) -> None:
        self.run_id = registration.run_id
        self.uri = registration.uri
        self._registration = registration
        self._folder = folder
        self._experiment_id = ""
        self._complete = False  # the store has every metric that was logged
        self._silent_until = 0.0

    def begin(self) -> None:
        """Create the run, or mark it as running again; note it in the folder either way."""
        registration = self._registration
        try:
            client = _client(registration.uri)
            self._experiment_id = _experiment(client, registration.experiment, registration.uri)
            if self.run_id and not _is_there(client, self.run_id):
                self.run_id = None  # somebody deleted it
            if self.run_id is None:
                run = client.create_run(
                    self._experiment_id, registration.start_ms, registration.tags, registration.name
                )
                self.run_id = run.info.run_id
                self._send_params(client)
                # A run that could only be created after its training has metrics that are still to be sent.
                self._complete = not (self._folder / "metrics.jsonl").exists()
            else:
                # First whose it is, then that it runs, or `end_the_dead` could end it in between.
                for key, value in registration.tags.items():
                    client.set_tag(self.run_id, key, value)
                client.update_run(self.run_id, "RUNNING")
                if "failure_reason" in client.get_run(self.run_id).data.tags:
                    client.delete_tag(self.run_id, "failure_reason")
        except _store_errors() as error:
            if not self.is_remote():
                raise TrackingError(f"tracking.uri={registration.uri!r}: {_first_line(error)}") from error
            self._lose(error)
        note = json.dumps(asdict(registration) | {"run_id": self.run_id}, indent=2)
        write_atomic(self._folder / "tracking.json", note + "\n")

    def log(self, epoch: int, metrics: dict[str, float], time_ms: int) -> None:
        from mlflow.entities import Metric

        if self.run_id is None or time.monotonic() < self._silent_until:
            self._complete = False
            return
        try:
            points = [Metric(key, value, time_ms, epoch) for key, value in metrics.items()]
            with _unbroken():
                _client(self.uri).log_batch(self.run_id, metrics=points)
        except _store_errors() as error:
            self._lose(error)

    def end(self, result: Result) -> str | None:
        """Send what the store has not got, and close the run; return what went wrong, if anything did."""
        from mlflow.entities import RunTag

        if self.run_id is None:
            return "the run could not be created in the store"
        try:
            client = _client(self.uri)
            if not self._complete:
                self._send_all(client)
            # What it says of sweeps that the run stands for is kept.
            _, stands, of_sweeps = client.get_run(self.run_id).data.tags.get(_NOTE, "").partition(_STANDS)
            tags = {_NOTE: f"{self._description(result)}\n\n{stands}{of_sweeps}".strip()}
            if result.reason:
                tags["failure_reason"] = result.reason[:PARAM_LENGTH]
            if result.collapsed:
                tags["collapsed"] = "true"
            client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
            for path in sorted(self._folder.rglob("*")):
                relative = path.relative_to(self._folder)
                if path.is_file() and relative.parts[0] in _ARTIFACTS:
                    parent = relative.parent.as_posix()
                    client.log_artifact(self.run_id, str(path), None if parent == "." else parent)
            client.set_terminated(self.run_id, result.status, self._end_ms())
        except _store_errors() as error:
            return _first_line(error)
        return None

    def where(self) -> list[str]:
        """Lines that say where the run is."""
        if self.run_id is None:
            return []
        page = [f"{self.uri.rstrip('/')}/{run_page(self._experiment_id, self.run_id)}"]
        return [f"MLflow run {self.run_id}", *(page if self.is_remote() else [])]

    def _description(self, result: Result) -> str:
        """The run in Markdown: what was overridden, what came of it, how to have it again."""
        assert self.run_id is not None
        registration = self._registration
        sweep_id = registration.tags.get("sweep_id")
        metrics = [f"{name} {result.metrics[name]:.3f}" for name in _TOLD if name in result.metrics]
        outcome = ", ".join([result.status.lower(), *metrics, f"{result.seconds:.1f} s"])
        lines = [
            _code(registration.name) + (f" of sweep {_code(sweep_id)}" if sweep_id else ""),
            f"{outcome}{'; **collapsed** to guessing' if result.collapsed else ''}",
            *([f"why: {_code(result.reason[:500])}"] if result.reason else []),
            f"again: {_code(f'python -m lenet_sweep reproduce {self.run_id[:8]}')}",
        ]
        return "\n\n".join(lines)

    def _send_all(self, client: "MlflowClient") -> None:
        """Send params and every metric of metrics.jsonl; what is there already stays as it is."""
        from mlflow.entities import Metric

        assert self.run_id is not None
        self._send_params(client)
        points = []
        for line in (self._folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            for key, value in values.items():
                if "/" in key:
                    points.append(Metric(key, value, values["time_ms"], values["epoch"]))
        for i in range(0, len(points), _BATCH):
            client.log_batch(self.run_id, metrics=points[i : i + _BATCH])

    def _send_params(self, client: "MlflowClient") -> None:
        from mlflow.entities import Param

        assert self.run_id is not None
        values = yaml.safe_load((self._folder / "config.yaml").read_text(encoding="utf-8"))
        params = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in configs.flatten(values)]
        client.log_batch(self.run_id, params=params)

    def _lose(self, error: Exception) -> None:
        log.warning("tracking store out of reach, all is kept in the output folder: %s", _first_line(error))
        self._complete = False
        self._silent_until = time.monotonic() + _RETRY_S

    def _end_ms(self) -> int:
        """When the run ended; now, if a full disk kept that from being written."""
        written = self._folder / "result.json"
        end_ms = int((written.stat().st_mtime if written.exists() else time.time()) * 1000)
        return max(end_ms, self._registration.start_ms)

    def is_remote(self) -> bool:
        return is_server(self.uri)


# Of an output folder, these go to MLflow; Hydra's own files and the log stay behind.
_ARTIFACTS = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "per_class.json",
    "uncommitted.diff",
    "model",
    "plots",
    "profile",
)


def _client(uri: str) -> "MlflowClient":
    """A client of the store (MLflow keeps its connections); a missing local database is created."""
    for key, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    for chatty in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    uri = absolute(uri)
    if uri.startswith(_SQLITE):
        _create_database(_database(uri))
    return MlflowClient(uri)


@contextmanager
def _asking(config: MlflowConfig, chosen: str = "") -> Iterator["MlflowClient"]:
    """A client of a store that answers; errors in our words. `chosen` is the filter that it is asked with.

    Raises:
        ConfigError: if there is nothing in the store yet, or it does not understand the filter.
        TrackingError: if it cannot be asked.
    """
    check_filled(config)
    try:
        yield _client(config.uri)
    except _store_errors() as error:
        if getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE" and chosen:
            raise ConfigError(
                f"MLflow does not understand the filter {chosen}: {_first_line(error)}\n"
                "Write it as in --filter \"params.lr = '0.1' and metrics.`test/acc` > 0.8\"."
            ) from error
        raise TrackingError(f"tracking.uri={config.uri!r}: {_first_line(error)}") from error


def _search(
    client: "MlflowClient", config: MlflowConfig, chosen: str, at_most: int = 0
) -> Iterator["MlflowEntity"]:
    """Runs of the config's experiment, the latest first."""
    experiment = client.get_experiment_by_name(config.experiment)
    page = None
    while experiment:
        runs = client.search_runs(
            [experiment.experiment_id],
            chosen,
            max_results=at_most or _PAGE,
            order_by=["attributes.start_time DESC"],
            page_token=page,
        )
        yield from runs
        page = runs.token
        if at_most or not page:
            return


def _finished(client: "MlflowClient", config: MlflowConfig, hashes: frozenset[str]) -> dict[str, Result]:
    """Look for many hashes among the latest runs, page by page, and ask for those that are left.

    MLflow has no filter for many values of a tag. So many pages are read that they cost less than
    asking for every hash would, however many runs the store has.
    """
    found: dict[str, Result] = {}
    at_most = len(hashes) // _QUESTIONS_A_PAGE * _PAGE
    seen = 0
    for run in islice(_search(client, config, "attributes.status = 'FINISHED'"), at_most):
        seen += 1
        config_hash = run.data.tags.get("config_hash", "")
        if config_hash in hashes and config_hash not in found:
            found[config_hash] = _result(run, config_hash)
            if len(found) == len(hashes):
                break
    if seen < at_most:
        return found

    def ask(config_hash: str) -> "list[MlflowEntity]":
        same = f"attributes.status = 'FINISHED' and tags.config_hash = '{config_hash}'"
        return list(_search(client, config, same, at_most=1))

    with ThreadPoolExecutor(_AT_ONCE if is_server(config.uri) else 1) as pool:
        left = sorted(hashes - found.keys())
        for config_hash, runs in zip(left, pool.map(ask, left), strict=True):
            if runs:
                found[config_hash] = _result(runs[0], config_hash)
    return found


def _histories(client: "MlflowClient", run_ids: Sequence[str], metric: str) -> Iterator[tuple[str, History]]:
    """Every epoch of a metric, by run.

    A database is asked once for all runs, which takes a hundredth of the time of asking for each;
    for a server, MLflow's client has no such call, so several requests are under way at once.
    """
    store = client._tracking_client.store
    if hasattr(store, "get_metric_history_bulk"):
        found: dict[str, History] = {run_id: {} for run_id in run_ids}
        for point in store.get_metric_history_bulk(list(run_ids), metric, max_results=2**31 - 1):
            found[point.run_id][point.step] = point.value
        yield from found.items()
        return

    def ask(run_id: str) -> History:
        return {point.step: point.value for point in client.get_metric_history(run_id, metric)}

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from zip(run_ids, pool.map(ask, run_ids), strict=True)


def _record(run: "MlflowEntity") -> Record:
    tags, info = run.data.tags, run.info
    return Record(
        name=info.run_id,
        status=info.status,
        params=dict(run.data.params),
        config_hash=tags.get("config_hash", ""),
        reason=tags.get("failure_reason"),
        collapsed=tags.get("collapsed") == "true",
        seconds=(info.end_time - info.start_time) / 1000 if info.end_time else None,
        commit=tags.get("git_commit", ""),
        start_ms=info.start_time,
    )


def _quoted(text: str) -> str:
    """A text as a value in MLflow's filters, which know no escapes."""
    if "'" in text and '"' in text:
        raise ConfigError(f"{text!r}: holds both kinds of quotes, which MLflow cannot search for")
    return f'"{text}"' if "'" in text else f"'{text}'"


def _process() -> dict[str, str]:
    """Tags by which `end_the_dead` knows whether the run's process still lives."""
    started = psutil.Process().create_time()
    return {"host": socket.gethostname(), "pid": str(os.getpid()), "process_start": f"{started:.2f}"}


def _is_alive(tags: dict[str, str]) -> bool:
    """Whether the process that these tags name still runs; a process number alone may be another's by now."""
    try:
        process = psutil.Process(int(tags["pid"]))
        same = abs(process.create_time() - float(tags["process_start"])) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (KeyError, ValueError, psutil.NoSuchProcess):
        return False
    except psutil.AccessDenied:
        return True


def _result(run: "MlflowEntity", config_hash: str) -> Result:
    end_ms = run.info.end_time or run.info.start_time
    metrics = dict(run.data.metrics)
    return Result(
        "FINISHED",
        None,
        run.data.tags.get("collapsed") == "true",
        run.info.run_id,
        config_hash,
        seconds=(end_ms - run.info.start_time) / 1000,
        metrics=metrics,
    )


def _store_errors() -> tuple[type[Exception], ...]:
    """What a store raises when it is dead, full, damaged or unwilling (or is sent half a JSON line)."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError, json.JSONDecodeError


def _any_errors() -> tuple[type[Exception], ...]:
    """The same, and what we make of it."""
    return (*_store_errors(), TrackingError)


@contextmanager
def _unbroken() -> Iterator[None]:
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


def _code(text: str) -> str:
    """Text in Markdown that is nothing but text: code on one line, without what could end it."""
    return f"`{' '.join(text.replace('`', ' ').split())}`"


def _is_there(client: "MlflowClient", run_id: str) -> bool:
    """Whether the store has this run and it is not deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _find(client: "MlflowClient", prefix: str) -> str:
    """The one run of all experiments whose id starts so."""
    if len(prefix) == 32 and _is_there(client, prefix):
        return prefix
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found: list[str] = []
    page = None
    while True:
        runs = client.search_runs(experiments, max_results=1000, page_token=page)
        found += [run.info.run_id for run in runs if run.info.run_id.startswith(prefix)]
        page = runs.token
        if not page:
            break
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError(f"no run has an id that starts with {prefix!r}")
    raise ConfigError(f"{len(found)} runs have ids that start with {prefix!r}: {', '.join(found[:5])}")


def _experiment(client: "MlflowClient", name: str, uri: str) -> str:
    """The experiment's id; a missing one is created."""
    from mlflow.exceptions import MlflowException

    # Only create_experiment can set where artifacts go; a server decides that for itself.
    location = (_database(uri).parent / "artifacts").as_uri() if uri.startswith(_SQLITE) else None
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=location, tags={_NOTE: _ABOUT}))
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


def _check_server(uri: str) -> None:
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


def _database(uri: str) -> Path:
    return Path(uri.removeprefix(_SQLITE)).absolute()


def absolute(uri: str) -> str:
    """The URI that means the same store in any folder."""
    return f"{_SQLITE}{_database(uri)}" if uri.startswith(_SQLITE) else uri


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

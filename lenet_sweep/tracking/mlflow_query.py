"""Questions to an MLflow store: finished runs, sweeps, histories, artifacts, stale runs."""

import logging
import os
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from lenet_sweep.config.schema import MlflowConfig
from lenet_sweep.errors import ConfigError
from lenet_sweep.storage.records import History, Record
from lenet_sweep.storage.result import Result
from lenet_sweep.tracking import mlflow_client, processes
from lenet_sweep.tracking.base import Metrics

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowEntity

log = logging.getLogger(__name__)

_PAGE = 1000  # runs per response
_AT_ONCE = 8  # concurrent requests to a server
_QUERIES_PER_PAGE = 400  # queries for single runs (1.9 s) that take longer than reading a page (8 ms)


def fetch(config: MlflowConfig, name: str, folder: Path, files: Iterable[str]) -> tuple[str, Metrics]:
    """Fetch a run's metrics, and those of its artifacts in `files` that it has, into `folder`.

    `name` is the run's id or a prefix of it that no other run has. Returns the id, and every metric
    by epoch and name.

    Raises:
        ConfigError: if no run, or more than one, has such an id.
        TrackingError: if the store cannot be reached.
    """
    if not re.fullmatch("[0-9a-f]{1,32}", name):
        raise ConfigError(
            f"{name!r}: is neither a folder, nor a config.yaml, nor a run id (hexadecimal digits)"
        )
    with mlflow_client.querying(config) as client:
        run_id = _find(client, name)
        metrics: Metrics = {}
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
        TrackingError: if the store cannot be reached.
    """
    given = f"tags.sweep_id LIKE {_quoted(prefix + '%')}"
    with mlflow_client.querying(config) as client:
        if list(_search(client, config, sweep_filter(prefix), at_most=1)):
            return [prefix]
        found = [run.data.tags["sweep_id"] for run in _search(client, config, given)]
    return list(dict.fromkeys(sweep_id for sweep_id in found if sweep_id.startswith(prefix)))


def latest_sweep(config: MlflowConfig) -> str | None:
    """The id of the sweep whose run started last.

    Raises:
        TrackingError: if the store cannot be reached.
    """
    with mlflow_client.querying(config) as client:
        for run in _search(client, config, "tags.sweep_id LIKE '%'", at_most=1):
            return str(run.data.tags["sweep_id"])
    return None


def records(config: MlflowConfig, chosen: str, metrics: Sequence[str]) -> list[Record]:
    """The runs that MLflow's filter `chosen` selects ('' for all), with the histories of `metrics`.

    Raises:
        ConfigError: if MLflow does not understand the filter.
        TrackingError: if the store cannot be reached.
    """
    with mlflow_client.querying(config, chosen) as client:
        runs = list(_search(client, config, chosen))
        found = {run.info.run_id: _to_record(run) for run in runs}
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
        condition = runs_filter(run_ids[i : i + _PAGE])
        found += records(config, f"{condition} and {chosen}" if chosen else condition, metrics)
    return found


def find_run(config: MlflowConfig, prefix: str) -> str:
    """The whole id of the one run whose id starts with `prefix`.

    Raises:
        ConfigError: if no run, or more than one, has such an id.
        TrackingError: if the store cannot be reached.
    """
    with mlflow_client.querying(config) as client:
        return _find(client, prefix)


def close_stale_runs(config: MlflowConfig) -> list[str]:
    """Mark as KILLED what is RUNNING though its process on this machine is gone; return the ids.

    A process that was killed, or a machine that lost power, could not do so itself.
    """
    closed = []
    try:
        client = mlflow_client.connect(config.uri)
        experiment = client.get_experiment_by_name(config.experiment)
        host = socket.gethostname().replace("'", "")
        running = f"attributes.status = 'RUNNING' and tags.host = '{host}'"
        for run in client.search_runs([experiment.experiment_id], running) if experiment else []:
            if not processes.is_alive(run.data.tags):
                client.set_tag(run.info.run_id, "failure_reason", "its process was killed")
                client.set_terminated(run.info.run_id, "KILLED")
                closed.append(run.info.run_id)
    except mlflow_client.store_errors() as error:
        log.warning("stale runs could not be searched for: %s", mlflow_client.first_line(error))
    return closed


def sweep_filter(sweep_id: str) -> str:
    """MLflow's filter for the runs of a sweep."""
    return f"tags.sweep_id = {_quoted(sweep_id)}"


def runs_filter(run_ids: Iterable[str]) -> str:
    """MLflow's filter for the runs with these ids."""
    return f"attributes.run_id IN ({', '.join(map(_quoted, run_ids))})"


def experiment_of(config: MlflowConfig, run_id: str) -> str:
    """The id of the experiment that a run is in.

    Raises:
        TrackingError: if the store cannot be reached.
    """
    with mlflow_client.querying(config) as client:
        return str(client.get_run(run_id).info.experiment_id)


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


def finished(client: "MlflowClient", config: MlflowConfig, hashes: frozenset[str]) -> dict[str, Result]:
    """The results, by config hash, of those of these configs that have a finished run, the latest of several.

    MLflow has no filter for many values of a tag. Pages of the latest runs are read as long as that costs
    less than a query for each hash; then the remaining hashes are queried one by one.
    """
    found: dict[str, Result] = {}
    at_most = len(hashes) // _QUERIES_PER_PAGE * _PAGE
    seen = 0
    for run in islice(_search(client, config, "attributes.status = 'FINISHED'"), at_most):
        seen += 1
        config_hash = run.data.tags.get("config_hash", "")
        if config_hash in hashes and config_hash not in found:
            found[config_hash] = _to_result(run, config_hash)
            if len(found) == len(hashes):
                break
    if seen < at_most:
        return found

    def query(config_hash: str) -> "list[MlflowEntity]":
        same = f"attributes.status = 'FINISHED' and tags.config_hash = '{config_hash}'"
        return list(_search(client, config, same, at_most=1))

    with ThreadPoolExecutor(_AT_ONCE if mlflow_client.is_server(config.uri) else 1) as pool:
        left = sorted(hashes - found.keys())
        for config_hash, runs in zip(left, pool.map(query, left), strict=True):
            if runs:
                found[config_hash] = _to_result(runs[0], config_hash)
    return found


def _histories(client: "MlflowClient", run_ids: Sequence[str], metric: str) -> Iterator[tuple[str, History]]:
    """Every epoch of a metric, by run.

    A database is queried once for all runs, which takes a hundredth of the time of a query per run. MLflow's
    client has no such call for servers, so several requests are sent concurrently.
    """
    store = client._tracking_client.store
    if hasattr(store, "get_metric_history_bulk"):
        found: dict[str, History] = {run_id: {} for run_id in run_ids}
        for point in store.get_metric_history_bulk(list(run_ids), metric, max_results=2**31 - 1):
            found[point.run_id][point.step] = point.value
        yield from found.items()
        return

    def query(run_id: str) -> History:
        return {point.step: point.value for point in client.get_metric_history(run_id, metric)}

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from zip(run_ids, pool.map(query, run_ids), strict=True)


def _to_record(run: "MlflowEntity") -> Record:
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


def _to_result(run: "MlflowEntity", config_hash: str) -> Result:
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


def _find(client: "MlflowClient", prefix: str) -> str:
    """The one run of all experiments whose id starts so."""
    if len(prefix) == 32 and mlflow_client.is_there(client, prefix):
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

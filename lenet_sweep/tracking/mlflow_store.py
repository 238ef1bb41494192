"""The store of `tracking=mlflow` and `tracking=server`: `base.Store` over MLflow's client.

What a run logs goes to its output folder first. A server that dies therefore costs no number: training
continues, and `recovery` sends what is missing, with its true times, when the run ends or with any later
command. Sending anything twice leaves it there once.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lenet_sweep.config.schema import MlflowConfig
from lenet_sweep.errors import ConfigError, TrackingError
from lenet_sweep.storage.records import Record
from lenet_sweep.storage.result import Result
from lenet_sweep.tracking import mlflow_client, mlflow_page, mlflow_query, processes
from lenet_sweep.tracking.base import Metrics
from lenet_sweep.tracking.mlflow_run import MlflowRun, Registration

if TYPE_CHECKING:
    from mlflow import MlflowClient


class MlflowStore:
    """Implements `base.Store`; `config` says which MLflow tracking URI and which experiment."""

    def __init__(self, config: MlflowConfig) -> None:
        self.config = config

    @property
    def name(self) -> str:
        return f"{self.config.uri} {self.config.experiment}"

    def check(self) -> None:
        mlflow_client.check(self.config)

    def open_run(
        self, folder: Path, name: str, tags: dict[str, str], start_ms: int, run_id: str | None = None
    ) -> MlflowRun:
        uri, experiment = mlflow_client.absolute(self.config.uri), self.config.experiment
        registration = Registration(uri, experiment, name, tags | processes.tags(), start_ms, run_id)
        run = MlflowRun(registration, folder)
        run.begin()
        return run

    def finished(self, hashes: Collection[str]) -> dict[str, Result]:
        if not mlflow_client.exists(self.config.uri):
            return {}
        try:
            return mlflow_query.finished(self._connect(), self.config, frozenset(hashes))
        except mlflow_client.store_errors() as error:
            raise TrackingError(
                f"tracking.uri={self.config.uri!r}: {mlflow_client.first_line(error)}"
            ) from error

    def close_stale_runs(self) -> list[str]:
        return mlflow_query.close_stale_runs(self.config) if mlflow_client.exists(self.config.uri) else []

    def latest_sweep(self) -> str | None:
        return mlflow_query.latest_sweep(self.config)

    def find(self, name: str) -> tuple[str, str]:
        sweeps = mlflow_query.sweeps(self.config, name)
        if len(sweeps) == 1:
            return sweeps[0], ""
        if sweeps:
            raise ConfigError(f"{name!r}: {len(sweeps)} sweeps start like this: {', '.join(sweeps[:5])}")
        if not set(name) <= set("0123456789abcdef"):
            raise ConfigError(f"{name!r}: is neither a folder, nor the id of a sweep or a run, nor its start")
        return "", mlflow_query.find_run(self.config, name)

    def check_filter(self, where: str) -> None:
        pass  # MLflow checks the filter itself

    def records(
        self, metrics: Sequence[str], *, sweep_id: str = "", run_ids: Sequence[str] = (), where: str = ""
    ) -> list[Record]:
        if not sweep_id and not run_ids:
            return mlflow_query.records(self.config, where, metrics)
        found = []
        if sweep_id:
            conditions = [mlflow_query.sweep_filter(sweep_id), *([where] if where else [])]
            found += mlflow_query.records(self.config, " and ".join(conditions), metrics)
        return found + mlflow_query.records_of(self.config, run_ids, metrics, where)

    def fetch(self, name: str, folder: Path, files: Iterable[str]) -> tuple[str, Metrics]:
        return mlflow_query.fetch(self.config, name, folder, files)

    def attach_report(self, run_id: str, sweep_id: str, report: Path, answer: str) -> str | None:
        return mlflow_page.attach_report(self.config, run_id, sweep_id, report, answer)

    def open_command(self, name: str, overrides: Iterable[str]) -> str:
        return mlflow_page.ui_command(name, overrides)

    def _connect(self) -> "MlflowClient":
        return mlflow_client.connect(self.config.uri)

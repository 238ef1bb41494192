"""One run in an MLflow store: created or resumed, logged to, and closed.

Calls never raise because of a server that is down. What could not be sent is sent when the run ends, or by
`recovery`. Params, metrics and artifacts that are sent twice are stored once.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lenet_sweep.errors import TrackingError
from lenet_sweep.paths import write_atomic
from lenet_sweep.storage import metrics_file
from lenet_sweep.storage.records import PARAM_LENGTH, params
from lenet_sweep.storage.result import Result
from lenet_sweep.tracking import mlflow_client, mlflow_page, processes
from lenet_sweep.tracking.mlflow_client import NOTE

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)


_BATCH = 1000  # metrics per call, MLflow's limit
_DESCRIBED = ("train/loss", "train/acc", "val/acc", "test/acc")  # metrics in a run's description
_RETRY_S = 30  # time after a failed call in which no other is made


@dataclass(frozen=True)
class Registration:
    """The identity of a run in its store, as stored in `tracking.json` in its folder."""

    uri: str
    experiment: str
    name: str
    tags: dict[str, str]
    start_ms: int
    run_id: str | None  # None: the store was unreachable, so the run has not been created yet


class MlflowRun:
    """Implements `base.RunLogger` for the run in `folder`; `begin` must be called first."""

    def __init__(self, registration: Registration, folder: Path) -> None:
        self.run_id = registration.run_id
        self.uri = registration.uri
        self._registration = registration
        self._folder = folder
        self._experiment_id = ""
        self._complete = False  # the store has every metric that was logged
        self._retry_at = 0.0

    def begin(self) -> None:
        """Create the run, or mark it as running again; write tracking.json in both cases."""
        registration = self._registration
        try:
            client = mlflow_client.connect(registration.uri)
            self._experiment_id = mlflow_client.experiment_id_of(
                client, registration.experiment, registration.uri
            )
            if self.run_id and not mlflow_client.is_there(client, self.run_id):
                self.run_id = None  # it was deleted in the store
            if self.run_id is None:
                run = client.create_run(
                    self._experiment_id, registration.start_ms, registration.tags, registration.name
                )
                self.run_id = run.info.run_id
                self._send_params(client)
                # If the run could only be created after its training, its metrics have not been sent yet.
                self._complete = not (self._folder / "metrics.jsonl").exists()
            else:
                # The process tags come first, or `close_stale_runs` could close the run in between.
                for key, value in registration.tags.items():
                    client.set_tag(self.run_id, key, value)
                client.update_run(self.run_id, "RUNNING")
                if "failure_reason" in client.get_run(self.run_id).data.tags:
                    client.delete_tag(self.run_id, "failure_reason")
        except mlflow_client.store_errors() as error:
            if not self.is_remote():
                raise TrackingError(
                    f"tracking.uri={registration.uri!r}: {mlflow_client.first_line(error)}"
                ) from error
            self._on_store_error(error)
        note = json.dumps(asdict(registration) | {"run_id": self.run_id}, indent=2)
        write_atomic(self._folder / "tracking.json", note + "\n")

    def log(self, epoch: int, metrics: dict[str, float], time_ms: int) -> None:
        from mlflow.entities import Metric

        if self.run_id is None or time.monotonic() < self._retry_at:
            self._complete = False
            return
        try:
            points = [Metric(key, value, time_ms, epoch) for key, value in metrics.items()]
            # An interrupted transaction would stay open and lock SQLite.
            with processes.defer_interrupts():
                mlflow_client.connect(self.uri).log_batch(self.run_id, metrics=points)
        except mlflow_client.store_errors() as error:
            self._on_store_error(error)

    def end(self, result: Result) -> str | None:
        """Send what is missing and close the run; return what went wrong, None if nothing did."""
        from mlflow.entities import RunTag

        if self.run_id is None:
            return "the run could not be created in the store"
        try:
            client = mlflow_client.connect(self.uri)
            if not self._complete:
                self._send_all(client)
            about_sweeps = mlflow_page.note_about_sweeps(client.get_run(self.run_id).data.tags.get(NOTE, ""))
            tags = {NOTE: f"{self._description(result)}\n\n{about_sweeps}".strip()}
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
        except mlflow_client.store_errors() as error:
            return mlflow_client.first_line(error)
        return None

    def locations(self) -> list[str]:
        """Lines of text that tell where the run is."""
        if self.run_id is None:
            return []
        page = [f"{self.uri.rstrip('/')}/{mlflow_page.run_page(self._experiment_id, self.run_id)}"]
        return [f"MLflow run {self.run_id}", *(page if self.is_remote() else [])]

    def _description(self, result: Result) -> str:
        """The run in Markdown: its overrides, its outcome, and the command that reproduces it."""
        assert self.run_id is not None
        registration = self._registration
        sweep_id = registration.tags.get("sweep_id")
        metrics = [f"{name} {result.metrics[name]:.3f}" for name in _DESCRIBED if name in result.metrics]
        outcome = ", ".join([result.status.lower(), *metrics, f"{result.seconds:.1f} s"])
        lines = [
            mlflow_page.inline_code(registration.name)
            + (f" of sweep {mlflow_page.inline_code(sweep_id)}" if sweep_id else ""),
            f"{outcome}{'; **collapsed** (no better than guessing)' if result.collapsed else ''}",
            *([f"reason: {mlflow_page.inline_code(result.reason[:500])}"] if result.reason else []),
            f"reproduce: {mlflow_page.inline_code(f'python -m lenet_sweep reproduce {self.run_id[:8]}')}",
        ]
        return "\n\n".join(lines)

    def _send_all(self, client: "MlflowClient") -> None:
        """Send params and every metric of metrics.jsonl; MLflow ignores what it has already."""
        from mlflow.entities import Metric

        assert self.run_id is not None
        self._send_params(client)
        points = [
            Metric(key, value, record.time_ms, record.metrics.epoch)
            for record in metrics_file.read(self._folder / "metrics.jsonl")
            for key, value in record.named().items()
        ]
        for i in range(0, len(points), _BATCH):
            client.log_batch(self.run_id, metrics=points[i : i + _BATCH])

    def _send_params(self, client: "MlflowClient") -> None:
        from mlflow.entities import Param

        assert self.run_id is not None
        values = yaml.safe_load((self._folder / "config.yaml").read_text(encoding="utf-8"))
        entries = [Param(key, value) for key, value in params(values).items()]
        client.log_batch(self.run_id, params=entries)

    def _on_store_error(self, error: Exception) -> None:
        log.warning(
            "the tracking store is unreachable; everything is in the output folder: %s",
            mlflow_client.first_line(error),
        )
        self._complete = False
        self._retry_at = time.monotonic() + _RETRY_S

    def _end_ms(self) -> int:
        """When the run ended, in milliseconds since 1970; now, if a full disk prevented result.json."""
        written = self._folder / "result.json"
        end_ms = int((written.stat().st_mtime if written.exists() else time.time()) * 1000)
        return max(end_ms, self._registration.start_ms)

    def is_remote(self) -> bool:
        return mlflow_client.is_server(self.uri)


# The parts of an output folder that become artifacts; Hydra's own files and the log do not.
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

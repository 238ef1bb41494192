"""What of a run or sweep is shown on MLflow's pages: addresses, saved views, the report of a sweep."""

import base64
import json
import shlex
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lenet_sweep.config.parsing import is_about_tracking
from lenet_sweep.config.schema import MlflowConfig
from lenet_sweep.errors import ConfigError
from lenet_sweep.tracking import mlflow_client
from lenet_sweep.tracking.mlflow_client import NOTE

_BEST_OF = "This is the best run of sweep "
_BEST_OF_BEFORE = "This run stands for sweep "  # in notes that were written before version 0.1.0


def ui_command(name: str, overrides: Iterable[str]) -> str:
    """The shell command that opens a sweep or run in MLflow; '' is the latest sweep.

    `overrides` are those of the user's command; the ones about tracking are repeated.
    """
    store = [override for override in overrides if is_about_tracking(override)]
    return shlex.join(["python", "-m", "lenet_sweep", "ui", *filter(None, [name]), *store])


def run_page(experiment_id: str, run_id: str) -> str:
    """The address of a run's page, relative to the server's."""
    return f"#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def share_view(config: MlflowConfig, key: str, name: str, state: dict[str, Any]) -> str:
    """Save a view of the experiment's runs for MLflow's pages; return the experiment's id.

    MLflow documents neither where its pages keep a view nor its form (`views.state`): a tag of the
    experiment, whose value is the zipped state in an envelope. A browser test holds both.

    Raises:
        ConfigError: if there is nothing in the store yet, or no such experiment.
        TrackingError: if the store cannot be reached.
    """
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    now = int(time.time() * 1000)
    envelope = {"name": name, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"}
    with mlflow_client.querying(config) as client:
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


def attach_report(config: MlflowConfig, run_id: str, sweep_id: str, report: Path, answer: str) -> str | None:
    """Attach a sweep's report to its best run; return what went wrong, None if nothing did."""
    try:
        client = mlflow_client.connect(config.uri)
        tags = client.get_run(run_id).data.tags
        # A run can also be the best of later sweeps, which did not train it again.
        folder = None if tags.get("sweep_id") == sweep_id else sweep_id
        client.log_artifact(run_id, str(report), folder)
        note = tags.get(NOTE, "")
        best_of = f"{_BEST_OF}{inline_code(sweep_id)}"
        if best_of not in note:
            where = inline_code(f"{folder}/{report.name}" if folder else report.name)
            about = f"{best_of}. Its artifact {where} compares all runs of the sweep."
            client.set_tag(run_id, NOTE, f"{note}\n\n{about}\n\n{inline_code(answer)}".strip())
    except mlflow_client.any_errors() as error:
        return mlflow_client.first_line(error)
    return None


def note_about_sweeps(note: str) -> str:
    """The part of a run's note that is about the sweeps of which it is the best run, '' if there is none."""
    starts = [i for text in (_BEST_OF, _BEST_OF_BEFORE) if (i := note.find(text)) >= 0]
    return note[min(starts) :] if starts else ""


def inline_code(text: str) -> str:
    """Untrusted text as inline code in Markdown: one line, without backticks."""
    return f"`{' '.join(text.replace('`', ' ').split())}`"

"""Sending to a store what it missed while it was out of reach."""

import json
from pathlib import Path

from lenet_sweep.errors import TrackingError
from lenet_sweep.storage import run_index
from lenet_sweep.storage.result import Result, read_result
from lenet_sweep.tracking import mlflow_client
from lenet_sweep.tracking.mlflow_run import MlflowRun, Registration


def sync_all() -> tuple[int, list[str]]:
    """Send every ended run that its store does not have in full; return how many, and what went wrong."""
    synced, problems = 0, []
    for folder in run_index.unsynced():
        result = read_result(folder)
        if result is None:
            continue  # it has not ended, or was killed before it could: it is resumed instead
        with run_index.claim_if_free(result.config_hash) as free:
            if not free:
                continue  # another process trains or syncs it now
            if problem := sync_run(folder, result):
                problems.append(problem)
            else:
                run_index.mark_synced(folder)
                synced += 1
    return synced, problems


def sync_run(folder: Path, result: Result) -> str | None:
    """Send everything that the ended run in `folder` has; return what went wrong, None if nothing did."""
    try:
        values = json.loads((folder / "tracking.json").read_text(encoding="utf-8"))
        run = MlflowRun(Registration(**values), folder)
    except (OSError, ValueError, TypeError) as error:
        return f"{folder}: {error}"
    try:
        if run.is_remote():
            mlflow_client.check_server(run.uri)
        run.begin()
    except TrackingError as error:
        return str(error)
    return run.end(result)

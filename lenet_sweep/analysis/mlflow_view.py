"""A sweep's saved view on MLflow's pages: its runs, columns for what was swept, curves and choices drawn.

The form of the state is that of MLflow's own front end (`ExperimentPageUIState`), which documents it
nowhere: it was read off views saved by hand, and a browser test holds it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenet_sweep.analysis import comparison, selection
from lenet_sweep.errors import ConfigError
from lenet_sweep.storage.manifest import SWEEPS, read_manifest
from lenet_sweep.storage.records import MORE_IS_BETTER, Record
from lenet_sweep.storage.result import read_result
from lenet_sweep.tracking import mlflow_query
from lenet_sweep.tracking.mlflow_store import MlflowStore

Spec = dict[str, Any]

_TABLE = ("test/acc", "val/acc", "train/acc", "train/loss")
_CURVES = ("test/acc", "val/acc", "train/acc", "train/loss")
_MOST = 100  # runs that a chart draws, the first of the table
_MOST_NAMED = 80  # runs in a filter that names each: MLflow keeps no longer ones in a view
_AXES = 6  # choices beside each other in parallel coordinates


@dataclass(frozen=True)
class MlflowPage:
    """What MLflow's pages are to show: one run, or `runs`, which MLflow's filter `condition` selects."""

    title: str
    runs: tuple[Record, ...] = ()
    condition: str = ""
    run_id: str | None = None


def find_page(name: str | None, store: MlflowStore) -> MlflowPage:
    """The page for `name`, as `selection.select` takes it; without one the latest sweep, or all runs.

    Raises:
        ConfigError: if the name is unknown.
        TrackingError: if the store cannot be reached.
    """
    if name is None:
        latest = store.latest_sweep()
        return _sweep_page(latest, store) if latest else MlflowPage("all runs", tuple(store.records(())))
    folder = Path(name)
    if folder.is_dir():
        result = read_result(folder)
        if result and result.run_id:
            return MlflowPage(result.run_id, run_id=result.run_id)
        if not (folder / "sweep.json").is_file():
            raise ConfigError(f"{name!r}: holds neither a sweep nor a run that was tracked")
        return _sweep_page(folder.absolute().name, store, folder)
    sweep_id, run_id = store.find(name)
    return _sweep_page(sweep_id, store) if sweep_id else MlflowPage(run_id, run_id=run_id)


def _sweep_page(sweep_id: str, store: MlflowStore, folder: Path | None = None) -> MlflowPage:
    """A sweep's runs, with those that were finished before it as far as a filter can name them."""
    runs = selection.of_sweep(sweep_id, store, "", (), folder).runs
    if not runs:
        raise ConfigError(f"{sweep_id!r}: no run of this sweep is in {store.config.uri}")
    manifest = read_manifest(folder or SWEEPS / Path(sweep_id).name)
    by_id = manifest and manifest.finished_before and len(runs) <= _MOST_NAMED
    named = mlflow_query.runs_filter([run.name for run in runs])
    return MlflowPage(f"sweep {sweep_id}", runs, named if by_id else mlflow_query.sweep_filter(sweep_id))


def view_key(title: str) -> str:
    """The name under which the view of this selection is saved: always the same, so it is kept once."""
    return hashlib.sha256(title.encode()).hexdigest()[:16]


def view_state(runs: Sequence[Record], condition: str) -> Spec:
    """The view of `runs`, which MLflow's filter `condition` selects.

    Best test accuracy first. The columns are the params that differ between the runs, and the final
    metrics.
    """
    swept = comparison.varied(runs)
    held_out = any(run.params.get("data.val_size", "0") != "0" for run in runs)
    measured = [name for name in MORE_IS_BETTER if held_out or not name.startswith("val/")]
    choices = [name for name in swept if name != "seed"] or swept
    return {
        "searchFilter": condition,
        "orderByKey": "metrics.`test/acc`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [
            *(f"params.`{name}`" for name in swept),
            *(f"metrics.`{name}`" for name in _TABLE if name in measured),
        ],
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": None,
        "hideEmptyCharts": True,
        "autoRefreshEnabled": True,
        "isAccordionReordered": True,  # or the page would sort the sections by name
        "compareRunSections": [_section("curves", "Curves"), _section("choices", "Choices")],
        "compareRunCharts": [
            *(_curve(name) for name in _CURVES if name in measured),
            *([_parallel(choices[:_AXES])] if choices else []),
            *(_scatter(name) for name in choices[:_AXES] if _is_numeric(runs, name)),
        ],
    }


def _section(uuid: str, name: str) -> Spec:
    return {"uuid": uuid, "name": name, "display": True, "isReordered": True, "isGenerated": False}


def _chart(kind: str, uuid: str, section: str, **more: Any) -> Spec:
    return {
        "type": kind,
        "uuid": uuid,
        "metricSectionId": section,
        "runsCountToCompare": _MOST,
        "deleted": False,
        "isGenerated": True,  # or the page would add its own chart of the same metric
    } | more


def _curve(metric: str) -> Spec:
    return _chart(
        "LINE",
        f"curve {metric}",
        "curves",
        metricKey=metric,
        selectedMetricKeys=[metric],
        displayName=metric,
        scaleType="log" if metric.endswith("/loss") else "linear",
        xAxisKey="step",
        xAxisScaleType="linear",
        yAxisKey="metric",
        yAxisExpressions=[],
        range={},
        lineSmoothness=0,
        useGlobalXaxisKey=True,
        useGlobalLineSmoothing=True,
    )


def _parallel(choices: Sequence[str]) -> Spec:
    return _chart(
        "PARALLEL",
        "parallel",
        "choices",
        selectedParams=list(choices),
        selectedMetrics=["test/acc"],
        showAllRuns=False,
    )


def _scatter(param: str) -> Spec:
    return _chart(
        "SCATTER",
        f"scatter {param}",
        "choices",
        xaxis={"key": param, "type": "PARAM"},
        yaxis={"key": "test/acc", "type": "METRIC"},
    )


def _is_numeric(runs: Sequence[Record], param: str) -> bool:
    return all(comparison.level(run.params.get(param, "")) < (float("inf"), "") for run in runs)

"""The saved view of a sweep on MLflow's pages: its runs, columns for the swept params, and charts.

The state has the form of MLflow's front end (`ExperimentPageUIState`). It is not documented; it was taken
from views that were saved by hand, and a browser test checks it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenet_sweep.analysis import selection
from lenet_sweep.analysis.comparison import level, varied
from lenet_sweep.errors import ConfigError
from lenet_sweep.storage.manifest import SWEEPS
from lenet_sweep.storage.records import MORE_IS_BETTER, Record
from lenet_sweep.storage.result import read_result
from lenet_sweep.tracking import mlflow_query
from lenet_sweep.tracking.mlflow_store import MlflowStore

Spec = dict[str, Any]

_TABLE = ("test/acc", "val/acc", "train/acc", "train/loss")
_CURVES = ("test/acc", "val/acc", "train/acc", "train/loss")
_CHART_RUNS = 100  # runs in a chart: the first ones of the table
_FILTER_IDS = 80  # run ids in a filter; MLflow does not keep a longer filter in a view
_AXES = 6  # params in the parallel coordinates


@dataclass(frozen=True)
class MlflowPage:
    """The content of a page: the run `run_id`, or the `runs` that MLflow's filter `condition` selects."""

    title: str
    runs: tuple[Record, ...] = ()
    condition: str = ""
    run_id: str | None = None


def find_page(name: str | None, store: MlflowStore) -> MlflowPage:
    """The page for `name`: an id, the start of an id, or a folder.

    Without a name, it is the page of the latest sweep, or of all runs if there is no sweep.

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
            raise ConfigError(f"{name!r}: contains neither a sweep nor a tracked run")
        return _sweep_page(folder.absolute().name, store, folder)
    sweep_id, run_id = store.find(name)
    return _sweep_page(sweep_id, store) if sweep_id else MlflowPage(run_id, run_id=run_id)


def _sweep_page(sweep_id: str, store: MlflowStore, folder: Path | None = None) -> MlflowPage:
    """The runs of a sweep, with those that were finished before it if a filter can list all ids."""
    runs = selection.of_sweep(sweep_id, store, "", (), folder).runs
    if not runs:
        raise ConfigError(f"{sweep_id!r}: {store.config.uri} contains no runs of this sweep")
    manifest = selection.readable_manifest(folder or SWEEPS / Path(sweep_id).name)
    by_id = manifest and manifest.finished_before and len(runs) <= _FILTER_IDS
    ids = mlflow_query.runs_filter([run.name for run in runs])
    return MlflowPage(f"sweep {sweep_id}", runs, ids if by_id else mlflow_query.sweep_filter(sweep_id))


def view_key(title: str) -> str:
    """The name under which a view is saved; it depends on the title alone, so that a view is saved once."""
    return hashlib.sha256(title.encode()).hexdigest()[:16]


def view_state(runs: Sequence[Record], condition: str) -> Spec:
    """The view of the `runs` that MLflow's filter `condition` selects, sorted by test accuracy.

    The columns are the params that differ between the runs, and the final metrics.
    """
    swept = varied(runs)
    held_out = any(run.params.get("data.val_size", "0") != "0" for run in runs)
    metrics = [name for name in MORE_IS_BETTER if held_out or not name.startswith("val/")]
    params = [name for name in swept if name != "seed"] or swept
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
            *(f"metrics.`{name}`" for name in _TABLE if name in metrics),
        ],
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": None,
        "hideEmptyCharts": True,
        "autoRefreshEnabled": True,
        "isAccordionReordered": True,  # otherwise the page sorts the sections by name
        "compareRunSections": [_section("curves", "Curves"), _section("choices", "Choices")],
        "compareRunCharts": [
            *(_curve(name) for name in _CURVES if name in metrics),
            *([_parallel(params[:_AXES])] if params else []),
            *(_scatter(name) for name in params[:_AXES] if _is_numeric(runs, name)),
        ],
    }


def _section(uuid: str, name: str) -> Spec:
    return {"uuid": uuid, "name": name, "display": True, "isReordered": True, "isGenerated": False}


def _chart(kind: str, uuid: str, section: str, **more: Any) -> Spec:
    return {
        "type": kind,
        "uuid": uuid,
        "metricSectionId": section,
        "runsCountToCompare": _CHART_RUNS,
        "deleted": False,
        "isGenerated": True,  # otherwise the page adds its own chart of the same metric
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


def _parallel(params: Sequence[str]) -> Spec:
    return _chart(
        "PARALLEL",
        "parallel",
        "choices",
        selectedParams=list(params),
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
    return all(level(run.params.get(param, "")) < (float("inf"), "") for run in runs)

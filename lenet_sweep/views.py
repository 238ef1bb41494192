"""A sweep's saved view on MLflow's pages: its runs, columns for what was swept, curves and choices drawn.

The form of the state is that of MLflow's own front end (`ExperimentPageUIState`), which documents it
nowhere: it was read off views saved by hand, and a browser test holds it.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from lenet_sweep import comparison
from lenet_sweep.records import MORE_IS_BETTER, Record

Spec = dict[str, Any]

_TABLE = ("test/acc", "val/acc", "train/acc", "train/loss")
_CURVES = ("test/acc", "val/acc", "train/acc", "train/loss")
_MOST = 100  # runs that a chart draws, the first of the table
_AXES = 6  # choices beside each other in parallel coordinates


def key(title: str) -> str:
    """The name under which the view of this selection is saved: always the same, so it is kept once."""
    return hashlib.sha256(title.encode()).hexdigest()[:16]


def state(runs: Sequence[Record], condition: str) -> Spec:
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

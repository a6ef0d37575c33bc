"""A prepared view of a sweep in MLflow's pages: its columns, order and charts, and the link that opens it.

MLflow keeps a shared view as a tag of the experiment, as JSON; the link names the tag. Nothing of it is needed to read
the runs, so a version of MLflow that knows no such view shows its own.
"""

from __future__ import annotations

import json
from typing import Any

from scaling_ray.tracking.database import database_file
from scaling_ray.tracking.ledger import shown_uri

VIEW_TAG = "mlflow.sharedViewState."
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
"""Says that runs train models: without it MLflow may file them under evaluations of language models."""
LARGEST_TAG = 5000
"""Characters that the value of an experiment's tag may have."""

_COLUMNS = (
    *("metrics.`test_loss`", "metrics.`gain_over_gene_mean`", "metrics.`gain_over_gaussian`"),
    *("metrics.`cells_per_second`", "params.`params`", "params.`cells`", "params.`seed`", "params.`lr`"),
    *("params.`width`", "tags.`verdict`", "tags.`failure`"),
)
_FIRST_COLUMNS = tuple(f"attributes.`{name}`" for name in ("Run Name", "Created", "Duration"))
_SECTION = "sweep"


def view_of(key: str, name: str) -> str:
    """The view of the sweep of a key, as the value of the experiment's tag."""
    view = {
        "searchFilter": f"tags.`scaling_ray.sweep` = '{key}'",
        "orderByKey": "metrics.`test_loss`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(_COLUMNS),
        "columnOrder": [*_FIRST_COLUMNS, *_COLUMNS],
        "columnWidths": dict.fromkeys(_COLUMNS, 120),
        # else sections are sorted by name, and the prepared charts come last
        "isAccordionReordered": True,
        "runsHiddenMode": "SHOW_ALL",
        "hideEmptyCharts": False,
        "compareRunSections": [
            {"uuid": _SECTION, "name": name, "display": True, "isReordered": True, "deleted": False}
        ],
        "compareRunCharts": [
            _scatter("loss against parameters", "params"),
            _scatter("loss against training cells", "cells"),
            _curve("validation loss against cells seen", "curve/val_loss"),
            _curve("training loss against cells seen", "curve/train_loss"),
        ],
    }
    text = json.dumps(view, separators=(",", ":"))
    if len(text) > LARGEST_TAG:
        raise ValueError(f"a view of {len(text)} characters is more than a tag of an experiment may have")
    return text


def _card(kind: str, title: str) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": title.replace(" ", "-"),
        "displayName": title,
        "metricSectionId": _SECTION,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
    }


def _scatter(title: str, param: str) -> dict[str, Any]:
    axes = {"xaxis": {"key": param, "type": "PARAM"}, "yaxis": {"key": "test_loss", "type": "METRIC"}}
    return _card("SCATTER", title) | axes


def _curve(title: str, metric: str) -> dict[str, Any]:
    return _card("LINE", title) | {
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "lineSmoothness": 0,
        "scaleType": "linear",
        "xAxisScaleType": "linear",
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": False,
        "range": {},
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
    }


def link_to(uri: str, experiment: str, key: str) -> str:
    """The address of a sweep's view, on its server or, for a database without one, on one that is started here."""
    server = shown_uri(uri).rstrip("/") if uri.startswith(("http://", "https://")) else "http://127.0.0.1:5000"
    # Without the last part the page opens in its mode for language models, where runs stand under "Evaluation runs".
    return f"{server}/#/experiments/{experiment}/runs?viewStateShareKey={key}&workflowType=machine_learning"


def how_to_open(uri: str, experiment: str, key: str) -> str:
    """One line: the link, after the command that serves a database that has no server."""
    link = link_to(uri, experiment, key)
    if database_file(uri) is None:
        return link
    return f"`mlflow server --backend-store-uri {uri} --port 5000`, then {link}"

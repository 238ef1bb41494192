"""Everything that is shown, against what it looked like when somebody last looked at it.

tests/snapshots/ holds the tables, the report and MLflow's view as text and the plots as PNG files. After a
change of how something looks, record it anew, look at it, and commit it:
`LENET_SWEEP_RECORD=1 python -m pytest tests/test_snapshots.py`.

Texts must be equal. Images must be equal to the pixel with the library versions that drew them
(tests/snapshots/versions.json), and nearly equal with others, which draw letters differently.
"""

import importlib.metadata
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from plotly.offline import get_plotlyjs
from rich.console import Console

from lenet_sweep.analysis import export, figures, mlflow_view, page, tables
from lenet_sweep.analysis.comparison import compare
from lenet_sweep.analysis.selection import Selection
from lenet_sweep.config import parsing
from lenet_sweep.config.schema import Config
from lenet_sweep.inspection import plots
from lenet_sweep.inspection.activations import ActivationStats, ConfidentError
from lenet_sweep.shapes import CLASSES
from lenet_sweep.storage.records import Record
from lenet_sweep.training.metrics import CurvePoint, EpochMetrics

SNAPSHOTS = Path(__file__).parent / "snapshots"
RECORD = os.environ.get("LENET_SWEEP_RECORD") == "1"
VERSIONS = {name: importlib.metadata.version(name) for name in ("matplotlib", "pillow", "numpy")}
NAMES = tuple(f"class {i}" for i in range(CLASSES))


def check_text(name, text):
    path = SNAPSHOTS / name
    if RECORD:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def check_image(path):
    kept = SNAPSHOTS / path.name
    if RECORD:
        kept.write_bytes(path.read_bytes())
        (SNAPSHOTS / "versions.json").write_text(json.dumps(VERSIONS, indent=1) + "\n")
    mine, its = (np.asarray(Image.open(file).convert("RGB"), dtype=int) for file in (path, kept))
    if json.loads((SNAPSHOTS / "versions.json").read_text()) == VERSIONS:
        assert mine.shape == its.shape
        assert (mine == its).all()
    else:
        assert mine.shape == pytest.approx(its.shape, rel=0.05)
        height, width = np.minimum(mine.shape, its.shape)[:2]
        assert np.abs(mine[:height, :width] - its[:height, :width]).mean() < 12


def rounded(value):
    """The same value with nine digits: libraries differ in the last ones."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value


def record(number, accuracy, status="FINISHED", length=4, **params):
    """A run of `length` epochs whose accuracy rises to `accuracy`."""
    history = {e: accuracy * (1 - 0.5**e) for e in range(1, length + 1)}
    return Record(
        name=f"{number:032x}",
        status=status,
        params={"data.name": "mnist", "model.name": "lenet", "optimizer.name": "sgd", **params},
        config_hash=f"{number:016x}",
        reason="the loss became nan in epoch 2, by step 3 of 8" if status == "FAILED" else None,
        collapsed=status == "FINISHED" and accuracy < 0.11,
        seconds=10.0 + number,
        commit="0123456789abcdef",
        start_ms=1_700_000_000_000 + number,
        history={
            "test/acc": history,
            "train/acc": {e: x + 0.01 for e, x in history.items()},
            "train/loss": {e: 2.3 - 2 * x for e, x in history.items()},
            "speed/examples_per_s": dict.fromkeys(history, 20_000.0 + 100 * number),
        },
    )


def sweep():
    """Two learning rates, two numbers of epochs, two models, three seeds; one failed and two collapsed."""
    runs = []
    for lr, bonus in (("0.1", 0.0), ("0.5", 0.08)):
        for epochs in ("4", "8"):
            for model, extra in (("lenet", 0.0), ("lenet_relu_max", 0.05)):
                for seed in range(3):
                    n = len(runs)
                    accuracy = 0.7 + bonus + extra + 0.01 * int(epochs) + 0.004 * seed * (1 + n % 3)
                    collapsed = lr == "0.5" and model == "lenet_relu_max" and seed == 2
                    status = "FAILED" if n == 7 else "KILLED" if n == 2 else "FINISHED"
                    params = {"lr": lr, "epochs": epochs, "model.name": model, "seed": str(seed)}
                    runs.append(record(n, 0.1 if collapsed else accuracy, status, int(epochs), **params))
    return runs


def single_runs():
    """Fifteen learning rates with one run each, more than are shown at first."""
    return [record(n, 0.9 - 0.04 * abs(n - 6), lr=f"{0.01 * 2**n:.4g}", seed="0") for n in range(15)]


COMPARISONS = {"sweep": sweep, "single_runs": single_runs}


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("width", [80, 140])
def test_terminal_shows_the_recorded_table_and_lines(name, width):
    comparison = compare(COMPARISONS[name](), "test/acc")
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(tables.comparison_table(comparison, width, at_most=6))
    for line in [tables.answer(comparison), *tables.comparison_lines(comparison)]:
        console.print(tables.plain(line), soft_wrap=True)
    check_text(f"{name}_{width}.txt", console.file.getvalue())


@pytest.mark.parametrize("metric", ["train/loss", "speed/examples_per_s"])
def test_other_metrics_are_ranked_and_shown_as_recorded(metric):
    check_text(f"{metric.replace('/', '_')}.md", export.comparison_markdown(compare(sweep(), metric)))


def test_files_of_a_comparison_are_the_recorded_ones(tmp_path):
    comparison = compare(sweep(), "test/acc", ["lr", "model"])
    export.write_json(comparison, tmp_path / "t.json")
    export.write_csv(comparison, tmp_path / "t.csv")
    values = rounded(json.loads((tmp_path / "t.json").read_text()))
    header = (tmp_path / "t.csv").read_text().splitlines()[0]
    text = json.dumps({"csv": header, "groups": values["groups"], "notes": values["notes"]}, indent=1)
    check_text("comparison.json", text + "\n")


@pytest.mark.parametrize("name", COMPARISONS)
def test_report_is_the_recorded_one(tmp_path, name):
    runs = COMPARISONS[name]()
    selection = Selection("20260101-120000", tuple(runs), ("python -m lenet_sweep lr=0.1,0.5 -m",))
    page.write(compare(runs, "test/acc"), selection, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8").replace(get_plotlyjs(), "PLOTLY")
    before, data, after = re.split(r'(?<=id="data">)(.*?)(?=</script>)', text, maxsplit=1, flags=re.DOTALL)
    values = json.dumps(rounded(json.loads(data)), indent=None, separators=(",", ":"))
    check_text(f"{name}.html", before + values.replace('},{"', '},\n{"') + after)


def test_view_of_mlflow_is_the_recorded_one():
    state = mlflow_view.view_state(sweep(), "tags.sweep_id = 'x'")
    check_text("view.json", json.dumps(state, indent=1) + "\n")


@pytest.mark.parametrize("name", COMPARISONS)
def test_figures_are_the_recorded_ones(tmp_path, name):
    written = figures.write(compare(COMPARISONS[name](), "test/acc"), tmp_path)
    for path in written:
        if path.suffix == ".png":
            small = path.with_name(f"{name}_{path.name}")
            Image.open(path).convert("RGB").reduce(2).quantize(64).save(small)
            check_image(small)


def pattern(*shape, seed=0):
    """Numbers in [0, 1) that look like noise and are the same everywhere."""
    n = int(np.prod(shape))
    return torch.from_numpy((np.arange(n) * 7919 + seed * 104729) % 1009 / 1009).float().reshape(shape)


def test_plots_of_a_run_are_the_recorded_ones(tmp_path):
    history = [
        EpochMetrics(
            epoch,
            train_loss=2 / epoch,
            train_acc=0.5 + 0.1 * epoch,
            test_loss=2.1 / epoch,
            test_acc=0.45 + 0.1 * epoch,
            val_loss=2.2 / epoch,
            val_acc=0.4 + 0.1 * epoch,
            examples_per_s=1e4,
            epoch_s=1.0,
            curve=tuple(CurvePoint(epoch - 1 + k / 5, 2.5 / (epoch + k / 5), 0.1 * k) for k in range(1, 6)),
        )
        for epoch in range(1, 4)
    ]
    plots.curves(history, "lenet, sgd, lr 0.9", tmp_path / "curves.png")
    unvalidated = [replace(metrics, val_loss=None, val_acc=None) for metrics in history]
    plots.curves(unvalidated, "lenet", tmp_path / "curves_without_validation.png")
    counts = [[(i * 7 + j * 3) % 11 + (80 if i == j else 0) for j in range(10)] for i in range(10)]
    plots.confusion_matrix(counts, NAMES, tmp_path / "confusion_matrix.png")
    kernels = [("conv1", pattern(6, 1, 5, 5) - 0.5), ("conv2", 3 * pattern(16, 6, 5, 5, seed=1) - 1)]
    plots.filters(kernels, tmp_path / "filters.png")
    images = (pattern(3, 28, 28, seed=2) * 255).to(torch.uint8)
    maps = [("act1", pattern(3, 6, 14, 14, seed=3) * 4 - 1), ("act2", pattern(3, 20, 5, 5, seed=4))]
    plots.activations(images, maps, ["Bag", "Ankle boot", "x"], tmp_path / "activations.png")
    errors = [ConfidentError(images[i % 3], i, 9 - i, 0.99 - 0.01 * i) for i in range(7)]
    plots.errors(errors, NAMES, tmp_path / "errors.png")
    plots.errors([], NAMES, tmp_path / "no_errors.png")
    for path in sorted(tmp_path.glob("*.png")):
        check_image(path)


def test_plot_of_activation_statistics_is_the_recorded_one(tmp_path):
    kinds = ("test images", "inverted", "noise")
    stats = [
        ActivationStats(
            kind, {f"act{n}": pattern(400, seed=i + n) * (n + i) for n in (1, 2)}, pattern(50, seed=i)
        )
        for i, kind in enumerate(kinds)
    ]
    plots.activation_stats(stats, "lenet trained on mnist", tmp_path / "activation_stats.png")
    check_image(tmp_path / "activation_stats.png")
    console = Console(file=io.StringIO(), width=100, color_system=None, legacy_windows=False)
    console.print(tables.activation_table(stats))
    check_text("activation_stats.txt", console.file.getvalue())


def test_allowed_values_of_the_config_are_the_recorded_ones():
    """What every field takes, as its error message says it."""

    def lines(section, prefix=""):
        for name, hint in get_type_hints(section, include_extras=True).items():
            options = parsing._options(hint)
            sections = [option for option in options if hasattr(option, "__dataclass_fields__")]
            for option in sections:
                yield from lines(option, f"{prefix}{name}.")
            if not sections:
                yield f"{prefix}{name}: {' or '.join(parsing._describe(option) for option in options)}"

    check_text("config.txt", "\n".join(lines(Config)) + "\n")

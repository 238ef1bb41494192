"""The subcommands: `compare`, `data`, `predict`, `reproduce`, `sync` and `ui`.

Each takes the rest of the command line and returns its exit code (None: 0). Its docstring is its help text.
A user's mistake raises a `LenetSweepError`. Torch and MLflow are imported only by the commands that use them.
"""

import argparse
import inspect
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from lenet_sweep.cli.compose import compose, parse_override
from lenet_sweep.config import parsing
from lenet_sweep.config.schema import Config
from lenet_sweep.errors import ConfigError, OutputError, TrackingError, suggestion
from lenet_sweep.paths import check_writable, default_data_root, write_atomic
from lenet_sweep.tracking.base import Store
from lenet_sweep.tracking.mlflow_store import MlflowStore
from lenet_sweep.tracking.stores import open_store

if TYPE_CHECKING:
    from lenet_sweep.analysis.comparison import Comparison
    from lenet_sweep.analysis.selection import Selection


INTERRUPTED = 130  # a shell reports this code for a process that Ctrl-C ended
_DIFFERENT = 3  # `reproduce` found a difference

_RUN_HELP = "MLflow run id or the start of one, run folder, or config.yaml"


def data(arguments: list[str]) -> None:
    """Fetch and verify datasets ahead of time."""
    from lenet_sweep.datasets import download
    from lenet_sweep.datasets.catalog import DATASETS

    names = tuple(DATASETS)
    parser = _parser(data)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names)} (default: all)")
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        default=Path(default_data_root()),
        help="folder of the datasets, into which missing files are fetched "
        "(default: $LENET_SWEEP_DATA, or data)",
    )
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in names:
            near = suggestion(name, set(names))
            raise ConfigError(f"there is no dataset {name!r}.{near}\nDatasets: {', '.join(names)}.")
    for name in options.names or names:
        print(f"{name}: complete and verified in {download.ensure(name, options.root)}")


def sync(arguments: list[str]) -> None:
    """Send to the tracking store the results that it missed while it could not be
    reached.
    """
    from lenet_sweep.tracking import recovery

    _parser(sync).parse_args(arguments)
    synced, problems = recovery.sync_all()
    print(f"{_count(synced, 'run')} synced")
    if problems:
        raise TrackingError("\n".join(problems))


def reproduce(arguments: list[str]) -> int:
    """Train a run again from its stored config, and report whether its metrics and
    weights are bit-identical. The speed is not compared.

    With overrides (such as lr=0.3), train a variant instead: a new run, tagged
    with its origin.
    """
    parser = _parser(
        reproduce,
        "Exit codes: 0 bit-identical (or the variant was trained), 3 different,\n"
        "2 the run could not be trained again.",
    )
    parser.add_argument("run", metavar="RUN", help=_RUN_HELP)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="overrides of the variant; tracking.uri=... only selects the tracking store of RUN, "
        "data.root=... the folder of the datasets",
    )
    options = parser.parse_args(arguments)
    local = [override for override in options.overrides if _is_local(override)]
    config = compose(local)
    changes = [parse_override(override) for override in options.overrides if override not in local]

    from lenet_sweep.runs.reproduce import load_original, retrain, train_variant

    original = load_original(options.run, open_store(config.tracking))
    if changes:
        train_variant(original, config, changes, tuple(options.overrides))
        return 0
    reproduction = retrain(original, config.data.root)
    print("\n".join(reproduction.lines()))
    return 0 if reproduction.identical else _DIFFERENT


def predict(arguments: list[str]) -> None:
    """Classify images with the network of a run, or plot its activations.

    Accepts PNG, JPEG, GIF, BMP, WEBP, TIFF and PPM files. Each image is converted
    to greyscale, inverted if needed, cropped and centred, as in the run's dataset.
    """
    from lenet_sweep.analysis import export, tables
    from lenet_sweep.inspection import plots
    from lenet_sweep.inspection.predict import activation_stats, classify, feature_maps, load
    from lenet_sweep.runs import progress

    options, config = _predict_arguments(arguments)
    _check_targets(options.activations, options.json, options.ood)
    trained = load(options.run, open_store(config.tracking))
    screen = progress.console()
    if options.images:
        predictions = classify(trained, options.images)
        screen.print(tables.prediction_table(predictions))
        if options.json:
            export.write_predictions(predictions, options.json)
        if options.activations:
            images, layers = feature_maps(trained, predictions)
            names = [path.name[:24] for path in options.images]
            plots.activations(images, layers, names, options.activations)
    if options.ood:
        stats = activation_stats(trained, Path(config.data.root))
        screen.print(tables.activation_table(stats))
        title = f"{trained.config.model.name} trained on {trained.config.data.name}"
        plots.activation_stats(stats, title, options.ood)
    for path in filter(None, (options.activations, options.json, options.ood)):
        screen.print(tables.plain(str(path)), soft_wrap=True)


def _predict_arguments(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    """The options, with the image files as `images`, and the config of this machine's stores and datasets."""
    parser = _parser(
        predict,
        "tracking.uri=... selects the tracking store of RUN, data.root=... the folder of\nthe datasets.",
    )
    parser.add_argument("run", metavar="RUN", help=_RUN_HELP)
    parser.add_argument("words", nargs="*", metavar="IMAGE", help="image files")
    parser.add_argument(
        "--activations", type=Path, metavar="OUT.png", help="plot the activations of the first two layers"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all probabilities to FILE")
    parser.add_argument(
        "--ood",
        type=Path,
        metavar="OUT.png",
        help="plot every layer's activations on test images, inverted images, noise and another dataset",
    )
    options = parser.parse_intermixed_args(arguments)
    overrides = [word for word in options.words if _is_local(word)]
    options.images = [Path(word) for word in options.words if word not in overrides]
    if not options.images and not options.ood:
        raise ConfigError(
            "predict: needs an image file (python -m lenet_sweep predict RUN IMAGE...), or --ood"
        )
    if not options.images and (options.activations or options.json):
        raise ConfigError("--activations and --json: name at least one image file")
    return options, compose(overrides)


def compare(arguments: list[str]) -> None:
    """Compare the settings of a sweep: a table of means over seeds, the best
    setting, and which others are not significantly worse.
    """
    from lenet_sweep.analysis import comparison, selection, tables
    from lenet_sweep.runs import progress
    from lenet_sweep.storage import records

    options = _compare_arguments(arguments)
    comparison.check_metric(options.metric)
    names, store = _names_and_store(options.words, "; see --filter")
    _check_targets(options.csv, options.json, options.markdown, options.html, options.figures)
    writes_all_metrics = options.csv or options.json or options.html or options.figures
    metrics = dict.fromkeys([options.metric, *(records.MORE_IS_BETTER if writes_all_metrics else ())])
    selected = selection.select(names, store, options.filter, list(metrics))
    result = comparison.compare(selected.runs, options.metric, options.by)
    screen = progress.console()
    screen.print(tables.plain(f"{_count(len(selected.runs), 'run')} of {selected.title}"), soft_wrap=True)
    screen.print(tables.comparison_table(result, screen.width))
    for line in [*tables.comparison_lines(result), *_write(options, result, selected)]:
        screen.print(tables.plain(line), soft_wrap=True)


def _write(options: argparse.Namespace, result: "Comparison", selected: "Selection") -> list[str]:
    """Write the files that `options` name; return their paths."""
    from lenet_sweep.analysis import export, page

    written: list[Path] = []
    if options.csv:
        export.write_csv(result, options.csv)
        written.append(options.csv)
    if options.json:
        export.write_json(result, options.json)
        written.append(options.json)
    if options.markdown:
        write_atomic(options.markdown, export.comparison_markdown(result))
        written.append(options.markdown)
    if options.html:
        page.write(result, selected, options.html)
        written.append(options.html)
    if options.figures:
        from lenet_sweep.analysis import figures

        written += figures.write(result, options.figures)
    return [str(path) for path in written]


def _compare_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = _parser(
        compare,
        "tracking.uri=... selects the tracking store. With tracking=none, SWEEP is a folder\n"
        "or its name in outputs/sweeps.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="SWEEP",
        help="ids or folders of sweeps or runs, or starts of ids (default: the latest sweep)",
    )
    parser.add_argument(
        "--by",
        nargs="+",
        metavar="KEY",
        help="config keys that make up a setting, such as lr (default: all keys that differ, except seed)",
    )
    parser.add_argument("--metric", default="test/acc", help="metric to compare (default: test/acc)")
    parser.add_argument(
        "--filter", help="compare only runs that match this MLflow filter, such as \"params.lr = '0.1'\""
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table to FILE, with all digits")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table and all runs to FILE")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the answer and the table to FILE"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report with charts to FILE")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write the charts to DIR as PNG and SVG")
    options = parser.parse_intermixed_args(arguments)
    by = [key for word in options.by or [] for key in word.split(",") if key]
    options.words += [word for word in by if "=" in word]
    options.by = [word for word in by if "=" not in word] or None
    return options


def ui(arguments: list[str]) -> int:
    """Open a sweep in MLflow's web pages: its runs, what was swept, and curves.
    Ctrl-C stops the server.
    """
    from lenet_sweep.analysis import mlflow_server
    from lenet_sweep.runs import progress

    parser = _parser(
        ui,
        "tracking.uri=... selects the tracking store. If the store is a server, only the\nbrowser is opened.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="SWEEP",
        help="id or folder of a sweep or run, or the start of an id (default: the latest sweep)",
    )
    parser.add_argument(
        "--port",
        type=_port,
        help=f"port of the server (default: {mlflow_server.PORT}, or the next free one)",
    )
    parser.add_argument("--no-browser", action="store_true", help="print the address without opening it")
    options = parser.parse_intermixed_args(arguments)
    names, store = _names_and_store(options.words)
    if len(names) > 1:
        raise ConfigError(f"{' '.join(names)}: ui opens one sweep or run; give only one")
    if not isinstance(store, MlflowStore):
        raise ConfigError("ui: needs MLflow; with tracking=none, open the report.html of a sweep")
    if hasattr(signal, "SIGHUP"):  # closing the terminal must stop the server, too
        signal.signal(signal.SIGHUP, raise_interrupt)
    name = names[0] if names else None
    try:
        mlflow_server.run(name, store, options.port, not options.no_browser, progress.say)
    except KeyboardInterrupt:  # before the page was opened
        return INTERRUPTED
    return 0


def _count(number: int, noun: str) -> str:
    """'1 run' or '3 runs'."""
    return f"{number} {noun}{'s' * (number != 1)}"


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; use a number from 1 to 65535")
    return int(text)


def _parser(command: Callable[[list[str]], object], epilog: str = "") -> argparse.ArgumentParser:
    """A parser whose help shows the command's docstring and `epilog` with their own line breaks."""
    return argparse.ArgumentParser(
        f"python -m lenet_sweep {command.__name__}",
        description=inspect.cleandoc(command.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=epilog,
    )


def _names_and_store(words: list[str], hint: str = "") -> tuple[list[str], Store]:
    """Split words into names of sweeps or runs and tracking overrides; open the store of the overrides.

    Raises:
        ConfigError: for any other override; the message ends with `hint`.
    """
    overrides = [word for word in words if "=" in word]
    for override in overrides:
        if not parsing.is_about_tracking(override):
            raise ConfigError(f"{override}: only tracking=... and tracking.uri=... can be set here{hint}")
    names = [word for word in words if word not in overrides]
    return names, open_store(compose(overrides).tracking)


def _is_local(word: str) -> bool:
    """Whether an override only says where runs or datasets are, so that the stored config stays as it is."""
    return bool(re.match(r"(tracking[\w.]*|data\.root)=", word))


def _check_targets(*files: Path | None) -> None:
    """Refuse output files that cannot be written before the work starts.

    Raises:
        OutputError: naming the folder.
    """
    for file in filter(None, files):
        if not file.parent.is_dir():
            raise OutputError(f"{file}: the folder {file.parent} does not exist")
        check_writable(file.parent)


def raise_interrupt(signum: int, frame: FrameType | None) -> None:
    """Handle a signal as Python handles Ctrl-C, so that a run saves its state and records its status."""
    raise KeyboardInterrupt


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "compare": compare,
    "data": data,
    "predict": predict,
    "reproduce": reproduce,
    "sync": sync,
    "ui": ui,
}

"""TODO cli.commands."""

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
from lenet_sweep.tracking.mlflow_store import MlflowStore
from lenet_sweep.tracking.stores import open_store

if TYPE_CHECKING:
    from lenet_sweep.analysis.comparison import Comparison
    from lenet_sweep.analysis.selection import Selection


_DIFFERENT = 3
INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended


def data(arguments: list[str]) -> None:
    """Fetch and verify datasets."""
    from lenet_sweep.datasets import download
    from lenet_sweep.datasets.catalog import DATASETS

    parser = argparse.ArgumentParser(
        "python -m lenet_sweep data", description="Fetch and verify datasets ahead of time."
    )
    names = tuple(DATASETS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names)} (default: all)")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(default_data_root()),
        help="the folder to look in and to fetch into (default: $LENET_SWEEP_DATA, or data)",
    )
    chosen = parser.parse_args(arguments)
    for name in chosen.names:
        if name not in names:
            near = suggestion(name, set(names))
            raise ConfigError(f"there is no dataset {name!r}.{near}\nDatasets: {', '.join(names)}.")
    for name in chosen.names or names:
        print(f"{name}: complete and verified in {download.ensure(name, chosen.root)}")


def sync(arguments: list[str]) -> None:
    """Send to the tracking store what it did not get while it was out of reach."""
    from lenet_sweep.tracking import recovery

    argparse.ArgumentParser("python -m lenet_sweep sync", description=sync.__doc__).parse_args(arguments)
    sent, problems = recovery.sync_all()
    print(f"{sent} runs sent in full")
    if problems:
        raise TrackingError("\n".join(problems))


def reproduce(arguments: list[str]) -> int:
    """Train a run again from its stored config, and tell whether every bit is the same.

    With overrides (lr=0.3), train a variant of it instead: a new run, tagged with its origin.
    """
    parser = argparse.ArgumentParser(
        "python -m lenet_sweep reproduce",
        description=inspect.cleandoc(reproduce.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 identical (or the variant was trained), 3 different, 2 it could not be tried.",
    )
    parser.add_argument(
        "run", metavar="RUN", help="an MLflow run id or its start, a folder, or a config.yaml"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="tracking.uri=... says where RUN is"
    )
    chosen = parser.parse_args(arguments)
    local = [text for text in chosen.overrides if re.match(r"tracking\b|data\.root=", text)]
    here = compose(local)
    changes = [parse_override(text) for text in chosen.overrides if text not in local]

    from lenet_sweep.runs.reproduce import again, find, variant

    original = find(chosen.run, open_store(here.tracking))
    if changes:
        variant(original, here, changes, tuple(chosen.overrides))
        return 0
    verdict = again(original, here.data.root)
    print("\n".join(verdict.lines()))
    return 0 if verdict.identical else _DIFFERENT


def predict(arguments: list[str]) -> None:
    """Classify pictures with a run's network, or look at what pictures set off inside it.

    Any PNG, JPEG, GIF, BMP, WEBP, TIFF or PPM file: it is turned grey, inverted where needed, cropped
    and centred as the run's dataset is.
    """
    from lenet_sweep.analysis import export, tables
    from lenet_sweep.inspection import plots
    from lenet_sweep.inspection.predict import activation_stats, classify, feature_maps, load
    from lenet_sweep.runs import progress

    given, here = _predict_arguments(arguments)
    _check_targets(given.activations, given.json, given.ood)
    trained = load(given.run, open_store(here.tracking))
    screen = progress.console()
    if given.images:
        found = classify(trained, given.images)
        screen.print(tables.prediction_table(found))
        if given.json:
            export.write_predictions(found, given.json)
        if given.activations:
            images, layers = feature_maps(trained, found)
            plots.activations(images, layers, [path.name[:24] for path in given.images], given.activations)
    if given.ood:
        reactions = activation_stats(trained, Path(here.data.root))
        screen.print(tables.activation_table(reactions))
        plots.activation_stats(
            reactions, f"{trained.config.model.name} trained on {trained.config.data.name}", given.ood
        )
    for path in filter(None, (given.activations, given.json, given.ood)):
        screen.print(tables.plain(str(path)), soft_wrap=True)


def _predict_arguments(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(
        "python -m lenet_sweep predict",
        description=inspect.cleandoc(predict.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="tracking.uri=... says where RUN is, data.root=... where datasets are.",
    )
    parser.add_argument(
        "run", metavar="RUN", help="an MLflow run id or its start, a folder, or a config.yaml"
    )
    parser.add_argument("words", nargs="*", metavar="IMAGE", help="picture files")
    parser.add_argument(
        "--activations", type=Path, metavar="OUT.png", help="draw the first two layers' activations"
    )
    parser.add_argument("--json", type=Path, metavar="F", help="write all probabilities to F")
    parser.add_argument(
        "--ood",
        type=Path,
        metavar="OUT.png",
        help="draw what test pictures, inverted ones, noise and another dataset's set off in every layer",
    )
    given = parser.parse_intermixed_args(arguments)
    overrides = [word for word in given.words if re.match(r"(tracking[\w.]*|data\.root)=", word)]
    given.images = [Path(word) for word in given.words if word not in overrides]
    if not given.images and not given.ood:
        raise ConfigError(
            "predict: needs a picture file (python -m lenet_sweep predict RUN IMAGE...), or --ood"
        )
    if not given.images and (given.activations or given.json):
        raise ConfigError("--activations and --json: are about picture files; name at least one")
    return given, compose(overrides)


def compare(arguments: list[str]) -> None:
    """Compare the settings of a sweep over their seeds: which is best, and which cannot be told from it?"""
    from lenet_sweep.analysis import comparison, selection, tables
    from lenet_sweep.runs import progress
    from lenet_sweep.storage import records

    given = _compare_arguments(arguments)
    comparison.check_metric(given.metric)
    overrides = [word for word in given.words if "=" in word]
    if strange := [word for word in overrides if not parsing.is_about_tracking(word)]:
        raise ConfigError(
            f"{strange[0]}: only tracking=... and tracking.uri=... can be set here; see --filter"
        )
    _check_targets(given.csv, given.json, given.markdown, given.html, given.figures)
    names = [word for word in given.words if word not in overrides]
    everything = given.csv or given.json or given.html or given.figures
    metrics = dict.fromkeys([given.metric, *(records.MORE_IS_BETTER if everything else ())])
    chosen = selection.select(names, open_store(compose(overrides).tracking), given.filter, list(metrics))
    result = comparison.compare(chosen.runs, given.metric, given.by)
    screen = progress.console()
    screen.print(tables.plain(f"{len(chosen.runs)} runs of {chosen.title}"), soft_wrap=True)
    screen.print(tables.comparison_table(result, screen.width))
    for line in [*tables.comparison_lines(result), *_write(given, result, chosen)]:
        screen.print(tables.plain(line), soft_wrap=True)


def _check_targets(*files: Path | None) -> None:
    """Refuse files that could not be written, before there is something to write.

    Raises:
        OutputError: naming the folder.
    """
    for file in filter(None, files):
        if not file.parent.is_dir():
            raise OutputError(f"{file}: there is no folder {file.parent}")
        check_writable(file.parent)


def _write(given: argparse.Namespace, result: "Comparison", chosen: "Selection") -> list[str]:
    """Write the files that were asked for; return where they are."""
    from lenet_sweep.analysis import export, page

    written: list[Path] = []
    if given.csv:
        export.write_csv(result, given.csv)
        written.append(given.csv)
    if given.json:
        export.write_json(result, given.json)
        written.append(given.json)
    if given.markdown:
        write_atomic(given.markdown, export.comparison_markdown(result))
        written.append(given.markdown)
    if given.html:
        page.write(result, chosen, given.html)
        written.append(given.html)
    if given.figures:
        from lenet_sweep.analysis import figures

        written += figures.write(result, given.figures)
    return [str(path) for path in written]


def _compare_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m lenet_sweep compare",
        description=inspect.cleandoc(compare.__doc__ or ""),
        epilog="tracking.uri=... says which store; with tracking=none, SWEEP is a folder.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="SWEEP",
        help="ids or folders of sweeps or runs, or their start (default: the latest sweep)",
    )
    parser.add_argument("--by", nargs="+", metavar="KEY", help="what to group by (default: all that differs)")
    parser.add_argument("--metric", default="test/acc", help="default: test/acc")
    parser.add_argument("--filter", help="only runs that MLflow's filter selects: \"params.lr = '0.1'\"")
    parser.add_argument("--csv", type=Path, metavar="F", help="write the table to F, with all digits")
    parser.add_argument("--json", type=Path, metavar="F", help="write table and runs to F")
    parser.add_argument("--markdown", type=Path, metavar="F", help="write the answer and the table to F")
    parser.add_argument("--html", type=Path, metavar="F", help="write a page with pictures to F")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write PNG and SVG pictures to DIR")
    given = parser.parse_intermixed_args(arguments)
    by = [key for word in given.by or [] for key in word.split(",") if key]
    given.words += [word for word in by if "=" in word]
    given.by = [word for word in by if "=" not in word] or None
    return given


def ui(arguments: list[str]) -> int:
    """Open MLflow's pages on a sweep: its runs, what was swept, curves. Ctrl-C ends the server."""
    from lenet_sweep.analysis import mlflow_server
    from lenet_sweep.runs import progress

    parser = argparse.ArgumentParser(
        "python -m lenet_sweep ui",
        description=inspect.cleandoc(ui.__doc__ or ""),
        epilog="tracking.uri=... says which store; one that is a server already is only opened.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="SWEEP",
        help="a sweep's or run's id or folder, or the start of an id (default: the latest sweep)",
    )
    parser.add_argument(
        "--port", type=_port, help=f"of the server (default: {mlflow_server.PORT}, or a free one after it)"
    )
    parser.add_argument("--no-browser", action="store_true", help="only print the page's address")
    given = parser.parse_intermixed_args(arguments)
    overrides = [word for word in given.words if parsing.is_about_tracking(word)]
    names = [word for word in given.words if word not in overrides]
    if len(names) > 1:
        raise ConfigError(f"{' '.join(names)}: the pages open on one sweep or run; name one")
    if strange := [word for word in names if "=" in word]:
        raise ConfigError(f"{strange[0]}: only tracking=... can be set here")
    store = open_store(compose(overrides).tracking)
    if not isinstance(store, MlflowStore):
        raise ConfigError("ui: needs MLflow; with tracking=none, open the report.html of a sweep")
    if hasattr(signal, "SIGHUP"):  # a terminal that is closed must not leave the server behind
        signal.signal(signal.SIGHUP, raise_interrupt)
    try:
        mlflow_server.run(names[0] if names else None, store, given.port, not given.no_browser, progress.say)
    except KeyboardInterrupt:  # before there was a page
        return INTERRUPTED
    return 0


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 1 to 65535")
    return int(text)


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "compare": compare,
    "data": data,
    "predict": predict,
    "reproduce": reproduce,
    "sync": sync,
    "ui": ui,
}


def raise_interrupt(signum: int, frame: FrameType | None) -> None:
    """SIGTERM ends a run as Ctrl-C does: in order, with its status recorded."""
    raise KeyboardInterrupt

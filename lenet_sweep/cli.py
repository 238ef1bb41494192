"""The command line: `compare`, `data`, `predict`, `reproduce`, `sync`, `ui` are our own, all else is Hydra's.

Hydra composes the config and makes the output folder, and `task` hands both to `run`. Torch and
mlflow are imported only when a run starts, so that --help, --cfg and completion answer at once.

Exit codes: 0 all well; 1 a run failed; 2 a mistake in the command or config, nothing was started;
3 `reproduce` found other numbers; 130 interrupted.
"""

import argparse
import atexit
import gc
import inspect
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lenet_sweep import config as configs
from lenet_sweep.config import Config
from lenet_sweep.errors import ConfigError, LenetSweepError, OutputError, TrackingError
from lenet_sweep.paths import check_writable, conf_dir, write_atomic

if TYPE_CHECKING:
    from lenet_sweep.comparison import Comparison
    from lenet_sweep.ledger import Result
    from lenet_sweep.plan import Job
    from lenet_sweep.selection import Selection

_DIFFERENT = 3
_INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended


def main() -> int:
    """Run the command in `sys.argv`; return the exit code."""
    debug = os.environ.get("HYDRA_FULL_ERROR") == "1"
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        debug = True
    signal.signal(signal.SIGTERM, _interrupt)
    # Python ends with a search for cycles among all objects, which takes 1.3 s after torch and mlflow; all
    # the memory goes back to the system anyway.
    atexit.register(gc.freeze)
    try:
        command = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
        if command:
            return command(sys.argv[2:]) or 0
        _hydra()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from where it stopped", file=sys.stderr)
        return _INTERRUPTED
    except (_Carried, LenetSweepError, HydraException, OmegaConfBaseException, OSError) as caught:
        return _tell(_in_words(caught.error if isinstance(caught, _Carried) else caught), debug)
    except ValueError as caught:
        if not _raised_in_hydra(caught):
            raise
        typed = " ".join(sys.argv[1:])
        return _tell(ConfigError(f"{typed}: {caught}; a choice is written as model=lenet"), debug)
    return 0


def _tell(error: LenetSweepError, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def task(composed: DictConfig) -> "Result":
    """One run, or one job of a sweep, in the folder that Hydra made for it."""
    from lenet_sweep.run import run

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    overrides = tuple(hydra_config.overrides.task)
    if hydra_config.mode == RunMode.MULTIRUN:
        config, job = _planned(composed, hydra_config)
        return run(config, folder, overrides, job)
    try:
        return run(to_config(composed), folder, overrides)
    except LenetSweepError as error:
        raise _Carried(error) from error


def to_config(composed: DictConfig) -> Config:
    """What Hydra composed, as checked dataclasses.

    Raises:
        ConfigError: if it asks for something that cannot be.
    """
    if "hydra" in composed:
        composed = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return configs.parse({str(key): value for key, value in values.items()})


class RefuseEarly(Callback):
    """Refuses a single run before Hydra makes a folder for it; a sweep is checked by its sweeper."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        from lenet_sweep import preflight

        try:
            own = to_config(config)
            if own.sweep.dry_run:
                raise ConfigError("sweep.dry_run=true: plans a sweep, so it needs -m")
            if OmegaConf.select(config, "hydra.sweeper.params"):
                raise ConfigError("this experiment is a sweep, so it needs -m")
            preflight.check([own], Path(config.hydra.run.dir), print)
        except (LenetSweepError, OmegaConfBaseException) as error:
            raise _Carried(error) from error


def data(arguments: list[str]) -> None:
    """Fetch and verify datasets."""
    from lenet_sweep import sources

    parser = argparse.ArgumentParser(
        "python -m lenet_sweep data", description="Fetch and verify datasets ahead of time."
    )
    names = tuple(sources.DATASETS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names)} (default: all)")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(configs.default_data_root()),
        help="the folder to look in and to fetch into (default: $LENET_SWEEP_DATA, or data)",
    )
    chosen = parser.parse_args(arguments)
    for name in chosen.names:
        if name not in names:
            near = configs.suggestion(name, set(names))
            raise ConfigError(f"there is no dataset {name!r}.{near}\nDatasets: {', '.join(names)}.")
    for name in chosen.names or names:
        print(f"{name}: complete and verified in {sources.ensure(name, chosen.root)}")


def sync(arguments: list[str]) -> None:
    """Send to the tracking store what it did not get while it was out of reach."""
    from lenet_sweep import tracking

    argparse.ArgumentParser("python -m lenet_sweep sync", description=sync.__doc__).parse_args(arguments)
    sent, problems = tracking.deliver_all()
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
    here = _compose(local)
    changes = [_change(text) for text in chosen.overrides if text not in local]

    from lenet_sweep import reproduce as reproduction

    original = reproduction.find(chosen.run, here.tracking)
    if changes:
        reproduction.variant(original, here, changes, tuple(chosen.overrides))
        return 0
    verdict = reproduction.again(original, here.data.root)
    print("\n".join(verdict.lines()))
    return 0 if verdict.identical else _DIFFERENT


def predict(arguments: list[str]) -> None:
    """Classify pictures with a run's network, or look at what pictures set off inside it.

    Any PNG, JPEG, GIF, BMP, WEBP, TIFF or PPM file: it is turned grey, inverted where needed, cropped
    and centred as the run's dataset is.
    """
    from lenet_sweep import plots, predict, progress, report

    given, here = _predict_arguments(arguments)
    _check_targets(given.activations, given.json, given.elsewhere)
    trained = predict.load(given.run, here.tracking)
    screen = progress.console()
    if given.images:
        found = predict.classify(trained, given.images)
        screen.print(report.prediction_table(found))
        if given.json:
            report.write_predictions(found, given.json)
        if given.activations:
            images, layers = predict.feature_maps(trained, found)
            plots.activations(images, layers, [path.name[:24] for path in given.images], given.activations)
    if given.elsewhere:
        reactions = predict.reactions(trained, Path(here.data.root))
        screen.print(report.reaction_table(reactions))
        plots.reactions(
            reactions, f"{trained.config.model.name} trained on {trained.config.data.name}", given.elsewhere
        )
    for path in filter(None, (given.activations, given.json, given.elsewhere)):
        screen.print(report.plain(str(path)), soft_wrap=True)


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
        "--elsewhere",
        type=Path,
        metavar="OUT.png",
        help="draw what test pictures, inverted ones, noise and another dataset's set off in every layer",
    )
    given = parser.parse_intermixed_args(arguments)
    overrides = [word for word in given.words if re.match(r"(tracking[\w.]*|data\.root)=", word)]
    given.images = [Path(word) for word in given.words if word not in overrides]
    if not given.images and not given.elsewhere:
        raise ConfigError(
            "predict: needs a picture file (python -m lenet_sweep predict RUN IMAGE...), or --elsewhere"
        )
    if not given.images and (given.activations or given.json):
        raise ConfigError("--activations and --json: are about picture files; name at least one")
    return given, _compose(overrides)


def compare(arguments: list[str]) -> None:
    """Compare the settings of a sweep over their seeds: which is best, and which cannot be told from it?"""
    from lenet_sweep import comparison, progress, records, report, selection

    given = _compare_arguments(arguments)
    comparison.check_metric(given.metric)
    overrides = [word for word in given.words if "=" in word]
    if strange := [word for word in overrides if not configs.is_about_tracking(word)]:
        raise ConfigError(
            f"{strange[0]}: only tracking=... and tracking.uri=... can be set here; see --filter"
        )
    _check_targets(given.csv, given.json, given.markdown, given.html, given.figures)
    names = [word for word in given.words if word not in overrides]
    everything = given.csv or given.json or given.html or given.figures
    metrics = dict.fromkeys([given.metric, *(records.MORE_IS_BETTER if everything else ())])
    chosen = selection.select(names, _compose(overrides).tracking, given.filter, list(metrics))
    result = comparison.compare(chosen.runs, given.metric, given.by)
    screen = progress.console()
    screen.print(report.plain(f"{len(chosen.runs)} runs of {chosen.title}"), soft_wrap=True)
    screen.print(report.comparison_table(result, screen.width))
    for line in [*report.comparison_lines(result), *_write(given, result, chosen)]:
        screen.print(report.plain(line), soft_wrap=True)


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
    from lenet_sweep import page, report

    written: list[Path] = []
    if given.csv:
        report.write_csv(result, given.csv)
        written.append(given.csv)
    if given.json:
        report.write_json(result, given.json)
        written.append(given.json)
    if given.markdown:
        write_atomic(given.markdown, report.comparison_markdown(result))
        written.append(given.markdown)
    if given.html:
        page.write(result, chosen, given.html)
        written.append(given.html)
    if given.figures:
        from lenet_sweep import figures

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
    from lenet_sweep import progress
    from lenet_sweep import ui as pages

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
        "--port", type=_port, help=f"of the server (default: {pages.PORT}, or a free one after it)"
    )
    parser.add_argument("--no-browser", action="store_true", help="only print the page's address")
    given = parser.parse_intermixed_args(arguments)
    overrides = [word for word in given.words if configs.is_about_tracking(word)]
    names = [word for word in given.words if word not in overrides]
    if len(names) > 1:
        raise ConfigError(f"{' '.join(names)}: the pages open on one sweep or run; name one")
    if strange := [word for word in names if "=" in word]:
        raise ConfigError(f"{strange[0]}: only tracking=... can be set here")
    store = _compose(overrides).tracking
    if isinstance(store, configs.NoTrackingConfig):
        raise ConfigError("tracking=none: keeps nothing that MLflow could show; see report.html of a sweep")
    if hasattr(signal, "SIGHUP"):  # a terminal that is closed must not leave the server behind
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        pages.run(names[0] if names else None, store, given.port, not given.no_browser, progress.say)
    except KeyboardInterrupt:  # before there was a page
        return _INTERRUPTED
    return 0


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 1 to 65535")
    return int(text)


def _compose(overrides: list[str]) -> Config:
    """The config that these overrides alone make."""
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_config(hydra.compose("config", overrides))


def _change(text: str) -> tuple[str, Any]:
    """One override as a key and its plain value; a choice (model=lenet) as its whole section."""
    override = OverridesParser.create().parse_override(text)
    key = override.key_or_group
    if key not in configs.known_keys():
        raise configs.unknown_key(key)
    section = configs.to_dict(_compose([text])).get(key) if "." not in key else None
    return key, section if isinstance(section, dict) else override.value()


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "compare": compare,
    "data": data,
    "predict": predict,
    "reproduce": reproduce,
    "sync": sync,
    "ui": ui,
}


def _hydra() -> None:
    """Let Hydra read the rest of the command line; its exceptions come through as they are."""
    for word in sys.argv[1:]:
        key = word.lstrip("-").partition("=")[0]
        if word.startswith("-") and key in configs.known_keys():
            raise ConfigError(f"{word}: values are given without dashes: {key}=VALUE")
    # argparse takes only overrides that stand together: `lr=0.1,0.2 -m seed=1` would be refused.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: bool(re.match(r"[^-].*=|~", word)))
    given = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's way to raise errors instead of printing them
    try:
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(task)()
    finally:
        if given is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = given


class _Carried(BaseException):
    """Carries an error through Hydra, which would turn it into a warning (callback) or add to it (task)."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _planned(composed: DictConfig, hydra_config: HydraConf) -> tuple[Config, "Job"]:
    """The job's config and its place in the sweep, both from the plan if our sweeper left one.

    Stock launchers compose a job when it starts; a file edited since then must not change it.
    """
    from lenet_sweep.plan import Job

    folder, number = Path(hydra_config.sweep.dir), int(hydra_config.job.num)
    plan = read_plan(folder)
    if plan is None:
        label = " ".join(hydra_config.overrides.task)
        return to_config(composed), Job(folder.name, number + 1, None, label)
    return configs.parse(plan["jobs"][number]["config"]), planned_job(folder, plan, number)


def read_plan(folder: Path) -> dict[str, Any] | None:
    """What our sweeper wrote into its folder: `jobs`, each with label, colour, overrides and config."""
    plan = folder / "sweep.json"
    if not plan.exists():
        return None
    values = json.loads(plan.read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


def planned_job(folder: Path, plan: dict[str, Any], number: int) -> "Job":
    """The place in the sweep of the job with this number (from 0) in its plan."""
    from lenet_sweep.plan import Job

    planned = plan["jobs"][number]
    return Job(folder.name, number + 1, len(plan["jobs"]), planned["label"], planned.get("colour", ""))


def _in_words(error: Exception) -> LenetSweepError:
    """What went wrong, in terms of what the user typed."""
    if isinstance(error, LenetSweepError):
        return error
    text, cause = str(error), error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_option(str(error.missing_cfg_file), text)
    if isinstance(error, OverrideParseException) and "=" in error.override:
        return ConfigError(
            f"{error.override}: is no KEY=VALUE; a value with spaces or signs needs quotes within quotes, "
            "as in 'data.root=\"~/my data\"'; a list is [A,B]"
        )
    if isinstance(error, OverrideParseException):
        if error.override in configs.known_keys():
            return ConfigError(f"{error.override!r} lacks its value: write {error.override}=VALUE")
        known = {*COMMANDS, *configs.known_keys()}
        return ConfigError(
            f"{error.override!r} is neither a command ({', '.join(COMMANDS)}) nor KEY=VALUE."
            + configs.suggestion(error.override.partition("=")[0], known)
        )
    if ambiguous := re.match(r"Ambiguous value for argument '(.*)'", text):
        return ConfigError(
            f"{ambiguous[1]}: several values are a sweep, which needs -m; for one list, write KEY=[A,B]"
        )
    if missing := re.match(r"Could not override '(\w+)'\. No match in the defaults list", text):
        return ConfigError(f"{missing[1]} is chosen with a + in front: +{missing[1]}=NAME")
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        return configs.unknown_key(cause.full_key)
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return ConfigError(f"{error.full_key}: {text.splitlines()[0]}")
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return OutputError(f"{error.filename or 'input or output'}: {error.strerror or error}")
    detail = f": {str(cause).splitlines()[0]}" if cause and str(cause) else ""
    return ConfigError(" ".join(text.split("\nSee ")[0].splitlines()) + detail)


def _raised_in_hydra(error: BaseException) -> bool:
    """Whether Hydra, not our code, stumbled: it lets some odd overrides through to plain ValueErrors."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("hydra.")


def _unknown_option(path: str, text: str) -> ConfigError:
    """The error for a group's option ('model/sigmod') that there is no file for."""
    group, _, option = path.rpartition("/")
    options = re.findall(r"^\t(?!provider=)(.+)$", text, re.MULTILINE)
    if not group or not options:
        return ConfigError(f"there is no config {path!r}; python -m lenet_sweep --help lists what there is")
    hint = configs.suggestion(option, set(options))
    return ConfigError(f"there is no {group}={option}.{hint}\nOptions of {group}: {', '.join(options)}.")


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """SIGTERM ends a run as Ctrl-C does: in order, with its status recorded."""
    raise KeyboardInterrupt

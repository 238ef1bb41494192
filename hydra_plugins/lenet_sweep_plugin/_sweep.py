"""A sweep from its command line to its table: list the jobs, check them all, plan, launch, report."""

import copy
import functools
import json
import re
import shlex
import sys
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from lenet_sweep import charts, comparison, ledger, plan, preflight, progress, records, report, tracking
from lenet_sweep import config as configs
from lenet_sweep.cli import to_config
from lenet_sweep.comparison import Comparison
from lenet_sweep.config import Config, MlflowConfig, NoTrackingConfig
from lenet_sweep.errors import ConfigError, LenetSweepError, OutputError, RunFailed
from lenet_sweep.ledger import Result
from lenet_sweep.paths import write_atomic
from lenet_sweep.plan import Planned
from lenet_sweep.records import Record
from lenet_sweep.selection import Selection

Job = list[str]  # the overrides of one job

_SHOWN = 20  # settings in the table at the end; `compare` and the report have them all


def sweep(
    arguments: list[str], *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
) -> list[list[JobReturn]]:
    """Run every job that `arguments` span and that is not finished, with the launcher that the config names.

    Raises:
        ConfigError, DataError, DeviceError, OutputError, TrackingError: nothing was started.
        RunFailed: at the end, if any run failed.
    """
    composer = _Composer(hydra_context, config)
    configured = [(tuple(job), composer.compose(job)) for job in composer.expand(arguments)]
    if not configured:
        raise ConfigError(f"{' '.join(arguments)}: spans not a single run")
    if config.hydra.sweep._get_node("subdir")._value() != "${hydra.job.num}":
        raise ConfigError("hydra.sweep.subdir: is fixed, so that no two runs of a sweep share a folder")
    sweep_config = configured[0][1].sweep
    if sweep_config.dry_run:
        _print_plan(plan.make(configured))
        return []

    folder = Path(config.hydra.sweep.dir)
    preflight.check([job_config for _, job_config in configured], folder, print)
    planned = plan.make(configured)
    missing = [job for job in planned if job.action != "skip"]
    if len(missing) < len(planned):
        print(f"{len(planned) - len(missing)} of {len(planned)} runs are finished already")
    returns: list[list[JobReturn]] = []
    if missing:  # what refuses that must leave a folder that is another sweep's alone
        _claim(folder, planned, missing, config)
    try:
        if missing:
            launcher = Plugins.instance().instantiate_launcher(
                hydra_context=hydra_context, task_function=task_function, config=config
            )
            returns.append(list(launcher.launch([list(job.overrides) for job in missing], initial_job_idx=0)))
    finally:
        # Also after Ctrl-C, or when the launcher itself broke.
        _report(planned, missing, folder, returns)
    return returns


class _Composer:
    """Composes a sweep's jobs as Hydra would, but each choice of groups only once.

    Hydra takes 0.1 to 0.3 s to compose a job. But it only then applies the overrides of single values,
    one after the other, so jobs that choose the same groups share all that comes before.
    """

    def __init__(self, hydra_context: HydraContext, config: DictConfig) -> None:
        self._loader = hydra_context.config_loader
        assert isinstance(self._loader, ConfigLoaderImpl)  # the one kind that Hydra has
        self._repository = self._loader.repository
        self._config = config
        self._parser = OverridesParser.create(config_loader=self._loader)
        self._parse = functools.cache(self._parsed)
        self._compose_groups = functools.cache(self._composed)

    def expand(self, arguments: list[str]) -> list[Job]:
        """Hydra's own expansion of lists, choice, range and glob."""
        (jobs,) = BasicSweeper.split_arguments(self._parser.parse_overrides(arguments), max_batch_size=None)
        return jobs

    def compose(self, job: Job) -> Config:
        parsed = [self._parse(text) for text in job]
        groups = tuple(text for text, (_, is_value) in zip(job, parsed, strict=True) if not is_value)
        composed = copy.deepcopy(self._compose_groups(groups))
        ConfigLoaderImpl._apply_overrides_to_config(
            [override for override, is_value in parsed if is_value], composed
        )
        return to_config(composed)

    def _parsed(self, text: str) -> tuple[Override, bool]:
        override = self._parser.parse_override(text)
        return override, self._is_value(override)

    def _composed(self, groups: tuple[str, ...]) -> DictConfig:
        """All but Hydra's own section, which no value of a job depends on; closed to unknown keys."""
        whole = self._loader.load_sweep_config(self._config, list(groups))
        own = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
        OmegaConf.set_struct(own, True)
        return own

    def _is_value(self, override: Override) -> bool:
        """Whether Hydra applies it after the composition; what would change Hydra itself is left to it."""
        if override.is_hydra_override() or override.is_sweep_override():
            return False
        is_section = isinstance(override.value(), dict)
        return is_section or not self._repository.group_exists(override.key_or_group)


def _claim(folder: Path, planned: list[Planned], jobs: list[Planned], config: DictConfig) -> None:
    """Make `folder` this sweep's own by creating its plan, which no other sweep may have."""
    varied = report.varied_keys([job.overrides for job in planned])
    colours = _colours([job.overrides for job in planned])
    values = {
        "command": shlex.join(["python", "-m", "lenet_sweep", *sys.argv[1:]]),
        "jobs": [
            {
                "label": report.label(job.overrides, varied),
                "colour": colours.get(job.overrides, ""),
                "overrides": job.overrides,
                "config_hash": job.config_hash,
                "config": configs.to_dict(job.config),
            }
            for job in jobs
        ],
        # So that a comparison of this sweep has them too.
        "finished_before": [
            {"config_hash": job.config_hash, "run_id": job.result.run_id} for job in planned if job.result
        ],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "sweep.json", "x", encoding="utf-8") as file:
            json.dump(values, file, indent=1)
        write_atomic(folder / "multirun.yaml", OmegaConf.to_yaml(config))
    except FileExistsError as error:
        raise OutputError(f"{folder}: already holds a sweep; choose another hydra.sweep.dir") from error
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error


def _colours(jobs: list[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """A colour for every job's curves, the same for the same learning rate, or else first swept choice."""
    swept = [key for key in report.varied_keys(jobs) if key != "seed"]
    if not swept:
        return {}
    leading = "lr" if "lr" in swept else swept[0]
    values = {job: dict(override.partition("=")[::2] for override in job).get(leading, "") for job in jobs}
    levels = sorted(set(values.values()), key=comparison.level)
    return {job: charts.style(levels.index(value))[0] for job, value in values.items()}


def _print_plan(planned: list[Planned]) -> None:
    varied = report.varied_keys([job.overrides for job in planned])
    for number, job in enumerate(planned, start=1):
        print(f"[{number}/{len(planned)}] {report.label(job.overrides, varied)}: {job.action} ({job.why})")
    counts = {action: sum(job.action == action for job in planned) for action in ("train", "resume", "skip")}
    print(
        f"{counts['train']} runs would be trained, {counts['resume']} resumed, {counts['skip']} skipped; "
        "sweep.dry_run=true starts none"
    )


def _returned(ended: JobReturn | None, job: Planned) -> Result | None:
    """What a job gave back that left nothing in its folder: another's result, or why it has no folder."""
    value = ended._return_value if ended else None
    if isinstance(value, Exception):
        return Result("FAILED", str(value), False, None, job.config_hash, 0.0, {})
    return value if isinstance(value, Result) else None


def _compare(planned: list[Planned], runs: list[Record], folder: Path) -> tuple[Comparison, Selection]:
    """All runs of the sweep: those that it trained in `folder`, and those that were finished before."""
    here = {run.config_hash for run in runs}
    runs += [_before(job) for job in planned if job.result and job.config_hash not in here]
    command = records.read_plan(folder).command
    return comparison.compare(runs, "test/acc"), Selection(folder.name, tuple(runs), (command,))


def _answer(planned: list[Planned], folder: Path, trained: bool) -> None:
    """Show which setting is best, and write the report if anything was `trained` in `folder`."""
    screen = progress.console()
    found, selection = _compare(planned, records.of_sweep(folder) if trained else [], folder)
    if len(found.groups) > 1:
        screen.print(report.comparison_table(found, screen.width, at_most=_SHOWN))
    if trained:
        screen.print(f"output folder {folder.absolute()}", markup=False, soft_wrap=True)
        line = _write_report(found, selection, folder / "report.html", planned[0].config.tracking)
        screen.print(line, markup=False, soft_wrap=True)
    screen.print(report.answer(found), markup=False, soft_wrap=True)


def _write_report(
    found: Comparison, selection: Selection, path: Path, store: MlflowConfig | NoTrackingConfig
) -> str:
    """Write the report into the sweep's folder, and to its best run; say where it is, or what went wrong."""
    from lenet_sweep import page

    try:
        page.write(found, selection, path)
    except OSError as error:
        return f"report.html could not be written: {error.strerror}"
    run_id = _best_run_id(found)
    if isinstance(store, MlflowConfig) and run_id:
        problem = tracking.log_report(store, run_id, path.parent.name, path, report.answer(found))
        if problem:
            return f"report {path} (not tracked: {problem})"
    return f"report {path}"


def _best_run_id(found: Comparison) -> str | None:
    """The tracked id of the best run of the best setting; of any run, if none ended well."""
    sign = 1 if records.MORE_IS_BETTER[found.metric] else -1
    counted = next((group.counted for group in found.groups if group.counted), ())
    best = max(counted, key=lambda run: sign * (run.last(found.metric) or 0.0), default=found.runs[0])
    result = ledger.read_result(Path(best.name))
    return result.run_id if result else (best.name if re.fullmatch("[0-9a-f]{32}", best.name) else None)


def _sweep_of(job: Planned) -> str:
    """The sweep that a job was finished in, or its run's id, or '' if neither is known here."""
    entry = ledger.look_up(job.config_hash)
    if entry and (entry.folder.parent / "sweep.json").is_file():
        return entry.folder.parent.name
    return (job.result.run_id if job.result else None) or ""


def _before(job: Planned) -> Record:
    """A run that was finished before, in another folder: of its metrics the store gave the last."""
    assert job.result is not None
    return Record(
        name=job.result.run_id or job.config_hash,
        status=job.result.status,
        params=records.params(configs.to_dict(job.config)),
        config_hash=job.config_hash,
        collapsed=job.result.collapsed,
        seconds=job.result.seconds,
        history={name: {job.config.epochs: value} for name, value in job.result.metrics.items()},
    )


def _report(
    planned: list[Planned], launched: list[Planned], folder: Path, returns: list[list[JobReturn]]
) -> None:
    """Print every run's result and where everything is.

    Raises:
        RunFailed: if any run failed.
    """
    rows = []
    for job in planned:
        if job.action == "skip":
            rows.append(report.Row(job.overrides, None, job.result))
            continue
        job_folder = folder / str(launched.index(job))
        number = launched.index(job)
        ended = returns[0][number] if returns and number < len(returns[0]) else None
        result = ledger.read_result(job_folder) or _returned(ended, job)
        rows.append(report.Row(job.overrides, job_folder, result))
    screen = progress.console()
    screen.print(report.sweep_table(rows))
    for line in report.failures(rows):
        screen.print(line, markup=False, soft_wrap=True, style="red")
    try:
        _answer(planned, folder, bool(launched))
    except LenetSweepError as error:  # it must not hide what ended the sweep
        screen.print(f"the runs could not be compared: {error}", markup=False, soft_wrap=True)
    name = folder.name if launched else _sweep_of(planned[0])
    if name and isinstance(planned[0].config.tracking, MlflowConfig):
        command = tracking.ui_command(name, planned[0].overrides)
        screen.print(f"curves in the browser: {command}", markup=False, soft_wrap=True)
    failed = sum(row.failed for row in rows)
    if failed and not sys.exc_info()[0]:  # what broke the launcher goes before
        raise RunFailed(f"{failed} of {len(rows)} runs failed")

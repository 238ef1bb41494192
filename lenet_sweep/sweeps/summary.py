"""The output of a sweep: its plan before it starts; table, answer and report after it ends."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lenet_sweep.analysis import charts, tables
from lenet_sweep.analysis.comparison import Comparison, compare, level
from lenet_sweep.analysis.selection import Selection
from lenet_sweep.config import parsing
from lenet_sweep.errors import LenetSweepError, RunFailed
from lenet_sweep.runs import progress
from lenet_sweep.storage import records, run_index
from lenet_sweep.storage.manifest import FinishedRun, JobEntry, Manifest, read_manifest
from lenet_sweep.storage.records import Record
from lenet_sweep.storage.result import Result, read_result
from lenet_sweep.sweeps.plan import Planned
from lenet_sweep.tracking.stores import open_store

_SHOWN = 20  # settings in the table at the end; `compare` and the report list all
_METRIC = "test/acc"  # by which a sweep's settings are ranked; more is better


def to_manifest(command: str, planned: Sequence[Planned], missing: Sequence[Planned]) -> Manifest:
    """The content of sweep.json: the jobs to train, and those that were finished before.

    The latter are part of every comparison of the sweep.
    """
    overrides = [job.overrides for job in planned]
    varied, colours = tables.varied_keys(overrides), _colours(overrides)
    jobs = [
        JobEntry(
            tables.label(job.overrides, varied),
            colours.get(job.overrides, ""),
            job.overrides,
            job.config_hash,
            parsing.to_dict(job.config),
        )
        for job in missing
    ]
    finished = [FinishedRun(job.config_hash, job.result.run_id) for job in planned if job.result]
    return Manifest(command, tuple(jobs), tuple(finished))


def print_plan(planned: Sequence[Planned]) -> None:
    """Print the action for each job (train, resume or skip), and the number of jobs for each action."""
    varied = tables.varied_keys([job.overrides for job in planned])
    for number, job in enumerate(planned, start=1):
        print(f"[{number}/{len(planned)}] {tables.label(job.overrides, varied)}: {job.action} ({job.why})")
    counts = {action: sum(job.action == action for job in planned) for action in ("train", "resume", "skip")}
    print(
        f"{counts['train']} runs would be trained, {counts['resume']} resumed, {counts['skip']} skipped; "
        "nothing was started (sweep.dry_run=true)"
    )


def report_sweep(
    planned: Sequence[Planned], launched: Sequence[Planned], folder: Path, returned: Sequence[object]
) -> None:
    """Print the results of all runs, the answer, and the paths of the outputs.

    `returned` is what the launcher returned for the launched jobs that were started, in order.

    Raises:
        RunFailed: if any run failed.
    """
    rows = _rows(planned, launched, folder, returned)
    screen = progress.console()
    screen.print(tables.sweep_table(rows))
    for line in tables.failures(rows):
        screen.print(line, markup=False, soft_wrap=True, style="red")
    try:
        _print_answer(planned, folder, bool(launched))
    except LenetSweepError as error:  # must not replace the error that ended the sweep
        screen.print(f"the runs could not be compared: {error}", markup=False, soft_wrap=True)
    name = folder.name if launched else _sweep_of(planned[0])
    command = open_store(planned[0].config.tracking).open_command(name, planned[0].overrides)
    if name and command:
        screen.print(f"curves in the browser: {command}", markup=False, soft_wrap=True)
    failed = sum(row.failed for row in rows)
    if failed and not sys.exc_info()[0]:  # an error of the launcher takes precedence
        raise RunFailed(f"{failed} of {len(rows)} runs failed")


def _rows(
    planned: Sequence[Planned], launched: Sequence[Planned], folder: Path, returned: Sequence[object]
) -> list[tables.Row]:
    rows = []
    for job in planned:
        if job.action == "skip":
            rows.append(tables.Row(job.overrides, None, job.result))
            continue
        number = launched.index(job)
        result = read_result(folder / str(number))
        if result is None and number < len(returned):
            result = _without_folder(returned[number], job)
        rows.append(tables.Row(job.overrides, folder / str(number), result))
    return rows


def _without_folder(returned: object, job: Planned) -> Result | None:
    """The result of a job without a result file: that of an equal run, or the error that it raised."""
    if isinstance(returned, Exception):
        return Result("FAILED", str(returned), False, None, job.config_hash, 0.0, {})
    return returned if isinstance(returned, Result) else None


def _print_answer(planned: Sequence[Planned], folder: Path, trained: bool) -> None:
    """Print which setting is best, and write the report if `trained` says that `folder` has new runs."""
    screen = progress.console()
    selection = _select(planned, records.of_sweep(folder) if trained else [], folder)
    comparison = compare(selection.runs, _METRIC)
    if len(comparison.settings) > 1:
        screen.print(tables.comparison_table(comparison, screen.width, at_most=_SHOWN))
    if trained:
        screen.print(f"output folder {folder.absolute()}", markup=False, soft_wrap=True)
        line = _write_report(comparison, selection, folder / "report.html", planned)
        screen.print(line, markup=False, soft_wrap=True)
    screen.print(tables.answer(comparison), markup=False, soft_wrap=True)


def _select(planned: Sequence[Planned], runs: list[Record], folder: Path) -> Selection:
    """All runs of the sweep: `runs`, which it trained in `folder`, and those that were finished before."""
    hashes = {run.config_hash for run in runs}
    runs += [_finished_before(job) for job in planned if job.result and job.config_hash not in hashes]
    manifest = read_manifest(folder)
    return Selection(folder.name, tuple(runs), (manifest.command if manifest else "",))


def _write_report(
    comparison: Comparison, selection: Selection, path: Path, planned: Sequence[Planned]
) -> str:
    """Write the report to `path` and attach it to the best run; return the line to print about it."""
    from lenet_sweep.analysis import page

    try:
        page.write(comparison, selection, path)
    except OSError as error:
        return f"report.html could not be written: {error.strerror}"
    if run_id := _best_run_id(comparison):
        store = open_store(planned[0].config.tracking)
        if problem := store.attach_report(run_id, path.parent.name, path, tables.answer(comparison)):
            return f"report {path} (not attached to its run: {problem})"
    return f"report {path}"


def _best_run_id(comparison: Comparison) -> str | None:
    """The tracked id of the best run of the best setting, or of the first run if none ended well."""
    counted = next((setting.counted for setting in comparison.settings if setting.counted), ())
    best = max(counted, key=lambda run: run.last(_METRIC) or 0.0, default=comparison.runs[0])
    result = read_result(Path(best.name))
    return result.run_id if result else (best.name if re.fullmatch("[0-9a-f]{32}", best.name) else None)


def _sweep_of(job: Planned) -> str:
    """The id of the sweep that finished the job, or else of its run, or '' if neither is known."""
    entry = run_index.look_up(job.config_hash)
    if entry and (entry.folder.parent / "sweep.json").is_file():
        return entry.folder.parent.name
    return (job.result.run_id if job.result else None) or ""


def _finished_before(job: Planned) -> Record:
    """A run that was finished before in another folder; only its final metrics are known."""
    assert job.result is not None
    return Record(
        name=job.result.run_id or job.config_hash,
        status=job.result.status,
        params=records.params(parsing.to_dict(job.config)),
        config_hash=job.config_hash,
        collapsed=job.result.collapsed,
        seconds=job.result.seconds,
        history={name: {job.config.epochs: value} for name, value in job.result.metrics.items()},
    )


def _colours(jobs: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The colour of each job in MLflow: one per learning rate, or per value of the first swept key."""
    swept = [key for key in tables.varied_keys(jobs) if key != "seed"]
    if not swept:
        return {}
    leading = "lr" if "lr" in swept else swept[0]
    values = {job: tables.settings_of(job).get(leading, "") for job in jobs}
    levels = sorted(set(values.values()), key=level)
    return {job: charts.style(levels.index(value))[0] for job, value in values.items()}

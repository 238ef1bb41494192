"""Which runs a comparison is about: from a tracking store, or from the folders of sweeps and runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lenet_sweep import config as configs
from lenet_sweep import ledger, records, tracking
from lenet_sweep.config import MlflowConfig, NoTrackingConfig
from lenet_sweep.errors import ConfigError
from lenet_sweep.records import Record

SWEEPS = Path("outputs") / "sweeps"  # below the folder that the command is run in
_MOST_NAMED = 80  # runs in a filter that names each: MLflow keeps no longer ones in a view


@dataclass(frozen=True)
class Selection:
    """The runs, what they are called together, and the commands that made them, where those are known."""

    title: str
    runs: tuple[Record, ...]
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """What a page of MLflow is to show: one run, or `runs`, which MLflow's filter `condition` selects."""

    title: str
    runs: tuple[Record, ...] = ()
    condition: str = ""
    run_id: str | None = None


def select(
    names: Sequence[str],
    store: MlflowConfig | NoTrackingConfig,
    chosen: str | None,
    metrics: Sequence[str],
) -> Selection:
    """The runs that `names` and the filter `chosen` select, with the histories of `metrics`.

    A name is a folder (of a sweep or of one run), a sweep's id, or a run's id, or the start of
    either. No name is the latest sweep; but if there is a filter, all runs of the experiment.

    Raises:
        ConfigError: if a name is nobody's, or nothing is selected.
        TrackingError: if the store cannot be asked.
    """
    if isinstance(store, NoTrackingConfig):
        if chosen:
            raise ConfigError("--filter: is MLflow's, so it needs a tracking store (tracking=none has none)")
        parts = [_of_folder(_folder(name)) for name in names or [_latest_folder()]]
    elif names or not chosen:
        parts = [_of_name(name, store, chosen, metrics) for name in names or [_latest(store)]]
    else:
        parts = [Selection(chosen, tuple(tracking.records(store, chosen, metrics)), ())]
    runs = {run.name: run for part in parts for run in part.runs}
    title = ", ".join(part.title for part in parts)
    if not runs:
        raise ConfigError(f"{title}: there is no such run" + (f" with {chosen}" if chosen and names else ""))
    return Selection(title, tuple(runs.values()), tuple(c for part in parts for c in part.commands))


def place(name: str | None, store: MlflowConfig) -> Place:
    """What MLflow's pages are to show for `name`, as in `select`; without one, and without a sweep, all runs.

    Raises:
        ConfigError: if the name is nobody's.
        TrackingError: if the store cannot be asked.
    """
    if name is None:
        latest = tracking.latest_sweep(store)
        return _sweeps_place(latest, store) if latest else Place("all runs", _all(store))
    folder = Path(name)
    if folder.is_dir():
        result = ledger.read_result(folder)
        if result and result.run_id:
            return Place(result.run_id, run_id=result.run_id)
        if not (folder / "sweep.json").is_file():
            raise ConfigError(f"{name!r}: holds neither a sweep nor a run that was tracked")
        return _sweeps_place(folder.absolute().name, store, folder)
    sweep_id, run_id = _find(name, store)
    return _sweeps_place(sweep_id, store) if sweep_id else Place(run_id, run_id=run_id)


def _sweeps_place(sweep_id: str, store: MlflowConfig, folder: Path | None = None) -> Place:
    """A sweep's runs, and with them those that were finished before it, as far as a filter can name them."""
    folder = folder or SWEEPS / Path(sweep_id).name
    runs = _of_sweep(sweep_id, store, None, (), folder).runs
    if not runs:
        raise ConfigError(f"{sweep_id!r}: no run of this sweep is in {store.uri}")
    own = tracking.of_sweep(sweep_id)
    if not records.read_plan(folder).finished_before or len(runs) > _MOST_NAMED:
        return Place(f"sweep {sweep_id}", runs, own)
    return Place(f"sweep {sweep_id}", runs, tracking.of_runs([run.name for run in runs]))


def _all(store: MlflowConfig) -> tuple[Record, ...]:
    return tuple(tracking.records(store, "", ()))


def _of_name(name: str, store: MlflowConfig, chosen: str | None, metrics: Sequence[str]) -> Selection:
    if Path(name).is_dir():
        if chosen:
            raise ConfigError(f"--filter: is MLflow's; give the sweep as an id, not as the folder {name!r}")
        return _of_folder(Path(name))
    sweep_id, run_id = _find(name, store)
    if sweep_id:
        return _of_sweep(sweep_id, store, chosen, metrics)
    return Selection(run_id[:8], tuple(tracking.records_of(store, [run_id], metrics)), ())


def _find(name: str, store: MlflowConfig) -> tuple[str, str]:
    """The id of the sweep, or else of the run, whose id starts with `name`; the other one is ''."""
    sweeps = tracking.sweeps(store, name)
    if len(sweeps) == 1:
        return sweeps[0], ""
    if sweeps:
        raise ConfigError(f"{name!r}: {len(sweeps)} sweeps start so: {', '.join(sweeps[:5])}")
    if not set(name) <= set("0123456789abcdef"):
        raise ConfigError(
            f"{name!r}: is neither a folder, nor the id of a sweep or a run, nor the start of one"
        )
    return "", tracking.find_run(store, name)


def _of_sweep(
    sweep_id: str,
    store: MlflowConfig,
    chosen: str | None,
    metrics: Sequence[str],
    folder: Path | None = None,
) -> Selection:
    """A sweep's runs in the store; those that were finished before it are named in its folder's plan."""
    plan = records.read_plan(folder or SWEEPS / Path(sweep_id).name)
    condition = " and ".join([tracking.of_sweep(sweep_id), *([chosen] if chosen else [])])
    found = tracking.records(store, condition, metrics)
    before = [str(job["run_id"]) for job in plan.finished_before if job.get("run_id")]
    found += tracking.records_of(store, before, metrics, chosen)
    return Selection(sweep_id, tuple(found), (plan.command,) if plan.command else ())


def _of_folder(folder: Path) -> Selection:
    if (folder / "config.yaml").is_file():
        return Selection(folder.name, (records.of_folder(folder),), ())
    command = records.read_plan(folder).command
    return Selection(folder.name, tuple(records.of_sweep(folder)), (command,) if command else ())


def _latest(store: MlflowConfig) -> str:
    sweep_id = tracking.latest_sweep(store)
    if sweep_id is None:
        raise ConfigError(
            f"there is no sweep yet in {store.uri}, experiment {store.experiment!r}; a sweep is "
            "python -m lenet_sweep lr=0.1,0.5,0.9 -m"
        )
    return sweep_id


def _latest_folder() -> str:
    plans = sorted(SWEEPS.glob("*/sweep.json"), key=lambda plan: plan.stat().st_mtime)
    if not plans:
        raise ConfigError(f"there is no sweep yet in {SWEEPS}; name the folder of one")
    return str(plans[-1].parent)


def _folder(name: str) -> Path:
    """The folder of that name, here or among the sweeps."""
    for folder in (Path(name), SWEEPS / name):
        if folder.is_dir():
            return folder
    known = {path.name for path in SWEEPS.glob("*") if path.is_dir()}
    raise ConfigError(
        f"{name!r}: there is no such folder, here or in {SWEEPS}.{configs.suggestion(name, known)}"
    )

"""Selects the runs of a comparison from a tracking store, or from the folders of sweeps and runs."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lenet_sweep.errors import ConfigError, OutputError
from lenet_sweep.storage import records
from lenet_sweep.storage.manifest import SWEEPS, Manifest, read_manifest
from lenet_sweep.storage.records import Record
from lenet_sweep.tracking.base import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """Runs, their common title, and the commands that started their sweeps, if known."""

    title: str
    runs: tuple[Record, ...]
    commands: tuple[str, ...]


def select(names: Sequence[str], store: Store, where: str | None, metrics: Sequence[str]) -> Selection:
    """The runs that `names` and the filter `where` select, with the histories of `metrics`.

    A name is the folder of a sweep or run, the id of a sweep or run, or the start of an id. Without names,
    the latest sweep is selected, or with a filter all runs of the experiment.

    Raises:
        ConfigError: if a name is unknown, or no run is selected.
        TrackingError: if the store cannot be reached.
    """
    if where:
        store.check_filter(where)
    if names or not where:
        parts = [_of_name(name, store, where or "", metrics) for name in names or [_latest(store)]]
    else:
        parts = [Selection(where, tuple(store.records(metrics, where=where)), ())]
    runs = {run.name: run for part in parts for run in part.runs}
    title = ", ".join(part.title for part in parts)
    if not runs:
        of_names = f" of {', '.join(names)}" if names else ""
        raise ConfigError(f"no run{of_names} satisfies {where}" if where else f"{title}: contains no runs")
    return Selection(title, tuple(runs.values()), tuple(c for part in parts for c in part.commands))


def of_sweep(
    sweep_id: str, store: Store, where: str, metrics: Sequence[str], folder: Path | None = None
) -> Selection:
    """The runs of a sweep in the store, with those that were finished before it.

    The latter are listed in the sweep's manifest, which is in `folder`.
    """
    manifest = readable_manifest(folder or SWEEPS / Path(sweep_id).name)
    before = [run.run_id for run in manifest.finished_before if run.run_id] if manifest else []
    runs = store.records(metrics, sweep_id=sweep_id, run_ids=before, where=where)
    return Selection(sweep_id, tuple(runs), (manifest.command,) if manifest and manifest.command else ())


def readable_manifest(folder: Path) -> Manifest | None:
    """The manifest in a sweep's folder; None, with a warning, if it is damaged. The store has the runs."""
    try:
        return read_manifest(folder)
    except OutputError as error:
        log.warning("%s", error)
        return None


def _of_name(name: str, store: Store, where: str, metrics: Sequence[str]) -> Selection:
    if Path(name).is_dir():
        if where:
            raise ConfigError(f"--filter: needs the id of a sweep or run, not the folder {name!r}")
        return _of_folder(Path(name))
    sweep_id, run_id = store.find(name)
    if sweep_id:
        return of_sweep(sweep_id, store, where, metrics)
    return Selection(run_id[:8], tuple(store.records(metrics, run_ids=[run_id])), ())


def _of_folder(folder: Path) -> Selection:
    if (folder / "config.yaml").is_file():
        return Selection(folder.name, (records.of_folder(folder),), ())
    manifest = read_manifest(folder)
    commands = (manifest.command,) if manifest and manifest.command else ()
    return Selection(folder.name, tuple(records.of_sweep(folder)), commands)


def _latest(store: Store) -> str:
    sweep_id = store.latest_sweep()
    if sweep_id is None:
        raise ConfigError(
            f"there is no sweep yet in {store.name or SWEEPS}; "
            "start one: python -m lenet_sweep lr=0.1,0.5,0.9 -m"
        )
    return sweep_id

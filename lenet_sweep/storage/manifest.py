"""sweep.json: what a sweep is made of, written once by the sweeper into the sweep's folder.

outputs/sweeps/SWEEP/sweep.json    command, jobs (label, colour, overrides, config), finished_before
outputs/sweeps/SWEEP/N/            what job N (from 0) left
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenet_sweep.config import parsing
from lenet_sweep.config.schema import Config
from lenet_sweep.errors import OutputError

SWEEPS = Path("outputs") / "sweeps"  # below the folder that the command is run in


@dataclass(frozen=True)
class Job:
    """A run's place in a sweep: `number` counts from 1; `total` is None where it is not known.

    `label` has the overrides in which the run differs from the others, as in "lr=0.1 seed=2"; `colour`
    (#rrggbb) is that of its curves on MLflow's pages, '' to leave it to MLflow.
    """

    sweep_id: str
    number: int
    total: int | None
    label: str
    colour: str = ""

    @property
    def long_label(self) -> str:
        """'[2/3] lr=0.1 seed=2'."""
        total = f"/{self.total}" if self.total else ""
        return f"[{self.number}{total}] {self.label}".rstrip()


@dataclass(frozen=True)
class JobEntry:
    """One job in sweep.json; `config` are the plain values of its `Config`, not yet checked."""

    label: str
    colour: str
    overrides: tuple[str, ...]
    config_hash: str
    config: dict[str, Any]


@dataclass(frozen=True)
class FinishedRun:
    """A run that was finished before the sweep began; `run_id` is None if it was not tracked."""

    config_hash: str
    run_id: str | None


@dataclass(frozen=True)
class Manifest:
    """A sweep as its sweep.json describes it: the command, the jobs to train, and runs finished before."""

    command: str = ""
    jobs: tuple[JobEntry, ...] = ()
    finished_before: tuple[FinishedRun, ...] = ()

    def job(self, folder: Path, number: int) -> tuple[Config, Job]:
        """Config and place of the job with this number (from 0) of the sweep in `folder`."""
        entry = self.jobs[number]
        place = Job(folder.name, number + 1, len(self.jobs), entry.label, entry.colour)
        return parsing.parse(entry.config), place


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in a sweep's folder; None if there is none.

    Raises:
        OutputError: if it cannot be read or is damaged.
    """
    path = folder / "sweep.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(
            str(values.get("command", "")),
            tuple(
                JobEntry(
                    str(job.get("label", "")),
                    str(job.get("colour", "")),
                    tuple(map(str, job.get("overrides", ()))),
                    str(job.get("config_hash")),
                    dict(job["config"]),
                )
                for job in values["jobs"]
            ),
            tuple(
                FinishedRun(str(run.get("config_hash")), run.get("run_id"))
                for run in values.get("finished_before", [])
            ),
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{path}: is damaged ({error!r})") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make `folder` this sweep's own by creating its sweep.json.

    Raises:
        OutputError: if the folder holds a sweep already, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "sweep.json", "x", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(manifest), file, indent=1)
    except FileExistsError as error:
        raise OutputError(f"{folder}: already holds a sweep; choose another hydra.sweep.dir") from error
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error

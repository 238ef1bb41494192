"""What a sweep has to do: which of its jobs to train, and which of them together."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from lenet_sweep import identity, ledger, tracking
from lenet_sweep.config import Config, MlflowConfig, NoTrackingConfig
from lenet_sweep.ledger import Result

Action = Literal["train", "resume", "skip", "wait"]


@dataclass(frozen=True)
class Job:
    """A run's place in a sweep: `number` counts from 1; `total` is None where nobody knows it.

    `label` says what tells the run from the others, as in "lr=0.1 seed=2"; `colour` (#rrggbb) is that
    of its curves on MLflow's pages, '' for whatever they choose.
    """

    sweep_id: str
    number: int
    total: int | None
    label: str
    colour: str = ""

    @property
    def long_label(self) -> str:
        """'[2/3] lr=0.1 seed=2'."""
        of_how_many = f"/{self.total}" if self.total else ""
        return f"[{self.number}{of_how_many}] {self.label}".rstrip()


@dataclass(frozen=True)
class Planned:
    """One job of a sweep: what will be done about it, and why."""

    overrides: tuple[str, ...]
    config: Config
    config_hash: str
    action: Action
    why: str
    result: Result | None  # of the run that makes this one needless; None unless it is skipped


def make(jobs: Sequence[tuple[tuple[str, ...], Config]]) -> list[Planned]:
    """Decide about every job (its overrides and config), in order; starts and changes nothing.

    Raises:
        TrackingError: if the store cannot be asked what is finished.
    """
    hashes = [identity.config_hash(config) for _, config in jobs]
    asked: dict[MlflowConfig | NoTrackingConfig, list[str]] = {}
    for (_, config), config_hash in zip(jobs, hashes, strict=True):
        if not config.sweep.rerun:
            asked.setdefault(config.tracking, []).append(config_hash)
    done = {store: tracking.finished(store, wanted) for store, wanted in asked.items()}
    return [
        _decide(overrides, config, config_hash, done.get(config.tracking, {}).get(config_hash))
        for (overrides, config), config_hash in zip(jobs, hashes, strict=True)
    ]


@dataclass(frozen=True)
class Group:
    """Jobs for one process, by their places: wave after wave, those of a wave at once, as one array.

    A job goes on from the one of its trajectory in the wave before.
    """

    waves: tuple[tuple[int, ...], ...]
    costs: dict[int, int]  # epochs that are left to each job after the one before it

    @property
    def cost(self) -> int:
        """Epochs of the longest job of each trajectory."""
        return sum(self.costs.values())


def groups(jobs: Sequence[Config], width: int = 1) -> list[Group]:
    """Split jobs into groups that can be trained at the same time, in the order of their first jobs.

    Jobs that differ only in their epochs are one trajectory, trained from the shortest to the
    longest, so that all of them cost the longest. Up to `width` trajectories that can be an array
    are one group.
    """
    trajectories: dict[str, list[int]] = {}
    for place, config in enumerate(jobs):
        trajectories.setdefault(identity.trajectory_hash(config), []).append(place)
    alike: dict[Hashable, list[list[int]]] = {}
    for number, places in enumerate(trajectories.values()):
        key = array_key(jobs[places[0]]) if width > 1 else number
        alike.setdefault(key, []).append(sorted(places, key=lambda place: jobs[place].epochs))
    found = [_group(jobs, same[i : i + width]) for same in alike.values() for i in range(0, len(same), width)]
    return sorted(found, key=lambda group: min(group.costs))


def _group(jobs: Sequence[Config], trajectories: list[list[int]]) -> Group:
    waves = tuple(tuple(place for place in wave if place is not None) for wave in zip_longest(*trajectories))
    costs = {}
    for places in trajectories:
        behind = 0
        for place in places:
            free = behind if not identity.is_bound_to_its_end(jobs[place]) else 0
            costs[place], behind = jobs[place].epochs - free, jobs[place].epochs
    return Group(waves, costs)


def array_key(config: Config) -> Hashable:
    """Configs with equal keys can be trained as members of one array (`fused`).

    What may differ is what each run has for itself: lr, the optimizer's other numbers, schedule,
    epochs, initial weights and seed; the seed only where it does not choose the examples.
    """
    chosen_by_seed = config.data.val_size > 0 or config.data.train_size is not None
    return (
        config.batch_size,
        config.device,
        config.backend,
        config.threads,
        config.precision,
        config.data,
        replace(config.model, name="", init="pytorch"),
        type(config.optimizer),
        config.seed if chosen_by_seed else None,
    )


def _decide(overrides: tuple[str, ...], config: Config, config_hash: str, done: Result | None) -> Planned:
    """What to do about one job; `done` is the result of the same config's finished run, if there is one."""

    def planned(action: Action, why: str, result: Result | None = None) -> Planned:
        return Planned(overrides, config, config_hash, action, why, result)

    if config.sweep.rerun:
        return planned("train", "sweep.rerun=true")
    if done:
        return planned("skip", f"finished before as run {done.run_id or done.config_hash}", done)
    if ledger.is_claimed(config_hash):
        return planned("wait", "another process trains it now")
    entry = ledger.look_up(config_hash)
    if entry is None:
        return planned("train", "never trained")
    before = ledger.read_result(entry.folder)
    if before and before.status == "FAILED":
        return planned("train", f"failed before: {before.reason}")
    if before and before.status == "FINISHED":
        return planned("train", "finished before, but not in this tracking store")
    if Path(entry.folder / "checkpoint.safetensors").exists():
        return planned("resume", f"was interrupted in {entry.folder}")
    return planned("train", "was interrupted before its first epoch ended")

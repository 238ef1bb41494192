"""What a sweep has to do: which of its jobs to train, and which of them together."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal

from lenet_sweep.config.schema import Config
from lenet_sweep.storage import fingerprint, run_index
from lenet_sweep.storage.result import Result, read_result
from lenet_sweep.storage.run_index import CHECKPOINT
from lenet_sweep.tracking.stores import open_store

Action = Literal["train", "resume", "skip", "wait"]


@dataclass(frozen=True)
class Planned:
    """One job of a sweep: what will be done about it, and why."""

    overrides: tuple[str, ...]
    config: Config
    config_hash: str
    action: Action
    why: str
    result: Result | None  # of the run that makes this one needless; None unless it is skipped


def make_plan(jobs: Sequence[tuple[tuple[str, ...], Config]]) -> list[Planned]:
    """Decide about every job (its overrides and config), in order; starts and changes nothing.

    Raises:
        TrackingError: if the store cannot be asked what is finished.
    """
    hashes = [fingerprint.config_hash(config) for _, config in jobs]
    done: dict[str, Result] = {}
    for tracking in {config.tracking for _, config in jobs}:
        wanted = [
            config_hash
            for (_, config), config_hash in zip(jobs, hashes, strict=True)
            if config.tracking == tracking and not config.sweep.rerun
        ]
        done |= open_store(tracking).finished(wanted) if wanted else {}
    return [
        _decide(overrides, config, config_hash, done.get(config_hash))
        for (overrides, config), config_hash in zip(jobs, hashes, strict=True)
    ]


@dataclass(frozen=True)
class JobGroup:
    """Jobs for one process, by their indices: wave after wave, those of a wave at once, as one array.

    A job resumes from the one of its trajectory in the wave before.
    """

    waves: tuple[tuple[int, ...], ...]
    costs: dict[int, int]  # epochs that are left to each job after the one before it

    @property
    def cost(self) -> int:
        """Epochs of the longest job of each trajectory."""
        return sum(self.costs.values())


def group_jobs(jobs: Sequence[Config], width: int = 1) -> list[JobGroup]:
    """Split jobs into groups that can be trained at the same time, in the order of their first jobs.

    Jobs that differ only in their epochs are one trajectory, trained from the shortest to the
    longest, so that all of them cost the longest. Up to `width` trajectories that can be an array
    are one group.
    """
    trajectories: dict[str, list[int]] = {}
    for i, config in enumerate(jobs):
        trajectories.setdefault(fingerprint.trajectory_hash(config), []).append(i)
    alike: dict[Hashable, list[list[int]]] = {}
    for number, trajectory in enumerate(trajectories.values()):
        key = array_key(jobs[trajectory[0]]) if width > 1 else number
        alike.setdefault(key, []).append(sorted(trajectory, key=lambda i: jobs[i].epochs))
    found = [_group(jobs, same[j : j + width]) for same in alike.values() for j in range(0, len(same), width)]
    return sorted(found, key=lambda group: min(group.costs))


def _group(jobs: Sequence[Config], trajectories: list[list[int]]) -> JobGroup:
    waves = tuple(tuple(i for i in wave if i is not None) for wave in zip_longest(*trajectories))
    costs = {}
    for trajectory in trajectories:
        behind = 0
        for i in trajectory:
            free = behind if not fingerprint.depends_on_epochs(jobs[i]) else 0
            costs[i], behind = jobs[i].epochs - free, jobs[i].epochs
    return JobGroup(waves, costs)


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
    if run_index.is_claimed(config_hash):
        return planned("wait", "another process trains it now")
    entry = run_index.look_up(config_hash)
    if entry is None:
        return planned("train", "never trained")
    before = read_result(entry.folder)
    if before and before.status == "FAILED":
        return planned("train", f"failed before: {before.reason}")
    if before and before.status == "FINISHED":
        return planned("train", "finished before, but not in this tracking store")
    if (entry.folder / CHECKPOINT).exists():
        return planned("resume", f"was interrupted in {entry.folder}")
    return planned("train", "was interrupted before its first epoch ended")

"""Which jobs of a sweep still need training, and which of them are trained together."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal

from lenet_sweep.config.schema import Config, MlflowConfig, NoTrackingConfig
from lenet_sweep.storage import fingerprint, run_index
from lenet_sweep.storage.result import Result, read_result
from lenet_sweep.storage.run_index import CHECKPOINT
from lenet_sweep.tracking.stores import open_store

Action = Literal["train", "resume", "skip", "wait"]


@dataclass(frozen=True)
class Planned:
    """One job of a sweep, the action that is planned for it, and why."""

    overrides: tuple[str, ...]
    config: Config
    config_hash: str
    action: Action
    why: str
    result: Result | None  # of the finished run of this config, if the job is skipped


def make_plan(jobs: Sequence[tuple[tuple[str, ...], Config]]) -> list[Planned]:
    """Choose an action for every job (its overrides and config), in order. Nothing is started or changed.

    Raises:
        TrackingError: if a tracking store cannot be reached.
    """
    hashes = [fingerprint.config_hash(config) for _, config in jobs]
    # Tracking does not enter the hash, so jobs of two stores can have the same.
    results: dict[MlflowConfig | NoTrackingConfig, dict[str, Result]] = {}
    for tracking in {config.tracking for _, config in jobs}:
        to_look_up = [
            config_hash
            for (_, config), config_hash in zip(jobs, hashes, strict=True)
            if config.tracking == tracking and not config.sweep.rerun
        ]
        results[tracking] = open_store(tracking).finished(to_look_up) if to_look_up else {}
    return [
        _choose_action(overrides, config, config_hash, results[config.tracking].get(config_hash))
        for (overrides, config), config_hash in zip(jobs, hashes, strict=True)
    ]


@dataclass(frozen=True)
class JobGroup:
    """Jobs for one process, by their indices. Waves are trained in order, the jobs of a wave as one array.

    A job resumes from the job of its trajectory in the previous wave.
    """

    waves: tuple[tuple[int, ...], ...]
    costs: dict[int, int]  # index of a job -> epochs that it trains, after resuming

    @property
    def cost(self) -> int:
        """The number of epochs that the group trains."""
        return sum(self.costs.values())


def group_jobs(jobs: Sequence[Config], width: int = 1) -> list[JobGroup]:
    """Split jobs into groups that can be trained at the same time, in the order of their first jobs.

    Jobs that differ only in their epochs are one trajectory. They are trained from the shortest to the
    longest, and each resumes from the one before, so that together they cost as much as the longest. Up to
    `width` trajectories with equal `array_key` form one group.
    """
    trajectories: dict[str, list[int]] = {}
    for i, config in enumerate(jobs):
        trajectories.setdefault(fingerprint.trajectory_hash(config), []).append(i)
    by_key: dict[Hashable, list[list[int]]] = {}
    for number, trajectory in enumerate(trajectories.values()):
        key = array_key(jobs[trajectory[0]]) if width > 1 else number
        by_key.setdefault(key, []).append(sorted(trajectory, key=lambda i: jobs[i].epochs))
    groups = [
        _group(jobs, same[j : j + width]) for same in by_key.values() for j in range(0, len(same), width)
    ]
    return sorted(groups, key=lambda group: min(group.costs))


def _group(jobs: Sequence[Config], trajectories: list[list[int]]) -> JobGroup:
    """A group of trajectories, each a list of indices in the order of training."""
    waves = tuple(tuple(i for i in wave if i is not None) for wave in zip_longest(*trajectories))
    costs = {}
    for trajectory in trajectories:
        epochs_before = 0
        for i in trajectory:
            resumed = epochs_before if not fingerprint.depends_on_epochs(jobs[i]) else 0
            costs[i], epochs_before = jobs[i].epochs - resumed, jobs[i].epochs
    return JobGroup(waves, costs)


def array_key(config: Config) -> Hashable:
    """Configs with equal keys can be trained as members of one array (see `training.fused`).

    Members may differ in lr and the optimizer's other numbers, schedule, epochs and initial weights. They
    may differ in the seed only if the seed does not choose the training examples.
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


def _choose_action(
    overrides: tuple[str, ...], config: Config, config_hash: str, finished: Result | None
) -> Planned:
    """Plan one job; `finished` is the result of a finished run of the same config, if there is one."""

    def planned(action: Action, why: str, result: Result | None = None) -> Planned:
        return Planned(overrides, config, config_hash, action, why, result)

    if config.sweep.rerun:
        return planned("train", "sweep.rerun=true")
    if finished:
        return planned("skip", f"finished before as run {finished.run_id or finished.config_hash}", finished)
    if run_index.is_claimed(config_hash):
        return planned("wait", "another process is training it")
    entry = run_index.look_up(config_hash)
    if entry is None:
        return planned("train", "not trained before")
    previous = read_result(entry.folder)
    if previous and previous.status == "FAILED":
        return planned("train", f"failed before: {previous.reason}")
    if previous and previous.status == "FINISHED":
        return planned("train", "finished before, but not in this tracking store")
    if (entry.folder / CHECKPOINT).exists():
        return planned("resume", f"interrupted; checkpoint in {entry.folder}")
    return planned("train", "interrupted before the end of its first epoch")

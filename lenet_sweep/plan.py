"""What a sweep has to do: which of its jobs to train, which to go on with, which are finished."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lenet_sweep import identity, ledger, tracking
from lenet_sweep.config import Config
from lenet_sweep.ledger import Result

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


def make(jobs: Sequence[tuple[tuple[str, ...], Config]]) -> list[Planned]:
    """Decide about every job (its overrides and config), in order; starts and changes nothing.

    Raises:
        TrackingError: if the store cannot be asked what is finished.
    """
    return [_decide(overrides, config) for overrides, config in jobs]


def _decide(overrides: tuple[str, ...], config: Config) -> Planned:
    config_hash = identity.config_hash(config)

    def planned(action: Action, why: str, result: Result | None = None) -> Planned:
        return Planned(overrides, config, config_hash, action, why, result)

    if config.sweep.rerun:
        return planned("train", "sweep.rerun=true")
    done = tracking.finished(config.tracking, config_hash)
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

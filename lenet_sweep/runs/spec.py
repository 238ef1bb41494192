"""A run before it starts: its config and folder, what the user typed, its name, label and tags."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lenet_sweep.config.parsing import is_about_tracking
from lenet_sweep.config.schema import Config
from lenet_sweep.storage import fingerprint
from lenet_sweep.storage.environment import git_state
from lenet_sweep.storage.manifest import Job


@dataclass(frozen=True)
class RunSpec:
    """A run that is to be trained; plain values, so it can be sent to another process.

    `overrides` are what the user typed, `job` is the run's place in a sweep (None for a single run), and
    `origin` names the run that this one is a variant of.
    """

    config: Config
    folder: Path
    overrides: tuple[str, ...] = ()
    job: Job | None = None
    origin: str | None = None

    @cached_property
    def config_hash(self) -> str:
        return fingerprint.config_hash(self.config)

    @property
    def name(self) -> str:
        """The overrides that can change a number, swept ones first; the model's name if there are none."""
        telling = [
            override
            for override in self.overrides
            if not override.startswith(("data.root", "sweep.", "hydra")) and not is_about_tracking(override)
        ]
        swept = f" {self.job.label} " if self.job else ""
        name = " ".join(sorted(telling, key=lambda o: f" {o} " not in swept))[:250]
        return name or self.config.model.name

    @property
    def label(self) -> str:
        """'[2/3] lr=0.5' for a job of a sweep, '' for a single run."""
        return self.job.long_label if self.job else ""

    def tags(self) -> dict[str, str]:
        """The tags of the run in its tracking store."""
        git = git_state()
        tags = {
            "config_hash": self.config_hash,
            "git_commit": git.commit or "none: not run from a checkout",
            "git_dirty": str(git.dirty).lower(),
            "mlflow.source.name": "lenet_sweep",
            "mlflow.source.type": "LOCAL",
        }
        if git.commit:
            tags["mlflow.source.git.commit"] = git.commit
        if self.job:
            tags["sweep_id"] = self.job.sweep_id
        if self.job and self.job.colour:
            tags["mlflow.runColor"] = self.job.colour
        if self.origin:
            tags["origin"] = self.origin
        return tags

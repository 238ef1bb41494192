"""Registers our launcher with Hydra.

Hydra imports this file in every Hydra application on the machine, so it imports nothing heavy. The
implementation is `lenet_sweep.cli.launcher`, which is imported when a sweep is launched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class LenetLauncherConf:
    """The launcher has no settings."""

    _target_: str = "hydra_plugins.lenet_sweep_plugin.launcher.LenetLauncher"


ConfigStore.instance().store(
    group="hydra/launcher", name="lenet_sweep", node=LenetLauncherConf, provider="lenet_sweep"
)


class LenetLauncher(Launcher):
    """Trains the jobs of a sweep as the sweeper planned them, in this process or in worker processes."""

    def __init__(self) -> None:
        self._setup: dict[str, Any] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._setup = {"hydra_context": hydra_context, "config": config}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from lenet_sweep.cli.launcher import launch

        return launch(job_overrides, initial_job_idx, **self._setup)

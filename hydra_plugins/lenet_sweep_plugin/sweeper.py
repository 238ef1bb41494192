"""Registers our sweeper with Hydra.

Hydra imports this file in every Hydra application on the machine, so it imports nothing heavy. The
implementation is `lenet_sweep.cli.sweeper`, which is imported when a sweep starts.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class LenetSweeperConf:
    """`params` are sweeps written in YAML, as in conf/experiment/; the command line extends them."""

    _target_: str = "hydra_plugins.lenet_sweep_plugin.sweeper.LenetSweeper"
    params: dict[str, str] = field(default_factory=dict)


ConfigStore.instance().store(
    group="hydra/sweeper", name="lenet_sweep", node=LenetSweeperConf, provider="lenet_sweep"
)


class LenetSweeper(Sweeper):
    """Checks every job of a sweep before the first one starts, and prints a table of all runs at the end."""

    def __init__(self, params: dict[str, str]) -> None:
        self._params = params
        self._setup: dict[str, Any] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._setup = {
            "hydra_context": hydra_context,
            "task_function": task_function,
            "config": config,
        }

    def sweep(self, arguments: list[str]) -> Any:
        from lenet_sweep.cli.sweeper import sweep

        return sweep([f"{key}={value}" for key, value in self._params.items()] + arguments, **self._setup)

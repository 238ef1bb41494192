"""Everything that can prevent a run, checked before any run starts; without torch and mlflow if possible."""

from collections.abc import Callable, Iterable
from pathlib import Path

from lenet_sweep.config.schema import Config
from lenet_sweep.datasets import download
from lenet_sweep.paths import check_writable
from lenet_sweep.runs import hardware
from lenet_sweep.tracking import recovery
from lenet_sweep.tracking.base import Store
from lenet_sweep.tracking.stores import open_store
from lenet_sweep.training import compiler


def check(configs: Iterable[Config], folder: Path, say: Callable[[str], None]) -> None:
    """Refuse runs that cannot work here; fetch the datasets that they need.

    `folder` is where the runs will write. The quickest checks come first; `say` is called with a line of
    text for each download.

    Raises:
        OutputError, TrackingError, DeviceError, DataError: nothing was started.
    """
    configs = list(configs)
    check_writable(folder)
    stores = [open_store(tracking) for tracking in {config.tracking for config in configs}]
    for store in stores:
        store.check()
    _compile_ahead(configs[0])
    for name in sorted({config.device for config in configs} - {"auto", "cpu"}):
        from lenet_sweep.training import devices  # imports torch: only for a device that may be missing

        devices.resolve(name)
    for name, root in sorted({(config.data.name, config.data.root) for config in configs}):
        download.ensure(name, Path(root), say)
    for store in stores:
        recover(store, say)


def _compile_ahead(config: Config) -> None:
    """Compile the first run's native backend while torch is imported; a GPU needs none."""
    if compiler.native_is_likely(config.backend, config.precision.amp) and not hardware.here().trains_on_gpu(
        config
    ):
        compiler.compile_ahead(config.model)


def recover(store: Store, say: Callable[[str], None]) -> None:
    """Sync what the store missed, and close runs whose process was killed."""
    synced, problems = recovery.sync_all()
    if synced:
        say(f"synced {synced} runs that the tracking store had missed")
    for problem in problems:
        say(f"not yet tracked in full: {problem}")
    for run_id in store.close_stale_runs():
        say(f"run {run_id} was killed; it is now marked as KILLED")

"""Everything that can stop a run, asked before any run starts; free of torch and mlflow where it can be."""

from collections.abc import Callable, Iterable
from pathlib import Path

from lenet_sweep import compiler, identity, sources, tracking
from lenet_sweep.config import Config, MlflowConfig, NoTrackingConfig
from lenet_sweep.paths import check_writable


def check(configs: Iterable[Config], folder: Path, say: Callable[[str], None]) -> None:
    """Refuse runs that could not work here; fetch the datasets that they need.

    `folder` is where the runs will write. The quickest questions come first; `say` is told what is
    being fetched.

    Raises:
        OutputError, TrackingError, DeviceError, DataError: nothing was started.
    """
    configs = list(configs)
    check_writable(folder)
    stores = {config.tracking for config in configs}
    for store in stores:
        tracking.check(store)
    _compile_ahead(configs[0])
    for name in sorted({config.device for config in configs} - {"auto", "cpu"}):
        from lenet_sweep import devices  # imports torch: only for a device that may be missing

        devices.resolve(name)
    for name, root in sorted({(config.data.name, config.data.root) for config in configs}):
        sources.ensure(name, Path(root), say)
    for store in stores:
        recover(store, say)


def _compile_ahead(config: Config) -> None:
    """The first run's step compiles while torch is imported; a GPU, where there is one, needs none."""
    if compiler.is_likely(config) and not identity.trains_on_gpu(config):
        compiler.compile_ahead(config.model)


def recover(store: MlflowConfig | NoTrackingConfig, say: Callable[[str], None]) -> None:
    """Mend what runs left behind whose process or tracking server died."""
    sent, problems = tracking.deliver_all()
    if sent:
        say(f"{sent} runs that the tracking store had missed were sent")
    for problem in problems:
        say(f"not yet tracked in full: {problem}")
    for run_id in tracking.end_the_dead(store):
        say(f"run {run_id} was killed; it is marked so")

"""A run's stored files, whether it is named by a folder, a config.yaml or an id."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lenet_sweep.tracking.base import Metrics, Store


@contextmanager
def stored(name: str, store: Store, files: Sequence[str]) -> Iterator[tuple[Path, str, Metrics]]:
    """A folder with those of `files` that the run has, its name, and its metrics in the store.

    Raises:
        ConfigError: if there is no such run.
        TrackingError: if the store cannot be reached.
    """
    path = Path(name)
    if path.name == "config.yaml" or path.is_dir():
        yield path if path.is_dir() else path.parent, name, {}
        return
    with tempfile.TemporaryDirectory(prefix="lenet_sweep-") as temporary:
        run_id, metrics = store.fetch(name, Path(temporary), files)
        yield Path(temporary), run_id, metrics

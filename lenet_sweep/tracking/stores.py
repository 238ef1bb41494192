"""From a config to its store."""

from lenet_sweep.config.schema import MlflowConfig, NoTrackingConfig
from lenet_sweep.tracking.base import Store
from lenet_sweep.tracking.folder_store import FolderStore
from lenet_sweep.tracking.mlflow_store import MlflowStore


def open_store(config: MlflowConfig | NoTrackingConfig) -> Store:
    """The store that `config` describes; it is not contacted yet, and mlflow is not imported."""
    match config:
        case MlflowConfig():
            return MlflowStore(config)
        case NoTrackingConfig():
            return FolderStore()

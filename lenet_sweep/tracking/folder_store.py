"""The store of `tracking=none`: output folders alone, read through the run index and sweep.json."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from lenet_sweep.errors import ConfigError, suggestion
from lenet_sweep.storage import records, run_index
from lenet_sweep.storage.manifest import SWEEPS
from lenet_sweep.storage.records import Record
from lenet_sweep.storage.result import Result
from lenet_sweep.tracking.base import Metrics


class FolderLogger:
    """Logs nowhere: the run's folder has everything already."""

    run_id: str | None = None

    def log(self, epoch: int, metrics: dict[str, float], time_ms: int) -> None:
        pass

    def end(self, result: Result) -> None:
        pass

    def locations(self) -> list[str]:
        return []


class FolderStore:
    """Implements `base.Store` over the folders below the current one."""

    name = None

    def check(self) -> None:
        pass

    def open_run(
        self, folder: Path, name: str, tags: dict[str, str], start_ms: int, run_id: str | None = None
    ) -> FolderLogger:
        return FolderLogger()

    def finished(self, hashes: Collection[str]) -> dict[str, Result]:
        results = {config_hash: run_index.finished(config_hash) for config_hash in hashes}
        return {config_hash: result for config_hash, result in results.items() if result}

    def close_stale_runs(self) -> list[str]:
        return []

    def latest_sweep(self) -> str | None:
        manifests = sorted(SWEEPS.glob("*/sweep.json"), key=lambda path: path.stat().st_mtime)
        return manifests[-1].parent.name if manifests else None

    def find(self, name: str) -> tuple[str, str]:
        if (SWEEPS / name).is_dir():
            return name, ""
        known = {path.name for path in SWEEPS.glob("*") if path.is_dir()}
        raise ConfigError(
            f"{name!r}: there is no such folder, neither here nor in {SWEEPS}.{suggestion(name, known)}"
        )

    def check_filter(self, where: str) -> None:
        raise ConfigError("--filter: only MLflow can filter runs; tracking=none reads folders")

    def records(
        self, metrics: Sequence[str], *, sweep_id: str = "", run_ids: Sequence[str] = (), where: str = ""
    ) -> list[Record]:
        assert sweep_id, "without ids only a sweep's folder can be read"
        folder = SWEEPS / sweep_id
        is_run = (folder / "config.yaml").is_file()  # SWEEP/N
        return [records.of_folder(folder)] if is_run else records.of_sweep(folder)

    def fetch(self, name: str, folder: Path, files: Iterable[str]) -> tuple[str, Metrics]:
        raise ConfigError(f"{name!r}: there is no such folder; run ids need tracking=mlflow")

    def attach_report(self, run_id: str, sweep_id: str, report: Path, answer: str) -> None:
        return None

    def open_command(self, name: str, overrides: Iterable[str]) -> None:
        return None

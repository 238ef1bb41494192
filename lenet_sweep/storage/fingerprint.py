"""What a result depends on, as hashes: the config that matters and the code that matters."""

import functools
import hashlib
import json
from pathlib import Path

from lenet_sweep.config import parsing
from lenet_sweep.config.schema import Config, CosineScheduleConfig
from lenet_sweep.paths import PACKAGE

# Fields that cannot change a number: folders, tracking, profiling, labels.
RESULT_FREE = ("data.root", "model.name", "profile", "sweep", "tracking")


def config_hash(config: Config) -> str:
    """16 hex digits over everything that decides a run's numbers: the config and the code version.

    It is the same on every machine and Python version. `device` and `threads` enter as written, so "auto"
    covers what it resolves to on any machine.
    """
    return _hash(config, RESULT_FREE)


def trajectory_hash(config: Config) -> str:
    """16 hex digits that two runs share if the one with fewer epochs is a prefix of the other.

    The number of epochs is left out, unless the schedule depends on it.
    """
    return _hash(config, RESULT_FREE if depends_on_epochs(config) else (*RESULT_FREE, "epochs"))


def depends_on_epochs(config: Config) -> bool:
    """Whether the first epochs already depend on the number of epochs."""
    return isinstance(config.schedule, CosineScheduleConfig)


def _hash(config: Config, without: tuple[str, ...]) -> str:
    fields = {
        key: value
        for key, value in parsing.flatten(parsing.to_dict(config))
        if not any(key == free or key.startswith(f"{free}.") for free in without)
    }
    text = json.dumps([code_version(), fields], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def code_version() -> str:
    """SHA-256 over the sources that can change a number: all of `training/`, and shapes.py.

    Line ends are normalised. Editing any other source leaves every config hash as it is.
    """
    digest = hashlib.sha256()
    for path in result_sources():
        source = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.relative_to(PACKAGE).as_posix()} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def result_sources() -> list[Path]:
    """The sources whose text can change a number, in a fixed order."""
    room = PACKAGE / "training"
    paths = [path for path in room.rglob("*") if path.suffix in (".py", ".cpp")]
    # Editors keep files like .#model.py and .ipynb_checkpoints/model.py beside a source.
    visible = [p for p in paths if not any(part.startswith(".") for part in p.relative_to(room).parts)]
    return sorted([*visible, PACKAGE / "shapes.py"])

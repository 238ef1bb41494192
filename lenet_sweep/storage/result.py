"""result.json: how a run ended."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lenet_sweep.errors import LenetSweepError
from lenet_sweep.paths import write_atomic

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Result:
    """How a run ended. `metrics` are those of its last epoch, `seconds` those of its last session."""

    status: Status
    reason: str | None
    collapsed: bool  # no better than guessing: accuracy at chance, loss at ln(classes) or above
    run_id: str | None
    config_hash: str
    seconds: float
    metrics: dict[str, float]


Outcome = Result | LenetSweepError  # of a job: what `run` returned or raised


def write_result(folder: Path, result: Result) -> None:
    """Write `result.json`."""
    write_atomic(folder / "result.json", json.dumps(dataclasses.asdict(result), indent=2) + "\n")


def read_result(folder: Path) -> Result | None:
    """The result that a run left in `folder`; None if it left none (killed, or not started)."""
    try:
        return Result(**json.loads((folder / "result.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None

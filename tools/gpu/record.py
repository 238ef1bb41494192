"""What a step of the GPU check writes down: values, claims that hold or not, errors, one line of summary.

Every call rewrites the step's JSON file, so a step that is stopped by its time limit keeps what it measured.
"""

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda")
ON_GPU = DEVICE.startswith("cuda")
SMALL = os.environ.get("GPU_CHECK_SMALL") == "1"  # the small dataset and few steps, to try the check itself
DATASET = "fashion_mnist_mini" if SMALL else "fashion_mnist"


@dataclass(frozen=True)
class Claim:
    """Something that must be true, and whether it was."""

    claim: str
    holds: bool
    detail: str = ""


@dataclass
class StepRecord:
    """The content of a step's JSON file. `path` None keeps it in memory."""

    path: Path | None = None
    limit_s: float = 1e9  # for the whole step
    summary: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # for want of time
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def from_environment(cls) -> "StepRecord":
        """The record that `runner` reads when the step has ended."""
        path, seconds = os.environ.get("GPU_CHECK_RECORD"), os.environ.get("GPU_CHECK_LIMIT", "1e9")
        return cls(Path(path) if path else None, float(seconds))

    @property
    def left_s(self) -> float:
        return self.limit_s - (time.monotonic() - self.started)

    def keep(self, **values: Any) -> None:
        """Add or replace values."""
        self.values.update(values)
        self._write()

    def claim(self, claim: str, holds: bool, detail: str = "") -> None:
        """Add a claim. The step fails if one does not hold."""
        self.claims.append(Claim(claim, bool(holds), detail))
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim} {detail}".rstrip(), flush=True)
        self._write()

    def summarize(self, *parts: str) -> None:
        """Set the line that the table shows; empty parts are dropped."""
        self.summary = "; ".join(part for part in parts if part)
        self._write()

    def note_error(self, what: str, error: BaseException) -> None:
        first_line = (str(error).splitlines() or [""])[0]
        self.errors.append(f"{what}: {type(error).__name__}: {first_line[:300]}")
        self._write()

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Record an error of the block and continue after it. The step fails, its other values are kept."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.note_error(what, error)

    def has_time(self, what: str, needed_s: float) -> bool:
        """Whether so many seconds are left; if not, `what` is listed as left out."""
        if self.left_s >= needed_s:
            return True
        self.left_out.append(what)
        self._write()
        return False

    def _write(self) -> None:
        if self.path is None:
            return
        content = asdict(self)
        for key in ("path", "limit_s", "started"):
            del content[key]
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
        temporary.replace(self.path)

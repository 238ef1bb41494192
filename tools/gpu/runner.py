"""Run the steps of the GPU check, each in a process of its own and within its time limit.

    python -m tools.gpu.runner [STEP...]        at the root of the checkout; `bash tools/gpu/check` does it

A step that fails does not stop the others. After every step, results.json and table.txt are written to $OUT.
The exit code is 1 if a step is not ok. Needs only the standard library. docs/gpu.md describes the results.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lenet_sweep  # noqa: F401  sets how OpenMP waits, for all steps; imports nothing else
from tools.gpu.record import DEVICE, ON_GPU, SMALL

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 475.0  # for everything
LEAST_S = 5.0  # a step is not started with less
LONGEST = 400  # characters of a reason or summary in the table; results.json has all
PACKED_FOR = (3, 12)  # by `prepare`
GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "clocks.sm",
    "clocks.max.sm",
    "power.limit",
    "temperature.gpu",
    "utilization.gpu",
    "mig.mode.current",
)
GRACE_S = 3.0  # between Ctrl-C and SIGKILL, and between a step's own limit and its process's


@dataclass(frozen=True)
class Step:
    """A step: `python -m MODULE NAME`. `limit_s` is what it may take if no step leaves time over."""

    name: str
    module: str
    limit_s: float
    about: str

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", self.module, self.name]


MEASURE, PROGRAM = "tools.gpu.measure", "tools.gpu.program"
STEPS = (
    Step("facts", MEASURE, 20, "the card, torch's switches, errors of float32 products, unmet requirements"),
    Step("peaks", MEASURE, 15, "the card's peak FLOP/s and bytes/s, and what they allow for LeNet"),
    Step("tests", PROGRAM, 28, "the project's tests with the marker gpu"),
    Step("equality", MEASURE, 25, "repeated, resumed, captured and fused runs compared, and GPU with CPU"),
    Step("readme", PROGRAM, 35, "the README's sweep, compared with the tutorial's losses"),
    Step("reproduce", PROGRAM, 80, "one run, trained again by `reproduce`"),
    Step("arrays", MEASURE, 40, "speed and memory of arrays of 1 to 256 runs, with and without CUDA graphs"),
    Step("profile", MEASURE, 28, "kernels of a step, gaps between them, the heaviest"),
    Step("ladder", PROGRAM, 80, "the tutorial's loop and one run, by benchmarks.ladder"),
    Step("sweep_fused", PROGRAM, 55, "64 runs as one command, trained as arrays"),
    Step("precision", MEASURE, 30, "speed and loss with TF32 and bfloat16"),
    Step("sweep_unfused", PROGRAM, 39, "eight of these runs, one after the other"),
)


@dataclass
class Outcome:
    """How a step ended. `status` is ok, failed, timed out or not run; `reason` says why it is not ok."""

    name: str
    status: str
    reason: str
    seconds: float
    limit_s: float
    exit_code: int | None = None
    log: str = ""
    summary: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    claims: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def main() -> int:
    steps = select(parse_arguments().step)
    # Ctrl-C and SIGTERM stop the step at hand; the results of the earlier ones are already written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    deadline = time.monotonic() + float(os.environ.get("GPU_CHECK_SECONDS", BUDGET_S))
    out = output_folder()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        logs = Path(work) / "logs"
        logs.mkdir()
        environment = set_up(Path(work))
        report = Report(out, logs, len(steps), describe_machine())
        try:
            outcomes = run_steps(steps, logs, environment, deadline, report.write)
        except KeyboardInterrupt:
            print(f"\ninterrupted; results so far in {out}")
            return 130
    print(f"\n{table(outcomes)}\n\nresults in {out}")
    if again := [outcome.name for outcome in outcomes if not outcome.ok]:
        print(f"to repeat what is not ok: bash tools/gpu/check {' '.join(again)}")
    return 1 if again else 0


class Report:
    """results.json, table.txt and logs.tar.gz in `out`, rewritten after every step."""

    def __init__(self, out: Path, logs: Path, steps: int, environment: dict[str, Any]) -> None:
        self._out, self._logs, self._steps = out, logs, steps
        self._started = time.monotonic()
        self._header = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": DEVICE,
            "small": SMALL,
            "environment": environment,
        }

    def write(self, outcomes: Sequence[Outcome]) -> None:
        complete = len(outcomes) == self._steps
        content = {
            **self._header,
            "ok": complete and all(outcome.ok for outcome in outcomes),
            "seconds": round(time.monotonic() - self._started, 1),
            "gpu_after": nvidia_smi(),
            "steps": [asdict(outcome) for outcome in outcomes],
        }
        (self._out / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (self._out / "table.txt").write_text(table(outcomes) + "\n", encoding="utf-8")
        with tarfile.open(self._out / "logs.tar.gz", "w:gz") as tar:
            tar.add(self._logs, "logs")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    lines = "\n".join(f"  {step.name:<14} {step.limit_s:>3.0f} s  {step.about}" for step in STEPS)
    parser = argparse.ArgumentParser(
        prog="bash tools/gpu/check",
        description="Tries the project on a CUDA GPU. docs/gpu.md describes the results.",
        epilog=f"steps:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", nargs="*", help="run these steps only (default: all)")
    return parser.parse_args(arguments)


def select(names: Sequence[str]) -> list[Step]:
    """The named steps in their fixed order, all if none is named.

    Raises:
        SystemExit: if there is no such step.
    """
    known = [step.name for step in STEPS]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"there is no step {unknown[0]!r}; choose from {' '.join(known)}")
    return [step for step in STEPS if not names or step.name in names]


def run_steps(
    steps: Sequence[Step],
    logs: Path,
    environment: dict[str, str],
    deadline: float,
    on_outcome: Callable[[Sequence[Outcome]], None],
) -> list[Outcome]:
    """Run `steps` one after the other until `deadline` (of time.monotonic).

    `on_outcome` is called after each with the outcomes so far.
    """
    outcomes: list[Outcome] = []
    for index, step in enumerate(steps):
        limit_s = time_limit(steps[index:], deadline - time.monotonic())
        print(f"{step.name:<14}", end="", flush=True)
        outcomes.append(run_step(step, limit_s, logs, environment))
        print(format_row(outcomes[-1]).removeprefix(f"{step.name:<14}"), flush=True)
        on_outcome(outcomes)
    return outcomes


def time_limit(steps: Sequence[Step], left_s: float) -> float:
    """Seconds for the first of `steps`: what the others do not need, and at most twice its own limit."""
    first, *others = steps
    spare_s = left_s - sum(step.limit_s for step in others)
    return max(0.0, min(2 * first.limit_s, max(spare_s, first.limit_s), left_s - GRACE_S))


def run_step(step: Step, limit_s: float, logs: Path, environment: dict[str, str]) -> Outcome:
    """Run one step; its output goes to NAME.txt in `logs`."""
    if limit_s < LEAST_S:
        return Outcome(step.name, "not run", "no time left", 0.0, limit_s)
    log, record = logs / f"{step.name}.txt", logs / f"{step.name}.json"
    record.unlink(missing_ok=True)
    own = {"GPU_CHECK_RECORD": str(record), "GPU_CHECK_LIMIT": str(limit_s - GRACE_S)}
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment | own, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        code = wait_or_stop(process, limit_s)
    outcome = Outcome(step.name, "ok", "", round(time.monotonic() - started, 1), round(limit_s, 1), code)
    outcome.log = f"logs/{log.name}"
    with contextlib.suppress(OSError, ValueError):
        for key, value in json.loads(record.read_text(encoding="utf-8")).items():
            setattr(outcome, key, value)
        record.unlink()
    outcome.status, outcome.reason = judge(outcome, log.read_text(encoding="utf-8", errors="replace"))
    return outcome


def wait_or_stop(process: "subprocess.Popen[bytes]", limit_s: float) -> int | None:
    """The exit code; None if the time limit was reached and the process and its children were stopped."""
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # What the step started and left behind ends, too.
        for number, seconds in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, GRACE_S)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=seconds)


def judge(outcome: Outcome, log: str) -> tuple[str, str]:
    """Status and reason of a step that was started."""
    if outcome.exit_code is None:
        return "timed out", f"stopped after {outcome.limit_s:.0f} s"
    broken = [
        f"{claim['claim']}: {claim['detail']}".removesuffix(": ")
        for claim in outcome.claims
        if not claim["holds"]
    ]
    if reasons := [*broken, *outcome.errors]:
        return "failed", "; ".join(reasons)
    if outcome.exit_code != 0:
        last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "no output")
        return "failed", f"exit code {outcome.exit_code}: {last[:300]}"
    if not outcome.summary:
        return "failed", "the step recorded nothing"
    return "ok", ""


def table(outcomes: Sequence[Outcome]) -> str:
    """One row a step, then what steps bring as tables of their own."""
    lines = [f"{'step':<14}{'status':<10}{'time':>7}  result", *map(format_row, outcomes)]
    for outcome in outcomes:
        if extra := outcome.values.get("table"):
            lines += ["", f"{outcome.name}:", str(extra).rstrip()]
    return "\n".join(lines)


def format_row(outcome: Outcome) -> str:
    texts = [outcome.reason, outcome.summary]
    if outcome.left_out:
        texts.append(f"{len(outcome.left_out)} left out for want of time")
    text = " | ".join(text if len(text) < LONGEST else f"{text[:LONGEST]}..." for text in texts if text)
    return f"{outcome.name:<14}{outcome.status:<10}{outcome.seconds:>5.0f} s  {text}"


def output_folder() -> Path:
    """$OUT, or a new folder below .gpu-out."""
    default = ROOT / ".gpu-out" / datetime.now().strftime("%Y%m%d-%H%M%S")
    out = Path(os.environ.get("OUT") or default).absolute()
    out.mkdir(parents=True, exist_ok=True)
    return out


def set_up(work: Path) -> dict[str, str]:
    """The environment of all steps; unpacks the carried packages and data where they are needed."""
    paths = [*carried_packages(), str(ROOT)]
    sys.path[:0] = paths
    own = {
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        **({} if ON_GPU or not SMALL else {"OMP_NUM_THREADS": "1"}),  # so few examples need no more
        "MPLCONFIGDIR": str(work / "matplotlib"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GPU_CHECK_WORK": str(work),  # for the outputs of the program's commands
        "LENET_SWEEP_DATA": os.environ.get("LENET_SWEEP_DATA") or str(data_folder(work)),
    }
    return {**os.environ, **own}


def carried_packages() -> list[str]:
    """The folder of the carried packages, unpacked, if some are missing in this interpreter."""
    if all(importlib.util.find_spec(name) for name in ("hydra", "mlflow", "distributed")):
        return []
    site = carried("site.tar.xz")
    if site is None:
        print("packages are missing, and there is no .gpu/site.tar.xz; see tools/gpu/README.md")
        return []
    if sys.version_info[:2] != PACKED_FOR:
        print(f"packages are missing, and .gpu is for Python 3.12; this is {sys.version.split()[0]}")
        return []
    unpack(site, ROOT / ".gpu-site")
    return [str(ROOT / ".gpu-site")]


def data_folder(work: Path) -> Path:
    """Where the datasets are: carried ones, unpacked below `work`, or the checkout's own."""
    if SMALL:
        return work / "data"  # the small dataset is part of the package
    if packed := carried("fashion_mnist.tar.xz"):
        unpack(packed, work / "data" / "FashionMNIST" / "raw")
        return work / "data"
    return ROOT / "data"


def carried(name: str) -> Path | None:
    """What `prepare` packed."""
    paths = [ROOT / folder / name for folder in (".gpu", ".gpu-data")]
    return next((path for path in paths if path.is_file()), None)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack `archive`, unless an earlier check did."""
    stamp, state = folder / ".unpacked", f"{archive.stat().st_size} {archive.stat().st_mtime_ns}"
    if stamp.is_file() and stamp.read_text() == state:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    stamp.write_text(state)


def describe_machine() -> dict[str, Any]:
    """The card as nvidia-smi describes it, and packages, CPU and code version as a run records them."""
    try:
        from lenet_sweep.storage.environment import describe_environment

        described = describe_environment(DEVICE, os.cpu_count() or 1, "")
    except ImportError as error:
        return {"gpu": nvidia_smi(), "error": str(error)}
    return {"gpu": nvidia_smi(), **{k: v for k, v in described.items() if k not in ("device", "backend")}}


def nvidia_smi() -> list[dict[str, str]]:
    """What nvidia-smi tells of each GPU; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.split(",") for line in done.stdout.splitlines() if line.strip())
    return [dict(zip(GPU_FIELDS, map(str.strip, row), strict=False)) for row in rows]


if __name__ == "__main__":
    raise SystemExit(main())

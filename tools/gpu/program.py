"""The steps of the GPU check that run the project's commands: python -m tools.gpu.program STEP

`runner` starts them. Each command runs in an empty folder below $GPU_CHECK_WORK, as a user would run it.
"""

import contextlib
import json
import os
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from tools.gpu.record import DATASET, DEVICE, ON_GPU, SMALL, StepRecord

# The tutorial's train losses after 10 epochs (test/acc at lr 0.9: 0.8), as ranges over seeds with some air.
TUTORIAL_LOSS = {0.1: (0.90, 1.15), 0.5: (0.53, 0.57), 0.9: (0.44, 0.49)}
TRAIN_EXAMPLES = 2_000 if SMALL else 60_000
INTERRUPT_S = 4.0  # between Ctrl-C and the end of a command
TO_TRY = ["data=fashion_mnist_mini", "epochs=1"] if SMALL else []
FILES_IN_ORDER = ("config.yaml", "metrics.jsonl", "result.json")  # of a run: its start, epochs, end
UNTRACKED = ["tracking=none"] if SMALL else []


@dataclass(frozen=True)
class Run:
    """What a finished run left in its folder."""

    folder: str
    lr: float
    device: str
    backend: str
    train_loss: float
    test_acc: float
    examples_per_s: float  # the median over epochs


def main() -> int:
    record = StepRecord.from_environment()
    steps: dict[str, Callable[[StepRecord], None]] = {
        step.__name__: step for step in (tests, readme, reproduce, ladder, sweep_fused, sweep_unfused)
    }
    name = sys.argv[1]
    try:
        steps[name](record)
    except Exception as error:
        traceback.print_exc()
        record.note_error(name, error)
    return 1 if record.errors or not all(claim.holds for claim in record.claims) else 0


def tests(record: StepRecord) -> None:
    """Run the tests with the marker gpu. Only files that have such tests are collected."""
    files = [
        str(path)
        for path in sorted(Path("tests").glob("test_*.py"))
        if re.search(r"^@pytest\.mark\.gpu", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    done = run([sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files])
    counts = {
        word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last(done))
    }
    failures = re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", done.stdout, re.MULTILINE)
    record.keep(counts=counts, failures=failures, files=files)
    record.claim("pytest ended with code 0", done.returncode == 0, ", ".join(failures) or last(done))
    if ON_GPU:
        record.claim("no GPU test was skipped", not counts.get("skipped") and counts.get("passed", 0) > 0)
    record.summarize(last(done).strip("= "))


def readme(record: StepRecord) -> None:
    """Run the README's sweep and compare its losses with the tutorial's."""
    folder = work_folder("readme")
    done = command("lr=0.1,0.5,0.9", "-m", *TO_TRY, folder=folder)
    runs, states = finished_runs(folder), states_in_mlflow(folder)
    record.keep(runs=[asdict(each) for each in runs], mlflow=states, exit_code=done.returncode)
    record.claim("the command ended with code 0", done.returncode == 0, last(done))
    record.claim("MLflow has three finished runs", states == {"FINISHED": 3}, f"{states}")
    record.claim("the folders hold three finished runs", [each.lr for each in runs] == sorted(TUTORIAL_LOSS))
    for each in runs:
        if ON_GPU:
            record.claim(f"lr={each.lr} was trained on the GPU", "cuda" in each.device, each.device)
        if not SMALL:
            low, high = TUTORIAL_LOSS[each.lr]
            inside = low <= each.train_loss <= high
            record.claim(f"lr={each.lr}: train loss in [{low}, {high}]", inside, f"{each.train_loss:.3f}")
    losses = ", ".join(f"lr {each.lr}: {each.train_loss:.3f}/{each.test_acc:.3f}" for each in runs)
    kinds = sorted({f"{each.backend} on {each.device}" for each in runs})
    record.summarize(f"train loss/test acc: {losses}", ", ".join(kinds))


def reproduce(record: StepRecord) -> None:
    """Train one run and train it again; then again a member of the README's sweep, if that step has run."""
    folder = work_folder("reproduce")
    done = command("hydra.run.dir=outputs/one", *TO_TRY, *UNTRACKED, folder=folder)
    record.claim("the command ended with code 0", done.returncode == 0, last(done))
    runs = finished_runs(folder)
    again = command("reproduce", "outputs/one", folder=folder)
    record.claim("a run alone is reproduced bit for bit", again.returncode == 0, last(again))
    record.keep(runs=[asdict(each) for each in runs], lines=again.stdout.splitlines()[-10:])
    # Not claimed: a member of an array and the run alone differ by rounding.
    member_code = None
    if members := finished_runs(work_folder("readme")):
        member = command("reproduce", members[-1].folder, folder=work_folder("readme"))
        member_code = member.returncode
        record.keep(member_exit_code=member_code, member_lines=member.stdout.splitlines()[-10:])
    speed = f"{runs[0].examples_per_s:,.0f} examples/s" if runs else ""
    trained_in = f"{members[-1].backend} backend" if members else ""
    record.summarize(
        f"alone: {speed}, exit code {again.returncode}",
        f"member ({trained_in}): exit code {member_code}" if members else "",
    )


def ladder(record: StepRecord) -> None:
    """Compare the tutorial's loop with one run."""
    samples = work_folder("ladder") / "samples.json"
    arguments = ["--device", DEVICE, "--data", DATASET, "--json", str(samples)]
    workers = ["0"] if SMALL else ["0", "4"]
    names = [*(f"loop, {number} DataLoader workers" for number in workers), "backend=torch"]
    arguments += ["--rounds", "1", "--loader-workers", *workers]
    arguments += ["--only", *(f"{name} sigmoid/avg" for name in names)]
    done = run([sys.executable, "-m", "benchmarks.ladder", *arguments])
    record.claim("the command ended with code 0", done.returncode == 0, last(done))
    rungs = json.loads(samples.read_text(encoding="utf-8"))["rungs"]
    rates = {
        f"{rung['network']}, {rung['name']}": statistics.median(
            sample["examples"] / sample["seconds"] for sample in rung["samples"]
        )
        for rung in rungs
        if rung["samples"]
    }
    record.keep(examples_per_s=rates, rungs=rungs, table=done.stdout[max(0, done.stdout.find("┏")) :])
    record.claim(
        "every contender was measured", len(rates) == len(rungs) > 0, f"{len(rates)} of {len(rungs)}"
    )
    record.summarize(*(f"{name}: {rate:,.0f} examples/s" for name, rate in rates.items()))


def sweep_fused(record: StepRecord) -> None:
    """64 runs as one command, as arrays. A CPU makes arrays only if it is told to."""
    sweep(record, "auto" if ON_GPU else "2")


def sweep_unfused(record: StepRecord) -> None:
    """Eight of these runs, each alone."""
    sweep(record, "off", seeds=1)


def sweep(record: StepRecord, fuse: str, seeds: int = 8) -> None:
    """Measure a whole command. If its time is over, it is interrupted, and what it finished counts."""
    folder = work_folder(f"sweep_{fuse}")
    rates = "0.1,0.9" if SMALL else "0.1,0.3,0.5,0.7,0.8,0.9,1.0,1.2"
    seeds, epochs = (1, 1) if SMALL else (seeds, 2)
    runs = seeds * len(rates.split(","))
    grid = [f"lr={rates}", f"seed=range({seeds})", f"epochs={epochs}", f"data={DATASET}", *UNTRACKED]
    began, started = time.time(), time.perf_counter()
    done = command(*grid, f"sweep.fuse={fuse}", "-m", folder=folder, limit_s=record.left_s - 8)
    wall_s = time.perf_counter() - started
    record.keep(timeline_s={name: since(began, folder, name) for name in FILES_IN_ORDER})
    finished = finished_runs(folder)
    rate = len(finished) * epochs * TRAIN_EXAMPLES / wall_s
    record.keep(
        runs=runs, finished=len(finished), epochs=epochs, wall_s=wall_s, exit_code=done.returncode,
        examples_per_s=rate, training_examples_per_s=[each.examples_per_s for each in finished],
        train_loss=[each.train_loss for each in finished], backends=sorted({r.backend for r in finished}),
    )  # fmt: skip
    record.claim("every run finished", len(finished) == runs, f"{len(finished)} of {runs}, {last(done)}")
    record.summarize(
        f"{len(finished)} of {runs} runs x {epochs} epochs in {wall_s:.1f} s",
        f"{rate:,.0f} examples/s in all, {wall_s / max(1, len(finished)):.2f} s a run",
    )


def since(began: float, folder: Path, name: str) -> list[float]:
    """When the first and the last run last wrote the file `name`, in seconds after `began` (a Unix time)."""
    times = [path.stat().st_mtime - began for path in folder.glob(f"outputs/**/{name}")]
    return [round(min(times), 2), round(max(times), 2)] if times else []


# ---------------------------------------------------------------- commands, and what they leave


def command(
    *arguments: str, folder: Path, limit_s: float | None = None
) -> "subprocess.CompletedProcess[str]":
    """`python -m lenet_sweep ARGUMENTS` in `folder`, on the device of the check where one is chosen."""
    chooses_device = arguments[0] != "reproduce"
    device = [f"device={DEVICE}"] if chooses_device else []
    return run([sys.executable, "-m", "lenet_sweep", *arguments, *device], folder, limit_s)


def run(
    arguments: Sequence[str], folder: Path | None = None, limit_s: float | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end, or stop it after `limit_s`; its output is also this step's."""
    print("$", " ".join(arguments), flush=True)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(arguments, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(INTERRUPT_S)
            process.kill()
        code = process.wait()
        file.seek(0)
        output = file.read()
    print(output, flush=True)
    return subprocess.CompletedProcess(list(arguments), code, output, "")


def last(done: "subprocess.CompletedProcess[str]") -> str:
    """The last line of a command's output."""
    return next((line.strip() for line in reversed(done.stdout.splitlines()) if line.strip()), "no output")


def work_folder(name: str) -> Path:
    folder = Path(os.environ["GPU_CHECK_WORK"]) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def finished_runs(folder: Path) -> list[Run]:
    """The finished runs below `folder`, by learning rate."""
    runs = []
    for path in folder.glob("outputs/**/result.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["status"] == "FINISHED":
            runs.append(read_run(path.parent, result["metrics"]))
    return sorted(runs, key=lambda each: each.lr)


def read_run(folder: Path, metrics: dict[str, float]) -> Run:
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Run(
        folder=str(folder),
        lr=float(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["lr"]),
        device=environment["device"],
        backend=environment["backend"],
        train_loss=metrics["train/loss"],
        test_acc=metrics["test/acc"],
        examples_per_s=statistics.median(json.loads(line)["speed/examples_per_s"] for line in lines),
    )


def states_in_mlflow(folder: Path) -> dict[str, int]:
    """How many runs MLflow's database has, by status."""
    database = folder / "mlruns" / "mlflow.db"
    if not database.exists():
        return {}
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return dict(connection.execute("select status, count(*) from runs group by status").fetchall())


if __name__ == "__main__":
    raise SystemExit(main())

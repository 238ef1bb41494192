"""The GPU check: its steps on a CPU with real results, and its bookkeeping."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tools.gpu import packages, runner
from tools.gpu.kernels import Span, utilisation
from tools.gpu.record import StepRecord
from tools.gpu.runner import Outcome, Step

ROOT = Path(runner.__file__).resolve().parents[2]


class Script(Step):
    """A step that is a few lines of Python."""

    @property
    def command(self):
        return [sys.executable, "-c", self.module]


def script(name, code, limit_s=60.0):
    return Script(name, code, limit_s, "")


RECORD = "from tools.gpu.record import StepRecord; record = StepRecord.from_environment(); "


@pytest.fixture
def run_steps(tmp_path):
    """Run scripts as steps; returns their outcomes by name."""

    def run(*steps, seconds=300.0):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        deadline = time.monotonic() + seconds
        outcomes = runner.run_steps(steps, tmp_path, environment, deadline, lambda outcomes: None)
        return {outcome.name: outcome for outcome in outcomes}

    return run


def check(out, *steps, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "tools" / "gpu" / "check"), *steps],
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(out), **environment},
        cwd=out.parent,
        capture_output=True,
        text=True,
        timeout=580,
    )


@pytest.mark.slow
def test_whole_check_passes_on_a_cpu_with_small_sizes(tmp_path):
    out = tmp_path / "out"
    done = check(out, GPU_CHECK_DEVICE="cpu", GPU_CHECK_SMALL="1")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    steps = {step["name"]: step for step in results["steps"]}
    assert list(steps) == [step.name for step in runner.STEPS]
    assert {step["status"] for step in steps.values()} == {"ok"}
    assert results["ok"]
    assert results["environment"]["packages"]["torch"]
    assert (out / "table.txt").read_text().strip() in done.stdout
    with tarfile.open(out / "logs.tar.gz") as tar:
        assert {f"logs/{name}.txt" for name in steps} <= set(tar.getnames())
    values = {name: step["values"] for name, step in steps.items()}
    assert_claims(steps)
    assert_values(values)


def assert_claims(steps):
    """What has to be true was looked at, not only never contradicted."""
    claims = {name: {claim["claim"] for claim in step["claims"]} for name, step in steps.items()}
    assert "products are float32 with precision.tf32=false" in claims["facts"]
    for network in ("sigmoid/avg", "ReLU/max"):
        for what in ("a repeated run", "a resumed run", "a repeated array"):
            assert f"{network}: {what} is bit-identical" in claims["equality"]
    assert "a run alone is reproduced bit for bit" in claims["reproduce"]
    assert {"MLflow has three finished runs", "the folders hold three finished runs"} <= claims["readme"]


def assert_values(values):
    """The numbers are those of a real training of 2,000 examples from ten classes."""
    assert max(values["facts"]["tf32=false"]["relative_errors"].values()) < 1e-5
    assert values["peaks"]["flops_per_example"] == 2_263_920
    assert 1e9 < values["peaks"]["float32_flops"] < 1e14
    assert max(values["equality"]["loss_distance"].values()) < 1e-4
    assert [run["lr"] for run in values["readme"]["runs"]] == [0.1, 0.5, 0.9]
    assert all(2.2 < run["train_loss"] < 2.6 for run in values["readme"]["runs"])
    assert values["reproduce"]["member_exit_code"] == 0  # on a CPU the sweep makes no arrays
    assert {row["width"] for row in values["arrays"]["rows"]} == {1, 2}
    assert all(row["examples_per_s"] > 100 for row in values["arrays"]["rows"])
    assert all(row["kernels_a_step"] > 50 for row in values["profile"]["rows"].values())
    assert len(values["ladder"]["examples_per_s"]) == 2
    losses = [row["train_loss"] for row in values["precision"]["rows"]]
    assert all(1.5 < loss < 3 for loss in losses)
    for name, backend in (("sweep_fused", "fused"), ("sweep_unfused", "native")):
        assert values[name]["finished"] == 2
        assert values[name]["backends"] in ([backend], ["torch"] if backend == "native" else [backend])
    same = zip(values["sweep_fused"]["train_loss"], values["sweep_unfused"]["train_loss"], strict=True)
    assert all(one == pytest.approx(other, abs=1e-4) for one, other in same)


def test_steps_are_selected_by_name_and_keep_their_order():
    assert [step.name for step in runner.select(["arrays", "facts"])] == ["facts", "arrays"]
    assert runner.select([]) == list(runner.STEPS)


def test_unknown_step_is_refused_with_the_known_ones(tmp_path):
    done = check(tmp_path / "out", "arays")
    assert done.returncode != 0
    assert "'arays'" in done.stderr
    assert "arrays" in done.stderr
    assert not (tmp_path / "out").exists()


def test_limits_of_all_steps_fit_into_the_budget_and_into_eight_minutes():
    assert sum(step.limit_s for step in runner.STEPS) <= runner.BUDGET_S < 480


def test_step_may_use_what_the_others_leave_but_not_their_time():
    first, second = script("a", "", 10), script("b", "", 30)
    assert runner.time_limit([first, second], 45) == 15
    assert runner.time_limit([first, second], 500) == 20
    assert runner.time_limit([second], 20) == 20 - runner.GRACE_S
    assert runner.time_limit([first, second], 0) == 0


def test_failed_steps_do_not_stop_the_others_and_say_why(run_steps):
    outcomes = run_steps(
        script("crash", "raise ValueError('no such card')"),
        script("wrong", f"{RECORD}record.summarize('x'); record.claim('2 is 3', False, 'off by 1')"),
        script("partly", f"{RECORD}record.keep(a=1)\nwith record.attempt('b'): 1 / 0\nrecord.summarize('a')"),
        script("silent", "pass"),
        script("fine", f"{RECORD}record.keep(rate=7); record.claim('1 is 1', True); record.summarize('7')"),
    )
    reasons = {name: outcome.reason for name, outcome in outcomes.items()}
    assert reasons == {
        "crash": "exit code 1: ValueError: no such card",
        "wrong": "2 is 3: off by 1",
        "partly": "b: ZeroDivisionError: division by zero",
        "silent": "the step recorded nothing",
        "fine": "",
    }
    assert {name for name, outcome in outcomes.items() if outcome.ok} == {"fine"}
    assert outcomes["fine"].values == {"rate": 7}
    assert outcomes["partly"].values == {"a": 1}


def test_step_beyond_its_limit_is_stopped_with_its_children_and_keeps_its_values(
    run_steps, tmp_path, monkeypatch
):
    monkeypatch.setattr(runner, "LEAST_S", 0.0)
    monkeypatch.setattr(runner, "GRACE_S", 0.5)
    pid_file = tmp_path / "pid"
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(99)"
    code = (
        f"import subprocess, sys, time; {RECORD}record.keep(rate=7); "
        f"process = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        f"open({str(pid_file)!r}, 'w').write(str(process.pid)); time.sleep(99)"
    )
    outcome = run_steps(script("slow", code, limit_s=3), seconds=3.5)["slow"]
    assert (outcome.status, outcome.reason) == ("timed out", "stopped after 3 s")
    assert outcome.exit_code is None
    assert outcome.values == {"rate": 7}
    pid = int(pid_file.read_text())
    deadline = time.monotonic() + 10
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(pid)


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_step_without_time_is_not_run(run_steps):
    outcome = run_steps(script("late", "raise SystemExit('started')"), seconds=2)["late"]
    assert (outcome.status, outcome.reason) == ("not run", "no time left")


def test_failure_is_in_the_files_and_the_exit_code_is_1(tmp_path, monkeypatch):
    steps = (script("good", f"{RECORD}record.summarize('fine')"), script("bad", "raise SystemExit('why')"))
    monkeypatch.setattr(runner, "STEPS", steps)
    monkeypatch.setattr(sys, "argv", ["check"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(runner.signal, "signal", lambda *_: None)
    assert runner.main() == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert not results["ok"]
    assert [(step["name"], step["status"]) for step in results["steps"]] == [
        ("good", "ok"),
        ("bad", "failed"),
    ]
    assert results["steps"][1]["reason"] == "exit code 1: why"
    assert results["steps"][1]["exit_code"] == 1
    assert "exit code 1: why" in (tmp_path / "table.txt").read_text()


def test_table_has_a_row_a_step_and_the_tables_of_steps():
    rows = [
        Outcome("peaks", "ok", "", 12.4, 20, summary="9 TFLOP/s", left_out=["copy"]),
        Outcome("arrays", "failed", "x: y", 60.0, 60, summary="best 7", values={"table": "a b\n1 2\n"}),
    ]
    assert runner.table(rows).splitlines() == [
        "step          status       time  result",
        "peaks         ok           12 s  9 TFLOP/s | 1 left out for want of time",
        "arrays        failed       60 s  x: y | best 7",
        "",
        "arrays:",
        "a b",
        "1 2",
    ]


def test_record_lists_what_there_is_no_time_for():
    record = StepRecord(limit_s=5.0)
    assert record.has_time("a", 1)
    assert not record.has_time("b", 60)
    assert record.left_out == ["b"]


def test_utilisation_counts_kernels_overlaps_and_gaps():
    spans = [Span(50, 70, "FillFunctor"), Span(0, 20, "conv"), Span(10, 30, "conv"), Span(90, 100, "bmm")]
    row = utilisation(spans, steps=2)
    assert row["kernels_a_step"] == 2
    assert row["busy"] == pytest.approx(0.6)
    assert row["median_gap_us"] == pytest.approx(0.02)
    assert row["fills_a_step"] == 0.5
    assert row["heaviest"][0] == {"kernel": "conv", "a_step": 1, "us_a_step": pytest.approx(0.02)}


def test_installed_packages_are_read_with_and_without_versions(tmp_path):
    path = tmp_path / "there.txt"
    path.write_text("# a list\nTorch==2.11.0\n\ntyping_extensions  # any\n")
    assert packages.read_installed(path) == {"torch": "2.11.0", "typing-extensions": None}


def test_packages_that_are_required_and_not_installed_there_are_pinned():
    pins = packages.choose_versions(["hydra-core>=1.3", "torch>=2.9"], {"torch": None, "packaging": None})
    names = {pin.partition("==")[0] for pin in pins}
    assert "hydra-core" in names
    assert any(name.startswith("antlr4") for name in names)  # required by hydra-core
    assert not {"torch", "packaging"} & names


def test_default_list_leaves_nothing_large_to_carry():
    pins = packages.choose_versions(
        packages.project_requirements(), packages.read_installed(packages.INSTALLED)
    )
    names = {packages.normalized(pin.partition("==")[0]) for pin in pins}
    assert {"mlflow", "hydra-core", "distributed"} <= names
    assert not {"torch", "numpy", "scipy", "pyarrow", "playwright"} & names


def test_dataset_survives_packing_and_unpacking(tmp_path):
    raw = ROOT / "lenet_sweep" / "datasets" / "embedded" / "fashion_mnist_mini"
    packages.pack_data(raw, tmp_path / "data.tar.xz")
    runner.unpack(tmp_path / "data.tar.xz", tmp_path / "raw")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "raw").glob("*ubyte")}
    assert sizes["train-images-idx3-ubyte"] == 16 + 2_000 * 28 * 28
    assert set(sizes) == set(packages.FILES)

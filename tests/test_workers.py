"""Sweeps in worker processes: bit-identical to one process, and nothing is lost when a worker dies."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psutil
import pytest
from safetensors.torch import load_file

from lenet_sweep.errors import RunFailed
from lenet_sweep.runs import hardware
from lenet_sweep.runs.hardware import Hardware
from lenet_sweep.shapes import CLASSES, IMAGE_SHAPE, training_flops
from lenet_sweep.storage import metrics_file
from lenet_sweep.sweeps import dask_pool, plan, resources
from lenet_sweep.sweeps.executor import run_serial

# Four runs that end well, and two whose loss does not stay finite.
MIXED = (
    "data=fashion_mnist_mini", "data.train_size=300", "batch_size=32", "model=lenet_relu_max",
    "optimizer=momentum", "lr=0.01,1000,0.03", "epochs=1,2",
)  # fmt: skip


def results(sweep):
    """By the overrides of each run of a sweep: every metric but speed, and the bytes of the weights."""
    by_overrides = {}
    for number, job in enumerate(json.loads((sweep / "sweep.json").read_text())["jobs"]):
        folder = sweep / str(number)
        lines = [metrics_file.parse(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        kept = [{k: v for k, v in line.named().items() if not k.startswith("speed/")} for line in lines]
        saved = folder / "model" / "weights.safetensors"
        weights = load_file(saved) if saved.exists() else {}  # a failed run has none
        overrides = tuple(o for o in job["overrides"] if not o.startswith("sweep."))
        by_overrides[overrides] = (kept, {name: tensor.numpy().tobytes() for name, tensor in weights.items()})
    return by_overrides


def statuses(folder):
    with sqlite3.connect(folder / "mlruns" / "mlflow.db") as connection:
        rows = connection.execute("select status from runs").fetchall()
    connection.close()
    return sorted(status for (status,) in rows)


def latest(folder):
    return max((folder / "outputs" / "sweeps").iterdir())


def wait_for(condition, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
    return value


@pytest.fixture
def start(tmp_path, data_root):
    """Start the command line in `tmp_path` and leave it running; it is killed at the end."""
    started = []

    def begin(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "lenet_sweep", *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def alive(processes):
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def trains(folder):
    """The ids of the processes that are training, each with the folder of its run.

    A run has its metrics.jsonl only when the index knows of it, so that it is resumed if it is killed.
    """
    running = {}
    for note in folder.glob("outputs/sweeps/*/*/tracking.json"):
        has_ended = (note.parent / "result.json").exists()
        if not has_ended and (note.parent / "metrics.jsonl").exists():
            pid = json.loads(note.read_text())["tags"]["pid"]
            running[int(pid)] = note.parent
    return running


LONG = ("data=fashion_mnist_mini", "lr=0.1,0.3", "epochs=2000", "sweep.workers=2")


@pytest.fixture(scope="module")
def swept(tmp_path_factory, put_database, data_root):
    """The folder in which a real process swept `MIXED` in two workers, and how that process ended."""
    here = tmp_path_factory.mktemp("swept")
    put_database(here)
    command = [sys.executable, "-m", "lenet_sweep", *MIXED, "sweep.workers=2", "-m"]
    return here, subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=120)


def test_workers_leave_what_one_process_leaves_to_the_bit(swept, command_in, put_database, tmp_path):
    here, done = swept
    put_database(tmp_path)
    assert command_in(tmp_path, *MIXED, "sweep.workers=1", "-m").returncode == 1
    assert "6 runs in 2 worker processes" in done.stdout
    found = results(latest(here))
    assert found == results(latest(tmp_path))
    assert sum(bool(weights) for _, weights in found.values()) == 4
    for number in range(6):
        assert (latest(here) / str(number) / ".hydra" / "overrides.yaml").exists()
        log = (latest(here) / str(number) / "lenet_sweep.log").read_text()
        assert ("the run failed" if number in (2, 3) else "examples/sec on cpu") in log


def test_what_runs_in_workers_say_is_labelled_and_counted(swept):
    _, done = swept
    for label in ("[1/6] lr=0.01 epochs=1", "[5/6] lr=0.03 epochs=1"):
        assert f"{label}: training on cpu (" in done.stdout
        assert re.search(rf"{re.escape(label)}  epoch 1/1  train loss \d", done.stdout)
    told = re.findall(r"^(\d) of 6 runs(?:, (\d) failed)?, about \d+:\d\d left$", done.stdout, re.MULTILINE)
    assert [ended for ended, _ in told] == list("12345")
    assert list(dict.fromkeys(failed for _, failed in told if failed)) in (["1"], ["1", "2"])


def test_failed_run_in_a_worker_stops_no_other_and_is_told_with_its_reason(swept):
    here, done = swept
    assert done.returncode == 1
    assert statuses(here) == ["FAILED"] * 2 + ["FINISHED"] * 4
    assert re.search(r"run 3 \(.*lr=1000.*\): the loss became \w+ in epoch \d", done.stdout)
    assert "Traceback" not in done.stdout
    assert done.stderr == "error: 2 of 6 runs failed\n"


@pytest.mark.slow
def test_killed_worker_costs_nothing_its_group_is_tried_again(start, tmp_path):
    process = start(*LONG, "epochs=60", "-m")
    victims = wait_for(lambda: trains(tmp_path) if len(trains(tmp_path)) == 2 else None)
    pid, folder = min(victims.items())
    wait_for((folder / "checkpoint.safetensors").exists)
    os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert statuses(tmp_path) == ["FINISHED"] * 2
    assert re.search(rf"resuming after epoch \d+ of .*{folder.name}$", output, re.MULTILINE)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 60


@pytest.mark.slow
def test_run_whose_worker_dies_twice_is_given_up_and_the_others_end(start, tmp_path):
    process = start(*LONG, "epochs=300", "-m")
    victims = wait_for(lambda: trains(tmp_path) if len(trains(tmp_path)) == 2 else None)
    pid, folder = min(victims.items())
    os.kill(pid, signal.SIGKILL)
    second = wait_for(
        lambda: [other for other, at in trains(tmp_path).items() if at == folder and other != pid]
    )
    os.kill(second[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "its worker process died twice" in output
    assert statuses(tmp_path) == ["FINISHED", "KILLED"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_sweep_saves_the_state_of_all_its_workers_runs(start, cli, tmp_path, how):
    process = start(*LONG, "-m")
    wait_for(lambda: len(list(tmp_path.glob("outputs/sweeps/*/*/checkpoint.safetensors"))) == 2)
    children = psutil.Process(process.pid).children(recursive=True)
    (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)  # as a terminal, and as `kill` does
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert statuses(tmp_path) == ["KILLED"] * 2
    assert not alive(children)
    reached = [len(path.read_text().splitlines()) for path in latest(tmp_path).glob("*/metrics.jsonl")]
    done = cli(*LONG, "sweep.dry_run=true", "-m")
    assert done.stdout.count("resume (interrupted; checkpoint in") == 2
    assert min(reached) >= 1


@pytest.mark.slow
def test_workers_of_a_killed_sweep_end_and_their_runs_can_be_gone_on_with(start, cli, tmp_path):
    process = start(*LONG, "-m")
    wait_for(lambda: len(list(tmp_path.glob("outputs/sweeps/*/*/checkpoint.safetensors"))) == 2)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_for(lambda: not alive(children), 20)
    done = cli(*LONG, "sweep.dry_run=true", "-m")
    assert done.stdout.count("resume (interrupted; checkpoint in") == 2


@pytest.mark.slow
def test_sweep_listens_on_loopback_only_and_to_nobody_else(start, tmp_path):
    process = start(*LONG, "-m")
    wait_for(lambda: len(trains(tmp_path)) == 2)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    listening = [
        connection.laddr
        for member in family
        for connection in member.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert {address.ip for address in listening} == {"127.0.0.1"}

    def knock(port):
        stranger = f"import distributed as d; d.Client('tcp://127.0.0.1:{port}', timeout=3); print('in')"
        return subprocess.run(
            ["timeout", "20", sys.executable, "-c", stranger], capture_output=True, text=True, timeout=60
        )

    with ThreadPoolExecutor() as pool:
        for done in pool.map(knock, [address.port for address in listening]):
            assert done.returncode
            assert done.stdout == ""


def test_as_many_workers_as_asked_for_but_no_more_than_groups(make_config):
    jobs = [replace(make_config("sweep.workers=7"), seed=seed) for seed in range(3)]
    assert resources.choose_worker_count(jobs, plan.group_jobs(jobs), hardware.here()) == 3


@pytest.mark.parametrize(
    ("seeds", "overrides", "expected"),
    [
        (2, [], 1),  # a short sweep: starting workers would cost more than they save
        (40, [], 8),
        (40, ["threads=4"], 2),
        (20, ["data=fashion_mnist_mini"], 1),
        (40, ["backend=torch"], 1),  # results depend on the number of threads
        (40, ["backend=torch", "threads=2"], 4),
    ],
)
def test_workers_are_as_many_as_pay_off(make_config, seeds, overrides, expected):
    jobs = [replace(make_config(*overrides), seed=seed) for seed in range(seeds)]
    eight_cores = Hardware(cores=8, gpus=0, free_bytes=64 << 30)
    assert resources.choose_worker_count(jobs, plan.group_jobs(jobs), eight_cores) == expected


def test_no_worker_is_left_alone_with_a_long_group(make_config):
    # Two workers would train the third group with one core idle; one process uses both cores for each group.
    two_cores = Hardware(cores=2, gpus=0, free_bytes=64 << 30)
    jobs = [replace(make_config("epochs=40"), seed=seed) for seed in range(10)]
    assert resources.choose_worker_count(jobs[:3], plan.group_jobs(jobs[:3]), two_cores) == 1
    assert resources.choose_worker_count(jobs, plan.group_jobs(jobs), two_cores) == 2


def test_each_gpu_gets_a_worker(make_config):
    four_gpus = Hardware(cores=8, gpus=4, free_bytes=64 << 30)
    jobs = [replace(make_config(), seed=seed) for seed in range(6)]
    assert resources.choose_worker_count(jobs, plan.group_jobs(jobs), four_gpus) == 4
    assert resources.choose_worker_count(jobs[:2], plan.group_jobs(jobs[:2]), four_gpus) == 2


@pytest.mark.parametrize("threads", [1, 4])
def test_time_of_a_group_follows_from_its_floating_point_operations(make_config, threads):
    # Amdahl's law: the serial share does not shrink with more threads.
    jobs = [make_config("epochs=3", "data.train_size=1000")]
    (group,) = plan.group_jobs(jobs)
    alone_s = 3 * 1000 * training_flops(jobs[0].model, IMAGE_SHAPE, CLASSES) / resources._CORE_FLOPS
    serial = resources._SERIAL_SHARE
    expected = resources._JOB_S + alone_s * (serial + (1 - serial) / threads)
    assert resources._group_s(jobs, group, threads) == pytest.approx(expected, rel=1e-12)
    assert 0 < serial < 1


@pytest.mark.parametrize(
    ("gpus", "overrides", "width"),
    [
        (1, [], 5),  # all in one array
        (2, [], 3),  # half for each GPU, rounded up
        (0, [], 1),
        (2, ["device=cpu"], 1),
        (2, ["backend=torch"], 1),
        (2, ["sweep.fuse=off"], 1),
        (0, ["sweep.fuse=4"], 4),
    ],
)
def test_arrays_are_as_wide_as_the_gpus_need(make_config, gpus, overrides, width):
    jobs = [replace(make_config(*overrides), seed=seed) for seed in range(5)]
    assert resources.array_width(jobs, Hardware(cores=8, gpus=gpus, free_bytes=1 << 34)) == width


def test_in_one_process_every_group_gets_its_own_answer():
    assert dict(run_serial(abs, [-3, 4])) == {0: 3, 1: 4}


@pytest.mark.slow
def test_in_workers_every_group_gets_its_own_answer_and_one_that_kills_its_workers_fails_alone():
    answers = dict(dask_pool.run_parallel(_die_of_seven, [1, 7, 2, 4], 2))
    failure = answers.pop(1)
    assert answers == {0: -1, 2: -2, 3: -4}
    assert isinstance(failure, RunFailed)


def _die_of_seven(number):
    if number == 7:
        os._exit(1)
    return -number

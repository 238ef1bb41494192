"""What the ladder compares is the same work, and its roof is counted from the network's shapes."""

import importlib
import itertools
import json
import multiprocessing
import os
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F

from benchmarks import bars, ladder, measurement, overhead, scaling, tutorial
from benchmarks.contenders import Array, Lightning, Loop, Sample, Setting, Step, Sweep, Tutorial
from benchmarks.measurement import Cost, Peak
from benchmarks.rungs import Ladder, Rung
from lenet_sweep import shapes
from lenet_sweep.shapes import CLASSES, IMAGE_SHAPE
from lenet_sweep.training import model
from lenet_sweep.training.randomness import generator


def test_operations_of_a_lenet_step_are_those_counted_by_hand(make_config):
    forward = 784 * 6 * 25 + 100 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10
    first_input = 784 * 6 * 25
    assert (
        shapes.training_flops(make_config().model, IMAGE_SHAPE, CLASSES)
        == 2 * (3 * forward - first_input)
        == 2_263_920
    )


@pytest.mark.parametrize("preset", ["lenet", "lenet_relu_max"])
def test_the_tutorials_network_is_ours_but_for_rounding(make_config, preset):
    ours = model.build(make_config(f"model={preset}").model, generator(0, "init")).double()
    theirs = tutorial.network(relu_max=preset == "lenet_relu_max").double()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        other.data.copy_(mine.data)
    images, labels = torch.rand(32, 1, 28, 28, dtype=torch.float64), torch.arange(32) % 10
    outcomes = []
    for network in (ours, theirs):
        loss = F.cross_entropy(network(images), labels)
        outcomes.append([loss, *torch.autograd.grad(loss, list(network.parameters()))])
    torch.testing.assert_close(*outcomes, rtol=1e-10, atol=1e-14)


def test_the_tutorials_loop_learns(monkeypatch, data_root):
    monkeypatch.setenv("LENET_SWEEP_DATA", str(data_root))
    folder = tutorial.raw_folder("fashion_mnist_mini")
    pictures = tutorial.Pictures(folder, "t10k")
    image, label = pictures[0]
    assert image.shape == (1, 28, 28)
    assert 0 <= image.min() < image.max() <= 1
    assert label == 9
    monkeypatch.setattr(
        tutorial, "Pictures", lambda root, prefix: torch.utils.data.Subset(pictures, range(256))
    )
    torch.manual_seed(0)
    net = tutorial.network(relu_max=True)
    trained = tutorial.epochs(net, folder, 0.1, 0, torch.device("cpu"))
    losses = [loss for loss, *_ in itertools.islice(trained, 20)]
    assert losses[-1] < 0.8 * losses[0]


def test_every_function_that_the_overhead_is_measured_of_exists():
    calls = [call for calls in overhead.PARTS.values() for call in calls]
    assert [name for owner, name in calls if not callable(getattr(owner, name, None))] == []


def test_parts_of_a_job_add_up_to_its_time_with_nested_ones_counted_once():
    module = types.ModuleType("module")
    module.inner = lambda: time.sleep(0.02)
    module.outer = lambda: (time.sleep(0.03), module.inner())
    module.job = lambda: (module.outer(), module.inner())
    clock = overhead.Clock()
    clock.time(module, "inner", "in")
    clock.time(module, "outer", "out")
    clock.time_jobs(module, "job")
    module.inner()  # before the first job: nobody's
    started = time.perf_counter()
    for _ in range(2):
        module.job()
    took = time.perf_counter() - started
    assert len(clock.jobs) == 2
    for job in clock.jobs:
        assert job["in"] >= 0.04
        assert job["out"] >= 0.03
    assert sum(job.total() for job in clock.jobs) == pytest.approx(took, abs=0.01)


SMALL = Setting("cpu", 1, "fashion_mnist_mini")


@pytest.mark.parametrize(
    ("recipe", "examples"),
    [
        (Tutorial(SMALL, "sigmoid/avg", 0), 2_000),
        (Step(SMALL, "ReLU/max", "torch"), 2_000),
        (Step(SMALL, "ReLU/max", "native"), 2_000),
        (Array(SMALL, "sigmoid/avg", 3), 6_000),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_loop_yields_an_epoch_after_another(monkeypatch, data_root, recipe, examples):
    monkeypatch.setenv("LENET_SWEEP_DATA", str(data_root))
    for sample in itertools.islice(recipe.epochs(), 2):
        assert sample.examples == examples
        assert sample.seconds > 0
        assert sample.train_rate is None or sample.train_rate > sample.rate


def test_members_of_an_array_are_counted_together(monkeypatch, data_root):
    monkeypatch.setenv("LENET_SWEEP_DATA", str(data_root))
    sample = next(Array(SMALL, "sigmoid/avg", 2).epochs())
    assert sample.examples == 2 * 2_000
    assert sample.train_rate > sample.rate  # both of all members: the test pass comes on top


@pytest.mark.slow
def test_lightning_takes_the_tutorials_steps_in_a_process_that_ends_with_it(monkeypatch, data_root):
    monkeypatch.setenv("LENET_SWEEP_DATA", str(data_root))
    loop = Loop(Lightning(SMALL, "ReLU/max", 0))
    try:
        first, second = loop.warm_up(), loop.take()
        # DataLoaders start their workers as for everybody, not as this process was started.
        of_loaders = loop._process.submit(multiprocessing.get_start_method).result()
        mine, other = (
            loop._process.submit(epochs_of_one_batch, name).result()
            for name in ("tutorial", "lightning_loop")
        )
    finally:
        loop.close()
    assert of_loaders == multiprocessing.get_context().get_start_method()
    assert first.examples == second.examples == 2_000
    assert first.peak.all_mib > first.peak.largest_mib > 100
    assert not psutil.pid_exists(loop._pid)
    assert mine == [pytest.approx(numbers, rel=1e-3) for numbers in other]
    assert mine[-1][0] < mine[0][0]


def epochs_of_one_batch(name):
    """Loss and both accuracies of some epochs; the order in a single batch changes only rounding."""
    module = importlib.import_module(f"benchmarks.{name}")
    pictures = torch.utils.data.Subset(
        tutorial.Pictures(tutorial.raw_folder("fashion_mnist_mini"), "train"), range(256)
    )
    module.Pictures = lambda root, prefix: pictures
    torch.manual_seed(0)
    trained = module.epochs(tutorial.network(relu_max=True), Path(), 0.1, 0, torch.device("cpu"))
    return [numbers[:3] for numbers in itertools.islice(trained, 5)]


class Fake:
    """Takes samples of given seconds; None stands for Ctrl-C."""

    def __init__(self, name, network, *seconds):
        self.name, self.network, self.is_closed = name, network, False
        self._seconds = iter(seconds)

    def warm_up(self):
        return Sample(100.0, 60_000, None, Peak(700.0, 500.0))

    def take(self):
        seconds = next(self._seconds)
        if seconds is None:
            raise KeyboardInterrupt
        return Sample(seconds, 60_000, 60_000 / (0.9 * seconds))

    def close(self):
        self.is_closed = True


@pytest.fixture
def climb(monkeypatch, tmp_path):
    """Run the ladder's command with fakes for contenders; return its exit code and its JSON file."""

    def run(*fakes, options=("--rounds", "3")):
        monkeypatch.setattr(ladder, "contenders", lambda *_: list(fakes))
        monkeypatch.setattr(ladder, "matmul_rate", lambda _: 2_263_920 * 100_000)
        monkeypatch.setattr(measurement, "warm_up", lambda *_: None)
        file = tmp_path / "ladder.json"
        monkeypatch.setattr(sys, "argv", ["ladder", *options, "--device", "cpu", "--json", str(file)])
        return ladder.main(), json.loads(file.read_text())

    return run


def test_contenders_take_turns_and_the_first_does_not_count(climb, capsys):
    fakes = Fake("tutorial's loop, 0", "ReLU/max", 10, 12, 8), Fake("fast", "ReLU/max", 1, 2, 1)
    code, written = climb(*fakes)
    said = capsys.readouterr().err.splitlines()
    assert code == 0
    assert [line.partition(",")[0] for line in said] == [f"round {n} of 3" for n in range(4) for _ in fakes]
    assert ["fast" in line for line in said] == [False, True] * 4
    assert said[0].endswith("more than 5.0 min left")
    assert said[-1].endswith("about 0.0 min left")
    assert [[sample["seconds"] for sample in rung["samples"]] for rung in written["rungs"]] == [
        [10, 12, 8], [1, 2, 1],
    ]  # fmt: skip
    assert len(written["roofs"]) == 3
    assert written["machine"]["cpu_count"] == os.cpu_count()
    assert all(fake.is_closed for fake in fakes)


def test_table_shows_medians_ranges_and_shares(climb, capsys):
    climb(Fake("tutorial's loop, 0", "ReLU/max", 10, 12, 8), Fake("fast", "ReLU/max", 1, 2, 1))
    rows = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    slow, fast = (row[3:-1] for row in rows if len(row) > 5)
    assert slow == ["6,667 (5,556 to 8,333)", "6,000 (5,000 to 7,500)", "1.00", "6.7%", "700", "500"]
    assert fast == ["66,667 (33,333 to 66,667)", "60,000 (30,000 to 60,000)", "10.00", "66.7%", "700", "500"]


def test_interrupted_ladder_shows_what_it_has(climb, capsys):
    fakes = Fake("quick", "ReLU/max", 1, 1), Fake("slow", "ReLU/max", 10, None)
    code, written = climb(*fakes)
    shown = capsys.readouterr()
    assert code == 130
    assert "interrupted" in shown.err
    assert "60,000 (60,000 to 60,000)" in shown.out
    assert [len(rung["samples"]) for rung in written["rungs"]] == [2, 1]
    assert all(fake.is_closed for fake in fakes)


def test_only_chooses_by_words_and_names_what_there_is(climb):
    fakes = Fake("quick", "ReLU/max", 1), Fake("slow", "sigmoid/avg", 1)
    _, written = climb(*fakes, options=("--rounds", "1", "--only", "sigmoid"))
    assert [rung["name"] for rung in written["rungs"]] == ["slow"]
    with pytest.raises(SystemExit, match=r"(?s)no contender is called that.*quick\nslow"):
        climb(*fakes, options=("--only", "quikc"))


def test_picture_has_a_bar_for_each_rung_and_the_machines_name(climb, tmp_path):
    fakes = [
        Fake("tutorial's loop, 0", "ReLU/max", 10, 12, 8),
        Fake("fast", "sigmoid/avg", 1, 2, 1),
        Fake("sweep, x", "sigmoid/avg", 5, 5, 5),
    ]
    for name in ("ladder.png", "ladder.svg"):
        for fake in fakes:
            fake._seconds = itertools.repeat(2)
        climb(*fakes, options=("--rounds", "3", "--picture", str(tmp_path / name)))
        assert (tmp_path / name).stat().st_size > 10_000
    rungs = [Rung(f.name, f.network, [Sample(s, 60_000) for s in (2, 4, 3)]) for f in fakes]
    found = Ladder(rungs, [1e11])
    (axes,) = bars.draw(found, measurement.machine("test")).axes
    assert [bar.get_width() for bar in axes.patches] == [20_000] * 3
    assert [label.get_text() for label in axes.get_yticklabels()] == [fake.name for fake in fakes]
    assert f"{os.cpu_count()} cores" in axes.get_title(loc="left")


def test_what_is_not_installed_is_left_out_and_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "hydra_plugins.hydra_joblib_launcher", None)
    names = [each.name for each in ladder.contenders(SMALL, [0, 4], [8], 2)]
    said = capsys.readouterr().err.splitlines()
    assert not any("Lightning" in name or "joblib" in name for name in names)
    assert sum("4 DataLoader workers" in name for name in names) == 2
    assert sum("8 runs as one array" in name for name in names) == 2
    assert [line.partition(":")[0] for line in said] == ["Lightning", "hydra/launcher=joblib"]
    assert all("pip install -e '.[bench]'" in line for line in said)


def test_a_sweep_is_a_command_whose_runs_are_counted_together(monkeypatch):
    commands = []

    def take(command):
        commands.append(command)
        return Cost(10.0, Peak(1500.0, 700.0))

    monkeypatch.setattr(measurement, "take", take)
    sample = Sweep(SMALL, ("sweep.workers=2",), 5).take()
    assert sample.examples == 4 * 5 * 2_000
    assert (sample.seconds, sample.peak) == (10.0, Peak(1500.0, 700.0))
    assert {"lenet_sweep", "data=fashion_mnist_mini", "epochs=5", "sweep.workers=2", "-m"} <= {*commands[0]}


@pytest.mark.slow
def test_a_sweep_through_each_launcher_runs(monkeypatch, data_root):
    monkeypatch.setenv("LENET_SWEEP_DATA", str(data_root))
    for launcher in ladder.launchers():
        sample = Sweep(SMALL, launcher, 1).take()
        assert sample.examples == 8_000
        assert sample.peak.all_mib >= sample.peak.largest_mib > 100


def test_shared_memory_is_counted_once(monkeypatch):
    monkeypatch.setattr(measurement, "_LOOK_EVERY_S", 0.05)
    code = "import os, time; x = b'x' * (200 << 20); os.fork(); time.sleep(0.5)"
    cost = measurement.take(["timeit", "-n1", "-r1", code])
    assert cost.wall_s > 0.5
    assert 200 < cost.peak.all_mib < 300
    assert cost.peak.all_mib > cost.peak.largest_mib


def test_a_command_that_fails_is_no_measurement():
    with pytest.raises(SystemExit, match="timeit -n1 1/0: ended with code 1"):
        measurement.take(["timeit", "-n1", "1/0"])


def test_nothing_outlives_an_interrupted_measurement(monkeypatch):
    started = []

    def interrupt(pid, _):
        started.append(psutil.Process(pid))
        while not started[0].children():
            time.sleep(0.05)  # it forks when it has imported what it needs
        started.extend(started[0].children())
        raise KeyboardInterrupt

    monkeypatch.setattr(measurement, "watch", interrupt)
    code = "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); os.fork(); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        measurement.take(["timeit", "-n1", "-r1", code])
    assert len(started) == 2
    deadline = time.monotonic() + 10
    while living := [
        p for p in psutil.process_iter(["status"]) if p in started and p.info["status"] != "zombie"
    ]:
        assert time.monotonic() < deadline, living
        time.sleep(0.05)


def test_scaling_shows_medians_and_ranges_of_time_and_memory(capsys):
    costs = [Cost(float(wall), Peak(1000.0 * wall, 500.0)) for wall in (3, 1, 2)]
    measurement.show(scaling.table([scaling.Sweep("1 run x 10 epochs", costs)]))
    shown = capsys.readouterr().out
    for words in ("2.0 (1.0 to 3.0)", "2,000.0 (1,000.0 to 3,000.0)", "500.0 (500.0 to 500.0)"):
        assert words in shown

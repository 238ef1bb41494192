"""What the ladder compares is the same work, and its roof is counted from the network's shapes."""

import itertools
import time
import types

import pytest
import torch
import torch.nn.functional as F

from benchmarks import overhead, tutorial
from lenet_sweep import model, shapes
from lenet_sweep.config import CLASSES, IMAGE_SHAPE
from lenet_sweep.randomness import generator


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
    pictures = tutorial.Pictures(tutorial.raw_folder(), "t10k")
    image, label = pictures[0]
    assert image.shape == (1, 28, 28)
    assert 0 <= image.min() < image.max() <= 1
    assert label == 9
    monkeypatch.setattr(
        tutorial, "Pictures", lambda root, prefix: torch.utils.data.Subset(pictures, range(512))
    )
    torch.manual_seed(0)
    net = tutorial.network(relu_max=True)
    losses = [loss for loss, *_ in itertools.islice(tutorial.epochs(net, tutorial.raw_folder(), 0.1, 0), 12)]
    assert losses[-1] < 0.8 * losses[0]


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

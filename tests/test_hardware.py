"""What a machine has to train with: counted without torch, as far as a process may use it."""

import os

import pytest

from lenet_sweep.runs import hardware
from lenet_sweep.runs.hardware import Hardware


@pytest.fixture
def gpus(monkeypatch):
    """The number of GPUs that are counted with so many installed, and `CUDA_VISIBLE_DEVICES` set so."""

    def count(installed, visible=None):
        names = [f"/dev/nvidia{i}" for i in range(installed)]
        monkeypatch.setattr(hardware.Path, "glob", lambda path, pattern: iter(names))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return hardware.here().gpus

    return count


@pytest.mark.parametrize(
    ("installed", "visible", "expected"),
    [
        (0, None, 0),
        (2, None, 2),
        (4, "1,3", 2),
        (4, "", 0),
        (1, "0,1,2", 1),
        (2, "0, ", 1),
        (4, "-1", 0),
        (4, "1,-1,2", 1),
    ],
)
def test_gpus_are_those_that_are_installed_and_visible(gpus, installed, visible, expected):
    assert gpus(installed, visible) == expected


def test_cores_are_those_that_the_process_may_use():
    assert hardware.here().cores == len(os.sched_getaffinity(0))
    assert hardware.here().free_bytes > 1 << 20


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [("auto", 0, False), ("auto", 1, True), ("cpu", 1, False), ("cuda:1", 0, True), ("cuda", 2, True)],
)
def test_config_trains_on_a_gpu_if_it_says_so_or_may(make_config, device, gpus, expected):
    assert Hardware(2, gpus, 1).trains_on_gpu(make_config(f"device={device}")) is expected

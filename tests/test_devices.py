"""Which device a run trains on, how it computes, and how work is shared between threads."""

import os
import threading
import time

import pytest
import torch

from lenet_sweep.config.schema import PrecisionConfig
from lenet_sweep.errors import DeviceError
from lenet_sweep.training import devices
from lenet_sweep.training.threads import ThreadTeam, torch_threads

SHARES = [(1, 1, 1), (2, 2, 1), (3, 3, 1), (5, 4, 1), (6, 3, 2), (16, 4, 4)]


@pytest.mark.parametrize(("threads", "size", "share"), SHARES)
def test_team_works_side_by_side_each_with_its_share_of_the_threads(threads, size, share):
    team, together = ThreadTeam(threads), threading.Barrier(size)

    def work(part, other):
        together.wait(timeout=10)  # would break if one came after the other
        return part + other, torch.get_num_threads()

    before = torch.get_num_threads()
    results = team.map(work, range(size), range(0, 10 * size, 10))
    assert results == [(11 * i, share) for i in range(size)]
    assert torch.get_num_threads() == before


def test_team_shares_more_parts_than_it_has_threads():
    def work(part):
        return part, threading.get_ident()

    parts, threads = zip(*ThreadTeam(2).map(work, range(5)), strict=True)
    assert parts == (0, 1, 2, 3, 4)
    assert threads[0] == threads[2] == threads[4] == threading.get_ident()
    assert threads[1] == threads[3] != threads[0]


@pytest.mark.parametrize("bad", range(3))
def test_what_a_part_raises_reaches_the_caller_when_no_part_is_worked_on_any_more(bad):
    working = []

    def work(part):
        working.append(part)
        if part == bad:
            raise ValueError(f"part {part}")
        time.sleep(0.1)
        working.remove(part)

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match=f"part {bad}"):
        ThreadTeam(2).map(work, range(8))
    assert working == [bad]
    assert torch.get_num_threads() == before


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two CUDA GPUs, as far as torch can be asked; the preferred one is the first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Fake")
    monkeypatch.setattr(devices, "_preferred_gpu", 0)


def test_gpus_are_resolved_by_index_or_by_preference(two_gpus):
    assert devices.resolve("auto") == devices.resolve("cuda") == torch.device("cuda", 0)
    assert devices.resolve("cuda:1") == torch.device("cuda", 1)
    devices.prefer_gpu(3)  # counted round: the second of two
    assert devices.resolve("auto") == devices.resolve("cuda") == torch.device("cuda", 1)
    assert devices.resolve("cuda:0") == torch.device("cuda", 0)
    assert devices.resolve("cpu") == torch.device("cpu")
    with pytest.raises(DeviceError, match=r"device='cuda:2'.*cuda:0, cuda:1"):
        devices.resolve("cuda:2")


def test_devices_that_are_not_there_are_refused_and_auto_takes_what_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    assert devices.resolve("auto") == torch.device("cpu")
    with pytest.raises(DeviceError, match=r"device='cuda'.*none"):
        devices.resolve("cuda")
    with pytest.raises(DeviceError, match="device='mps'"):
        devices.resolve("mps")
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    assert devices.resolve("auto") == devices.resolve("mps") == torch.device("mps")
    devices.prefer_gpu(1)  # without a GPU there is nothing to prefer
    assert devices.resolve("cpu") == torch.device("cpu")


def test_devices_are_described_for_people(two_gpus):
    assert devices.describe(torch.device("cuda", 1)) == "cuda:1 (NVIDIA Fake)"
    assert devices.describe(torch.device("mps")) == devices.describe(torch.device("mps", 0)) == "mps"
    with torch_threads(1):
        assert devices.facts(torch.device("cpu")) == ("cpu (1 thread)", 1)
    with torch_threads(2):
        assert devices.facts(torch.device("cpu")) == ("cpu (2 threads)", 2)


@pytest.fixture
def arithmetic():
    """Put back how torch computes."""
    kept = torch.get_num_threads(), torch.backends.cuda.matmul.fp32_precision
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_num_threads(kept[0])
    torch.utils.deterministic.fill_uninitialized_memory = fills
    for switch in (torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.cudnn.conv):
        switch.fp32_precision = kept[1]


@pytest.mark.parametrize(("tf32", "expected"), [(False, "ieee"), (True, "tf32")])
def test_arithmetic_is_what_the_config_says(arithmetic, tf32, expected):
    devices.set_arithmetic(3, PrecisionConfig(tf32=tf32, amp=False))
    assert torch.get_num_threads() == 3
    assert torch.backends.cuda.matmul.fp32_precision == expected
    assert torch.backends.cudnn.fp32_precision == torch.backends.cudnn.conv.fp32_precision == expected
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    devices.set_arithmetic("auto", PrecisionConfig(tf32=False, amp=False))
    assert torch.get_num_threads() == devices._default_threads


@pytest.mark.parametrize("cuda", [True, False])
def test_kernels_are_chosen_deterministically_where_there_is_a_gpu(arithmetic, monkeypatch, cuda):
    calls = []
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch's default
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *a, **k: calls.append((a, k)))
    devices.set_arithmetic(1, PrecisionConfig(tf32=False, amp=False))
    assert calls == ([((True,), {"warn_only": True})] if cuda else [])
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if cuda else None)
    assert torch.utils.deterministic.fill_uninitialized_memory == (not cuda)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

"""Which device is taken is shown by test_engine and test_cli; here, how work is shared between threads."""

import threading

import pytest
import torch

from lenet_sweep import devices


@pytest.mark.parametrize(("threads", "size", "share"), [(1, 1, None), (2, 2, 1), (3, 3, 1), (9, 4, 2)])
def test_team_works_side_by_side_each_with_its_share_of_the_threads(threads, size, share):
    team, together = devices.Team(threads), threading.Barrier(size)

    def work(part, other):
        together.wait(timeout=10)  # would break if one came after the other
        return part + other, torch.get_num_threads()

    before = torch.get_num_threads()
    results = team.map(work, range(size), range(0, 10 * size, 10))
    assert results == [(11 * i, share or before) for i in range(size)]
    assert torch.get_num_threads() == before


def test_team_shares_more_parts_than_it_has_threads():
    def work(part):
        return part, threading.get_ident()

    parts, threads = zip(*devices.Team(2).map(work, range(5)), strict=True)
    assert parts == (0, 1, 2, 3, 4)
    assert threads[0] == threads[2] == threads[4] == threading.get_ident()
    assert threads[1] == threads[3] != threads[0]


def test_what_a_part_raises_reaches_the_caller():
    def work(part):
        raise ValueError(f"part {part}")

    for threads in (1, 2):
        with pytest.raises(ValueError, match="part 0"):
            devices.Team(threads).map(work, range(2))

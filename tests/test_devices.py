"""Which device is taken is shown by test_engine and test_cli; here, how work is shared between threads."""

import threading
import time

import pytest
import torch

from lenet_sweep.training.threads import ThreadTeam

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

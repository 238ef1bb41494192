"""The plan: every job is in one group, trajectories are in order, arrays hold compatible jobs."""

import itertools

from lenet_sweep.storage import fingerprint
from lenet_sweep.sweeps import plan
from lenet_sweep.tracking.mlflow_store import MlflowStore


def indices(groups):
    return sorted(i for group in groups for wave in group.waves for i in wave)


def test_jobs_that_differ_only_in_epochs_are_one_group_from_the_shortest_to_the_longest(make_config):
    jobs = [make_config(f"lr={lr}", f"epochs={n}") for lr, n in itertools.product((0.1, 0.5), (20, 5, 10))]
    groups = plan.group_jobs(jobs)
    assert [group.waves for group in groups] == [((1,), (2,), (0,)), ((4,), (5,), (3,))]
    assert groups[0].costs == {1: 5, 2: 5, 0: 10}
    assert [group.cost for group in groups] == [20, 20]  # the longest, not the sum


def test_jobs_whose_schedule_depends_on_their_end_cost_their_sum(make_config):
    jobs = [make_config("schedule=cosine", f"epochs={n}") for n in (5, 10)]
    assert [group.waves for group in plan.group_jobs(jobs)] == [((0,),), ((1,),)]
    assert sum(group.cost for group in plan.group_jobs(jobs)) == 15


def test_arrays_hold_at_most_width_trajectories_with_equal_keys(make_config):
    jobs = [
        make_config(f"model={model}", f"seed={seed}", f"epochs={n}")
        for model, seed, n in itertools.product(("lenet", "lenet_relu_max"), range(3), (1, 2))
    ]
    groups = plan.group_jobs(jobs, width=2)
    assert [group.waves for group in groups] == [
        ((0, 2), (1, 3)),  # two seeds at once, their longer runs after their shorter ones
        ((4,), (5,)),
        ((6, 8), (7, 9)),
        ((10,), (11,)),
    ]
    for group in groups:
        for wave in group.waves:
            assert len({plan.array_key(jobs[i]) for i in wave}) == 1
            assert len({fingerprint.trajectory_hash(jobs[i]) for i in wave}) == len(wave)
    assert indices(groups) == list(range(12))


def test_job_given_twice_is_never_in_one_array_with_itself(make_config):
    jobs = [make_config(f"seed={seed}") for seed in (0, 1, 0)]
    assert plan.group_jobs(jobs, width=8)[0].waves == ((0, 1), (2,))
    assert indices(plan.group_jobs(jobs)) == [0, 1, 2]


def test_each_store_is_queried_once_and_not_for_jobs_to_rerun(make_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    queries = []
    monkeypatch.setattr(
        MlflowStore, "finished", lambda store, hashes: queries.append((store.config, hashes)) or {}
    )
    again = make_config("sweep.rerun=true")
    other = make_config("tracking.experiment=other")
    seeds = [make_config(f"seed={seed}") for seed in range(3)]
    planned = plan.make_plan([((), config) for config in (*seeds, again, other)])
    assert [job.action for job in planned] == ["train"] * 5
    assert sorted(queries, key=lambda query: query[0].experiment) == [
        (seeds[0].tracking, [job.config_hash for job in planned[:3]]),
        (other.tracking, [planned[4].config_hash]),
    ]

"""The plan: every job is in one group, trajectories are in order, arrays hold compatible jobs."""

import itertools

import pytest
from filelock import FileLock

from lenet_sweep.storage import fingerprint, run_index
from lenet_sweep.storage.result import Result, write_result
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


@pytest.fixture
def decide(make_config, tmp_path, monkeypatch):
    """What the plan decides about one config after `leave(folder, config_hash)` has left something."""
    monkeypatch.chdir(tmp_path)

    def decision(leave=None, *overrides):
        config = make_config("tracking=none", *overrides)
        config_hash = fingerprint.config_hash(config)
        folder = tmp_path / "outputs" / "runs" / "before"
        if leave:
            folder.mkdir(parents=True)
            run_index.INDEX.mkdir(parents=True)
            run_index.add(config_hash, run_index.Entry(folder, None, None))
            leave(folder, config_hash)
        (job,) = plan.make_plan([(("lr=0.1",), config)])
        return job

    return decision


def result(status, reason=None):
    """Leave the result of a run that ended so."""

    def leave(folder, config_hash):
        write_result(folder, Result(status, reason, False, None, config_hash, 1.0, {"test/acc": 0.5}))

    return leave


def test_config_that_was_never_trained_is_trained(decide):
    job = decide()
    assert (job.action, job.why, job.result) == ("train", "not trained before", None)


def test_finished_run_is_skipped_and_its_result_is_kept(decide):
    job = decide(result("FINISHED"))
    assert (job.action, job.result.metrics) == ("skip", {"test/acc": 0.5})
    assert job.config_hash in job.why


def test_finished_run_is_trained_again_only_with_rerun(decide):
    job = decide(result("FINISHED"), "sweep.rerun=true")
    assert (job.action, job.why, job.result) == ("train", "sweep.rerun=true", None)


def test_failed_run_is_trained_again_with_its_reason_told(decide):
    job = decide(result("FAILED", "the loss became nan"))
    assert job.action == "train"
    assert "the loss became nan" in job.why


@pytest.mark.parametrize("killed", [True, False])
def test_interrupted_run_with_a_checkpoint_is_resumed(decide, killed):
    """One that Ctrl-C ended has a result, one that SIGKILL ended has none."""

    def leave(folder, config_hash):
        (folder / "checkpoint.safetensors").write_bytes(b"state")
        if killed:
            result("KILLED", "interrupted")(folder, config_hash)

    job = decide(leave)
    assert job.action == "resume"
    assert "before" in job.why


def test_interrupted_run_without_a_checkpoint_is_trained(decide):
    assert decide(lambda folder, config_hash: None).action == "train"


def test_run_that_another_process_trains_is_waited_for(decide):
    locks = []

    def leave(folder, config_hash):
        locks.append(FileLock(str(run_index.INDEX / f"{config_hash}.lock")))
        locks[0].acquire()

    job = decide(leave)
    locks[0].release()
    assert job.action == "wait"


def test_run_that_is_finished_in_another_store_only_is_trained(make_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config()
    config_hash = fingerprint.config_hash(config)
    run_index.INDEX.mkdir(parents=True)
    run_index.add(config_hash, run_index.Entry(tmp_path, None, None))
    result("FINISHED")(tmp_path, config_hash)
    (job,) = plan.make_plan([((), config)])
    assert job.action == "train"
    assert "not in this tracking store" in job.why


def test_jobs_that_differ_in_their_store_only_are_skipped_each_by_its_own(make_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    untracked, tracked = make_config("tracking=none"), make_config()
    config_hash = fingerprint.config_hash(untracked)
    run_index.INDEX.mkdir(parents=True)
    run_index.add(config_hash, run_index.Entry(tmp_path, None, None))
    result("FINISHED")(tmp_path, config_hash)
    planned = plan.make_plan([((), untracked), ((), tracked)])
    assert [job.config_hash for job in planned] == [config_hash] * 2
    assert [job.action for job in planned] == ["skip", "train"]
    assert planned[1].why == "finished before, but not in this tracking store"


def test_runs_whose_examples_are_chosen_by_seed_share_an_array_only_with_equal_seeds(make_config):
    def key(*overrides):
        return plan.array_key(make_config(*overrides))

    assert key("seed=0") == key("seed=1")
    for chosen in ("data.val_size=1", "data.train_size=100"):
        assert key("seed=0", chosen) != key("seed=1", chosen)
        assert key("seed=0", chosen) == key("seed=0", chosen, "lr=0.1", "epochs=3", "schedule=step")


def test_jobs_of_a_cosine_schedule_cost_all_of_their_epochs(make_config):
    jobs = [make_config("schedule=cosine", f"epochs={n}") for n in (2, 5)]
    assert [group.cost for group in plan.group_jobs(jobs)] == [2, 5]
    jobs = [make_config(f"epochs={n}") for n in (5, 2)]
    (group,) = plan.group_jobs(jobs)
    assert (group.cost, group.costs) == (5, {1: 2, 0: 3})

"""Jobs of a sweep trained as one array: each leaves what it would leave alone, but for rounding."""

import json

import pytest
from safetensors.torch import load_file

from lenet_sweep.errors import RunFailed
from lenet_sweep.runs import outputs, session
from lenet_sweep.runs.array import run_array
from lenet_sweep.runs.run import run
from lenet_sweep.runs.session import RunSession
from lenet_sweep.runs.spec import RunSpec
from lenet_sweep.storage import metrics_file, run_index
from lenet_sweep.storage.manifest import Job
from lenet_sweep.storage.result import read_result, write_result
from lenet_sweep.training import fused

MINI = ("data=fashion_mnist_mini", "data.train_size=600", "tracking=none", "model=lenet", "epochs=3")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def orders(make_config, tmp_path):
    """An order for every tuple of overrides, as jobs of one sweep."""

    def make(*jobs, sweep="sweep"):
        return [
            RunSpec(
                make_config(*MINI, *job),
                tmp_path / sweep / str(i),
                job,
                Job(sweep, i + 1, len(jobs), str(job)),
            )
            for i, job in enumerate(jobs)
        ]

    return make


def numbers(folder):
    lines = [metrics_file.parse(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.named().items() if not k.startswith("speed/")} for line in lines]


def test_jobs_of_an_array_leave_what_each_leaves_alone(make_config, orders, tmp_path):
    together = orders(("lr=0.1",), ("lr=0.3", "seed=0", "epochs=2"), ("lr=0.2",))
    results = run_array(together)
    assert [result.status for result in results] == ["FINISHED"] * 3
    for order, result in zip(together, results, strict=True):
        alone = tmp_path / "alone" / order.folder.name
        run(RunSpec(make_config(*MINI, *order.overrides, "backend=torch"), alone))
        assert {path.name for path in order.folder.iterdir()} == {path.name for path in alone.iterdir()}
        for mine, other in zip(numbers(order.folder), numbers(alone), strict=True):
            assert mine == pytest.approx(other, abs=2e-3)  # an example may be right or wrong by a hair
            assert mine["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)
        weights = load_file(alone / "model" / "weights.safetensors")
        for name, tensor in load_file(order.folder / "model" / "weights.safetensors").items():
            assert (tensor - weights[name]).abs().max() < 1e-4
        assert json.loads((order.folder / "environment.json").read_text())["backend"] == "fused"
        assert read_result(order.folder) == result


@pytest.mark.usefixtures("no_pictures")
def test_member_that_fails_leaves_the_others_be(orders):
    together = orders(("lr=0.1",), ("lr=1000", "optimizer.weight_decay=10"), ("lr=0.2",))
    first, second, third = run_array(together)
    assert (first.status, third.status) == ("FINISHED", "FINISHED")
    assert isinstance(second, RunFailed)
    assert "loss became" in str(second)
    assert read_result(together[1].folder).status == "FAILED"
    assert len(numbers(together[2].folder)) == 3


@pytest.mark.usefixtures("no_pictures")
def test_member_whose_metrics_cannot_be_written_fails_alone(orders):
    together = orders(("lr=0.1",), ("lr=0.2",))
    together[0].folder.mkdir(parents=True)
    (together[0].folder / "metrics.jsonl").symlink_to("/dev/full")
    first, second = run_array(together)
    assert "No space left" in str(first)
    assert read_result(together[0].folder).status == "FAILED"
    assert second.status == "FINISHED"


@pytest.mark.usefixtures("no_pictures")
def test_interrupt_after_the_end_of_a_member_leaves_its_result(orders, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunSession, "_print_summary", interrupt)
    together = orders(("lr=0.1", "epochs=1"), ("lr=0.2",))
    with pytest.raises(KeyboardInterrupt):
        run_array(together)
    assert [read_result(order.folder).status for order in together] == ["FINISHED", "KILLED"]


@pytest.mark.usefixtures("no_pictures")
def test_error_after_the_end_of_a_member_leaves_its_result_and_the_others(orders, monkeypatch):
    def broken(session, result):
        if session.spec.config.epochs == 1:
            raise OSError

    monkeypatch.setattr(RunSession, "_print_summary", broken)
    together = orders(("lr=0.1", "epochs=1"), ("lr=0.2",))
    assert [result.status for result in run_array(together)] == ["FINISHED", "FINISHED"]
    assert [read_result(order.folder).status for order in together] == ["FINISHED", "FINISHED"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("can_write_result", [True, False])
def test_member_that_cannot_start_fails_alone(orders, monkeypatch, can_write_result):
    write = outputs.write_environment
    together = orders(("lr=0.1",), ("lr=0.2",), ("lr=0.3",))

    def full(folder, *rest):
        if folder == together[1].folder:
            raise OSError(28, "No space left on device")
        return write(folder, *rest) if rest else None

    def full_result(folder, result):
        full(folder)
        write_result(folder, result)

    monkeypatch.setattr(outputs, "write_environment", full)
    if not can_write_result:
        monkeypatch.setattr(session, "write_result", full_result)
    first, second, third = run_array(together)
    assert (first.status, third.status) == ("FINISHED", "FINISHED")
    assert "No space left on device" in str(second)
    result = read_result(together[1].folder)
    assert (result and result.status) == ("FAILED" if can_write_result else None)


@pytest.mark.usefixtures("no_pictures")
def test_every_member_is_ended_even_if_one_cannot_be(orders, monkeypatch):
    def full(*_, **__):
        raise MemoryError
        yield

    fail = RunSession.fail

    def fail_all_but_one(session, error):
        if "0.2" in session.spec.label:
            raise AssertionError
        fail(session, error)

    monkeypatch.setattr(fused, "train", full)
    monkeypatch.setattr(RunSession, "fail", fail_all_but_one)
    together = orders(("lr=0.1",), ("lr=0.2",), ("lr=0.3",))
    with pytest.raises(AssertionError):
        run_array(together)
    ended = [read_result(order.folder) for order in together]
    assert [result and result.status for result in ended] == ["FAILED", None, "FAILED"]


@pytest.mark.usefixtures("no_pictures")
def test_interrupted_array_saves_every_member_and_goes_on_to_the_same_numbers(orders, monkeypatch):
    jobs = (("lr=0.1",), ("lr=0.2",))
    train = fused.train

    def interrupted(*arguments, **options):
        for number, outcome in enumerate(train(*arguments, **options)):
            yield outcome
            if number == 2:  # one has its second epoch, the other has not
                raise KeyboardInterrupt

    whole = orders(*(("data.val_size=0", *job, "sweep.rerun=true") for job in jobs), sweep="whole")
    run_array(whole)
    for entry in run_index.INDEX.glob("*.json"):
        entry.unlink()
    first, second = orders(*jobs, sweep="first"), orders(*jobs, sweep="second")
    with monkeypatch.context() as patch:
        patch.setattr(fused, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_array(first)
    assert [read_result(order.folder).status for order in first] == ["KILLED"] * 2
    assert [len(numbers(order.folder)) for order in first] == [2, 1]
    assert [result.status for result in run_array(second)] == ["FINISHED"] * 2
    for order, other in zip(second, whole, strict=True):
        for mine, theirs in zip(numbers(order.folder), numbers(other.folder), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)  # members out of step are rounded otherwise


@pytest.mark.usefixtures("no_pictures")
def test_as_many_are_trained_at_once_as_there_is_room_for(orders, monkeypatch):
    widths = []
    train = fused.train
    monkeypatch.setattr(fused, "width", lambda *_: 2)
    monkeypatch.setattr(
        fused, "train", lambda members, *a, **k: widths.append(len(members)) or train(members, *a, **k)
    )
    results = run_array(orders(*((f"lr=0.{n}",) for n in range(1, 6))))
    assert widths == [2, 2, 1]
    assert [result.status for result in results] == ["FINISHED"] * 5


def test_device_without_memory_fails_all_members_with_that_reason(orders, monkeypatch):
    def full(*_, **__):
        raise MemoryError
        yield

    monkeypatch.setattr(fused, "train", full)
    results = run_array(orders(("lr=0.1",), ("lr=0.2",)))
    assert [str(result) for result in results] == ["out of memory"] * 2


@pytest.mark.usefixtures("no_pictures")
def test_finished_member_is_not_trained_again(orders, monkeypatch):
    jobs = (("lr=0.1",), ("lr=0.2",))
    before = run_array(orders(*jobs))
    monkeypatch.setattr(fused, "train", None)
    assert run_array(orders(*jobs, sweep="again")) == before


def test_sweep_fuses_where_it_is_asked_to_and_shorter_runs_are_gone_on_with(command, tmp_path):
    done = command(*MINI, "epochs=1,2", "lr=0.1,0.2", "sweep.fuse=2", "-m")
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    for number in range(4):
        environment = json.loads((sweep / str(number) / "environment.json").read_text())
        assert environment["backend"] == "fused"
        assert (sweep / str(number) / ".hydra" / "config.yaml").exists()
    assert done.stdout.count("resuming after epoch 1 of") == 2
    done = command("reproduce", str(sweep / "0"))
    assert done.returncode == (0 if "bit-identical: " in done.stdout else 3)
    assert ("equal up to rounding" in done.stdout) == (done.returncode == 3)


@pytest.mark.usefixtures("no_pictures")
def test_runs_on_a_cpu_are_not_fused_unless_asked(command, tmp_path, monkeypatch):
    monkeypatch.setattr(fused, "train", None)
    assert command(*MINI, "epochs=1", "lr=0.1,0.2", "-m").returncode == 0

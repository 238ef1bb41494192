"""A run cut short anywhere goes on to the same bits; a damaged checkpoint is known as one."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lenet_sweep.errors import RunFailed, TrackingError
from lenet_sweep.runs import outputs, resume
from lenet_sweep.runs.run import run
from lenet_sweep.runs.spec import RunSpec
from lenet_sweep.storage import checkpoint, fingerprint, run_index
from lenet_sweep.storage.manifest import Job
from lenet_sweep.storage.result import Result, read_result, write_result
from lenet_sweep.tracking.mlflow_store import MlflowStore
from lenet_sweep.tracking.stores import open_store
from lenet_sweep.training import engine, model, native, optim
from lenet_sweep.training.backend import TorchBackend
from lenet_sweep.training.randomness import generator

MINI = ("data=fashion_mnist_mini", "data.train_size=600", "epochs=4", "threads=1", "tracking=none", "lr=0.05")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cut_short(monkeypatch):
    """Train a config, but raise `how` (Ctrl-C by default) when so many epochs have been kept."""
    train = engine.train

    def train_until(config, folder, epochs, how=KeyboardInterrupt):
        def interrupted(*arguments, **options):
            for metrics in train(*arguments, **options):
                yield metrics
                if metrics.epoch == epochs:
                    raise how

        monkeypatch.setattr(engine, "train", interrupted)
        try:
            run(RunSpec(config, folder))
        finally:
            monkeypatch.setattr(engine, "train", train)

    return train_until


def numbers(folder):
    """Every result of a run: all metrics but speed and time, and the weights' bits."""
    from lenet_sweep.storage import metrics_file

    lines = [metrics_file.parse(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.named().items() if not k.startswith("speed/")} for line in lines]
    curves = [line.metrics.curve for line in lines]
    weights = load_file(folder / "model" / "weights.safetensors")
    return kept, curves, {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
def test_interrupted_run_goes_on_to_the_bits_of_an_uninterrupted_one(
    make_config, tmp_path, monkeypatch, cut_short, optimizer, schedule
):
    config = make_config(*MINI, f"optimizer={optimizer}", f"schedule={schedule}")
    whole = tmp_path / "whole"
    run(RunSpec(config, whole))
    (run_index.INDEX / f"{fingerprint.config_hash(config)}.json").unlink()

    with pytest.raises(KeyboardInterrupt):
        cut_short(config, tmp_path / "first", 2)
    assert read_result(tmp_path / "first").status == "KILLED"
    trained = []
    with monkeypatch.context() as patch:
        step = native.NativeBackend.gradients
        patch.setattr(native.NativeBackend, "gradients", lambda *a: trained.append(1) or step(*a))
        run(RunSpec(config, tmp_path / "second"))
    assert len(trained) == 2 * 3  # the two epochs that were missing, of three steps each
    assert numbers(tmp_path / "second") == numbers(whole)
    assert not (tmp_path / "first" / "checkpoint.safetensors").exists()
    # Kept for a run with more epochs, which a cosine's cannot be the beginning of.
    assert (tmp_path / "second" / "checkpoint.safetensors").exists() == (schedule != "cosine")


def test_run_killed_after_its_last_epoch_only_has_to_end(make_config, tmp_path, monkeypatch):
    config = make_config(*MINI)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(RunSpec(config, tmp_path / "first"))
    monkeypatch.setattr(native.NativeBackend, "gradients", None)
    assert run(RunSpec(config, tmp_path / "second")).status == "FINISHED"


def test_failed_run_keeps_its_last_good_checkpoint_and_starts_afresh_when_tried_again(
    make_config, tmp_path, monkeypatch, cut_short
):
    config = make_config(*MINI)
    with pytest.raises(RunFailed, match="RuntimeError: too hot"):
        cut_short(config, tmp_path / "first", 3, RuntimeError("too hot"))
    assert (tmp_path / "first" / "checkpoint.safetensors").exists()
    assert len((tmp_path / "first" / "metrics.jsonl").read_text().splitlines()) == 3
    steps = []
    step = native.NativeBackend.gradients
    monkeypatch.setattr(native.NativeBackend, "gradients", lambda *a: steps.append(1) or step(*a))
    assert run(RunSpec(config, tmp_path / "second")).status == "FINISHED"
    assert len(steps) == 4 * 3


def test_run_that_was_interrupted_in_its_first_epoch_starts_anew_elsewhere(
    make_config, tmp_path, monkeypatch, cut_short
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
        yield

    config = make_config(*MINI)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(RunSpec(config, tmp_path / "first"))
    assert not (tmp_path / "first" / "checkpoint.safetensors").exists()
    assert run(RunSpec(config, tmp_path / "second")).status == "FINISHED"


def test_rerun_starts_an_interrupted_run_afresh(make_config, tmp_path, monkeypatch, cut_short):
    with pytest.raises(KeyboardInterrupt):
        cut_short(make_config(*MINI), tmp_path / "first", 2)
    steps = []
    step = native.NativeBackend.gradients
    monkeypatch.setattr(native.NativeBackend, "gradients", lambda *a: steps.append(1) or step(*a))
    run(RunSpec(make_config(*MINI, "sweep.rerun=true"), tmp_path / "second"))
    assert len(steps) == 4 * 3


@pytest.fixture
def saved(make_config, tmp_path):
    """A checkpoint after one epoch of Adam, and what is needed to restore it."""
    config = make_config(*MINI, "optimizer=adam")

    def fresh():
        network = model.build(config.model, generator(1, "init"))
        optimizer = optim.optimizer(config.optimizer, network.parameters())
        return network, optimizer, optim.schedule(config.schedule, optimizer, config.epochs)

    network, optimizer, schedule = fresh()
    network(torch.rand(4, 1, 28, 28)).sum().backward()
    optimizer.step()
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, network, optimizer, schedule, "cafe", [])
    return path, fresh


def test_checkpoint_cut_anywhere_is_known_as_damaged(saved):
    path, fresh = saved
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = [0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(checkpoint.Damaged):
            checkpoint.restore(path, *fresh(), "cafe")
    path.write_bytes(whole)
    assert checkpoint.restore(path, *fresh(), "cafe") == []


def test_checkpoint_with_any_bit_flipped_is_known_as_damaged_and_changes_nothing(saved):
    path, fresh = saved
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    spots = [0, 5, 8, 20, header // 3, header - 2, header, header + 1000, len(whole) - 1]
    for spot in spots:
        damaged = bytearray(whole)
        damaged[spot] ^= 0x10
        path.write_bytes(damaged)
        network, optimizer, schedule = fresh()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        with pytest.raises(checkpoint.Damaged):
            checkpoint.restore(path, network, optimizer, schedule, "cafe")
        assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
        assert optimizer.state_dict()["state"] == {}


def test_checkpoint_of_another_config_or_another_file_is_refused(saved):
    path, fresh = saved
    with pytest.raises(checkpoint.Damaged, match="another config"):
        checkpoint.restore(path, *fresh(), "beef")
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(checkpoint.Damaged):
        checkpoint.restore(path, *fresh(), "cafe")
    path.write_bytes(b"\x80\x04cposix\nsystem\n")  # a pickle is never opened as one
    with pytest.raises(checkpoint.Damaged, match="cannot be read"):
        checkpoint.restore(path, *fresh(), "cafe")


def test_run_with_a_damaged_checkpoint_says_so_and_starts_from_its_first_epoch(
    make_config, tmp_path, capsys, cut_short
):
    config = make_config(*MINI)
    with pytest.raises(KeyboardInterrupt):
        cut_short(config, tmp_path / "first", 2)
    path = tmp_path / "first" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    run(RunSpec(config, tmp_path / "second"))
    assert "checkpoint.safetensors: cannot be read" in capsys.readouterr().out
    assert len((tmp_path / "second" / "metrics.jsonl").read_text().splitlines()) == 4


def steps_of(sweep_job, config, folder, monkeypatch):
    """How many gradient steps a job of a sweep takes; two epochs have six."""
    steps, step = [], native.NativeBackend.gradients
    with monkeypatch.context() as patch:
        patch.setattr(native.NativeBackend, "gradients", lambda *a: steps.append(1) or step(*a))
        run(RunSpec(config, folder, job=sweep_job))
    return len(steps)


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_runs_that_differ_in_epochs_cost_the_longest_and_are_what_they_are_alone(
    make_config, tmp_path, monkeypatch, optimizer, schedule
):
    configs = [
        make_config(*MINI, f"optimizer={optimizer}", f"schedule={schedule}", f"epochs={n}") for n in (1, 2, 4)
    ]
    for n, config in enumerate(configs):
        (tmp_path / f"{n}").mkdir()
        monkeypatch.chdir(tmp_path / f"{n}")
        run(RunSpec(config, tmp_path / f"{n}" / "alone"))
    monkeypatch.chdir(tmp_path)
    job = Job("sweep", 1, 3, "")
    native._checked.add(configs[0].model)
    steps = [steps_of(job, config, tmp_path / f"job{n}", monkeypatch) for n, config in enumerate(configs)]
    assert steps == ([3, 6, 12] if schedule == "cosine" else [3, 3, 6])
    for n in range(3):
        assert numbers(tmp_path / f"job{n}") == numbers(tmp_path / f"{n}" / "alone")


def test_single_run_and_rerun_train_from_the_first_epoch(make_config, tmp_path, monkeypatch):
    job = Job("sweep", 1, 2, "")
    run(RunSpec(make_config(*MINI, "epochs=1"), tmp_path / "short", job=job))
    assert steps_of(None, make_config(*MINI, "epochs=2"), tmp_path / "single", monkeypatch) == 6
    rerun = make_config(*MINI, "epochs=3", "sweep.rerun=true")
    assert steps_of(job, rerun, tmp_path / "rerun", monkeypatch) == 9


def test_longer_run_never_goes_on_from_a_run_of_another_config(make_config, tmp_path, monkeypatch):
    job = Job("sweep", 1, 2, "")
    run(RunSpec(make_config(*MINI, "epochs=1", "seed=1"), tmp_path / "short", job=job))
    assert steps_of(job, make_config(*MINI, "epochs=2"), tmp_path / "long", monkeypatch) == 6


def test_state_of_the_native_step_is_not_gone_on_from_by_torchs(
    make_config, tmp_path, monkeypatch, cut_short
):
    job = Job("sweep", 1, 2, "")
    run(RunSpec(make_config(*MINI, "epochs=1"), tmp_path / "short", job=job))
    with pytest.raises(KeyboardInterrupt):
        cut_short(make_config(*MINI, "epochs=3"), tmp_path / "interrupted", 2)
    monkeypatch.setenv("PATH", "")  # no compiler any more
    monkeypatch.delenv("CXX", raising=False)
    steps, gradients = [], TorchBackend.gradients
    monkeypatch.setattr(TorchBackend, "gradients", lambda *a: steps.append(1) or gradients(*a))
    run(RunSpec(make_config(*MINI, "epochs=2"), tmp_path / "long", job=job))
    assert len(steps) == 2 * 3
    run(RunSpec(make_config(*MINI, "epochs=3"), tmp_path / "resumed"))
    assert len(steps) == 2 * 3 + 3 * 3


@pytest.mark.parametrize(("store", "expected"), [("same", "FINISHED"), ("another", None)])
def test_index_decides_what_is_finished_where_the_store_cannot_be_reached(
    make_config, tmp_path, monkeypatch, store, expected
):
    def unreachable(self, hashes):
        raise TrackingError("it is down")

    monkeypatch.setattr(MlflowStore, "finished", unreachable)
    spec = RunSpec(make_config("epochs=1"), tmp_path / "run", job=Job("sweep", 1, 1, ""))
    assert resume.finished_before(spec) is None  # nothing is known here either
    before = tmp_path / "before"
    before.mkdir()
    run_index.INDEX.mkdir(parents=True)
    name = open_store(spec.config.tracking).name if store == "same" else "another store"
    run_index.add(spec.config_hash, run_index.Entry(before, name, "id"))
    write_result(before, Result("FINISHED", None, False, "id", spec.config_hash, 1.0, {}))
    found = resume.finished_before(spec)
    assert (found.status if found else None) == expected
    single = RunSpec(spec.config, spec.folder)  # a single run is always trained
    assert resume.finished_before(single) is None

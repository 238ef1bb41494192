"""One whole run, in this process: what it leaves, and how it ends when something goes wrong."""

import dataclasses
import json
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml
from matplotlib import image
from safetensors.torch import load_file

from lenet_sweep.config import parsing
from lenet_sweep.errors import DeviceError, OutputError, RunFailed, TrackingError
from lenet_sweep.runs import progress, session
from lenet_sweep.runs.run import run
from lenet_sweep.runs.spec import RunSpec
from lenet_sweep.storage import fingerprint
from lenet_sweep.storage.manifest import Job
from lenet_sweep.storage.result import read_result
from lenet_sweep.tracking.mlflow_store import MlflowStore
from lenet_sweep.training import engine, model
from lenet_sweep.training.backend import TorchBackend
from lenet_sweep.training.data import load_data
from lenet_sweep.training.randomness import generator

MINI = ("data=fashion_mnist_mini", "epochs=2", "data.train_size=600", "lr=0.1", "threads=1")


@pytest.fixture(scope="module", autouse=True)
def in_a_folder_of_its_own(tmp_path_factory):
    """Runs leave their ledger in the working folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("ledger"))
        yield


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"tracking.uri=sqlite:///{tmp_path_factory.mktemp('tracked')}/mlflow.db"


@pytest.fixture(scope="module")
def finished(make_config, uri, tmp_path_factory):
    """A finished run: its config, folder and result."""
    config = make_config(*MINI, uri)
    folder = tmp_path_factory.mktemp("outputs") / "run"
    return config, folder, run(RunSpec(config, folder, ("lr=0.1", uri)))


def lines(folder: Path):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def client(config):
    from mlflow import MlflowClient

    return MlflowClient(config.tracking.uri)


def test_stored_config_alone_is_the_config(finished):
    config, folder, _ = finished
    assert parsing.load(folder / "config.yaml") == config


def test_metrics_file_has_a_line_an_epoch_with_five_curve_points(finished):
    _, folder, _ = finished
    first, second = lines(folder)
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert len(second["curve"]) == min(5, -(-600 // 256))
    assert second["curve"][-1] == [2.0, second["train/loss"], second["train/acc"]]
    assert second["time_ms"] >= first["time_ms"] > 1_600_000_000_000


def test_mlflow_run_holds_all_that_the_design_lists(finished):
    config, _, result = finished
    kept = client(config).get_run(result.run_id)
    assert kept.info.status == "FINISHED"
    assert kept.info.run_name == f"lr=0.1 #{fingerprint.config_hash(config)[:6]}"
    expected = {key: str(value) for key, value in parsing.flatten(parsing.to_dict(config))}
    assert kept.data.params == expected
    assert expected["model.activation"] == "sigmoid"
    assert expected["optimizer.name"] == "sgd"
    assert kept.data.tags["config_hash"] == fingerprint.config_hash(config)
    assert kept.data.tags["git_dirty"] in ("true", "false")
    assert {"host", "git_commit"} <= set(kept.data.tags)
    assert "sweep_id" not in kept.data.tags


def test_mlflow_metrics_are_those_of_the_metrics_file(finished):
    config, folder, result = finished
    names = ("train/loss", "train/acc", "test/loss", "test/acc", "speed/examples_per_s", "speed/epoch_s")
    for name in names:
        history = client(config).get_metric_history(result.run_id, name)
        assert [(m.step, m.value, m.timestamp) for m in history] == [
            (line["epoch"], line[name], line["time_ms"]) for line in lines(folder)
        ]


def test_artifacts_open_and_say_what_they_should(finished, tmp_path):
    config, _, result = finished
    fetched = Path(client(config).download_artifacts(result.run_id, "", str(tmp_path)))
    assert parsing.parse(yaml.safe_load((fetched / "config.yaml").read_text())) == config
    environment = json.loads((fetched / "environment.json").read_text())
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["device"].startswith("cpu")
    for name in ("curves", "confusion_matrix"):
        pixels = image.imread(fetched / "plots" / f"{name}.png")
        assert pixels.shape[0] > 300
        assert pixels[..., :3].std() > 0.05  # something is drawn


def test_stored_weights_are_those_that_reached_the_last_test_accuracy(finished):
    config, folder, _ = finished
    network = model.build(config.model, generator(99, "init"))
    network.load_state_dict(load_file(folder / "model" / "weights.safetensors"))
    data = load_data(config.data, config.seed, torch.device("cpu"), say=lambda line: None)
    last = lines(folder)[-1]
    assert engine.evaluate(TorchBackend(network), data.test) == pytest.approx(
        (last["test/loss"], last["test/acc"])
    )


def test_result_file_says_how_it_ended(finished):
    _, folder, result = finished
    assert read_result(folder) == result
    assert result.status == "FINISHED"
    assert result.metrics["test/acc"] == lines(folder)[-1]["test/acc"]


def test_last_words_are_the_tutorials_two_lines_and_where_the_run_is(make_config, uri, tmp_path, capsys):
    config = make_config(*MINI, uri)
    result = run(RunSpec(config, tmp_path / "run"))
    said = capsys.readouterr().out.splitlines()
    loss = next(i for i, line in enumerate(said) if line.startswith("loss "))
    _, last = lines(tmp_path / "run")
    numbers = [f"{last[name]:.3f}" for name in ("train/loss", "train/acc", "test/acc")]
    assert said[loss] == "loss {}, train acc {}, test acc {}".format(*numbers)
    assert re.fullmatch(r"\d+\.\d examples/sec on cpu", said[loss + 1])
    assert said[loss + 2] == f"output folder {tmp_path / 'run'}"
    assert said[loss + 3] == f"MLflow run {result.run_id}"
    assert said[loss + 4] == f"python -m lenet_sweep ui {result.run_id[:8]}"


def test_run_that_continues_a_shorter_one_has_all_its_epochs_in_mlflow(make_config, uri, tmp_path):
    for epochs in (1, 3):
        config = make_config(*MINI, uri, "seed=82", f"epochs={epochs}")
        job = Job("sweep", epochs, None, "")
        result = run(RunSpec(config, tmp_path / str(epochs), job=job))
    history = client(config).get_metric_history(result.run_id, "train/loss")
    kept = lines(tmp_path / "3")
    assert [(m.step, m.value) for m in history] == [(line["epoch"], line["train/loss"]) for line in kept]
    assert lines(tmp_path / "1")[0]["train/loss"] == kept[0]["train/loss"]
    assert lines(tmp_path / "1")[0]["time_ms"] == kept[0]["time_ms"]  # it was not trained again


def test_name_of_a_run_has_at_most_250_characters(make_config, tmp_path):
    long = tuple(f"data.root={'x' * 20}/{i}" for i in range(99)), tuple(f"lr=0.{i}" for i in range(99))
    assert RunSpec(make_config(), tmp_path, long[0]).name == "lenet"
    assert RunSpec(make_config(), tmp_path, long[1]).name == " ".join(long[1])[:250]


def test_layer_table_is_the_tutorials(make_config, tmp_path, capsys):
    run(RunSpec(make_config(*MINI, "epochs=1", "tracking=none"), tmp_path / "run"))
    said = capsys.readouterr().out
    shapes = re.findall(r"^\w+ +(?:conv|activation|pool|flatten|linear) +(\(.*\))$", said, re.MULTILINE)
    assert shapes == (
        ["(6, 28, 28)"] * 2
        + ["(6, 14, 14)"]
        + ["(16, 10, 10)"] * 2
        + ["(16, 5, 5)", "(400,)", "(120,)", "(120,)", "(84,)", "(84,)", "(10,)"]
    )


def test_run_equals_training_by_hand(finished):
    config, folder, _ = finished
    data = load_data(config.data, config.seed, torch.device("cpu"), say=lambda line: None)
    network = model.build(config.model, generator(0, "init"))
    images, labels = data.train.images_NCHW.float() / 255, data.train.labels_N
    for epoch in (1, 2):
        order = torch.randperm(600, generator=generator(0, f"order/{epoch}"))
        for chosen in order.split(256):
            loss = torch.nn.functional.cross_entropy(network(images[chosen]), labels[chosen])
            network.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= 0.1 * parameter.grad
    stored = load_file(folder / "model" / "weights.safetensors")
    for name, weight in network.state_dict().items():
        assert torch.allclose(weight, stored[name], atol=1e-6)


def test_untracked_run_leaves_the_same_numbers_and_files(finished, make_config, tmp_path):
    _, folder, _ = finished
    run(RunSpec(make_config(*MINI, "tracking=none"), tmp_path / "run"))
    results = ("train/loss", "train/acc", "test/loss", "test/acc", "curve")
    for mine, tracked in zip(lines(tmp_path / "run"), lines(folder), strict=True):
        assert [mine[name] for name in results] == [tracked[name] for name in results]
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*")} - {"tracking.json"}
    assert {p.relative_to(tmp_path / "run").as_posix() for p in (tmp_path / "run").rglob("*")} == names


def test_diverged_run_is_failed_with_its_reason_everywhere(make_config, uri, tmp_path):
    config = make_config(*MINI, uri, "model=lenet_relu_max", "optimizer=momentum", "lr=1000")
    with pytest.raises(RunFailed, match="the loss became"):
        run(RunSpec(config, tmp_path / "run"))
    result = read_result(tmp_path / "run")
    assert result.status == "FAILED"
    assert "the loss became" in result.reason
    kept = client(config).get_run(result.run_id)
    assert kept.info.status == "FAILED"
    assert "the loss became" in kept.data.tags["failure_reason"]


def test_interrupted_run_is_killed_and_keeps_its_finished_epochs(make_config, uri, tmp_path, monkeypatch):
    config = make_config(*MINI, uri, "epochs=5")
    train = engine.train

    def interrupted(*arguments, **options):
        for metrics in train(*arguments, **options):
            yield metrics
            if metrics.epoch == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(engine, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(RunSpec(config, tmp_path / "run"))
    result = read_result(tmp_path / "run")
    assert (result.status, result.metrics["test/acc"]) == ("KILLED", lines(tmp_path / "run")[1]["test/acc"])
    kept = client(config)
    assert kept.get_run(result.run_id).info.status == "KILLED"
    assert [m.step for m in kept.get_metric_history(result.run_id, "test/acc")] == [1, 2]


def test_out_of_memory_is_a_reason_in_words(make_config, tmp_path, monkeypatch):
    def no_memory(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")

    monkeypatch.setattr(engine, "train", no_memory)
    with pytest.raises(RunFailed, match="out of memory on the device: CUDA out of memory"):
        run(RunSpec(make_config(*MINI, "tracking=none"), tmp_path / "run"))


def test_training_goes_on_when_the_server_dies_and_sends_everything_when_it_is_back(
    make_config, uri, tmp_path, monkeypatch
):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    log_batch = MlflowClient.log_batch
    calls = []

    def flaky(self, run_id, metrics=(), params=(), tags=()):
        if metrics:
            calls.append(len(metrics))
            if len(calls) == 2:
                raise MlflowException("connection refused")
        return log_batch(self, run_id, metrics, params, tags)

    monkeypatch.setattr(MlflowClient, "log_batch", flaky)
    config = make_config(*MINI, uri, "epochs=4")
    result = run(RunSpec(config, tmp_path / "run"))
    assert calls == [6, 6, 24]  # the first epoch, the second in vain, and at the end all four
    history = client(config).get_metric_history(result.run_id, "train/loss")
    assert [(m.step, m.timestamp) for m in history] == [
        (line["epoch"], line["time_ms"]) for line in lines(tmp_path / "run")
    ]


def test_run_that_was_deleted_in_the_store_is_made_anew_with_all_its_numbers(
    make_config, uri, tmp_path, monkeypatch
):
    config = make_config(*MINI, uri, "seed=77")
    train = engine.train

    def interrupted(*arguments, **options):
        yield next(train(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(RunSpec(config, tmp_path / "first"))
    monkeypatch.setattr(engine, "train", train)
    old = read_result(tmp_path / "first").run_id
    client(config).delete_run(old)
    new = run(RunSpec(config, tmp_path / "second")).run_id
    assert new != old
    assert [m.step for m in client(config).get_metric_history(new, "test/acc")] == [1, 2]
    assert client(config).get_run(new).data.params["seed"] == "77"


def test_full_disk_at_the_end_leaves_no_run_as_running(make_config, uri, tmp_path, monkeypatch):
    def full(folder, result):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session, "write_result", full)
    config = make_config(*MINI, uri, "seed=78")
    result = run(RunSpec(config, tmp_path / "run"))
    assert client(config).get_run(result.run_id).info.status == "FINISHED"


def test_run_that_is_stopped_as_it_starts_is_killed(make_config, uri, tmp_path):
    class Stop(progress.Screen):  # as in a worker whose sweep was interrupted
        def progress(self, *arguments):
            raise KeyboardInterrupt

    config = make_config(*MINI, uri, "seed=79")
    with progress.reporting_to(Stop()), pytest.raises(KeyboardInterrupt):
        run(RunSpec(config, tmp_path / "run"))
    result = read_result(tmp_path / "run")
    assert (result.status, result.reason) == ("KILLED", "interrupted")
    assert client(config).get_run(result.run_id).info.status == "KILLED"


def test_metrics_that_cannot_be_written_fail_the_run(make_config, uri, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    config = make_config(*MINI, uri, "seed=80")
    with pytest.raises(RunFailed, match="No space left"):
        run(RunSpec(config, tmp_path / "run"))
    result = read_result(tmp_path / "run")
    assert result.status == "FAILED"
    assert client(config).get_run(result.run_id).info.status == "FAILED"


@pytest.mark.parametrize("where", ["prepare", "open_store", "spec.tags"])
def test_run_that_is_interrupted_before_it_is_in_its_store_is_killed(
    make_config, tmp_path, monkeypatch, where
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    spec = RunSpec(make_config(*MINI, "tracking=none", "seed=83"), tmp_path / "run")
    owner, name = (RunSpec, "tags") if where == "spec.tags" else (session, where)
    monkeypatch.setattr(owner, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(spec)
    assert read_result(spec.folder).status == "KILLED"


def test_run_that_is_interrupted_while_it_is_created_in_mlflow_is_killed_there(
    make_config, uri, tmp_path, monkeypatch
):
    create = MlflowStore.open_run

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)  # as Ctrl-C does; it is deferred until there is a session
        return create(*arguments)

    monkeypatch.setattr(MlflowStore, "open_run", interrupted)
    config = make_config(*MINI, uri, "seed=84")
    with pytest.raises(KeyboardInterrupt):
        run(RunSpec(config, tmp_path / "run"))
    result = read_result(tmp_path / "run")
    assert result.status == "KILLED"
    assert client(config).get_run(result.run_id).info.status == "KILLED"


@pytest.mark.parametrize(("where", "status"), [("write_result", "KILLED"), ("open_store", "FINISHED")])
def test_run_that_is_interrupted_at_its_end_has_one_result(make_config, tmp_path, monkeypatch, where, status):
    function, calls = getattr(session, where), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == (1 if where == "write_result" else 2):  # the second store is opened for the summary
            raise KeyboardInterrupt
        return function(*arguments)

    monkeypatch.setattr(session, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(RunSpec(make_config(*MINI, "tracking=none", "seed=81"), tmp_path / "run"))
    assert read_result(tmp_path / "run").status == status


def test_profile_that_cannot_be_written_does_not_fail_the_run(make_config, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").touch()
    result = run(RunSpec(make_config(*MINI, "tracking=none", "profile=true"), tmp_path / "run"))
    assert result.status == "FINISHED"
    assert "the profile could not be written: [Errno 17] File exists" in capsys.readouterr().out


def test_folder_that_holds_a_run_is_refused_and_left_alone(finished, tmp_path):
    config, folder, _ = finished
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(OutputError, match="already holds a run"):
        run(RunSpec(config, folder))
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_missing_gpu_is_refused_before_tracking_starts(make_config, uri, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(MlflowStore, "open_run", None)
    with pytest.raises(DeviceError, match="device='cuda:1': is not available"):
        run(RunSpec(make_config(*MINI, uri, "device=cuda:1"), tmp_path / "run"))


def test_target_loss_ends_training_early(make_config, tmp_path):
    config = make_config(*MINI, "tracking=none", "epochs=50", "target_loss=2.34")
    result = run(RunSpec(config, tmp_path / "run"))
    losses = [line["train/loss"] for line in lines(tmp_path / "run")]
    assert len(losses) < 50
    assert losses[-1] < 2.34 <= min(losses[:-1])
    assert result.metrics["train/loss"] == losses[-1]


def test_profile_names_the_operators_of_the_step(make_config, tmp_path):
    run(
        RunSpec(
            make_config(*MINI, "tracking=none", "epochs=1", "profile=true", "backend=torch", "threads=2"),
            tmp_path / "run",
        )
    )
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    threads = [e["tid"] for e in trace["traceEvents"] if e.get("name") == "aten::convolution_backward"]
    assert len(set(threads)) == 2  # of the ThreadTeam: each works on its part of a batch
    assert "aten::" in (tmp_path / "run" / "profile" / "operators.txt").read_text()


def test_store_that_refuses_the_run_is_a_tracking_error(make_config, tmp_path):
    config = make_config(*MINI)
    broken = dataclasses.replace(
        config, tracking=dataclasses.replace(config.tracking, uri=f"sqlite:///{tmp_path}/mlflow.db")
    )
    (tmp_path / "mlflow.db").write_bytes(b"SQLite format 3\0" + b"garbage" * 1000)
    with pytest.raises(TrackingError, match=r"tracking\.uri="):
        run(RunSpec(broken, tmp_path / "run"))


def test_network_stuck_at_chance_is_tagged_and_said_to_be_collapsed(make_config, uri, tmp_path, capsys):
    # Sigmoids at a small learning rate: after two epochs of eight steps it still only guesses.
    config = make_config(*MINI, uri, "data.train_size=null")
    result = run(RunSpec(config, tmp_path / "run"))
    assert result.collapsed
    assert "collapsed: no better than guessing" in capsys.readouterr().out
    assert client(config).get_run(result.run_id).data.tags["collapsed"] == "true"


def test_network_that_learns_is_not_collapsed(make_config, tmp_path):
    config = make_config(*MINI, "tracking=none", "model=lenet_relu_max", "epochs=4")
    assert not run(RunSpec(config, tmp_path / "run")).collapsed


def test_folder_whose_config_cannot_be_read_is_refused(make_config, tmp_path):
    (tmp_path / "run" / "config.yaml").mkdir(parents=True)
    with pytest.raises(OutputError, match="already holds a run"):
        run(RunSpec(make_config(*MINI, "tracking=none"), tmp_path / "run"))

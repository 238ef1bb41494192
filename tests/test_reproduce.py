"""`reproduce` tells the truth: about equal bits, about one wrong bit, and about configs from elsewhere."""

import json
import math
import shutil
import sqlite3
from pathlib import Path

import pytest
import yaml

from lenet_sweep.runs import reproduce as reproduction
from lenet_sweep.runs.run import run
from lenet_sweep.runs.spec import RunSpec

MINI = ("data=fashion_mnist_mini", "data.train_size=600", "epochs=2", "threads=1", "lr=0.1", "seed=3")


@pytest.fixture(scope="module")
def original(make_config, tmp_path_factory, put_database):
    """A folder in which one run was trained: its ledger, its database and its output folder."""
    here = tmp_path_factory.mktemp("original")
    put_database(here)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        run(RunSpec(make_config(*MINI), Path("outputs") / "runs" / "first", ("lr=0.1",)))
    return here


@pytest.fixture
def trained(original, tmp_path):
    """The id and the folder of a finished run, in a copy that a test may spoil."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "outputs" / "runs" / "first"
    return json.loads((folder / "result.json").read_text())["run_id"], folder


@pytest.fixture
def cli(tmp_path, monkeypatch, command):
    """The command line, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return command


def test_finished_run_is_reproduced_bit_for_bit_by_id_prefix_folder_and_config(cli, trained):
    run_id, folder = trained
    for name in (run_id, run_id[:6], str(folder), str(folder / "config.yaml")):
        done = cli("reproduce", name)
        assert (done.returncode, done.stderr) == (0, "")
        found = "bit-identical: all metrics of 2 epochs, and the weights (speed is not compared)"
        assert found in done.stdout.splitlines()


def test_metric_changed_by_one_unit_in_the_last_place_is_found(cli, trained, tmp_path):
    run_id, _ = trained
    with sqlite3.connect(tmp_path / "mlruns" / "mlflow.db") as connection:
        (value,) = connection.execute(
            "select value from metrics where run_uuid = ? and key = 'test/loss' and step = 2", (run_id,)
        ).fetchone()
        changed = math.nextafter(value, 10)
        connection.execute(
            "update metrics set value = ? where run_uuid = ? and key = 'test/loss' and step = 2",
            (changed, run_id),
        )
    connection.close()
    done = cli("reproduce", run_id)
    assert done.returncode == 3
    assert "different\n" in done.stdout
    assert f"first in epoch 2, test/loss: {changed!r} then, {value!r} now" in done.stdout


def test_changed_weights_and_a_changed_journal_are_found_in_a_folder(cli, trained):
    _, folder = trained
    journal = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[0]["train/acc"] = math.nextafter(lines[0]["train/acc"], 1)
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = cli("reproduce", str(folder))
    assert done.returncode == 3
    assert "first in epoch 1, train/acc" in done.stdout

    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model" / "weights.safetensors")
    weights["conv1.bias"][0] += 1e-6
    save_file(weights, folder / "model" / "weights.safetensors")
    assert "the final weights differ" in cli("reproduce", str(folder)).stdout


def test_another_thread_count_or_library_is_named_beside_the_verdict(cli, trained):
    _, folder = trained
    environment = json.loads((folder / "environment.json").read_text())
    environment["packages"]["torch"] = "1.0"
    (folder / "environment.json").write_text(json.dumps(environment))
    done = cli("reproduce", str(folder))
    assert "packages torch: 1.0 then, " in done.stdout


def test_only_changes_that_matter_are_given_as_the_cause_of_differences(trained):
    _, folder = trained
    original = reproduction._from_folder(folder, "a run")
    now = json.loads((folder / "environment.json").read_text())
    now |= {"host": "elsewhere", "platform": "another", "git_commit": "1234"}
    sentence = "with another device, library or number of threads"

    def lines(environment, weights):
        return reproduction._compare(original, original.metrics, weights, environment).lines()

    same, other = original.weights_sha256, "other weights"
    assert [line.partition(":")[0] for line in lines(now, same)[1:]] == [
        "differences between the environments",
        "  git_commit",
    ]
    assert sentence not in "".join(lines(now, other))
    assert sentence not in "".join(lines(now | {"python": "2.7"}, same))
    assert sentence in "".join(lines(now | {"python": "2.7"}, other))
    assert "the code version differs" not in "".join(lines(now, other))
    original.environment.pop("code_version")
    assert "the code version differs" not in "".join(lines(now, other))
    original.environment["code_version"] = now["code_version"]
    assert "the code version differs" in "".join(lines(now | {"code_version": "0"}, same))


def test_run_that_was_cut_short_is_compared_as_far_as_it_went(cli, trained):
    _, folder = trained
    journal = folder / "metrics.jsonl"
    journal.write_text(journal.read_text().splitlines()[0] + "\n")
    (folder / "model" / "weights.safetensors").unlink()
    done = cli("reproduce", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit-identical: all metrics of 1 epoch (speed is not compared)\n" in done.stdout
    assert "the original ended after epoch 1 of 2" in done.stdout


def test_override_makes_a_variant_that_is_tagged_with_its_origin(cli, trained, tmp_path):
    run_id, _ = trained
    done = cli("reproduce", run_id, "lr=0.3", "model=lenet_relu_max")
    assert done.returncode == 0, done.stderr
    assert "identical" not in done.stdout
    with sqlite3.connect(tmp_path / "mlruns" / "mlflow.db") as connection:
        rows = connection.execute("select run_uuid from tags where key = 'origin' and value = ?", (run_id,))
        ((variant,),) = rows.fetchall()
        params = dict(
            connection.execute("select key, value from params where run_uuid = ?", (variant,)).fetchall()
        )
    connection.close()
    expected = {"lr": "0.3", "optimizer.lr": "0.3", "model.pool": "max", "seed": "3", "epochs": "2"}
    assert {key: params[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"surprise": 1}, "'surprise' is not a key of the config"),
        ({"seed": "${oc.env:HOME}"}, "a stored config must not contain interpolations"),
        ({"lr": -1}, "lr=-1: must be a number above 0"),
        ({"model": {"_target_": "os.system"}}, "'model._target_' is not a key of the config"),
        ({"data": "../../etc"}, "data='../../etc'"),
    ],
)
def test_config_from_elsewhere_that_is_more_than_values_is_refused(cli, trained, tmp_path, change, complaint):
    _, folder = trained
    values = yaml.safe_load((folder / "config.yaml").read_text())
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.yaml").write_text(yaml.safe_dump(values | change))
    done = cli("reproduce", "foreign")
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_yaml_that_would_make_python_objects_makes_none(cli, tmp_path):
    (tmp_path / "config.yaml").write_text("lr: !!python/object/apply:os.system ['touch pwned']\n")
    done = cli("reproduce", "config.yaml")
    assert done.returncode == 2
    assert "not a config in YAML" in done.stderr
    assert not (tmp_path / "pwned").exists()


def test_paths_in_a_config_from_elsewhere_are_not_used(cli, trained, tmp_path):
    _, folder = trained
    values = yaml.safe_load((folder / "config.yaml").read_text())
    values["data"]["root"] = str(tmp_path / "elsewhere")
    values["tracking"]["uri"] = f"sqlite:///{tmp_path}/elsewhere/mlflow.db"
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    assert cli("reproduce", str(folder)).returncode == 0
    assert not (tmp_path / "elsewhere").exists()


def test_weights_that_are_a_pickle_are_refused_unopened(cli, trained, tmp_path):
    _, folder = trained
    (folder / "model" / "weights.safetensors").write_bytes(b"cposix\nsystem\n(S'touch pwned'\ntR.")
    done = cli("reproduce", str(folder))
    assert done.returncode == 2
    assert "the stored data of the run is damaged" in done.stderr
    assert not (tmp_path / "pwned").exists()


def test_id_that_no_run_has_is_named(cli, trained):
    done = cli("reproduce", "0123456789abcdef")
    assert done.returncode == 2
    assert "no run has an id that starts with '0123456789abcdef'" in done.stderr


def test_value_that_only_the_originals_choices_have_can_be_varied(make_config, cli, tmp_path):
    run(RunSpec(make_config(*MINI, "epochs=1", "optimizer=adam", "tracking=none"), tmp_path / "adam"))
    done = cli("reproduce", "adam", "optimizer.eps=0.001", "tracking=none")
    assert done.returncode == 0, done.stderr
    (variant,) = (tmp_path / "outputs" / "runs").iterdir()
    kept = yaml.safe_load((variant / "config.yaml").read_text())["optimizer"]
    assert (kept["name"], kept["eps"]) == ("adam", 0.001)


def test_run_of_a_device_that_is_not_here_is_compared_on_another(cli, trained):
    _, folder = trained
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("device: auto", "device: cuda:7"))
    done = cli("reproduce", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training on another device; results are not bit-identical in general" in done.stdout


@pytest.mark.parametrize("threads", [-1, 10**9, True, "many"])
def test_absurd_number_of_threads_in_a_stored_environment_is_not_used(cli, trained, threads):
    _, folder = trained
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(environment | {"threads": threads}))
    assert cli("reproduce", str(folder)).returncode == 0


@pytest.mark.parametrize("change", ["+debug=fast", "hydra.run.dir=x", "lrr=0.1"])
def test_variant_of_something_that_no_config_has_is_refused(cli, trained, change):
    done = cli("reproduce", trained[0], change)
    assert done.returncode == 2
    assert "is not a key of the config" in done.stderr


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nowhere", "neither a folder, nor a config.yaml, nor a run id"),
        ("0123456789abcdef", "there are no runs yet in sqlite:///mlruns/mlflow.db"),
        ("nowhere/config.yaml", "contains no run"),
    ],
)
def test_run_that_is_not_there_is_named(cli, name, complaint):
    done = cli("reproduce", name)
    assert done.returncode == 2
    assert complaint in done.stderr


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([("lr", 0.3)], (0.3, 0.3)),  # as ${lr} in conf/optimizer/ says
        ([("epochs", 3)], (0.1, 0.05)),  # nothing about the learning rate
        ([("lr", 0.3), ("optimizer.lr", 0.7)], (0.3, 0.7)),
        ([("optimizer.lr", 0.7)], (0.1, 0.7)),
    ],
)
def test_variant_changes_the_optimizers_rate_with_lr_and_only_then(
    make_config, monkeypatch, changes, expected
):
    original = reproduction.Original("a run", make_config("lr=0.1", "optimizer.lr=0.05"), {}, None, {})
    specs = []
    monkeypatch.setattr(reproduction, "run", specs.append)
    monkeypatch.setattr(reproduction.preflight, "check", lambda *_: None)
    reproduction.train_variant(original, make_config(), changes, ("typed=1",))
    (spec,) = specs
    assert (spec.config.lr, spec.config.optimizer.lr) == expected
    assert (spec.origin, spec.overrides, spec.job) == ("a run", ("typed=1",), None)

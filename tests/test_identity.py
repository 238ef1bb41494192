"""What enters a config's hash, and what does not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lenet_sweep.config import parsing
from lenet_sweep.paths import PACKAGE
from lenet_sweep.storage import environment, fingerprint
from lenet_sweep.storage.environment import Git, git_state, uncommitted_diff

WITHOUT_EFFECT = [
    "data.root=elsewhere",
    "tracking=none",
    "tracking.uri=sqlite:///other.db",
    "tracking.experiment=another",
    "sweep.dry_run=true",
    "profile=true",
    "model.name=mine",
]
WITH_EFFECT = [
    "lr=0.8",
    "epochs=11",
    "batch_size=255",
    "seed=1",
    "device=cpu",
    "threads=1",
    "target_loss=0.1",
    "model=lenet_relu_max",
    "model.hidden=[120,85]",
    "model.init=pytorch",
    "optimizer=momentum",
    "optimizer.weight_decay=0.1",
    "schedule=cosine",
    "data=mnist",
    "data.train_size=1000",
    "data.val_size=1000",
    "precision.tf32=true",
    "precision.amp=true",
]


@pytest.mark.parametrize("override", WITHOUT_EFFECT)
def test_field_that_cannot_change_a_number_leaves_the_hash(make_config, override):
    assert fingerprint.config_hash(make_config(override)) == fingerprint.config_hash(make_config())


def test_every_field_that_can_change_a_number_changes_the_hash(make_config):
    hashes = [
        fingerprint.config_hash(make_config(*override)) for override in [(), *((o,) for o in WITH_EFFECT)]
    ]
    assert len(set(hashes)) == len(WITH_EFFECT) + 1


def test_hash_is_the_same_in_another_process_with_another_hash_seed(make_config):
    script = (
        "import json, sys; from lenet_sweep.config import parsing;"
        "from lenet_sweep.storage import fingerprint;"
        "print(fingerprint.config_hash(parsing.parse(json.load(sys.stdin))))"
    )
    values = json.dumps(parsing.to_dict(make_config()))
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=values,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "123", "PATH": ""},
    )
    assert done.stdout.strip() == fingerprint.config_hash(make_config())


def test_editing_the_training_loop_changes_the_hash_and_editing_the_report_does_not(
    make_config, monkeypatch, tmp_path
):
    shutil.copytree(PACKAGE, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(fingerprint, "PACKAGE", tmp_path)
    versions = []
    for edited in (None, "analysis/tables.py", "training/engine.py"):
        if edited:
            source = tmp_path / edited
            source.write_text(source.read_text() + "# edited\n")
        fingerprint.code_version.cache_clear()
        versions.append(fingerprint.config_hash(make_config()))
    monkeypatch.undo()
    fingerprint.code_version.cache_clear()
    assert versions[0] == versions[1] != versions[2]


def test_hidden_files_of_an_editor_are_no_sources(monkeypatch, tmp_path):
    shutil.copytree(PACKAGE, tmp_path, dirs_exist_ok=True)
    before = [path.relative_to(PACKAGE) for path in fingerprint.result_sources()]
    (tmp_path / "training" / ".#model.py").symlink_to("somebody@somewhere.1")
    for folder in (".ipynb_checkpoints", "more"):
        (tmp_path / "training" / folder).mkdir()
        (tmp_path / "training" / folder / "model.py").touch()
    monkeypatch.setattr(fingerprint, "PACKAGE", tmp_path)
    found = [path.relative_to(tmp_path) for path in fingerprint.result_sources()]
    assert set(found) == {*before, Path("training/more/model.py")}


def test_line_ends_of_a_checkout_do_not_change_the_hash(monkeypatch, tmp_path):
    shutil.copytree(PACKAGE, tmp_path, dirs_exist_ok=True)
    for source in [*tmp_path.rglob("*.py"), *tmp_path.rglob("*.cpp")]:
        source.write_bytes(source.read_bytes().replace(b"\n", b"\r\n"))
    expected = fingerprint.code_version()
    monkeypatch.setattr(fingerprint, "PACKAGE", tmp_path)
    fingerprint.code_version.cache_clear()
    found = fingerprint.code_version()
    monkeypatch.undo()
    fingerprint.code_version.cache_clear()
    assert found == expected


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one commit, in place of the package's own."""
    (tmp_path / "__init__.py").write_text("first\n")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(environment, "PACKAGE", tmp_path)
    for cached in (git_state, uncommitted_diff):
        cached.cache_clear()
    yield tmp_path
    for cached in (git_state, uncommitted_diff):
        cached.cache_clear()


def test_clean_checkout_has_a_commit_and_no_diff(checkout):
    assert len(git_state().commit) == 40
    assert not git_state().dirty
    assert uncommitted_diff() is None


def test_uncommitted_change_is_kept_as_a_diff_whatever_its_bytes(checkout):
    (checkout / "__init__.py").write_bytes(b"second \xe9\n")
    assert git_state().dirty
    assert "-first\n+second " in uncommitted_diff()


def test_huge_diff_is_cut_with_a_note(checkout):
    (checkout / "__init__.py").write_text("x" * 300_000)
    kept = uncommitted_diff()
    assert 262_144 < len(kept) < 263_000
    assert "[cut here: the whole diff has 300" in kept


def test_folder_that_is_no_checkout_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "PACKAGE", tmp_path)
    git_state.cache_clear()
    found = git_state()
    git_state.cache_clear()
    assert found == Git(None, False)

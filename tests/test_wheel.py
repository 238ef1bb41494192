"""The wheel, built from this checkout and run alone, where the checkout cannot be imported."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # Without hatchling here, pip fetches it into an environment of its own.
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    _pip("wheel", "--no-deps", *isolation, "--wheel-dir", folder, CHECKOUT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel alone, in a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    _pip("install", "--no-deps", "--target", folder, wheel)
    return folder


def test_wheel_holds_the_package_the_plugin_the_config_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lenet_sweep", "hydra_plugins"}
    for kind, target in (
        ("conf/**/*.yaml", "lenet_sweep/"),
        ("lenet_sweep/**/*.py", ""),
        ("hydra_plugins/**/*.py", ""),
    ):
        for path in CHECKOUT.glob(kind):
            assert f"{target}{path.relative_to(CHECKOUT).as_posix()}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name or "test" in name]


def test_wheel_runs_from_an_empty_folder(cli, installed, tmp_path):
    # -S leaves out site's .pth files, one of which leads to the checkout where that is installed editable.
    paths = [str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    alone = {"python": ("-S",), "env": {"PYTHONPATH": os.pathsep.join(paths)}}
    where = cli("--info", "searchpath", **alone)
    assert where.returncode == 0, where.stderr
    assert str(installed / "lenet_sweep" / "conf") in where.stdout
    assert str(CHECKOUT) not in where.stdout

    run = cli("+debug=fast", **alone)
    assert run.returncode == 0, run.stderr
    assert "examples/sec on" in run.stdout
    assert (tmp_path / "mlruns" / "mlflow.db").exists()

    sweep = cli("+debug=fast", "lr=0.1,0.2", "sweep.dry_run=true", "-m", **alone)
    assert "[2/2]" in sweep.stdout, sweep.stderr


def test_console_script_is_the_same_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert b"lenet-sweep = lenet_sweep.cli.main:main" in archive.read(entry_points)


def _pip(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr

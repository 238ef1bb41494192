"""What all tests share: the real command in a folder of its own, datasets, checked configs, a rule for skips.

`LENET_SWEEP_DATA` names a folder of datasets to use instead of fetching them once a session.
`LENET_SWEEP_NO_SKIP=1` makes every skipped test a failed one, but for those that need a GPU.
"""

import contextlib
import functools
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from lenet_sweep.config.schema import Config

if TYPE_CHECKING:
    from playwright.sync_api import Page

hypothesis.settings.register_profile("no deadline", deadline=None)  # a busy machine is no failed test
hypothesis.settings.load_profile("no deadline")

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of datasets, for this process and all commands; fetch into it with `sources.ensure`."""
    given = os.environ.get("LENET_SWEEP_DATA")
    root = Path(given).absolute() if given else tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LENET_SWEEP_DATA", str(root))
        yield root


@pytest.fixture
def cli(tmp_path: Path, data_root: Path) -> Cli:
    """Run `python -m lenet_sweep ARGUMENTS` in `tmp_path`, with none of our own settings around it."""

    def run(
        *arguments: str,
        env: dict[str, str] | None = None,
        cwd: Path = tmp_path,
        timeout: float = 120,
        python: tuple[str, ...] = (),
        prefix: tuple[str, ...] = (),
    ) -> "subprocess.CompletedProcess[str]":
        """`python` goes between `python` and `-m`; `prefix` before all (setpriv ...)."""
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("MLFLOW_", "HYDRA_", "LENET_SWEEP_", "PYTEST_"))
        }
        return subprocess.run(
            [*prefix, sys.executable, *python, "-m", "lenet_sweep", *arguments],
            cwd=cwd,
            env={**clean, "LENET_SWEEP_DATA": str(data_root), **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def make_config(data_root: Path) -> MakeConfig:
    """Compose conf/ with overrides, as the command line would: make_config("lr=0.1", "model.pool=max")."""
    from hydra import compose, initialize_config_dir

    from lenet_sweep.cli.compose import to_config
    from lenet_sweep.paths import conf_dir

    @functools.cache
    def make(*overrides: str) -> Config:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return to_config(compose("config", list(overrides)))

    return make


@dataclass
class Done:
    """What a command of `command` left, named as in subprocess.CompletedProcess."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def command_in(data_root: Path) -> Callable[..., Done]:
    """The command line in a folder and in this process, which has torch and mlflow: ten times as fast."""
    from lenet_sweep.cli.main import main

    def run(folder: Path, *arguments: str) -> Done:
        said, told = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(told),
        ):
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["lenet_sweep", *arguments])
            try:
                code = main()
            except SystemExit as exit:  # argparse's, after --help
                code = int(exit.code or 0)
        return Done(code, said.getvalue(), told.getvalue())

    return run


@pytest.fixture
def command(command_in: Callable[..., Done]) -> Callable[..., Done]:
    """The command line in the current folder and in this process."""

    def run(*arguments: str) -> Done:
        return command_in(Path.cwd(), *arguments)

    return run


@pytest.fixture(scope="session")
def put_database(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Give a folder MLflow's database, still without a run: a copy, as making one takes a second."""
    from lenet_sweep.tracking import mlflow_client

    made = tmp_path_factory.mktemp("database") / "mlflow.db"
    mlflow_client._create_database(made)

    def put(folder: Path) -> None:
        (folder / "mlruns").mkdir()
        shutil.copy(made, folder / "mlruns")

    return put


@pytest.fixture(scope="session")
def without_pictures() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A block in which runs draw nothing, which takes half of a short one's time."""
    from lenet_sweep.inspection import plots

    @contextlib.contextmanager
    def block() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("curves", "confusion_matrix", "filters", "activations", "errors"):
                patch.setattr(plots, name, lambda *_: None)
            yield

    return block


@pytest.fixture
def no_pictures(without_pictures: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """The test's runs draw nothing: for tests of what else they leave."""
    with without_pictures():
        yield


@pytest.fixture
def browser_page() -> Iterator["tuple[list[str], Page]"]:
    """A tab of a real browser, and the addresses that it asks for; an error in its page fails the test."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    asked: list[str] = []
    errors: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1600, "height": 1200})
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield asked, page
        browser.close()
    assert not errors


Server = tuple[Callable[[], "subprocess.Popen[bytes]"], str]


@pytest.fixture
def mlflow_server() -> Iterator[Callable[[Path, str], Server]]:
    """A function of a folder and a database in it; it returns a real server's starter and its address.

    The starter may be called again when the server has died: the port on loopback stays the same.
    """
    processes: list[subprocess.Popen[bytes]] = []

    def prepare(folder: Path, database: str) -> Server:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        address = ["--host", "127.0.0.1", "--port", str(port)]
        store = ["--backend-store-uri", f"sqlite:///{folder}/{database}"]
        store += ["--artifacts-destination", str(folder)]

        def begin() -> "subprocess.Popen[bytes]":
            process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--workers", "1", *address, *store],
                cwd=folder,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            processes.append(process)
            deadline = time.monotonic() + 90
            while not _answers(port):
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.1)
            return process

        return begin, f"http://127.0.0.1:{port}"

    yield prepare
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
    except (OSError, urllib.error.URLError):
        return False
    return True


def pytest_configure() -> None:
    # A shell lets what it starts in the background ignore Ctrl-C, and every child would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not item.get_closest_marker("gpu") and not hasattr(report, "wasxfail"):
        _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped(report)
    return report


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """A check that does not run is no check: where everything must run, a skip fails."""
    if report.skipped and os.environ.get("LENET_SWEEP_NO_SKIP") == "1":
        report.outcome = "failed"
        report.longrepr = f"skipped, but LENET_SWEEP_NO_SKIP=1: {report.longrepr}"

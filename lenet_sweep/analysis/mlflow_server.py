"""MLflow's pages on this machine, opened where the answer is: a server that lives as long as the command.

The server is MLflow's own, lean (one worker, no job consumers, no telemetry) and on loopback only. A
store that has a server already, here or elsewhere, gets no second one.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import webbrowser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from filelock import FileLock

from lenet_sweep.analysis import mlflow_view
from lenet_sweep.errors import ConfigError, TrackingError
from lenet_sweep.paths import cache_folder
from lenet_sweep.tracking import mlflow_client, mlflow_page, mlflow_query
from lenet_sweep.tracking.mlflow_store import MlflowStore

HOST = "127.0.0.1"
PORT = 5000  # MLflow's own
_OTHERS = 20  # ports after it that are tried when it is taken
_PATIENCE_S = 90  # for the server to answer; it takes 5 to 10 s
_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves nine processes and 2 GiB
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

Say = Callable[[str], None]


def run(name: str | None, store: MlflowStore, port: int | None, browser: bool, say: Say) -> None:
    """Serve `store` until Ctrl-C, and show `name`: a sweep's or run's id or folder, or the start of an id.

    Without a name it is the latest sweep, or, where there is none, all runs. The page's address is
    told, and opened if `browser` is.

    Raises:
        ConfigError: if `name` is nobody's, or `port` is asked for and taken.
        TrackingError: if the store cannot be asked, or the server does not start.
    """
    mlflow_client.check_filled(store.config)
    with contextlib.ExitStack() as served:
        # One command at a time chooses a port, or two could take each other's server for their own.
        with FileLock(cache_folder() / "ui.lock", timeout=2 * _PATIENCE_S):
            server = served.enter_context(_server(store, port, say))
            page = f"{server.address}/{page_address(name, store)}"  # found while the server starts
            server.wait()
        say(page)
        if browser:
            _open(page)
        if server.process:
            say("Ctrl-C ends the server")
            with contextlib.suppress(KeyboardInterrupt):
                server.process.wait()
                raise TrackingError(f"the server ended by itself: {server.last_words()}")


def page_address(name: str | None, store: MlflowStore) -> str:
    """The address of the page for `name`, below a server's; the view that it shows is saved in the store.

    Raises:
        ConfigError: if `name` is unknown.
        TrackingError: if the store cannot be reached.
    """
    page = mlflow_view.find_page(name, store)
    if page.run_id:
        return mlflow_page.run_page(mlflow_query.experiment_of(store.config, page.run_id), page.run_id)
    key = mlflow_view.view_key(page.title)
    state = mlflow_view.view_state(page.runs, page.condition)
    experiment_id = mlflow_page.share_view(store.config, key, page.title, state)
    # No more parameters: with an order or a filter in the address, MLflow ignores the saved view.
    query = f"workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={key}"
    return f"#/experiments/{experiment_id}/runs?{query}"


@dataclass
class _Server:
    """A server, and its process if this command started it."""

    address: str
    process: "subprocess.Popen[str] | None" = None
    said: IO[str] | None = None

    def wait(self) -> None:
        """Return as soon as it answers."""
        deadline = time.monotonic() + _PATIENCE_S
        while not mlflow_client.answers(self.address) or self._has_ended():
            if self._has_ended():
                raise TrackingError(f"MLflow's server did not start: {self.last_words()}")
            if time.monotonic() > deadline:
                raise TrackingError(f"MLflow's server at {self.address} does not answer: {self.last_words()}")
            time.sleep(0.1)

    def _has_ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def last_words(self) -> str:
        """What the server said last, an error if there was one."""
        if not self.said:
            return "it is none of this command's"
        self.said.seek(0)
        lines = [line.strip() for line in self.said if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        return (errors or lines or ["it said nothing"])[-1]


@contextlib.contextmanager
def _server(store: MlflowStore, port: int | None, say: Say) -> Iterator[_Server]:
    """A server of this store, which need not answer yet; one that is started here ends with the block."""
    if mlflow_client.is_server(store.config.uri):
        yield _Server(store.config.uri.rstrip("/"))
        return
    for wanted in [port] if port else range(PORT, PORT + _OTHERS):
        if _is_free(wanted):
            break
        if mlflow_client.serves(f"http://{HOST}:{wanted}", store.config):
            say("a server of this store is running already")
            yield _Server(f"http://{HOST}:{wanted}")
            return
        if port:
            raise ConfigError(
                f"--port {port}: is taken by something else; without --port a free one is found"
            )
        say(f"port {wanted} is taken by something else")
    else:
        raise ConfigError(f"ports {PORT} to {PORT + _OTHERS - 1} are all taken; name a free one with --port")
    say(f"starting MLflow's server on port {wanted}, reachable from this machine alone")
    with _started(store, wanted) as server:
        yield server


@contextlib.contextmanager
def _started(store: MlflowStore, port: int) -> Iterator[_Server]:
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--workers",
        "1",
        "--host",
        HOST,
        "--port",
        str(port),
    ]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            [*command, "--backend-store-uri", mlflow_client.absolute(store.config.uri)],
            env=os.environ | _ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one's whole family
        )
        try:
            yield _Server(f"http://{HOST}:{port}", process, said)
        finally:
            _end(process)


def _end(process: "subprocess.Popen[str]") -> None:
    """End the process and all its children, those that do not want to as well."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS's word for one that has ended
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def _open(page: str) -> None:
    """Open the page in a browser with windows; a text browser would take the terminal."""
    if sys.platform != "linux" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))):
        webbrowser.open(page)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True

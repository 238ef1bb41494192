"""The command `ui`: opens MLflow's pages on a sweep or run, and serves them until Ctrl-C.

The server is MLflow's own, with one worker, without job consumers and telemetry, and reachable only from
this machine. If a server for the store is already running, it is reused.
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
PORT = 5000  # MLflow's default
_PORTS = 20  # consecutive ports that are tried, from PORT on
_START_TIMEOUT_S = 90  # the server usually answers after 5 to 10 s
_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves nine processes and 2 GiB
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

Say = Callable[[str], None]


def run(name: str | None, store: MlflowStore, port: int | None, browser: bool, say: Say) -> None:
    """Serve `store` until Ctrl-C and open the page of `name`: an id, the start of an id, or a folder.

    Without a name, the page shows the latest sweep, or all runs if there is no sweep. Its address is
    passed to `say`, and opened in a browser if `browser` is true.

    Raises:
        ConfigError: if `name` is unknown, or if `port` is in use by another program.
        TrackingError: if the store cannot be reached, or the server does not start.
    """
    mlflow_client.check_filled(store.config)
    with contextlib.ExitStack() as served:
        # Only one command at a time may choose a port; otherwise two could start servers on the same one.
        with FileLock(cache_folder() / "ui.lock", timeout=2 * _START_TIMEOUT_S):
            server = served.enter_context(_server(store, port, say))
            page = f"{server.address}/{page_address(name, store)}"  # computed while the server starts
            server.wait()
        say(page)
        if browser:
            _open(page)
        if server.process:
            say("Ctrl-C stops the server")
            with contextlib.suppress(KeyboardInterrupt):
                server.process.wait()
                raise TrackingError(f"MLflow's server stopped unexpectedly: {server.last_line()}")


def page_address(name: str | None, store: MlflowStore) -> str:
    """The address of the page for `name`, relative to the server's. Saves its view in the store.

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
    # With an order or a filter in the address, MLflow ignores the saved view.
    query = f"workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={key}"
    return f"#/experiments/{experiment_id}/runs?{query}"


@dataclass
class _Server:
    """A server, with its process and log if this command started it."""

    address: str
    process: "subprocess.Popen[str] | None" = None
    log: IO[str] | None = None

    def wait(self) -> None:
        """Return as soon as the server answers.

        Raises:
            TrackingError: if its process ends first, or after 90 seconds.
        """
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not mlflow_client.responds(self.address) or self._has_ended():
            if self._has_ended():
                raise TrackingError(f"MLflow's server did not start: {self.last_line()}")
            if time.monotonic() > deadline:
                raise TrackingError(f"MLflow's server at {self.address} does not answer: {self.last_line()}")
            time.sleep(0.1)

    def _has_ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def last_line(self) -> str:
        """The last error in the server's log, or else its last line."""
        if not self.log:
            return "it was not started by this command"
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        return (errors or lines or ["its log is empty"])[-1]


@contextlib.contextmanager
def _server(store: MlflowStore, port: int | None, say: Say) -> Iterator[_Server]:
    """A server for this store, which may not answer yet. If it is started here, it ends with the block."""
    if mlflow_client.is_server(store.config.uri):
        yield _Server(store.config.uri.rstrip("/"))
        return
    for candidate in [port] if port else range(PORT, PORT + _PORTS):
        if _is_free(candidate):
            break
        if mlflow_client.serves_store(f"http://{HOST}:{candidate}", store.config):
            say("a server for this store is already running")
            yield _Server(f"http://{HOST}:{candidate}")
            return
        if port:
            raise ConfigError(
                f"--port {port}: is in use by another program; without --port, a free port is chosen"
            )
        say(f"port {candidate} is in use by another program")
    else:
        raise ConfigError(
            f"ports {PORT} to {PORT + _PORTS - 1} are all in use; pass the number of a free one with --port"
        )
    say(f"starting MLflow's server on port {candidate}, reachable only from this machine")
    with _started(store, candidate) as server:
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
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [*command, "--backend-store-uri", mlflow_client.absolute(store.config.uri)],
            env=os.environ | _ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C reaches this process only, which then ends the server's group
        )
        try:
            yield _Server(f"http://{HOST}:{port}", process, log)
        finally:
            _end(process)


def _end(process: "subprocess.Popen[str]") -> None:
    """End the process and all its children: SIGTERM first, SIGKILL for those that are still running."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(
            ProcessLookupError, PermissionError
        ):  # macOS raises the latter if it has ended
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def _open(page: str) -> None:
    """Open the page in a graphical browser; a text browser would block the terminal."""
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

"""`ui`: a lean server that ends with the command, and a view that shows a sweep, seen in a real browser."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from PIL import Image

from lenet_sweep.analysis import mlflow_server, mlflow_view
from lenet_sweep.config.schema import MlflowConfig
from lenet_sweep.errors import ConfigError, TrackingError
from lenet_sweep.storage.records import Record
from lenet_sweep.tracking import mlflow_client
from lenet_sweep.tracking.mlflow_store import MlflowStore

CHECKOUT = Path(__file__).parents[1]
LRS = ("0.05", "0.2")


@pytest.fixture(scope="module")
def original(tmp_path_factory, command_in, put_database):
    """A folder with a sweep of two lrs and two seeds, and one run by itself."""
    here = tmp_path_factory.mktemp("sweep")
    put_database(here)
    small = ("data=fashion_mnist_mini", "threads=1", "model=lenet_relu_max", "epochs=3")
    for arguments in (("lr=" + ",".join(LRS), "seed=0,1", "-m"), ("lr=0.1",)):
        done = command_in(here, *small, *arguments)
        assert done.returncode == 0, done.stderr
    return here


@pytest.fixture
def sweep(original, monkeypatch) -> Path:
    """The sweep's folder; the current folder is the one that it was run in."""
    monkeypatch.chdir(original)
    (folder,) = (original / "outputs" / "sweeps").iterdir()
    return folder


def store(folder):
    return MlflowConfig(name="mlflow", uri=f"sqlite:///{folder}/mlruns/mlflow.db", experiment="lenet_sweep")


@contextlib.contextmanager
def taken() -> Iterator[int]:
    with socket.create_server((mlflow_server.HOST, 0)) as listening:
        yield listening.getsockname()[1]


@contextlib.contextmanager
def pages(folder, *arguments) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The command's last address, when it says that it is ready, and its process; ended by Ctrl-C."""
    command = [sys.executable, "-u", "-m", "lenet_sweep", "ui", "--no-browser", *arguments]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout
            said = []
            for line in process.stdout:
                said.append(line.strip())
                if line.startswith("Ctrl-C"):
                    break
            else:
                pytest.fail(f"the command ended: {said}")
            yield next(line for line in reversed(said) if line.startswith("http")), process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=30)


def state_of(folder, address):
    """The view that the address names, as the store has it."""
    from mlflow import MlflowClient

    key = re.search("viewStateShareKey=(.*)$", address)[1]
    tags = MlflowClient(store(folder).uri).get_experiment_by_name("lenet_sweep").tags
    packed = json.loads(tags[f"mlflow.sharedViewState.{key}"])["state"]
    return json.loads(zlib.decompress(b64decode(packed.removeprefix("deflate;"))))


def runs(**varied):
    return [
        Record(
            str(i), "FINISHED", {**{key: value[i] for key, value in varied.items()}, "seed": str(i)}, str(i)
        )
        for i in range(2)
    ]


def test_columns_are_what_differs_and_the_metrics_that_were_measured():
    state = mlflow_view.view_state(runs(lr=("0.1", "0.5"), epochs=("3", "3")), "tags.sweep_id = 'x'")
    assert state["selectedColumns"] == [
        "params.`lr`", "params.`seed`", "metrics.`test/acc`", "metrics.`train/acc`", "metrics.`train/loss`",
    ]  # fmt: skip
    held_out = runs(**{"lr": ("0.1", "0.5"), "data.val_size": ("100", "100")})
    assert "metrics.`val/acc`" in mlflow_view.view_state(held_out, "")["selectedColumns"]


def test_words_are_on_no_numeric_axis():
    charts = mlflow_view.view_state(runs(**{"lr": ("0.1", "0.5"), "model.pool": ("avg", "max")}), "")[
        "compareRunCharts"
    ]
    assert [chart["xaxis"]["key"] for chart in charts if chart["type"] == "SCATTER"] == ["lr"]
    (parallel,) = [chart for chart in charts if chart["type"] == "PARALLEL"]
    assert parallel["selectedParams"] == ["lr", "model.pool"]


def test_view_selects_the_latest_sweep_or_the_one_that_is_named(sweep, original):
    for name in (None, sweep.name, sweep.name[:12], str(sweep)):
        state = state_of(original, mlflow_server.page_address(name, MlflowStore(store(original))))
        assert state["searchFilter"] == f"tags.sweep_id = '{sweep.name}'"
    with pytest.raises(ConfigError, match="neither a folder"):
        mlflow_server.page_address("nonsense", MlflowStore(store(original)))
    with pytest.raises(ConfigError, match="contains neither"):
        mlflow_server.page_address(".", MlflowStore(store(original)))


def test_experiment_that_is_not_there_is_not_made(original):
    from mlflow import MlflowClient

    with pytest.raises(ConfigError, match="'typo': is not in"):
        mlflow_server.page_address(None, MlflowStore(replace(store(original), experiment="typo")))
    assert MlflowClient(store(original).uri).get_experiment_by_name("typo") is None


def test_run_opens_on_its_own_page(sweep, original):
    run_id = json.loads((sweep / "0" / "result.json").read_text())["run_id"]
    for name in (run_id, run_id[:8], str(sweep / "0")):
        assert f"/runs/{run_id}?" in mlflow_server.page_address(name, MlflowStore(store(original)))


def test_view_holds_runs_that_were_finished_before_the_sweep(tmp_path, command_in, put_database):
    put_database(tmp_path)
    small = ("data=fashion_mnist_mini", "threads=1", "data.train_size=300", "epochs=1")
    folders = ["outputs/sweeps/first", "elsewhere"]
    for lrs, folder in zip(("0.1", "0.1,0.2"), folders, strict=True):
        done = command_in(tmp_path, *small, f"lr={lrs}", f"hydra.sweep.dir={folder}", "-m")
        assert done.returncode == 0, done.stderr
    with contextlib.chdir(tmp_path):
        state = state_of(tmp_path, mlflow_server.page_address("elsewhere", MlflowStore(store(tmp_path))))
    assert len(re.findall("'[0-9a-f]{32}'", state["searchFilter"])) == 2
    # Given again, nothing is trained, and the command names the sweep that did.
    again = command_in(tmp_path, *small, "lr=0.1", "-m")
    assert "curves in the browser: python -m lenet_sweep ui first" in again.stdout


def test_runs_of_one_learning_rate_have_one_colour(original):
    from mlflow import MlflowClient

    client = MlflowClient(store(original).uri)
    found = client.search_runs(
        [client.get_experiment_by_name("lenet_sweep").experiment_id], "tags.sweep_id LIKE '%'"
    )
    colours = {(run.data.params["lr"], run.data.tags["mlflow.runColor"]) for run in found}
    assert len(found) == 4
    assert len(colours) == len({colour for _, colour in colours}) == 2


def test_run_is_described_in_the_store(sweep, original):
    from mlflow import MlflowClient

    client = MlflowClient(store(original).uri)
    run_id = json.loads((sweep / "0" / "result.json").read_text())["run_id"]
    note = client.get_run(run_id).data.tags["mlflow.note.content"]
    accuracy = json.loads((sweep / "0" / "metrics.jsonl").read_text().splitlines()[-1])["test/acc"]
    assert "lr=0.05 seed=0" in note
    assert f"test/acc {accuracy:.3f}" in note
    assert f"reproduce {run_id[:8]}" in note


def test_best_run_stands_for_the_sweep_and_has_its_report(sweep, original):
    from mlflow import MlflowClient

    client = MlflowClient(store(original).uri)
    runs = client.search_runs([client.get_experiment_by_name("lenet_sweep").experiment_id])
    having = [
        run
        for run in runs
        if any(artifact.path == "report.html" for artifact in client.list_artifacts(run.info.run_id))
    ]
    assert len(having) == 1
    of_lr = {lr: [run.data.metrics["test/acc"] for run in runs if run.data.params["lr"] == lr] for lr in LRS}
    best = max(LRS, key=lambda lr: sum(of_lr[lr]))
    assert having[0].data.params["lr"] == best
    assert having[0].data.metrics["test/acc"] == max(of_lr[best])
    note = having[0].data.tags["mlflow.note.content"]
    assert f"best run of sweep `{sweep.name}`" in note
    assert "Best: lr=" in note


def test_port_that_is_taken_is_refused_when_asked_for_and_avoided_otherwise(sweep, original, monkeypatch):
    monkeypatch.setattr(mlflow_client, "_SILENCE_S", 0.1)  # what listens there never answers
    with taken() as port:
        with (
            pytest.raises(ConfigError, match=f"--port {port}"),
            mlflow_server._server(MlflowStore(store(original)), port, print),
        ):
            pytest.fail("it started")
        said = []
        monkeypatch.setattr(mlflow_server, "PORT", port)
        monkeypatch.setattr(mlflow_server, "_started", lambda store, port: contextlib.nullcontext(port))
        with mlflow_server._server(MlflowStore(store(original)), None, said.append) as other:
            assert port < other < port + mlflow_server._PORTS
        assert said[0] == f"port {port} is in use by another program"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["tracking=none"], "report.html"),
        (["a", "b"], "give only one"),
        ([], "no runs yet"),
    ],
)
def test_command_that_cannot_work_starts_nothing(command, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlflow_server, "_started", lambda *_: pytest.fail("a server was started"))
    done = command("ui", *arguments)
    assert done.returncode == 2
    assert reason in done.stderr


@pytest.mark.slow
@pytest.mark.server
def test_ctrl_c_ends_the_server_and_leaves_nothing_behind(original):
    with pages(original, "--port", str(_free())) as (address, process):
        family = psutil.Process(process.pid).children(recursive=True)
        sockets = [c for member in family for c in member.net_connections() if c.status == "LISTEN"]
        assert {connection.laddr.ip for connection in sockets} == {"127.0.0.1"}
        assert len(family) <= 3
        port = int(re.search(r":(\d+)/", address)[1])
        # The same again, at any moment, takes the server that is there, and does not end it.
        again = subprocess.run(
            [sys.executable, "-m", "lenet_sweep", "ui", "--no-browser", "--port", str(port)],
            cwd=original, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert again.stdout.splitlines() == ["a server for this store is already running", address]
        assert mlflow_client.responds(f"http://127.0.0.1:{port}")
    assert process.returncode == 0
    deadline = time.monotonic() + 5
    while any(member.is_running() for member in family) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [member for member in family if member.is_running()]


def test_server_that_cannot_start_is_told_with_its_last_words(tmp_path):
    with (tmp_path / "said").open("w+") as said, taken() as port:
        code = "import sys; sys.exit('no room for a server')"
        with subprocess.Popen([sys.executable, "-c", code], stderr=said, text=True) as process:
            server = mlflow_server._Server(f"http://127.0.0.1:{port + 1}", process, said)
            with pytest.raises(TrackingError, match="did not start: no room for a server"):
                server.wait()


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.server
def test_saved_view_shows_the_sweeps_runs_and_curves(original, sweep, browser_page):
    with pages(original, "--port", str(_free())) as (address, _):
        asked, page = browser_page
        page.goto(address)
        page.get_by_text("4 matching runs").wait_for()
        cards = page.get_by_test_id("experiment-view-compare-runs-card")
        curves = cards.filter(has_text="test/acc").first.locator("path.js-line")
        curves.nth(len(LRS)).wait_for(state="attached")
        # Each run is drawn, in the colour of its learning rate.
        colours = curves.evaluate_all("lines => lines.map(line => line.style.stroke)")
        assert {colours.count(colour) for colour in set(colours)} == {len(colours) // len(LRS)}
        assert len(set(colours)) == len(LRS)
        sections = page.get_by_test_id("experiment-view-compare-runs-section-header").all_inner_texts()
        assert [text.split()[0] for text in sections[:2]] == ["Curves", "Choices"]

        page.goto(address.replace("compareRunsMode=CHART", "compareRunsMode=TABLE"))
        for column in ("lr", "seed", "test/acc", "train/acc"):
            page.get_by_role("columnheader", name=column, exact=True).first.wait_for()

        run_id = json.loads((sweep / "0" / "result.json").read_text())["run_id"]
        run = f"{address.partition('#')[0]}#/experiments/1/runs/{run_id}"
        page.goto(f"{run}/model-metrics?workflowType=machine_learning")
        page.locator("path.js-line").first.wait_for(state="attached")
        page.goto(f"{run}/artifacts/config.yaml")
        page.get_by_text("batch_size").first.wait_for()
        page.get_by_text("plots", exact=True).click()
        page.get_by_text("curves.png", exact=True).click()
        page.wait_for_function("[...document.images].some(i => i.naturalWidth > 300)")
        # MLflow's front end speaks to its server alone.
        assert {urlsplit(url).hostname for url in asked if url.startswith("http")} == {"127.0.0.1"}


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.server
def test_pictures_of_the_documents_can_be_taken_anew(tmp_path, data_root):
    command = [sys.executable, "-m", "tools.screenshots", "--folder", "work", "--to", "images"]
    small = ("data=fashion_mnist_mini", "epochs=1", "threads=1")
    done = subprocess.run(
        [*command, *small],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    light, dark, view = (
        Image.open(tmp_path / "images" / f"{name}.png").convert("L")
        for name in ("report_light", "report_dark", "saved_view")
    )
    assert light.getpixel((5, 5)) > 240
    assert dark.getpixel((5, 5)) < 50
    assert len(view.getcolors(256)) > 100  # something is drawn


def _free():
    with taken() as port:
        return port


@pytest.mark.parametrize(
    ("port", "allowed"),
    [("1", True), ("65535", True), ("0", False), ("65536", False), ("70000", False), ("x", False)],
)
def test_ports_are_numbers_from_one_to_65535(command, monkeypatch, port, allowed):
    asked = []
    monkeypatch.setattr(mlflow_server, "run", lambda name, store, port, *_: asked.append(port))
    done = command("ui", "--port", port)
    assert (done.returncode, asked) == ((0, [int(port)]) if allowed else (2, []))

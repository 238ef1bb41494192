"""The command line: what cannot work is refused with a clear message before anything is created."""

import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from lenet_sweep.tracking import mlflow_client

MISTAKES = [
    # --- keys
    (["lrr=0.1"], ["'lrr'", "Did you mean 'lr'?"]),
    (["+lrr=0.1"], ["'lrr'", "Did you mean 'lr'?"]),
    (["model.kernal_size=3"], ["'model.kernal_size'", "Did you mean 'model.kernel_size'?"]),
    (["+model.kernal_size=3"], ["'model.kernal_size'", "Did you mean 'model.kernel_size'?"]),
    (["optimizer.lrr=1"], ["'optimizer.lrr'", "Did you mean 'optimizer.lr'?"]),
    (["optimizer=sgd", "+optimizer.eps=1"], ["'optimizer.eps'", "selected optimizer"]),
    (["lrr=0.1,0.2", "-m"], ["'lrr'", "Did you mean 'lr'?"]),
    (["lr=0.1,0.2", "+sedd=1", "-m"], ["'sedd'", "Did you mean 'seed'?"]),
    # --- types
    (["lr=abc"], ["lr='abc'", "a number above 0, at most 1000"]),
    (["lr="], ["lr=''", "a number above 0, at most 1000"]),
    (["epochs=2.5"], ["epochs=2.5", "a whole number from 1 to 1000000"]),
    (["model.channels=6"], ["model.channels=6", "a list of 1 to 6 entries"]),
    (["model.channels=[6,x]"], ["model.channels[1]='x'", "a whole number from 1 to 1024"]),
    (["precision.amp=maybe"], ["precision.amp='maybe'", "true or false"]),
    (["model.activation=sigmod"], ["model.activation='sigmod'", "Did you mean 'sigmoid'?"]),
    # --- ranges
    (["epochs=0"], ["epochs=0", "from 1 to 1000000"]),
    (["lr=0"], ["lr=0", "above 0, at most 1000"]),
    (["lr=nan"], ["lr=nan", "above 0, at most 1000"]),
    (["lr=0.1,-1", "-m"], ["lr=-1", "above 0, at most 1000"]),
    (["model.hidden=[9,9,9,9,9,9,9,9,9]"], ["model.hidden=[9, 9, 9", "0 to 8 entries"]),
    (["data.train_size=50000", "data.val_size=20000"], ["data.train_size=50000", "at most 40000"]),
    # --- shapes
    (["model.kernel_size=99"], ["model.kernel_size=99", "conv2", "at most 14"]),
    (["model.kernel_size=4"], ["model.kernel_size=4", "29x29", "silently crop"]),
    (["model.channels=[6,16,32]"], ["model.kernel_size=5", "conv3", "1x1", "number of model.channels"]),
    (["model.kernel_size=5,99", "-m"], ["model.kernel_size=99", "at most 14"]),
    # --- members of groups
    (["model=lenett"], ["model=lenett", "Did you mean 'lenet'?", "lenet, lenet_relu_max"]),
    (["optimizer=sgd,sdg", "-m"], ["optimizer=sdg", "Did you mean 'sgd'?", "adam, adamw, momentum"]),
    (["+debug=fats"], ["debug=fats", "Did you mean 'fast'?", "fast, overfit, profile"]),
    (["+experiment=none_such", "-m"], ["experiment=none_such", "Options of experiment: "]),
    (["debug=fast"], ["+debug="]),
    # --- devices
    (["device=gpu"], ["device='gpu'", "auto, cpu, mps, cuda or cuda:N"]),
    (["device=cuda:x"], ["device='cuda:x'", "cuda:N"]),
    # --- several values, single words, and what Hydra's grammar cannot read
    (["lr=0.1,0.5,0.9"], ["lr=0.1,0.5,0.9", "-m"]),
    (["seed=range(3)"], ["seed=range(3)", "multirun"]),
    (["model.channels=6,16"], ["model.channels=6,16", "KEY=[A,B]"]),
    (["dta"], ["'dta'", "Did you mean 'data'?"]),
    (["lr=[1"], ["lr=[1", "KEY=VALUE"]),
    (["=3"], ["=3", "model=lenet"]),
    (["model=null"], ["model=null", "model=lenet"]),
    (["seed=range(0,1,0)", "-m"], ["range"]),
    (["model=glob(none_such*)", "-m"], ["glob(none_such*)"]),
    (["lr=${none_such}"], ["lr", "none_such"]),
    (["--lr=0.1"], ["--lr=0.1", "without dashes: lr=VALUE"]),
    (["lr", "0.1"], ["'lr' needs a value", "lr=VALUE"]),
    (["lr=" + "9" * 400], ["lr=9", "a number above 0"]),
    # --- sweeps without -m
    (["sweep.dry_run=true"], ["sweep.dry_run=true", "needs -m"]),
    (["+experiment=learning_rates"], ["is a sweep", "needs -m"]),
    (["hydra.sweep.subdir=x", "lr=0.1,0.2", "-m"], ["hydra.sweep.subdir"]),
    # --- where runs are tracked
    (["tracking.uri='http://['"], ["tracking.uri='http://['", "is not a valid URI"]),
    (["tracking.uri=postgresql://user:secret@localhost/db"], ["tracking.uri", "would be stored"]),
    (["tracking.uri=file:///tmp/x"], ["tracking.uri='file:///tmp/x'", "sqlite:///, http://"]),
    (["tracking.uri=http://user:secret@localhost"], ["tracking.uri", "MLFLOW_TRACKING_PASSWORD"]),
    (["tracking.uri=http://localhost:port"], ["tracking.uri='http://localhost:port'"]),
    # --- the subcommand
    (["data", "fashion_minst"], ["'fashion_minst'", "Did you mean 'fashion_mnist'?"]),
]


@pytest.fixture
def command(command, tmp_path, monkeypatch):
    """The command line in `tmp_path` and in this process: a fourth of the time where much is refused."""
    monkeypatch.chdir(tmp_path)
    return command


@pytest.mark.parametrize(("arguments", "told"), MISTAKES, ids=[" ".join(case[0]) for case in MISTAKES])
def test_mistake_is_refused_with_field_value_and_what_is_allowed(command, tmp_path, arguments, told):
    _refused(command(*arguments), tmp_path, told)


def test_password_in_a_refused_uri_is_not_repeated(cli):
    assert "secret" not in cli("tracking.uri=http://user:secret@localhost").stderr


@pytest.mark.parametrize("arguments", [["device=cuda:99"], ["device=cpu,cuda:99", "-m"]])
def test_missing_gpu_is_refused_with_those_there_are(command, tmp_path, arguments):
    _refused(command(*arguments), tmp_path, ["device='cuda:99'", "CUDA GPUs that torch finds", "device=cpu"])


# --- folders that cannot be written


@pytest.mark.parametrize(("key", "flags"), [("hydra.run.dir", []), ("hydra.sweep.dir", ["-m"])])
def test_output_folder_below_a_file_is_refused(command, tmp_path, key, flags):
    (tmp_path / "file").write_text("kept")
    done = command(f"{key}=file/below", "data=fashion_mnist_mini", *flags)
    _refused(done, tmp_path, [str(tmp_path / "file"), "is a file, so the folder"], left={"file"})
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("key", ["hydra.run.dir=locked/run", "tracking.uri=sqlite:///locked/mlflow.db"])
def test_read_only_folder_is_refused(cli, tmp_path, key):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    # Root can write everywhere, unless it drops that capability.
    without_override = ("setpriv", "--bounding-set=-dac_override") if os.geteuid() == 0 else ()
    done = cli(key, "data=fashion_mnist_mini", prefix=without_override)
    _refused(done, tmp_path, [str(locked), "cannot be written"], left={"locked"})
    assert list(locked.iterdir()) == []


def test_data_root_below_a_file_is_refused(command, tmp_path):
    (tmp_path / "file").touch()
    done = command("data=fashion_mnist_mini", "data.root=file/data")
    _refused(done, tmp_path, [str(tmp_path / "file"), "data.root"], left={"file"})


# --- tracking servers that cannot be used


def _never_answer(connection):
    connection.recv(1 << 16)
    time.sleep(20)


def _answer_byte_by_byte(connection):
    for byte in b"HTTP/1.1 200 OK\r\n" + b"x" * 80:
        connection.sendall(bytes([byte]))
        time.sleep(0.1)


def _answer_in_another_protocol(connection):
    connection.sendall(b"220 this is no web server\r\n")


def _hang_up(connection):
    pass


def _answer_404(connection):
    connection.recv(1 << 16)
    connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")


@pytest.fixture
def listen():
    """Serve TCP on a free loopback port, handling each connection in a thread; give the port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept(handle):
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=attend, args=(handle, connection), daemon=True).start()

        def attend(handle, connection):
            with connection:
                try:
                    handle(connection)
                except OSError:
                    return  # the client gave up, as it should

        accepting = []

        def start(handle):
            accepting.append(threading.Thread(target=accept, args=(handle,), daemon=True))
            accepting[-1].start()
            return server.getsockname()[1]

        yield start
        server.shutdown(socket.SHUT_RDWR)
        for thread in accepting:  # or the socket would be closed under it
            thread.join()


@pytest.mark.parametrize(
    "answer", [_never_answer, _answer_byte_by_byte, _answer_in_another_protocol, _hang_up, _answer_404]
)
def test_server_that_does_not_answer_as_mlflow_is_refused_within_five_seconds(
    command, tmp_path, listen, monkeypatch, answer
):
    assert max(mlflow_client._SILENCE_S, mlflow_client._ANSWER_S) <= 4  # one second is for all else
    monkeypatch.setattr(mlflow_client, "_SILENCE_S", 0.3)
    monkeypatch.setattr(mlflow_client, "_ANSWER_S", 0.4)
    uri = f"http://127.0.0.1:{listen(answer)}"
    _refused_soon(command, tmp_path, uri, "data=fashion_mnist_mini")


@pytest.mark.parametrize("flags", [[], ["lr=0.1,0.2", "-m"]])
def test_server_that_is_not_there_is_refused_within_five_seconds(cli, tmp_path, flags):
    with socket.socket() as taken:  # bound but not listening: the port is taken and does not answer
        taken.bind(("127.0.0.1", 0))
        _refused_soon(cli, tmp_path, f"http://127.0.0.1:{taken.getsockname()[1]}", *flags)


def _refused_soon(command, tmp_path, uri, *arguments):
    started = time.monotonic()
    done = command("tracking=server", f"tracking.uri={uri}", *arguments)
    assert time.monotonic() - started < 5
    _refused(done, tmp_path, ["tracking.uri", repr(uri), "MLflow server"])


# --- fast commands, help, and --debug


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "python -m lenet_sweep lr=0.1,0.5,0.9 -m"),
        (["--cfg", "job"], "activation: sigmoid"),
        (["-sc", "query=bash"], ""),
        (["lrr=0.1"], ""),
        (["lr=0.1,abc", "-m"], ""),
        (["lr=0.1,0.2", "sweep.dry_run=true", "-m"], "[2/2] lr=0.2"),
    ],
)
def test_quick_answer_imports_neither_torch_nor_mlflow(cli, tmp_path, arguments, shown):
    done = cli(*arguments, python=("-X", "importtime"))
    assert shown in done.stdout
    imported = set(re.findall(r"^import time:.*\| +(\w+)", done.stderr, re.MULTILINE))
    assert "hydra" in imported
    assert not imported & {"torch", "torchvision", "mlflow", "matplotlib", "numpy", "safetensors"}
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_group_and_every_command(cli):
    shown = cli("--help").stdout
    for group in ("model", "optimizer", "schedule", "data", "tracking", "debug", "experiment"):
        assert re.search(rf"^{group}: \w", shown, re.MULTILINE)
    assert "python -m lenet_sweep data [NAME...]" in shown


@pytest.mark.parametrize(("flag", "env"), [(["--debug"], {}), ([], {"HYDRA_FULL_ERROR": "1"})])
def test_debug_shows_the_traceback_before_the_message(cli, flag, env):
    done = cli("lr=abc", *flag, env=env)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: lr='abc'")


def test_help_whose_reader_goes_away_ends_in_silence(tmp_path):
    command = [sys.executable, "-m", "lenet_sweep", "--help"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:
        process.stdout.close()  # as `head` does, but in any case before the first line
        assert (process.wait(60), process.stderr.read()) == (0, b"")


def test_garbage_collector_has_no_objects_to_search_at_exit(tmp_path):
    code = (
        "import atexit, gc, sys; atexit.register(lambda: print(len(gc.get_objects()) < 1000));"
        "sys.argv[1:] = ['sync']; from lenet_sweep.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "True", done.stderr


def test_data_command_says_where_the_verified_files_are(cli, tmp_path):
    done = cli("data", "fashion_mnist_mini", "--root", "here")
    assert (done.returncode, done.stderr) == (0, "")
    assert str(tmp_path / "here") in done.stdout
    assert len([path for path in tmp_path.rglob("*-ubyte") if path.is_file()]) == 4


def _refused(done, folder, expected, left=frozenset()):
    """Exit code 2, at most three lines that contain all of `expected`, and no file but `left` in `folder`."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3
    assert done.stderr.startswith("error: ")
    for words in expected:
        assert words in done.stderr
    assert {path.name for path in folder.iterdir()} == set(left)


@pytest.mark.parametrize("status", [1, 3])
def test_command_that_ctrl_c_ends_has_the_exit_code_of_a_shell(command, monkeypatch, status):
    from lenet_sweep.cli import main

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(main.COMMANDS, "sync", interrupted)
    done = command("sync")
    assert done.returncode == 130
    assert "the same command resumes where it stopped" in done.stderr
    monkeypatch.setitem(main.COMMANDS, "sync", lambda arguments: status)
    assert command("sync").returncode == status

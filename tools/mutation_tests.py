"""The pytest side of tools/mutation.py: which tests execute which lines, and runs of selected tests.

It is also a plugin of the pytest that it starts. The coverage run labels each line with the test that
executes it; lines of a shared fixture are labelled with the test file.
"""

import ast
import functools
import inspect
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lenet_sweep", "hydra_plugins")
COVERAGE = """[run]
source = {checkout}/lenet_sweep, {checkout}/hydra_plugins
data_file = {data}
parallel = true
context = ${{MUTATION_LABEL-}}
patch = fork, _exit
disable_warnings = no-data-collected, module-not-imported
"""


def own_files(*beginnings: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(name for name in names if name.startswith(beginnings) and (ROOT / name).is_file())


def measure(work: Path) -> dict[str, Any]:
    """Run the default tests in `work`/base: the seconds of each, and the tests of each line of each file.

    A test that fails here has None for its seconds, and no lines: it will not be run again.
    """
    from coverage import Coverage

    base, settings, record = work / "base", work / "settings.ini", work / "record.json"
    settings.write_text(COVERAGE.format(checkout=base / "checkout", data=work / "coverage"))
    told = {"MUTATION_RECORD": str(record), "COVERAGE_PROCESS_START": str(settings)}
    print(run_tests(base, 7200, **told)[1][-2000:], file=sys.stderr)
    seconds = json.loads(record.read_text())
    tests: dict[str, list[int]] = defaultdict(list)
    for i, (test, took) in enumerate(seconds.items()):
        for label in (test, file_of(test)):
            tests[label] += [i] if took is not None else []
    coverage = Coverage(config_file=str(settings))
    coverage.combine()
    data = coverage.get_data()
    lines = {}
    for file in data.measured_files():
        labels = data.contexts_by_lineno(file)
        lines[str(Path(file).relative_to(base / "checkout"))] = {
            str(line): sorted({i for label in labels[line] for i in tests[label]}) for line in sorted(labels)
        }
    return {"seconds": seconds, "lines": lines}


def tests_of(file: str, source: str, line: int, base: dict[str, Any]) -> tuple[list[str], bool]:
    """The tests that run a line of a file, the fastest first; and whether they were seen to run it."""
    names = list(base["seconds"])
    lines = base["lines"].get(file, {})
    found = {names[i] for near in _lines_run_with(source, line) for i in lines.get(str(near), [])}
    if not (seen := bool(found)):
        words = {part.strip("_") for part in Path(file).with_suffix("").parts[1:]} | {"cli"}
        named = (test for test in names if base["seconds"][test] is not None)
        found = {test for test in named if Path(file_of(test)).stem.removeprefix("test_") in words}
    return sorted(found, key=lambda test: (base["seconds"][test], test)), seen


def file_of(test: str) -> str:
    return test.partition("::")[0]


def _lines_run_with(source: str, line: int) -> set[int]:
    """The lines of the statement there, without its block; outside of functions, those of all functions."""

    def span(node: Any, block: bool) -> range:
        own = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        first = node.body[0].lineno if hasattr(node, "body") else node.end_lineno + 1
        return range(first, node.end_lineno + 1) if block else range(own, max(first, own + 1))

    nodes = list(ast.walk(ast.parse(source)))  # outer ones first
    blocks = [span(n, block=True) for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    if not any(line in block for block in blocks):
        return set().union(*blocks)
    statements = [span(n, block=False) for n in nodes if isinstance(n, ast.stmt | ast.excepthandler)]
    return set([s for s in statements if line in s][-1])


def run_tests(folder: Path, limit: float, *arguments: str, **variables: str) -> tuple[int | None, str]:
    """Pytest's exit code (None: out of time) and output, in `folder`/checkout; nothing is left running."""
    ours = ("LENET_SWEEP_", "MLFLOW_", "HYDRA_", "PYTEST_", "MUTATION_", "COVERAGE_")
    variables |= {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    variables |= {"TMPDIR": str(folder / "tmp"), "XDG_CACHE_HOME": str(folder / "cache")}
    variables |= {"PYTHONPATH": f"{folder / 'checkout'}{os.pathsep}{Path(__file__).parent}"}
    variables |= {"MUTATION_FOLDER": str(folder)}
    for name in ("tmp", "cache"):
        (folder / name).mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", Path(__file__).stem, "-p", "no:cacheprovider"]
    with (folder / "output.txt").open("w+") as file:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=folder / "checkout",
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(limit)
        finally:
            end_all(folder)
            process.wait()
        file.seek(0)
        return code, file.read()


def end_all(folder: Path) -> None:
    """End every process that tests in a folder below `folder` have started."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.environ().get("MUTATION_FOLDER", "/")).is_relative_to(folder):
                process.kill()


class Recorder:
    """The plugin of the first run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float | None] = {}

        def cache(function: Callable[..., Any]) -> Any:  # what is kept would hide what the next test needs
            ours = function.__module__.startswith((*PACKAGES, "conftest", "test"))
            return functools.lru_cache(0 if ours and not inspect.ismethod(function) else None)(function)

        functools.cache = cache

    def label(self, label: str) -> None:
        from coverage import Coverage

        os.environ["MUTATION_LABEL"] = label  # for commands that the test starts
        if running := Coverage.current():
            running.switch_context(label)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.label(item.nodeid)
        began = time.monotonic()
        result = yield
        self.seconds.setdefault(item.nodeid, time.monotonic() - began)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Generator[None, Any, Any]:
        before = os.environ["MUTATION_LABEL"]
        self.label(before if fixturedef.scope == "function" else request.node.nodeid)
        try:
            return (yield)
        finally:
            self.label(before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.seconds[report.nodeid] = None

    def pytest_sessionfinish(self) -> None:
        Path(os.environ["MUTATION_RECORD"]).write_text(json.dumps(self.seconds))


def pytest_configure(config: pytest.Config) -> None:
    if "MUTATION_RECORD" in os.environ:
        config.pluginmanager.register(Recorder())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the chosen tests, in their order, and after them new ones: a mutation may rename cases."""
    if path := os.environ.get("MUTATION_CHOSEN"):
        chosen, known = json.loads(Path(path).read_text())
        order = {test: place for place, test in enumerate(chosen)}
        items[:] = [item for item in items if item.nodeid in order or item.nodeid not in known]
        items.sort(key=lambda item: order.get(item.nodeid, len(order)))

"""The rule for skips of conftest.py, seen from outside: pytest run on tests that skip."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import pytest

@pytest.mark.skip(reason="some reason")
def test_skipped(): pass

@pytest.mark.gpu
@pytest.mark.skip(reason="no GPU")
def test_gpu(): pass

@pytest.mark.xfail
def test_known(): assert False

def test_runs(): pass
"""


@pytest.mark.parametrize(
    ("no_skip", "code", "told"),
    [
        ("1", 1, ["1 error", "1 passed", "1 skipped", "1 xfailed", "some reason"]),
        ("", 0, ["1 passed", "2 skipped", "1 xfailed"]),
    ],
)
def test_skip_is_a_failure_where_nothing_may_be_skipped(tmp_path, no_skip, code, told):
    done = _pytest(tmp_path, PROBE, no_skip)
    assert done.returncode == code, done.stdout
    assert [words for words in told if words not in done.stdout] == []


def test_skipped_module_is_a_failure_where_nothing_may_be_skipped(tmp_path):
    skipped = "import pytest\npytest.importorskip('no_such_module')"
    assert _pytest(tmp_path, skipped, no_skip="1").returncode != 0


def _pytest(folder, tests, no_skip):
    shutil.copy(Path(__file__).with_name("conftest.py"), folder)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a CUDA GPU\n")
    (folder / "test_probe.py").write_text(tests)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", folder],
        env={**os.environ, "LENET_SWEEP_NO_SKIP": no_skip, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )

"""Which room may import what, read from the source: dependencies point one way, heavy ones come late."""

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lenet_sweep
from lenet_sweep.storage import fingerprint

PACKAGE = Path(lenet_sweep.__file__).parent
PLUGIN = PACKAGE.parent / "hydra_plugins" / "lenet_sweep_plugin"

# A room may import those of the rows above its own, and nothing else of ours.
ROOMS = (
    {"errors"},
    {"paths", "shapes"},
    {"config"},
    {"datasets"},
    {"training"},
    {"storage"},
    {"tracking"},
    {"inspection"},
    {"runs", "analysis"},
    {"sweeps"},
    {"cli"},
    {"__main__", "plugin"},
)
RANK = {room: rank for rank, row in enumerate(ROOMS) for room in row}

# All modules by dotted name, such as "training.engine", "errors" or "plugin.sweeper".
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
} | {f"plugin.{path.stem}": path for path in PLUGIN.glob("*.py") if path.stem != "__init__"}

# What --help, completion, and the check of a config import loads at once: no torch, no mlflow.
HEAVY = {"torch", "torchvision", "mlflow", "matplotlib"}
LIGHT_TOP = {"__main__", "errors", "paths", "shapes", "plugin"}
LIGHT_ROOMS = {"config", "datasets", "tracking", "sweeps", "cli", *LIGHT_TOP}
LIGHT_MODULES = {
    "training": "compiler metrics",
    "storage": "environment fingerprint manifest metrics_file records result run_index",
    "runs": "hardware preflight progress spec",
    "analysis": "comparison selection charts tables export mlflow_view mlflow_server",
}
LIGHT = {module for module in MODULES if module.split(".")[0] in LIGHT_ROOMS} | {
    f"{room}.{name}" for room, names in LIGHT_MODULES.items() for name in names.split()
}

# Which rooms or modules may import a library.
ONLY = {
    "mlflow": {"tracking"},
    "hydra": {"cli", "plugin"},
    "omegaconf": {"cli", "plugin"},
    "matplotlib": {"inspection.plots", "analysis.figures"},
    "PIL": {"inspection.images", "inspection.plots"},
    "plotly": {"analysis.page"},
    "scipy": {"analysis.comparison"},
    "distributed": {"sweeps.dask_pool"},
    "dask": {"sweeps.dask_pool"},
    "rich": {"runs.progress", "analysis.tables", "datasets.download", "datasets.sources"},
    "safetensors": {"storage.checkpoint", "runs.outputs", "runs.reproduce", "inspection.predict"},
}


def room(module):
    return module.split(".")[0]


@functools.cache
def imports(module, everywhere=True):
    """Names that a module imports, whole ('lenet_sweep.config.schema'), but for those for type checkers."""
    return frozenset(_imports(module, everywhere))


def _imports(module, everywhere):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    hidden = [
        node
        for node in ast.walk(tree)
        if (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        or (not everywhere and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    ]
    skipped = {inner for node in hidden for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def own(module, everywhere=True):
    """Our own modules that a module imports, by the names in MODULES."""
    found = set()
    for name in imports(module, everywhere):
        name = name.replace("hydra_plugins.lenet_sweep_plugin.", "lenet_sweep.plugin.")
        parts = name.split(".")[1:] if name.startswith("lenet_sweep.") else []
        found |= {prefix for i in range(len(parts)) if (prefix := ".".join(parts[: i + 1])) in MODULES}
    return found


@functools.cache
def reached(module):
    """All of our own modules that loading `module` imports, directly or not."""
    found, new = set(), {module}
    while new:
        found |= new
        new = {other for module in new for other in own(module, everywhere=False)} - found
    return found


def tops(names):
    return {name.split(".")[0] for name in names}


def test_every_entry_of_the_package_is_a_room_with_its_row():
    entries = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    entries -= {"__pycache__", "__init__", "conf"}
    assert entries == set(RANK) - {"plugin"}
    assert len(entries | {"__init__"}) <= 16


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    against = {
        other
        for other in own(module)
        if room(other) != room(module) and RANK[room(other)] >= RANK[room(module)]
    }
    assert not against, f"{module} imports {against}, whose room is beside or above its own"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_itself_through_others(module):
    for other in own(module, everywhere=False):
        assert module not in reached(other), f"{module} and {other} import each other"


@pytest.mark.parametrize("name", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_every_room_says_what_it_is_for_and_what_it_may_import(name):
    tree = ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))
    text = ast.get_docstring(tree)
    assert len(tree.body) == 1, f"{name}/__init__.py holds code, which every import of the room would run"
    (line,) = [line for line in text.splitlines() if line.startswith("May import: ")]
    words = set(re.findall(r"\w+", line.removeprefix("May import: ")))
    named = {other for other in RANK if RANK[other] < RANK[name]} if "all" in words else words & set(RANK)
    used = {room(other) for module in MODULES if room(module) == name for other in own(module)} - {name}
    assert used <= named
    assert all(RANK[other] < RANK[name] for other in named)


def test_training_is_closed():
    """What it imports decides numbers too, and only its own sources and shapes.py enter the code version."""
    sources = {path.relative_to(PACKAGE).as_posix() for path in fingerprint.result_sources()}
    room_files = {f"training/{path.name}" for path in (PACKAGE / "training").glob("*") if path.is_file()}
    assert sources == {*room_files, "shapes.py"}
    allowed = {"config", "datasets", "shapes", "paths", "errors", "training"}
    used = {room(other) for module in MODULES if room(module) == "training" for other in own(module)}
    assert used <= allowed


@pytest.mark.parametrize("module", sorted(module for module in MODULES if room(module) != "training"))
def test_nothing_outside_training_decides_a_number(module):
    """No other room builds networks or optimizers, takes gradients, or sets how torch computes."""
    source = MODULES[module].read_text(encoding="utf-8")
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
    deciding = {
        call
        for call in calls
        if re.search(r"\.(backward|requires_grad_|manual_seed|randperm|set_num_threads|zero_grad)$", call)
        or re.match(r"(nn\.(Linear|Conv2d|init\.)|torch\.(optim|func|autograd)\.|F\.cross_entropy)", call)
        or re.match(r"(torch\.backends|torch\.use_deterministic)", call)
    }
    assert not deciding
    assert not re.search(r"torch\.backends\S* = ", source)


def test_training_loop_knows_neither_tracking_nor_what_is_shown():
    assert not {room(module) for module in reached("training.engine")} & {
        "tracking",
        "runs",
        "inspection",
        "cli",
    }


@pytest.mark.parametrize(
    "module", sorted(m for m in MODULES if room(m) in ("training", "config", "tracking"))
)
def test_nothing_below_the_edge_prints(module):
    calls = [n for n in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(n, ast.Call)]
    assert "print" not in {ast.unparse(call.func) for call in calls}


@pytest.mark.parametrize("library", ONLY)
def test_library_is_imported_only_where_it_belongs(library):
    users = {module for module in MODULES if library in tops(imports(module))}
    assert {user for user in users if not {user, room(user)} & ONLY[library]} == set()


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_light_module_imports_nothing_heavy_when_it_loads(module):
    for other in reached(module):
        assert not tops(imports(other, everywhere=False)) & HEAVY, f"{module} loads {other}"


def test_loading_all_light_modules_loads_neither_torch_nor_mlflow():
    names = [
        f"hydra_plugins.lenet_sweep_plugin.{name.removeprefix('plugin.')}"
        if name.startswith("plugin.")
        else f"lenet_sweep.{name}"
        for name in sorted(LIGHT)
    ]
    code = f"import {', '.join(names)}, sys; print({HEAVY} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_package_says_how_openmp_waits_before_torch_can_be_loaded():
    code = "import lenet_sweep, os, sys; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    clean = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1000", "False"]


def test_face_of_the_plugin_loads_nothing_of_the_package():
    """Hydra imports it in every Hydra app on the machine."""
    for face in ("plugin.sweeper", "plugin.launcher"):
        allowed = {"collections", "dataclasses", "typing", "hydra", "omegaconf"}
        assert tops(imports(face, everywhere=False)) <= allowed
    assert not (PLUGIN.parent / "__init__.py").exists()  # a namespace that others share


def test_modules_and_functions_stay_short():
    for module, path in MODULES.items():
        source = path.read_text(encoding="utf-8")
        assert source.count("\n") <= 400, module
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno + 1 <= 45, f"{module}.{node.name}"


def test_every_library_that_is_imported_is_a_dependency():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}
    modules = {"hydra-core": "hydra", "pyyaml": "yaml", "pillow": "PIL"}
    imported = set().union(*(tops(imports(module)) for module in MODULES))
    ours = {"lenet_sweep", "hydra_plugins"}
    mlflows = {"sqlalchemy"}  # its local store raises SQLAlchemy's errors
    libraries = imported - {*sys.stdlib_module_names, *ours, *mlflows}
    assert libraries <= {modules.get(name, name) for name in declared}

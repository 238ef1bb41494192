"""Which module may import what, read from the source: dependencies point one way, heavy ones come late."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lenet_sweep

PACKAGE = Path(lenet_sweep.__file__).parent
PLUGIN = PACKAGE.parent / "hydra_plugins" / "lenet_sweep_plugin"
MODULES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"} | {
    f"plugin.{path.stem}": path for path in PLUGIN.glob("*.py") if path.stem != "__init__"
}

# A module may import those of the lines above its own. A new module must be given its line here.
LAYERS = (
    {"errors", "shapes", "randomness", "layers"},
    {"paths"},
    {"config", "ledger"},
    {"sources", "identity", "devices", "model", "optim", "compiler", "records"},
    {"data", "tracking", "comparison", "pictures"},
    {"native"},
    {"engine", "plan", "preflight", "selection", "views"},
    {"ui", "fused", "journal", "inside", "progress", "charts"},
    {"checkpoint", "workers", "plots"},
    {"run"},
    {"reproduce", "figures"},
    {"predict"},
    {"report"},
    {"page"},
    {"cli"},
    {"__main__", "plugin._sweep", "plugin._launch"},
    {"plugin.sweeper", "plugin.launcher"},
)
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}

# Modules that --help, completion, or the check of a config import: they must load at once.
LIGHT = ("__main__", "cli", "config", "errors", "paths", "shapes", "preflight", "identity", "tracking",
         "sources", "ledger", "plan", "workers", "compiler", "records", "comparison", "selection",
         "views", "ui", "plugin.sweeper", "plugin.launcher", "plugin._sweep", "plugin._launch")  # fmt: skip

EDGE = {"cli", *(module for module in MODULES if module.startswith("plugin."))}
ONLY = {
    "mlflow": {"tracking"},
    "hydra": EDGE,
    "omegaconf": EDGE,
    "matplotlib": {"plots", "figures"},
    "PIL": {"pictures", "plots"},
    "plotly": {"page"},
    "scipy": {"comparison"},
    "distributed": {"workers"},
    "dask": {"workers"},
    "rich": {"progress", "report", "sources"},
    "safetensors": {"run", "checkpoint", "reproduce", "predict"},
}


def imports(module, everywhere=True):
    """Names that a module imports, whole ('lenet_sweep.config'), but for those for type checkers."""
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


def own(module):
    """Our own modules that a module imports, by the names in MODULES."""
    found = set()
    for name in imports(module):
        parts = name.split(".")
        if parts[0] == "lenet_sweep" and len(parts) > 1 and parts[1] in MODULES:
            found.add(parts[1])
        if parts[:2] == ["hydra_plugins", "lenet_sweep_plugin"]:
            found.add(f"plugin.{parts[2]}")
    return found


def tops(names):
    return {name.split(".")[0] for name in names}


def test_every_module_has_its_layer():
    assert set(MODULES) == set(RANK)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    against = {other for other in own(module) if RANK[other] >= RANK[module]}
    assert not against, f"{module} imports {against}, which stand beside or above it"


def test_config_stands_on_names_shapes_and_errors_alone():
    assert own("config") <= {"errors", "paths", "shapes"}


def test_tracking_knows_configs_and_nothing_of_training():
    assert own("tracking") <= {"config", "identity", "ledger", "records", "errors", "paths"}


def test_training_loop_knows_neither_tracking_nor_what_is_shown():
    reached, new = set(), {"engine"}
    while new:
        reached |= new
        new = {other for module in new for other in own(module)} - reached
    assert not reached & {"tracking", "progress", "plots", "run", "cli"}


@pytest.mark.parametrize("module", ["engine", "model", "data", "optim", "config", "shapes", "tracking"])
def test_nothing_below_the_edge_prints(module):
    calls = [n for n in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(n, ast.Call)]
    assert "print" not in {ast.unparse(call.func) for call in calls}


@pytest.mark.parametrize("library", ONLY)
def test_library_is_imported_only_where_it_belongs(library):
    assert {module for module in MODULES if library in tops(imports(module))} <= ONLY[library]


@pytest.mark.parametrize("module", LIGHT)
def test_light_module_imports_nothing_heavy_when_it_loads(module):
    assert not tops(imports(module, everywhere=False)) & {"torch", "torchvision", "mlflow", "matplotlib"}


def test_loading_all_light_modules_loads_neither_torch_nor_mlflow():
    names = [
        name.replace("plugin.", "hydra_plugins.lenet_sweep_plugin.") if "." in name else f"lenet_sweep.{name}"
        for name in LIGHT
    ]
    code = f"import {', '.join(names)}, sys; print({{'torch', 'mlflow', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_package_says_how_openmp_waits_before_torch_can_be_loaded():
    code = "import lenet_sweep, os, sys; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    clean = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1000", "False"]


def test_face_of_the_plugin_loads_nothing_of_the_package():
    """Hydra imports it in every Hydra app on the machine."""
    assert tops(imports("plugin.sweeper", everywhere=False)) <= {
        "dataclasses",
        "typing",
        "hydra",
        "omegaconf",
    }
    assert not (PLUGIN.parent / "__init__.py").exists()  # a namespace that others share


def test_every_library_that_is_imported_is_a_dependency():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}
    modules = {"hydra-core": "hydra", "pyyaml": "yaml", "pillow": "PIL"}
    imported = set().union(*(tops(imports(module)) for module in MODULES))
    ours = {"lenet_sweep", "hydra_plugins"}
    mlflows = {"sqlalchemy"}  # its local store raises SQLAlchemy's errors
    libraries = imported - {*sys.stdlib_module_names, *ours, *mlflows}
    assert libraries <= {modules.get(name, name) for name in declared}

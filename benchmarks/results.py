"""Runs the published comparisons of conf/experiment/ and writes docs/results.md from their results.

python -m benchmarks.results [NAME...] [--folder outputs/published]

Each comparison is an ordinary sweep. An interrupted one resumes, and a finished one is only compared
again. Tables, sentences and figures come from `python -m lenet_sweep compare`.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lenet_sweep.config.schema import MlflowConfig
from lenet_sweep.inspection import plots, predict
from lenet_sweep.paths import conf_dir
from lenet_sweep.storage.environment import describe_environment
from lenet_sweep.tracking import mlflow_query
from lenet_sweep.tracking.mlflow_store import MlflowStore

DOCS = Path(__file__).parents[1] / "docs"
ELSEWHERE = "activations_ood"  # its runs are inspected, not compared

HEAD = """# Results

Each section is one sweep of `conf/experiment/`: its question, its command and its result. The numbers
are test accuracies after the last epoch: mean and standard deviation over three seeds, and the 95 %
interval of the mean. Settings marked `~` are not significantly worse than the best one (Welch's t-test,
Holm's correction). The best setting is chosen on the test set, so its score is slightly optimistic.
`python -m benchmarks.results` writes this page.

Trained on: {machine}.
"""


def experiments() -> list[str]:
    """The names of the published comparisons."""
    return sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))


def question(name: str) -> tuple[str, str]:
    """The command and the question at the top of a comparison's file."""
    lines = (conf_dir() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return lines[1].removeprefix("# "), lines[2].removeprefix("# ")


def train(name: str, folder: Path) -> None:
    """Run the comparison's sweep, or the runs that are missing."""
    _command(folder, f"+experiment={name}", f"tracking.experiment={name}", "-m")
    (folder / f"{name}.done").touch()


def section(name: str, folder: Path) -> str:
    """The comparison in Markdown; its plots go to docs/images/."""
    (DOCS / "images").mkdir(parents=True, exist_ok=True)
    command, asked = question(name)
    parts = [f"## {asked}", f"```bash\n{command}\n```"]
    parts += _elsewhere(folder) if name == ELSEWHERE else _compared(name, folder)
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _compared(name: str, folder: Path) -> list[str]:
    """The output of `compare` for the experiment, and its figures."""
    with tempfile.TemporaryDirectory() as temporary:
        table, figures = Path(temporary) / "table.md", Path(temporary) / "figures"
        everything = ["--filter", "attributes.status != 'RUNNING'", f"tracking.experiment={name}"]
        _command(folder, "compare", *everything, "--markdown", str(table), "--figures", str(figures))
        pictures = []
        for picture in ("choices", "heatmap", "curves"):
            if (figures / f"{picture}.png").exists():
                target = DOCS / "images" / f"{name}_{picture}.png"
                shutil.copyfile(figures / f"{picture}.png", target)
                pictures.append(f"![{name}: {picture}](images/{target.name})")
        return [table.read_text(encoding="utf-8"), *pictures]


def _elsewhere(folder: Path) -> list[str]:
    """For each network, the confidence of its first seed on each kind of image, and its activations."""
    parts = []
    with contextlib.chdir(folder):
        store = MlflowConfig(name="mlflow", uri="sqlite:///mlruns/mlflow.db", experiment=ELSEWHERE)
        runs = mlflow_query.records(
            store, "params.seed = '0' and attributes.status = 'FINISHED'", ("test/acc",)
        )
        for run in runs:
            trained = predict.load(run.name, MlflowStore(store))
            found = predict.activation_stats(trained, Path(trained.config.data.root))
            network = trained.config.model.name
            target = DOCS / "images" / f"{ELSEWHERE}_{network}.png"
            plots.activation_stats(found, f"{network} trained on {trained.config.data.name}", target)
            sure = [f"{float(kind.confidence_N.mean()):.2f} ({kind.kind})" for kind in found]
            right = f"classifies {run.last('test/acc'):.2f} of the test images correctly"
            parts += [
                f"**{network}** {right}. Mean confidence: {', '.join(sure)}.",
                f"![{network}: activations](images/{target.name})",
            ]
    return parts


def _command(folder: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "lenet_sweep", *arguments], cwd=folder)
    if done.returncode not in (0, 1):  # a diverged run is a result too
        raise SystemExit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all, {', '.join(experiments())}")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs") / "published", help="folder to train in"
    )
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("LENET_SWEEP_DATA", str(Path("data").absolute()))
    for name in chosen.names or experiments():
        train(name, chosen.folder)
    facts = describe_environment("cpu", os.cpu_count() or 1, "auto")
    machine = f"{facts['cpu']}, {facts['cpu_count']} cores, torch {facts['packages']['torch']}"
    done = [name for name in experiments() if (chosen.folder / f"{name}.done").exists()]
    sections = [section(name, chosen.folder) for name in done]
    (DOCS / "results.md").write_text("\n".join([HEAD.format(machine=machine), *sections]), encoding="utf-8")


if __name__ == "__main__":
    main()

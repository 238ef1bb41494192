"""What a run leaves in its folder beside metrics and checkpoint: weights, plots, environment, profile."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch._C._profiler import _ExperimentalConfig

from lenet_sweep.inspection import activations, plots
from lenet_sweep.paths import atomic_path, write_atomic
from lenet_sweep.runs import progress
from lenet_sweep.runs.spec import RunSpec
from lenet_sweep.shapes import CLASSES
from lenet_sweep.storage.environment import describe_environment, uncommitted_diff
from lenet_sweep.training import devices
from lenet_sweep.training.metrics import EpochMetrics
from lenet_sweep.training.state import TrainingState
from lenet_sweep.training.threads import torch_threads


def save(spec: RunSpec, state: TrainingState, history: Sequence[EpochMetrics]) -> None:
    """Write the weights, the recall of each class, and the plots."""
    network, data, config = state.network, state.data, spec.config
    weights = spec.folder / "model" / "weights.safetensors"
    weights.parent.mkdir(exist_ok=True)
    with atomic_path(weights) as temporary:
        save_file({name: tensor.cpu() for name, tensor in network.state_dict().items()}, temporary)
    folder = spec.folder / "plots"
    title = f"{config.model.name}, {config.optimizer.name}, lr {config.optimizer.lr:g}"
    plots.curves(history, title, folder / "curves.png")
    predicted_N = state.backend.predict(data.test)
    counts = torch.bincount(data.test.labels_N * CLASSES + predicted_N, minlength=CLASSES**2)
    matrix = counts.reshape(CLASSES, CLASSES).tolist()
    plots.confusion_matrix(matrix, data.class_names, folder / "confusion_matrix.png")
    recalls = dict(zip(data.class_names, activations.per_class(matrix), strict=True))
    write_atomic(spec.folder / "per_class.json", json.dumps(recalls, indent=2) + "\n")
    with torch_threads(1):
        _plot_inside(state, predicted_N, folder)


def _plot_inside(state: TrainingState, predicted_N: torch.Tensor, folder: Path) -> None:
    """Plot the learned filters, activations for one example of each class, and the most confident errors."""
    network, data = state.network, state.data
    convolutions = [(name, layer) for name, layer in network.named_children() if isinstance(layer, nn.Conv2d)]
    plots.filters([(name, layer.weight) for name, layer in convolutions[:2]], folder / "filters.png")
    examples = activations.one_of_each(data.test, CLASSES)
    outputs = activations.activations(network, examples)
    shown = [(f"act{i}", outputs[f"act{i}"]) for i in range(1, len(convolutions[:2]) + 1)]
    plots.activations(examples[:, 0], shown, data.class_names, folder / "activations.png")
    network.train()
    errors = activations.confident_errors(network, data.test, predicted_N, 10)
    plots.errors(errors, data.class_names, folder / "mistakes.png")


def write_environment(folder: Path, state: TrainingState) -> None:
    """Write environment.json, and uncommitted.diff if the code's checkout has uncommitted changes."""
    environment = describe_environment(*devices.facts(state.device), state.backend.name)
    write_atomic(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    if diff := uncommitted_diff():
        write_atomic(folder / "uncommitted.diff", diff)


@contextlib.contextmanager
def profiling(spec: RunSpec, device: torch.device) -> Iterator[None]:
    """Profile the block with torch.profiler; write a trace for https://ui.perfetto.dev and print totals."""
    all_threads = _ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(record_shapes=True, experimental_config=all_threads) as profile:
        yield
    folder = spec.folder / "profile"
    order = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=15)
    progress.say(table)
    try:
        folder.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(folder / "trace.json"))
        write_atomic(folder / "operators.txt", table)
    except (OSError, RuntimeError) as error:  # RuntimeError is torch's
        progress.say(f"the profile could not be written: {error}", spec.label)
        return
    progress.say(f"trace {folder / 'trace.json'} (open it in https://ui.perfetto.dev)")

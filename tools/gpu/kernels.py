"""Where the time of a training step goes on the GPU, by torch's profiler."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as start_profiler

from lenet_sweep.training import engine
from lenet_sweep.training.data import Data
from lenet_sweep.training.state import prepare
from tools.gpu.record import ON_GPU, SMALL, StepRecord
from tools.gpu.workload import (
    BATCH,
    ENDLESS,
    NETWORKS,
    config_of,
    epochs_of_array,
    free_memory,
    load,
    members_of,
    part_of,
    synchronize,
)

STEPS = 2 if SMALL else 20  # of an epoch
HEAVIEST = 15


@dataclass(frozen=True)
class Span:
    """A kernel's execution, in nanoseconds."""

    start: int
    end: int
    name: str


def profile(record: StepRecord) -> None:
    """Profile an epoch of a run alone and of arrays, after two that warm up and capture."""
    whole = load(config_of("sigmoid/avg"))
    width = 2 if SMALL else 64
    cases: dict[str, Callable[[], Iterator[object]]] = {}
    for network in ["sigmoid/avg"] if SMALL else NETWORKS:
        cases[f"{network} alone"] = partial(epochs_alone, network, whole)
        for size in (width, 1):
            cases[f"{network} x{size}"] = partial(epochs_together, network, size, whole)
    rows: dict[str, Any] = {}
    for name, make in cases.items():
        if record.has_time(name, 0.5 if SMALL else 4):
            with record.attempt(name):
                free_memory()
                rows[name], text = profile_epoch(make())
                print(f"\n## {name}\n{text}", flush=True)
                record.keep(rows=rows)
    if ON_GPU:
        texts = [f"{name}: {row['kernels_a_step']:.0f}, busy {row['busy']:.0%}" for name, row in rows.items()]
        record.summarize(f"kernels a step: {', '.join(texts)}")
    else:
        texts = [f"{name}: {row['kernels_a_step']:.0f}" for name, row in rows.items()]
        record.summarize(f"without a GPU, operators a step: {', '.join(texts)}")


def short(whole: Data) -> Data:
    return part_of(whole, STEPS)


def epochs_alone(network: str, whole: Data) -> Iterator[object]:
    config, data = config_of(network), short(whole)
    return engine.train(prepare(config, data=data), epochs=ENDLESS, batch_size=BATCH, seed=0)


def epochs_together(network: str, width: int, whole: Data) -> Iterator[object]:
    data = short(whole)
    return epochs_of_array(members_of(config_of(network), range(width), data, ENDLESS), data)


def profile_epoch(epochs: Iterator[object]) -> tuple[dict[str, Any], str]:
    """Numbers of the third epoch, its short evaluation included, and torch's table."""
    for _ in range(2):
        next(epochs)
    synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    with start_profiler(activities=activities) as profiler:
        next(epochs)
        synchronize()
    order = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    text = profiler.key_averages().table(sort_by=order, row_limit=HEAVIEST, max_name_column_width=80)
    assert profiler.profiler
    events = profiler.profiler.kineto_results.events()
    spans = [
        Span(event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in events
        if event.device_type() == DeviceType.CUDA
        and not event.name().startswith(("ProfilerStep", "[memory]"))
    ]
    if spans:
        return utilisation(spans, STEPS), text
    operators = sum(event.name().startswith("aten::") for event in events)
    return {"kernels_a_step": operators / STEPS, "busy": 0.0}, text


def utilisation(spans: list[Span], steps: int) -> dict[str, Any]:
    """Kernels of a step, the share of time in which one runs, the gaps between them, the heaviest ones."""
    spans = sorted(spans, key=lambda span: (span.start, span.end))
    busy, reached, gaps = 0, spans[0].start, []
    times: dict[str, list[int]] = defaultdict(list)
    for span in spans:
        if span.start > reached:
            gaps.append(span.start - reached)
        busy += max(0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
        times[span.name].append(span.end - span.start)
    whole = reached - spans[0].start
    heaviest = sorted(times.items(), key=lambda item: -sum(item[1]))[:HEAVIEST]
    return {
        "kernels_a_step": len(spans) / steps,
        "step_us": whole / 1e3 / steps,
        "busy": busy / whole if whole else 0.0,
        "median_gap_us": statistics.median(gaps) / 1e3 if gaps else 0.0,
        "fills_a_step": _count(times, "FillFunctor") / steps,
        "layout_changes_a_step": _count(times, "nchwToNhwc", "nhwcToNchw") / steps,
        "heaviest": [
            {"kernel": name[:120], "a_step": len(each) / steps, "us_a_step": sum(each) / 1e3 / steps}
            for name, each in heaviest
        ],
    }


def _count(times: dict[str, list[int]], *words: str) -> int:
    return sum(len(each) for name, each in times.items() if any(word in name for word in words))

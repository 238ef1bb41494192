"""The steps of the GPU check that train or compute in this process: python -m tools.gpu.measure STEP

`runner` starts them. All of them use the project's own modules.
"""

import itertools
import logging
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lenet_sweep.training import fused
from lenet_sweep.training.data import Data
from tools.gpu.card import facts, peaks
from tools.gpu.equality import equality
from tools.gpu.kernels import profile
from tools.gpu.record import ON_GPU, SMALL, StepRecord
from tools.gpu.workload import (
    BATCH,
    LEARNING_RATES,
    NETWORKS,
    config_of,
    cuda_graphs,
    epochs_of_array,
    free_memory,
    load,
    members_of,
    part_of,
    train_alone,
)

WIDTHS = (1, 2) if SMALL else (1, 4, 16, 64, 256)
LOSS_OF_PRECISION = 0.1  # in nats; TF32 and bfloat16 change the loss of a short training by less


def main() -> int:
    record = StepRecord.from_environment()
    steps: dict[str, Callable[[StepRecord], None]] = {
        step.__name__: step for step in (facts, peaks, equality, arrays, profile, precision)
    }
    name = sys.argv[1]
    try:
        steps[name](record)
    except Exception as error:
        traceback.print_exc()
        record.note_error(name, error)
    return 1 if record.errors or not all(claim.holds for claim in record.claims) else 0


# ---------------------------------------------------------------- arrays


@dataclass(frozen=True)
class ArrayKind:
    """What an array trains and how; `shared`: all runs have one seed, so one order of examples."""

    network: str
    optimizer: str
    graph: bool
    shared: bool

    def __str__(self) -> str:
        graph, shared = "graph" if self.graph else "eager", " one order" if self.shared else ""
        return f"{self.network} {self.optimizer} {graph}{shared}"


def arrays(record: StepRecord) -> None:
    """Measure speed and memory of arrays of several widths."""
    warnings = collect_warnings()
    whole = load(config_of("sigmoid/avg"))
    rows: list[dict[str, Any]] = []
    for kind, width in itertools.product(array_kinds(), WIDTHS):
        name = f"{kind} x{width}"
        if (kind.shared and width == 1) or not record.has_time(name, 0.5 if SMALL else 6):
            continue
        with record.attempt(name), cuda_graphs(kind.graph):
            rows.append(measure_array(kind, width, whole))
            record.keep(rows=rows, table=arrays_table(rows), warnings=warnings)
            print(f"{name}: {rows[-1]['examples_per_s']:,.0f} examples/s", flush=True)
    over = [f"{row['kind']} x{row['width']}" for row in rows if row["peak_mib"] > row["promised_mib"]]
    record.claim("arrays stay within fused.run_bytes", not (ON_GPU and over), ", ".join(over))
    record.claim("no CUDA graph failed", not warnings, "; ".join(warnings)[:300])
    if rows:
        best = max(rows, key=lambda row: row["examples_per_s"])
        record.summarize(
            f"best {best['examples_per_s']:,.0f} examples/s ({best['kind']} x{best['width']})",
            f"{len(rows)} arrays measured",
        )


def array_kinds() -> list[ArrayKind]:
    """The most informative first: time may run out."""
    graphed = (True, False) if ON_GPU else (False,)
    kinds = [ArrayKind(n, "sgd", graphed[0], False) for n in NETWORKS]
    kinds += [ArrayKind(n, "sgd", graphed[0], True) for n in NETWORKS]
    more = [
        ArrayKind(n, o, g, False)
        for o, g, n in itertools.product(LEARNING_RATES, graphed, NETWORKS)
        if (o, g) != ("sgd", graphed[0])
    ]
    return kinds[:3] if SMALL else kinds + more


def measure_array(kind: ArrayKind, width: int, whole: Data) -> dict[str, Any]:
    """Train three short epochs; the first one, with its warm-up and capture, is not in the speed."""
    free_memory()
    data = part_of(whole, array_steps(kind, width))
    config = config_of(kind.network, optimizer=kind.optimizer)
    before = torch.cuda.memory_allocated() if ON_GPU else 0  # the dataset, which all runs share
    started = time.perf_counter()
    seeds = [0] * width if kind.shared else range(width)
    members = members_of(config, seeds, data, epochs=3)
    prepared = time.perf_counter()
    epochs = epochs_of_array(members, data)
    next(epochs)
    first_epoch_s = time.perf_counter() - prepared
    rates = [sum(each.examples_per_s for each in metrics) for metrics in epochs]
    rate = statistics.median(rates)
    peak, reserved, promised = memory_of(members, before) if ON_GPU else (0, 0, 0)
    return {
        "kind": str(kind), **asdict(kind), "width": width, "examples_per_s": rate, "rates": rates,
        "step_us": 1e6 * width * BATCH / rate, "peak_mib": peak / 2**20, "reserved_mib": reserved / 2**20,
        "promised_mib": promised / 2**20, "prepare_s": prepared - started, "first_epoch_s": first_epoch_s,
    }  # fmt: skip


def array_steps(kind: ArrayKind, width: int) -> int:
    if SMALL:
        return 2
    return max(4, (200 if kind.graph else 48) // (1 + width // 16))


def memory_of(members: list[fused.Member], before: int) -> tuple[int, int, int]:
    """Bytes at most allocated beyond `before`, at most reserved, and promised by `fused.run_bytes`."""
    promised = len(members) * fused.run_bytes(members[0].network, BATCH)
    return torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved(), promised


def arrays_table(rows: list[dict[str, Any]]) -> str:
    """Examples/s of all runs together, a column a width."""
    widths = sorted({row["width"] for row in rows})
    lines = [f"{'examples/s (peak MiB)':<32}" + "".join(f"{f'x{width}':>22}" for width in widths)]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        cells = {row["width"]: row for row in rows if row["kind"] == kind}
        texts = [
            f"{cells[w]['examples_per_s']:,.0f} ({cells[w]['peak_mib']:,.0f})" if w in cells else ""
            for w in widths
        ]
        lines.append(f"{kind:<32}" + "".join(f"{text:>22}" for text in texts))
    return "\n".join(lines)


def collect_warnings() -> list[str]:
    """A list that grows by every warning that the package logs from now on, with the causes of its error.

    torch replaces the error that ends a capture by another one; the first is in the chain of contexts.
    """
    texts: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            arguments = record.args if isinstance(record.args, tuple) else ()
            causes = [cause for error in arguments for cause in contexts(error)]
            texts.append(" <- ".join([record.getMessage(), *causes]))

    logging.getLogger("lenet_sweep").addHandler(Collector(logging.WARNING))
    return texts


def contexts(error: object) -> Iterator[str]:
    """The errors during which `error` was raised, the nearest first."""
    context = error.__context__ if isinstance(error, BaseException) else None
    while context:
        yield f"{type(context).__name__}: {(str(context).splitlines() or [''])[0]}"
        context = context.__context__


# ---------------------------------------------------------------- precision


def precision(record: StepRecord) -> None:
    """Measure TF32 and bfloat16 against float32: speed, and the loss after three short epochs."""
    whole = load(config_of("sigmoid/avg"))
    rows: list[dict[str, Any]] = []
    switched = [(False, False), (True, False), (False, True), (True, True)]
    networks = ["sigmoid/avg"] if SMALL else list(NETWORKS)
    for network, kind, (tf32, amp) in itertools.product(networks, ("array", "alone"), switched):
        name = f"{network} {kind} tf32={tf32} amp={amp}"
        if record.has_time(name, 0.5 if SMALL else 4):
            with record.attempt(name):
                values = measure_precision(network, kind, tf32, amp, whole)
                rows.append({"network": network, "kind": kind, "tf32": tf32, "amp": amp, **values})
                record.keep(rows=rows)
                print(f"{name}: {values}", flush=True)
    exact = {(row["network"], row["kind"]): row for row in rows if not row["tf32"] and not row["amp"]}
    ratios = []
    for row in rows:
        base = exact.get((row["network"], row["kind"]))
        if base is None or row is base:
            continue
        label = "+".join(flag for flag in ("tf32", "amp") if row[flag])
        name = f"{row['network']} {row['kind']} with {label}"
        off = abs(row["train_loss"] - base["train_loss"])
        record.claim(
            f"{name}: the loss is float32's within {LOSS_OF_PRECISION}", off < LOSS_OF_PRECISION, f"{off:.1e}"
        )
        if (row["network"], row["kind"]) == ("sigmoid/avg", "array"):
            ratios.append(f"{label} x{row['examples_per_s'] / base['examples_per_s']:.2f}")
    record.summarize(f"speed of a sigmoid/avg array: {', '.join(ratios)}", f"{len(rows)} measured")


def measure_precision(network: str, kind: str, tf32: bool, amp: bool, whole: Data) -> dict[str, float]:
    free_memory()
    flags = (f"precision.tf32={str(tf32).lower()}", f"precision.amp={str(amp).lower()}")
    config = config_of(network, *flags)
    data = part_of(whole, 2 if SMALL else (100 if kind == "alone" else 40))
    if kind == "alone":
        _, metrics = train_alone(config, data, epochs=3)
        rates = [each.examples_per_s for each in metrics]
    else:
        members = members_of(config, range(2 if SMALL else 64), data, epochs=3)
        epochs = list(epochs_of_array(members, data, amp))
        metrics = [epoch[0] for epoch in epochs]
        rates = [sum(each.examples_per_s for each in epoch) for epoch in epochs]
    last = metrics[-1]
    return {"examples_per_s": max(rates[1:]), "train_loss": last.train_loss, "test_loss": last.test_loss}


if __name__ == "__main__":
    raise SystemExit(main())

"""Compares the speed of one epoch and of one sweep with other loops and with the roof of the machine.

python -m benchmarks.ladder [--rounds 3] [--only WORD...] [--json FILE] [--picture FILE]
python -m benchmarks.ladder --rounds 1 --only tutorial backend --loader-workers 0      a quick run

A round measures every contender once: one epoch including its test pass, or one whole sweep. Rounds
interleave the contenders, so that machine noise affects all of them equally. The table shows medians and
ranges over the rounds. The roof is the fastest float32 matrix product of the same rounds.

The start-up of a loop (imports, compiling, reading the data) is excluded, because its first epoch is not
counted. A sweep is a real command in an empty folder, measured from start to exit. Only compiling the step
and downloading the dataset are done before.

Memory is the peak of all of a contender's processes together, and the peak of the largest process alone,
measured during its first epoch or its sweeps. Ctrl-C prints the results so far.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table

from benchmarks import bars, measurement
from benchmarks.contenders import (
    MODELS,
    Array,
    Contender,
    Lightning,
    Loop,
    Recipe,
    Setting,
    Step,
    Sweep,
    Tutorial,
    missing,
)
from benchmarks.measurement import spread
from benchmarks.rungs import Ladder, Rung
from lenet_sweep.config.schema import TRAIN_EXAMPLES
from lenet_sweep.runs import hardware
from lenet_sweep.training import devices


def contenders(
    setting: Setting, loader_workers: Sequence[int], widths: Sequence[int], sweep_epochs: int
) -> list[Contender]:
    """Everything that is compared; optional packages are included if they are installed."""
    recipes: list[Recipe] = []
    has_lightning = not missing("lightning", "Lightning")
    backends = ("torch", "native") if devices.resolve(setting.device).type == "cpu" else ("torch",)
    for network in MODELS:
        recipes += [Tutorial(setting, network, count) for count in loader_workers]
        if has_lightning:
            recipes += [Lightning(setting, network, count) for count in loader_workers]
        recipes += [Step(setting, network, backend) for backend in backends]
        recipes += [Array(setting, network, width) for width in widths]
    return [*map(Loop, recipes), *(Sweep(setting, launcher, sweep_epochs) for launcher in launchers())]


def launchers() -> list[tuple[str, ...]]:
    """The overrides that select each launcher; those with workers get one per run or core."""
    count = max(2, min(len(Sweep.rates), hardware.cores()))
    chosen = [("sweep.workers=1",), (f"sweep.workers={count}",), ("hydra/launcher=basic",)]
    if not missing("hydra_plugins.hydra_joblib_launcher", "hydra/launcher=joblib"):
        chosen.append(("hydra/launcher=joblib", f"hydra.launcher.n_jobs={count}"))
    return chosen


def climb(ladder: Ladder, those: Sequence[Contender], rounds: int, device: torch.device) -> Iterator[str]:
    """Measure all contenders in `rounds` rounds, after one that is not counted; yield a line per result."""
    ladder.rungs += [Rung(contender.name, contender.network) for contender in those]
    took_s: dict[str, float] = {}
    turns = [
        (number, *pair) for number in range(rounds + 1) for pair in zip(those, ladder.rungs, strict=True)
    ]
    for place, (number, contender, rung) in enumerate(turns):
        if number and contender is those[0]:
            ladder.roofs.append(matmul_rate(device))
        sample = contender.take() if number else contender.warm_up()
        if sample is None:
            continue
        rung.look(sample)
        if number:
            rung.samples.append(sample)
        took_s[rung.name, rung.network] = sample.seconds
        left = [took_s.get((r.name, r.network)) for _, _, r in turns[place + 1 :]]
        yield (
            f"round {number} of {rounds}, {rung.name}, {rung.network}: {sample.rate:,.0f} examples/s "
            f"({sample.seconds:.1f} s); {_time_left(left)}"
        )


def _time_left(turns_s: Sequence[float | None]) -> str:
    """Estimate the time of the remaining turns; None is a turn of unknown duration."""
    known = [seconds for seconds in turns_s if seconds is not None]
    return f"{'about' if len(known) == len(turns_s) else 'more than'} {sum(known) / 60:.1f} min left"


def matmul_rate(device: torch.device, size: int | None = None) -> float:
    """FLOP/s of a float32 matrix product, the best of several."""
    size = size or (2048 if device.type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    c = torch.empty_like(a)
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, b, out=c)
        c[0, 0].item()  # host-device sync
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def table(ladder: Ladder) -> Table:
    """One row per contender that has been measured."""
    title = f"float32 matrix product: {ladder.roof / 1e9:,.0f} GFLOP/s"
    rates = ("examples/s, training", "all in", "x tutorial", "of roof")
    shown = measurement.table(title, "contender", "network", *rates, "MiB, all", "largest", words=2)
    for rung in ladder.measured:
        times = ladder.times_tutorial(rung)
        shown.add_row(
            rung.name,
            rung.network,
            spread(rung.train_rates, 0),
            spread(rung.rates, 0),
            "" if times is None else f"{times:.2f}",
            f"{ladder.share_of_roof(rung):.1%}",
            f"{rung.peak_mib:,.0f}",
            f"{rung.largest_mib:,.0f}",
        )
    return shown


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    words = "only contenders with one of these words in the name or network, such as: tutorial native"
    widths = "runs per array; default: 1 8 32 128 on CUDA, none on other devices"
    loader_workers = "numbers of DataLoader workers to try; default: 0 and one per core"
    add("--rounds", type=int, default=3, help="number of rounds, after one that is not counted")
    add("--only", nargs="+", default=[""], metavar="WORD", help=words)
    add("--device", default="auto")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of each loop")
    add("--data", choices=TRAIN_EXAMPLES, default="fashion_mnist")
    add("--loader-workers", type=int, nargs="+", default=sorted({0, hardware.cores()}), metavar="N",
        help=loader_workers)  # fmt: skip
    add("--fused", type=int, nargs="*", metavar="N", help=widths)
    add("--sweep-epochs", type=int, default=5, help="epochs of each of the four runs of a sweep")
    add("--json", type=Path, help="also write every sample to FILE")
    add("--picture", type=Path, help="also draw the table as a chart: .png, .svg or .pdf")
    return parser.parse_args()


def main() -> int:
    chosen = parse()
    device = devices.resolve(chosen.device)
    if chosen.fused is None:
        chosen.fused = [1, 8, 32, 128] if device.type == "cuda" else []
    setting = Setting(str(device), chosen.threads, chosen.data)
    everyone = contenders(setting, chosen.loader_workers, chosen.fused, chosen.sweep_epochs)
    those = [c for c in everyone if any(word in f"{c.name} {c.network}" for word in chosen.only)]
    if not those:
        names = "\n".join(dict.fromkeys(c.name for c in everyone))
        raise SystemExit(f"--only {' '.join(chosen.only)}: no contender is called that. Contenders:\n{names}")
    ladder, code = Ladder(), 0
    try:
        measurement.warm_up(chosen.data, f"device={device}")
        torch.set_num_threads(chosen.threads)
        for line in climb(ladder, those, chosen.rounds, device):
            measurement.say(line)
    except KeyboardInterrupt:
        measurement.say("interrupted")
        code = 130
    finally:
        for contender in those:
            contender.close()
    report(ladder, measurement.machine("ladder", devices.describe(device), chosen.threads), chosen)
    return code


def report(ladder: Ladder, machine: dict[str, object], chosen: argparse.Namespace) -> None:
    """Print the table, and write the requested files."""
    if not ladder.measured:
        return
    measurement.show(table(ladder))
    measurement.write(chosen.json, machine, **asdict(ladder))
    if chosen.picture:
        bars.save(bars.draw(ladder, machine), chosen.picture)


if __name__ == "__main__":
    raise SystemExit(main())

"""The results of the ladder: samples per contender, and how they relate to the tutorial and the roof."""

import statistics
from dataclasses import dataclass, field

from benchmarks.contenders import MODELS, TUTORIAL, Sample, compose_config
from lenet_sweep import shapes
from lenet_sweep.shapes import CLASSES, IMAGE_SHAPE


@dataclass
class Rung:
    """The results of a contender: one sample per round."""

    name: str
    network: str
    samples: list[Sample] = field(default_factory=list)
    peak_mib: float = 0.0
    largest_mib: float = 0.0

    @property
    def rates(self) -> list[float]:
        return [sample.rate for sample in self.samples]

    @property
    def train_rates(self) -> list[float]:
        return [sample.train_rate for sample in self.samples if sample.train_rate is not None]

    def look(self, sample: Sample) -> None:
        """Record the memory of a sample, whether it is counted or not."""
        if sample.peak:
            self.peak_mib = max(self.peak_mib, sample.peak.all_mib)
            self.largest_mib = max(self.largest_mib, sample.peak.largest_mib)


@dataclass
class Ladder:
    """All rungs, and the roof: FLOP/s of the fastest matrix product of each round."""

    rungs: list[Rung] = field(default_factory=list)
    roofs: list[float] = field(default_factory=list)

    @property
    def roof(self) -> float:
        return max(self.roofs)

    @property
    def measured(self) -> list[Rung]:
        return [rung for rung in self.rungs if rung.samples]

    def times_tutorial(self, rung: Rung) -> float | None:
        """Speed relative to the tutorial's loop with its best number of workers."""
        loops = [r for r in self.measured if r.network == rung.network and r.name.startswith(TUTORIAL)]
        if not loops:
            return None
        return statistics.median(rung.rates) / max(statistics.median(loop.rates) for loop in loops)

    def share_of_roof(self, rung: Rung) -> float:
        """Share for training alone if it was timed separately, otherwise for everything."""
        rate = statistics.median(rung.train_rates or rung.rates)
        return rate * flops(rung.network) / self.roof


def flops(network: str) -> int:
    """Floating-point operations of training on one example."""
    model = compose_config(f"model={MODELS[network][0]}").model
    return shapes.training_flops(model, IMAGE_SHAPE, CLASSES)

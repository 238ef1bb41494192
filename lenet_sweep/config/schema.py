"""The schema of the config: frozen dataclasses with the type and range of every field.

The default values and the meaning of every field are in conf/*.yaml. Checks that involve more than one
field are in `__post_init__`. `config.parsing.parse` builds a `Config` from a nested dict, composed by Hydra
or read from a stored config.yaml.
"""

from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from lenet_sweep import shapes
from lenet_sweep.errors import ConfigError, suggestion
from lenet_sweep.shapes import CLASSES, IMAGE_SHAPE

# Size of each training set, without any held-out examples removed.
TRAIN_EXAMPLES = {"fashion_mnist": 60_000, "mnist": 60_000, "fashion_mnist_mini": 2_000}


@dataclass(frozen=True)
class Range:
    """The interval of allowed numbers: low <= x <= high, or low < x <= high if `above`."""

    low: float
    high: float
    above: bool = False

    def __contains__(self, x: float) -> bool:
        return (self.low < x if self.above else self.low <= x) and x <= self.high

    def __str__(self) -> str:
        if self.above:
            return f"above {self.low:g}, at most {self.high:g}"
        return f"from {self.low:.16g} to {self.high:.16g}"


@dataclass(frozen=True)
class Length:
    """The allowed number of entries of a list, bounds included."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.low} to {self.high} entries"


Device = Annotated[str, "auto, cpu, mps, cuda or cuda:N"]
Positive = Annotated[int, Range(1, 1_000_000)]
NotNegative = Annotated[int, Range(0, 1_000_000)]
Fraction = Annotated[float, Range(0, 1)]
WeightDecay = Annotated[float, Range(0, 10)]
LearningRate = Annotated[float, Range(0, 1000, above=True)]

# A new activation or pool also needs an entry in `training.model` and, for backend=native, a struct in
# native.cpp and an entry in `training.compiler`. tests/test_native.py checks that none is missing.
Activation = Literal["sigmoid", "tanh", "relu", "leaky_relu", "gelu", "silu"]
Pool = Literal["avg", "max"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """LeNet of any size: convolutions, each with an activation and a 2x2 pool, then linear layers."""

    name: str
    activation: Activation
    pool: Pool
    channels: Annotated[tuple[Annotated[int, Range(1, 1024)], ...], Length(1, 6)]
    kernel_size: Annotated[int, Range(1, 1_000)]
    padding: Literal["first", "all", "none"]
    hidden: Annotated[tuple[Annotated[int, Range(1, 8192)], ...], Length(0, 8)]
    init: Literal["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "pytorch"]


@dataclass(frozen=True, kw_only=True)
class SGDConfig:
    """torch.optim.SGD."""

    name: Literal["sgd", "momentum", "nesterov"]
    lr: LearningRate
    momentum: Fraction
    nesterov: bool
    weight_decay: WeightDecay

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise ConfigError("optimizer.nesterov=true: needs optimizer.momentum above 0, for example 0.9")


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """torch.optim.Adam (weight decay added to the gradient) or AdamW (decoupled weight decay)."""

    name: Literal["adam", "adamw"]
    lr: LearningRate
    betas: Annotated[tuple[Annotated[float, Range(0, 0.999999)], ...], Length(2, 2)]
    eps: Annotated[float, Range(0, 1, above=True)]
    weight_decay: WeightDecay


@dataclass(frozen=True, kw_only=True)
class ConstantScheduleConfig:
    """A constant learning rate."""

    name: Literal["constant"]


@dataclass(frozen=True, kw_only=True)
class StepScheduleConfig:
    """The learning rate is multiplied by `gamma` after every `step_size` epochs."""

    name: Literal["step"]
    step_size: Positive
    gamma: Annotated[float, Range(0, 1, above=True)]


@dataclass(frozen=True, kw_only=True)
class CosineScheduleConfig:
    """Cosine annealing of the learning rate to `eta_min` over all epochs of the run."""

    name: Literal["cosine"]
    eta_min: Annotated[float, Range(0, 1000)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The dataset. `val_size` training examples are held out; `train_size` of the others are used."""

    name: Literal["fashion_mnist", "mnist", "fashion_mnist_mini"]
    root: str
    train_size: Positive | None
    val_size: NotNegative

    def __post_init__(self) -> None:
        available = TRAIN_EXAMPLES[self.name]
        if self.val_size >= available:
            raise ConfigError(
                f"data.val_size={self.val_size}: must be less than the {available} training examples "
                f"of {self.name}"
            )
        if self.train_size is not None and self.train_size + self.val_size > available:
            raise ConfigError(
                f"data.train_size={self.train_size}: must be at most {available - self.val_size}; "
                f"{self.name} has {available} training examples, {self.val_size} of them held out (val_size)"
            )


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Faster, less precise arithmetic; both are off by default."""

    tf32: bool
    amp: bool


@dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    """Tracking in MLflow, at any database or server URI that MLflow supports."""

    name: Literal["mlflow"]
    uri: str
    experiment: str

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.uri)
            secret = parts.password or (parts.username if parts.scheme in ("http", "https") else None)
        except ValueError as error:
            raise ConfigError(f"tracking.uri={self.uri!r}: is not a valid URI: {error}") from error
        kind = parts.scheme.partition("+")[0]
        if (
            kind not in ("sqlite", "http", "https", "postgresql", "mysql", "mssql")
            and self.uri != "databricks"
        ):
            raise ConfigError(
                f"tracking.uri={self.uri!r}: must start with sqlite:///, http:// or https://, or be another "
                "database or server URI that MLflow supports; MLflow's file store is not supported"
            )
        if secret:
            # The config is stored with every run, where anyone with access to the store can read it.
            raise ConfigError(
                "tracking.uri: must not contain a password, because it would be stored with every run; for a "
                "server, set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        if not self.experiment.strip():
            raise ConfigError("tracking.experiment='': must be the name of an MLflow experiment")


@dataclass(frozen=True, kw_only=True)
class NoTrackingConfig:
    """No tracking: a run writes its output folder only."""

    name: Literal["none"]


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """How a sweep is executed. None of these fields changes a result."""

    workers: Annotated[int, Range(1, 1024)] | Literal["auto"]
    fuse: Annotated[int, Range(1, 4096)] | Literal["auto", "off"]
    rerun: bool
    dry_run: bool
    fail_fast: bool


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of one run. conf/config.yaml describes every field."""

    lr: LearningRate
    epochs: Positive
    batch_size: Positive
    seed: Annotated[int, Range(0, 2**53)]  # exact in JSON and YAML, which may parse numbers as float64
    device: Device
    backend: Literal["auto", "torch", "native"]
    threads: Annotated[int, Range(1, 1024)] | Literal["auto"]
    target_loss: Annotated[float, Range(0, 1000, above=True)] | None
    profile: bool
    model: ModelConfig
    optimizer: SGDConfig | AdamConfig
    schedule: ConstantScheduleConfig | StepScheduleConfig | CosineScheduleConfig
    data: DataConfig
    precision: PrecisionConfig
    tracking: MlflowConfig | NoTrackingConfig
    sweep: SweepConfig

    def __post_init__(self) -> None:
        _check_device(self.device)
        if self.backend == "native" and self.device not in ("auto", "cpu"):
            raise ConfigError(
                f"backend='native': supports CPUs only, not device={self.device}; use backend=auto"
            )
        if self.backend == "native" and self.precision.amp:
            raise ConfigError(
                "backend='native': supports float32 only; with precision.amp=true use backend=torch"
            )
        try:
            shapes.layers(self.model, IMAGE_SHAPE, CLASSES)
        except shapes.ShapeError as error:
            value = getattr(self.model, error.field)
            raise ConfigError(f"model.{error.field}={value}: {error}") from error


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    indexed = kind == "cuda" and index.isdecimal() and index.isascii()
    if device not in ("auto", "cpu", "mps", "cuda") and not indexed:
        near = suggestion("cuda" if "gpu" in device.lower() else device, {"auto", "cpu", "mps", "cuda"})
        raise ConfigError(f"device={device!r}: must be auto, cpu, mps, cuda or cuda:N.{near}")

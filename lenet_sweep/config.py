"""The config as plain frozen dataclasses: the schema of everything under conf/.

`parse` turns a nested dict (composed by Hydra, or read from a stored config.yaml) into a `Config`,
or raises a `ConfigError` that names the field, the value, what is allowed and the nearest known
name. Values live in YAML under conf/; this module holds types, ranges and what must fit together.
A config is data: nothing named in one is imported, instantiated or resolved here.
"""

import dataclasses
import difflib
import math
import os
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import yaml

from lenet_sweep import shapes
from lenet_sweep.errors import ConfigError

# Every dataset here has this form; the linear layers' input size follows from it.
IMAGE_SHAPE = (1, 28, 28)  # channels, height, width
CLASSES = 10
TRAIN_EXAMPLES = {"fashion_mnist": 60_000, "mnist": 60_000, "fashion_mnist_mini": 2_000}


@dataclass(frozen=True)
class Range:
    """The numbers a field takes: `low` <= x <= `high`, without `low` itself if `above`."""

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
    """How many entries a list may have."""

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


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """LeNet of any size: convolutions, each with activation and 2x2 pool, then linear layers."""

    name: str
    activation: Literal["sigmoid", "tanh", "relu", "leaky_relu", "gelu", "silu"]
    pool: Literal["avg", "max"]
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
            raise ConfigError("optimizer.nesterov=true: needs optimizer.momentum above 0, such as 0.9")


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """torch.optim.Adam (decay added to the gradient) or AdamW (decoupled decay)."""

    name: Literal["adam", "adamw"]
    lr: LearningRate
    betas: Annotated[tuple[Annotated[float, Range(0, 0.999999)], ...], Length(2, 2)]
    eps: Annotated[float, Range(0, 1, above=True)]
    weight_decay: WeightDecay


@dataclass(frozen=True, kw_only=True)
class ConstantScheduleConfig:
    """The learning rate stays as it is."""

    name: Literal["constant"]


@dataclass(frozen=True, kw_only=True)
class StepScheduleConfig:
    """The learning rate is multiplied by `gamma` after every `step_size` epochs."""

    name: Literal["step"]
    step_size: Positive
    gamma: Annotated[float, Range(0, 1, above=True)]


@dataclass(frozen=True, kw_only=True)
class CosineScheduleConfig:
    """The learning rate falls along half a cosine to `eta_min` over all epochs of the run."""

    name: Literal["cosine"]
    eta_min: Annotated[float, Range(0, 1000)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which examples: `val_size` are held out of the training set, `train_size` of the rest are used."""

    name: Literal["fashion_mnist", "mnist", "fashion_mnist_mini"]
    root: str
    train_size: Positive | None
    val_size: NotNegative

    def __post_init__(self) -> None:
        available = TRAIN_EXAMPLES[self.name]
        if self.val_size >= available:
            raise ConfigError(
                f"data.val_size={self.val_size}: {self.name} has {available} training examples; "
                "some must be left to train on"
            )
        if self.train_size is not None and self.train_size + self.val_size > available:
            raise ConfigError(
                f"data.train_size={self.train_size}: {self.name} has {available} training examples, of which "
                f"data.val_size={self.val_size} are held out; at most {available - self.val_size} are left"
            )


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Faster, less exact arithmetic; both off, numbers match the tutorial's."""

    tf32: bool
    amp: bool


@dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    """Where runs are tracked: any MLflow tracking URI."""

    name: Literal["mlflow"]
    uri: str
    experiment: str

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.uri)
            secret = parts.password or (parts.username if parts.scheme in ("http", "https") else None)
        except ValueError as error:
            raise ConfigError(f"tracking.uri={self.uri!r}: is no URI: {error}") from error
        kind = parts.scheme.partition("+")[0]
        if (
            kind not in ("sqlite", "http", "https", "postgresql", "mysql", "mssql")
            and self.uri != "databricks"
        ):
            raise ConfigError(
                f"tracking.uri={self.uri!r}: must start with sqlite:///, http://, https:// or be another URI "
                "that MLflow takes (its file store is no longer supported)"
            )
        if secret:
            # The config is stored with every run, for everybody to read.
            raise ConfigError(
                "tracking.uri: a password in the URI would be stored with every run; for a server, set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        if not self.experiment.strip():
            raise ConfigError("tracking.experiment='': must be the name of an MLflow experiment")


@dataclass(frozen=True, kw_only=True)
class NoTrackingConfig:
    """Runs leave only their output folder."""

    name: Literal["none"]


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """How a sweep is carried out; changes no result."""

    workers: Annotated[int, Range(1, 1024)] | Literal["auto"]
    fuse: Annotated[int, Range(1, 4096)] | Literal["auto", "off"]
    rerun: bool
    dry_run: bool
    fail_fast: bool


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides what one run does. The fields' meanings stand in conf/."""

    lr: LearningRate
    epochs: Positive
    batch_size: Positive
    seed: Annotated[int, Range(0, 2**53)]  # exact in every JSON and YAML reader
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
                f"backend='native': is for CPUs, not for device={self.device}; use backend=auto"
            )
        if self.backend == "native" and self.precision.amp:
            raise ConfigError("backend='native': has float32 only, so precision.amp=true needs backend=torch")
        try:
            shapes.layers(self.model, IMAGE_SHAPE, CLASSES)
        except shapes.ShapeError as error:
            value = getattr(self.model, error.field)
            raise ConfigError(f"model.{error.field}={value}: {error}") from error


def parse(values: dict[str, Any]) -> Config:
    """Build the `Config` that `values` (nested dicts, lists and plain values) describe.

    Raises:
        ConfigError: for an unknown or missing key, a wrong type, a value out of range, or values
            that cannot work together.
    """
    config = _section(Config, values, "")
    assert isinstance(config, Config)
    return config


def load(path: Path) -> Config:
    """Read a stored config.yaml. The file is untrusted: it is parsed as plain YAML, nothing more."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
        leaves = list(flatten(values)) if isinstance(values, dict) else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (yaml.YAMLError, AttributeError, LookupError, RecursionError, ValueError) as error:
        # PyYAML lets errors of its constructors through, as for "!!timestamp x" or "!!bool x".
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: not a config in YAML: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a config: expected keys and values, got {type(values).__name__}")
    for key, value in leaves:
        if isinstance(value, str) and "${" in value:
            raise ConfigError(
                f"{path}: {key}={value!r}: a stored config holds values, nothing to be resolved"
            )
    return parse(values)


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases, with which a short file can stand for an endless or a huge one."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


def dump(config: Config) -> str:
    """The config as YAML; `load` gives back an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def default_data_root() -> str:
    """Where datasets lie unless the config says otherwise (conf/data/fashion_mnist.yaml says the same)."""
    return os.environ.get("LENET_SWEEP_DATA", "data")


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dicts and lists of plain values."""
    values = _plain(dataclasses.asdict(config))
    assert isinstance(values, dict)
    return values


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf as ('model.pool', 'avg')."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def known_keys(section: type = Config, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every field and section."""
    for name, hint in get_type_hints(section).items():
        yield prefix + name
        for option in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
            if dataclasses.is_dataclass(option):
                assert isinstance(option, type)
                yield from known_keys(option, f"{prefix}{name}.")


def is_about_tracking(override: str) -> bool:
    """Whether a word of the command line chooses the tracking, or sets something of it."""
    return override.lstrip("+").startswith("tracking")


def suggestion(word: str, known: set[str]) -> str:
    """' Did you mean ...?' for the nearest of the `known` words; '' if none is near."""
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown_key(key: str) -> ConfigError:
    """The error for a key that this config does not have."""
    known = set(known_keys())
    if key in known:
        section = key.rpartition(".")[0]
        return ConfigError(f"{key!r} is not a key of the {section} that was chosen.")
    section, _, name = key.rpartition(".")
    siblings = [k for k in known_keys() if k.rpartition(".")[0] == section]
    near = suggestion(key, known) or suggestion(name, set(siblings))
    listed = ", ".join(dict.fromkeys(siblings or [k for k in known_keys() if "." not in k]))
    return ConfigError(f"{key!r} is not a key of the config.{near}\nKnown keys: {listed}.")


# ---------------------------------------------------------------- from plain values to dataclasses


def _section(section: type, values: Any, path: str) -> Any:
    """Build dataclass `section` from the dict `values` that stands at `path`."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path}={values!r}: must be a section with keys of its own")
    hints = get_type_hints(section, include_extras=True)
    for key in values:
        if key not in hints:
            raise unknown_key(_join(path, str(key)))
    missing = [_join(path, name) for name in hints if name not in values]
    if missing:
        raise ConfigError(f"the config lacks {', '.join(missing)}")
    return section(**{name: _value(hint, values[name], _join(path, name)) for name, hint in hints.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
    """Check `value` against the type `hint`, converting whole numbers to floats and lists to tuples."""
    options = _options(hint)
    sections = [option for option in options if dataclasses.is_dataclass(option)]
    if sections:
        assert all(isinstance(option, type) for option in sections)
        return _section(_variant(sections, value, path), value, path)
    for option in options:
        accepted, result = _accept(option, value, path)
        if accepted:
            return result
    allowed = " or ".join(_describe(option) for option in options)
    near = suggestion(value, _choices(options)) if isinstance(value, str) else ""
    raise ConfigError(f"{path}={_shown(value)}: must be {allowed}.{near}")


def _variant(sections: list[Any], value: Any, path: str) -> Any:
    """Choose the section (SGD or Adam, say) whose `name` field allows the given name."""
    if len(sections) == 1:
        return sections[0]
    names = {name: section for section in sections for name in get_args(get_type_hints(section)["name"])}
    given = value.get("name") if isinstance(value, dict) else value
    if not isinstance(given, str) or given not in names:
        near = suggestion(given, set(names)) if isinstance(given, str) else ""
        raise ConfigError(f"{path}.name={_shown(given)}: must be one of {', '.join(names)}.{near}")
    return names[given]


def _accept(option: Any, value: Any, path: str) -> tuple[bool, Any]:
    """Whether `value` is of type `option`, and the value as that type."""
    if option is type(None):
        return value is None, None
    if get_origin(option) is Literal:
        return value in get_args(option) and isinstance(value, str), value
    base, *rules = get_args(option) if get_origin(option) is Annotated else (option,)
    if get_origin(base) is tuple:
        if not isinstance(value, list | tuple):
            return False, None
        entries = tuple(_value(get_args(base)[0], entry, f"{path}[{i}]") for i, entry in enumerate(value))
        return all(rule.low <= len(entries) <= rule.high for rule in rules), entries
    if base is bool:
        return isinstance(value, bool), value
    if base is str:
        # `tracking.experiment=2024` is a number to YAML and a name to the user.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return isinstance(value, str) or number, str(value)
    assert base in (int, float), base
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False, None
    if base is int and not isinstance(value, int):
        return False, None
    finite = isinstance(value, int) or math.isfinite(value)
    if not finite or not all(value in rule for rule in rules):
        return False, None
    return True, base(value)


def _describe(option: Any) -> str:
    if option is type(None):
        return "null"
    if get_origin(option) is Literal:
        names = get_args(option)
        return repr(names[0]) if len(names) == 1 else f"one of {', '.join(names)}"
    base, *rules = get_args(option) if get_origin(option) is Annotated else (option,)
    rule = f" {rules[0]}" if rules else ""
    if get_origin(base) is tuple:
        return f"a list of{rule}, each {_describe(get_args(base)[0])}"
    return {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}[base] + rule


def _choices(options: tuple[Any, ...]) -> set[str]:
    return {name for option in options if get_origin(option) is Literal for name in get_args(option)}


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    indexed = kind == "cuda" and index.isdecimal() and index.isascii()
    if device not in ("auto", "cpu", "mps", "cuda") and not indexed:
        near = suggestion("cuda" if "gpu" in device.lower() else device, {"auto", "cpu", "mps", "cuda"})
        raise ConfigError(f"device={device!r}: must be auto, cpu, mps, cuda or cuda:N.{near}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value

"""Conversion between plain values (YAML, Hydra) and the dataclasses of `config.schema`.

`parse` builds a `Config` from nested dicts and `to_dict` reverses it; `load` and `dump` do the same for YAML.
Values are checked against the type hints of the schema: `Literal` lists the allowed names, and `Annotated`
carries a `Range` or a `Length`. A `ConfigError` names the field, the value, what is allowed and the closest
known name.
"""

import dataclasses
import math
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from lenet_sweep.config.schema import Config
from lenet_sweep.errors import ConfigError, suggestion


def parse(values: dict[str, Any]) -> Config:
    """Build a `Config` from nested dicts, lists and plain values.

    Raises:
        ConfigError: for an unknown or missing key, a wrong type, a value out of range, or values
            that contradict each other.
    """
    config = _section(Config, values, "")
    assert isinstance(config, Config)
    return config


def load(path: Path) -> Config:
    """Read a stored config.yaml. The file is untrusted, so only plain YAML without aliases is allowed.

    Raises:
        ConfigError: if the file cannot be read, is not YAML, or does not hold a valid config.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
        leaves = list(flatten(values)) if isinstance(values, dict) else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (yaml.YAMLError, AttributeError, LookupError, RecursionError, ValueError) as error:
        # PyYAML does not wrap the errors of its constructors, for example of "!!timestamp x" or "!!bool x".
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: is not a config in YAML: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: is not a config: expected keys and values, got {type(values).__name__}")
    for key, value in leaves:
        if isinstance(value, str) and "${" in value:
            raise ConfigError(
                f"{path}: {key}={value!r}: a stored config must not contain interpolations (${{...}})"
            )
    return parse(values)


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases: with them, a short file can expand to one of unlimited size."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


def dump(config: Config) -> str:
    """The config as YAML. `load` returns an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts and lists of plain values. `parse` returns an equal config."""
    values = _to_plain(dataclasses.asdict(config))
    assert isinstance(values, dict)
    return values


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf with its dotted name, such as ('model.pool', 'avg')."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def known_keys(section: type = Config, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every field and section."""
    for name, hint in get_type_hints(section).items():
        yield prefix + name
        for option in _options(hint):
            if dataclasses.is_dataclass(option):
                assert isinstance(option, type)
                yield from known_keys(option, f"{prefix}{name}.")


def is_about_tracking(override: str) -> bool:
    """Whether this override of the command line selects or configures the tracking."""
    return override.lstrip("+").startswith("tracking")


def unknown_key(key: str) -> ConfigError:
    """The error for a key that the config does not have, with the closest known key and all its siblings."""
    known = set(known_keys())
    if key in known:
        section = key.rpartition(".")[0]
        return ConfigError(f"{key!r} is not a key of the selected {section}.")
    section, _, name = key.rpartition(".")
    siblings = [k for k in known_keys() if k.rpartition(".")[0] == section]
    near = suggestion(key, known) or suggestion(name, set(siblings))
    listed = ", ".join(dict.fromkeys(siblings or [k for k in known_keys() if "." not in k]))
    return ConfigError(f"{key!r} is not a key of the config.{near}\nKnown keys: {listed}.")


# ---------------------------------------------------------------- from plain values to dataclasses


def _section(section: type, values: Any, path: str) -> Any:
    """Build the dataclass `section` from the dict `values`, found at the dotted name `path`."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path}={_shown(values)}: must be a section with keys")
    hints = get_type_hints(section, include_extras=True)
    for key in values:
        if key not in hints:
            raise unknown_key(_join(path, str(key)))
    missing = [_join(path, name) for name in hints if name not in values]
    if missing:
        raise ConfigError(f"the config has no value for {', '.join(missing)}")
    return section(**{name: _value(hint, values[name], _join(path, name)) for name, hint in hints.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
    """Check `value` against the type `hint`; convert integers to floats and lists to tuples as needed."""
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
    """Choose the dataclass (for example SGDConfig or AdamConfig) whose `name` field allows the name."""
    if len(sections) == 1:
        return sections[0]
    names = {name: section for section in sections for name in get_args(get_type_hints(section)["name"])}
    given = value.get("name") if isinstance(value, dict) else value
    if not isinstance(given, str) or given not in names:
        near = suggestion(given, set(names)) if isinstance(given, str) else ""
        raise ConfigError(f"{path}.name={_shown(given)}: must be one of {', '.join(names)}.{near}")
    return names[given]


def _accept(option: Any, value: Any, path: str) -> tuple[bool, Any]:
    """Return whether `value` is valid for the type `option`, and the value converted to it."""
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
        # YAML parses `tracking.experiment=2024` as a number, but the user means a name.
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
    return {bool: "true or false", str: "a string", int: "a whole number", float: "a number"}[base] + rule


def _choices(options: tuple[Any, ...]) -> set[str]:
    return {name for option in options if get_origin(option) is Literal for name in get_args(option)}


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _to_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(entry) for entry in value]
    return value

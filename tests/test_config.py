"""The config: presets are valid, every field has a type and range, and a stored config loads equal."""

import contextlib
import dataclasses
import datetime
import re
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lenet_sweep.config import parsing
from lenet_sweep.config.schema import Config, Length, Range
from lenet_sweep.errors import ConfigError
from lenet_sweep.paths import conf_dir

GROUPS = ("model", "optimizer", "schedule", "data", "tracking", "debug", "experiment")


PRESETS = [
    f"{'+' * (group in ('debug', 'experiment'))}{group}={path.stem}"
    for group in GROUPS
    for path in sorted((conf_dir() / group).glob("*.yaml"))
]


# --- what ships


@pytest.mark.parametrize("override", PRESETS)
def test_every_shipped_preset_is_a_valid_config(make_config, override):
    assert isinstance(make_config(override), Config)


@pytest.mark.parametrize("override", [p for p in PRESETS if not p.startswith("+")])
def test_preset_carries_its_own_name(make_config, override):
    group, name = override.split("=")
    section = getattr(make_config(override), group)
    assert section.name == ("mlflow" if name == "server" else name)


def test_default_is_the_tutorials_recipe(make_config):
    config = make_config()
    assert (config.lr, config.epochs, config.batch_size, config.seed) == (0.9, 10, 256, 0)
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.momentum) == ("sgd", 0.9, 0.0)
    assert (config.model.activation, config.model.pool, config.model.init) == (
        "sigmoid",
        "avg",
        "xavier_uniform",
    )
    assert (config.model.channels, config.model.hidden, config.model.kernel_size) == ((6, 16), (120, 84), 5)
    assert (config.data.name, config.data.train_size, config.data.val_size) == ("fashion_mnist", None, 0)
    assert (config.precision.tf32, config.precision.amp) == (False, False)


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "adam", "adamw"])
def test_every_optimizer_follows_the_learning_rate_at_the_top(make_config, name):
    assert make_config(f"optimizer={name}", "lr=0.123").optimizer.lr == 0.123


def test_conf_holds_values_only():
    for path in conf_dir().rglob("*.yaml"):
        targets = re.findall(r"_target_: *(\S+)", path.read_text())
        assert targets == (["lenet_sweep.cli.main.RefuseEarly"] if path.name == "config.yaml" else []), path


# --- types and ranges of single fields


def _leaves(section, prefix=""):
    for name, hint in get_type_hints(section, include_extras=True).items():
        options = parsing._options(hint)
        if any(dataclasses.is_dataclass(option) for option in options):
            for option in options:
                yield from _leaves(option, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", options


def _presets_with(path):
    """The preset of a group that has the field; for fields that not every preset of the group has."""
    group, _, name = path.rpartition(".")
    return {
        ("optimizer", "betas"): ["optimizer=adam"],
        ("optimizer", "eps"): ["optimizer=adam"],
        ("schedule", "step_size"): ["schedule=step"],
        ("schedule", "gamma"): ["schedule=step"],
        ("schedule", "eta_min"): ["schedule=cosine"],
    }.get((group, name), [])


LEAVES = dict(_leaves(Config))


@pytest.mark.parametrize("path", LEAVES)
@pytest.mark.parametrize("wrong", [{"a": 1}, [{}], datetime.date(2024, 1, 2)], ids=repr)
def test_value_of_no_fitting_type_is_refused_by_name(make_config, path, wrong):
    values = _replaced(make_config(*_presets_with(path)), path, wrong)
    with pytest.raises(ConfigError) as caught:
        parsing.parse(values)
    assert str(caught.value).startswith(f"{path}")
    assert "must be" in str(caught.value)


RANGED = {
    path: rule
    for path, options in LEAVES.items()
    for option in options
    for rule in get_args(option)[1:]
    if isinstance(rule, Range) and get_origin(option) is Annotated
}


@pytest.mark.parametrize("path", RANGED)
def test_value_just_outside_its_range_is_refused_with_the_range(make_config, path):
    rule = RANGED[path]
    below = rule.low if rule.above else rule.low - 1
    for outside in (below, rule.high + 1):
        values = _replaced(make_config(*_presets_with(path)), path, type(outside)(outside))
        with pytest.raises(ConfigError, match=re.escape(path)) as caught:
            parsing.parse(values)
        assert str(rule) in str(caught.value)


@pytest.mark.parametrize("path", LEAVES)
def test_missing_field_is_named(make_config, path):
    values = _replaced(make_config(*_presets_with(path)), path, None, remove=True)
    with pytest.raises(ConfigError, match=re.escape(path)):
        parsing.parse(values)


@pytest.mark.parametrize("given", [True, "3", 3.0, None])
def test_whole_number_is_neither_bool_text_nor_float(make_config, given):
    with pytest.raises(ConfigError, match="epochs="):
        parsing.parse(_replaced(make_config(), "epochs", given))


def test_whole_number_is_accepted_where_a_float_is_required(make_config):
    lr = parsing.parse(_replaced(make_config(), "lr", 1)).lr
    assert (lr, type(lr)) == (1.0, float)


def test_long_value_is_shown_shortened(make_config):
    with pytest.raises(ConfigError) as caught:
        parsing.parse(_replaced(make_config(), "lr", "x" * 10_000))
    assert len(str(caught.value)) < 200


# --- combinations


@pytest.mark.parametrize(
    ("preset", "path", "value", "expected"),
    [
        ("optimizer=nesterov", "optimizer.momentum", 0.0, "optimizer.nesterov=true"),
        ("data=fashion_mnist_mini", "data.train_size", 2001, "2000 training examples"),
        ("data=fashion_mnist_mini", "data.val_size", 2000, "must be less than the 2000"),
        ("model=lenet", "model.kernel_size", 15, "at most 14"),
        ("model=lenet", "model.padding", "all", None),
        ("tracking=mlflow", "tracking.uri", "sqlite", "sqlite:///"),
        ("tracking=mlflow", "tracking.experiment", " ", "tracking.experiment"),
    ],
)
def test_values_that_cannot_work_together_are_refused(make_config, preset, path, value, expected):
    values = _replaced(make_config(preset), path, value)
    if expected is None:
        assert parsing.parse(values)
        return
    with pytest.raises(ConfigError, match=re.escape(expected)):
        parsing.parse(values)


# --- names


@given(st.sampled_from(sorted(parsing.known_keys())), st.data())
def test_key_with_one_letter_missing_gets_the_known_key_as_a_suggestion(key, data):
    section, _, name = key.rpartition(".")
    assume(len(name) > 3)
    cut = data.draw(st.integers(0, len(name) - 1))
    misspelt = f"{section}." * bool(section) + name[:cut] + name[cut + 1 :]
    assume(misspelt not in set(parsing.known_keys()))
    assert f"Did you mean {key!r}?" in str(parsing.unknown_key(misspelt))


def test_word_unlike_any_known_key_gets_no_suggestion():
    assert "Did you mean" not in str(parsing.unknown_key("zzzzzz"))


# --- stored configs


def _field(options):
    """Values that a field accepts, regardless of the rest of the config."""
    strategies = [st.none()] if type(None) in options else []
    for option in options:
        if get_origin(option) is Literal:
            strategies.append(st.sampled_from(get_args(option)))
            continue
        base, *rules = get_args(option) if get_origin(option) is Annotated else (option,)
        rule = rules[0] if rules else None
        if base is int:
            strategies.append(st.integers(int(rule.low), int(rule.high)))
        elif base is float:
            strategies.append(st.floats(rule.low, rule.high, exclude_min=rule.above))
        elif base is bool:
            strategies.append(st.booleans())
        elif isinstance(rule, Length) and base is not str:
            entries = _field((get_args(base)[0],))
            strategies.append(st.lists(entries, min_size=rule.low, max_size=rule.high).map(tuple))
        elif base is str and rule is None:
            strategies.append(st.text(min_size=1))
    return st.one_of(strategies) if strategies else st.nothing()


@st.composite
def any_config(draw, start):
    """A valid config: `start` with any of its fields changed."""
    values = parsing.to_dict(start)
    for path, options in LEAVES.items():
        section, _, name = path.rpartition(".")
        holder = values[section] if section else values
        if name in holder and name != "name" and path not in ("device", "tracking.uri"):
            holder[name] = draw(st.just(holder[name]) | _field(options))
    with contextlib.suppress(ConfigError):
        return parsing.parse(values)
    assume(False)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optimizer=adam", "schedule=step", "tracking=none"),
        ("optimizer=nesterov", "schedule=cosine", "data=mnist"),
    ],
    ids=" ".join,
)
def test_dumped_config_loads_equal(make_config, tmp_path, overrides):
    start = make_config(*overrides)
    path = tmp_path / "config.yaml"

    @settings(max_examples=25)
    @given(any_config(start))
    def check(config):
        path.write_text(parsing.dump(config), encoding="utf-8")
        assert parsing.load(path) == config
        assert parsing.dump(parsing.load(path)) == parsing.dump(config)

    check()


def test_dumped_config_is_plain_yaml_without_tags(make_config):
    text = parsing.dump(make_config("optimizer=adam"))
    assert "!" not in text
    assert yaml.safe_load(text) == parsing.to_dict(make_config("optimizer=adam"))


FRAGMENTS = st.sampled_from(
    ["lr: ", "model:\n  ", "- ", "{", "}", "[", "]", "&a ", "*a", "<<: ", ": ", "? ", "|\n", "1e999", "null",
     "0x", "1:2:3", "2024-01-01", "2024-13-99", "!!python/object:os.system ", "!!float x", "!!timestamp x",
     "!!bool x", "!!int _", "!!set {a}", "!!omap 3", "!!binary é", "\t", "\n", "\0", "---\n", "%YAML 9.9\n"]
)  # fmt: skip


@settings(max_examples=300)
@given(st.one_of(st.binary(), st.text().map(str.encode), st.lists(FRAGMENTS).map("".join).map(str.encode)))
def test_loading_a_file_with_any_content_raises_a_config_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "stored.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        parsing.load(path)
    assert len(str(caught.value).splitlines()) <= 2


def test_dumped_config_has_the_order_of_the_schema(make_config):
    names = [field.name for field in dataclasses.fields(Config)]
    assert list(yaml.safe_load(parsing.dump(make_config()))) == names


def test_damaged_config_raises_nothing_but_config_errors(make_config, tmp_path):
    whole = parsing.dump(make_config())
    path = tmp_path / "config.yaml"

    @settings(max_examples=200)
    @given(st.integers(0, len(whole)), st.integers(0, 40), FRAGMENTS | st.text(max_size=3))
    def check(start, length, inserted):
        path.write_text(whole[:start] + inserted + whole[start + length :], encoding="utf-8")
        with contextlib.suppress(ConfigError):
            assert isinstance(parsing.load(path), Config)

    check()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "expected keys and values, got NoneType"),
        ("- 1", "got list"),
        ("[" * 5000, "not a config in YAML"),
        ("lr: 1", "has no value for epochs"),
        ("lrr: 1", "Did you mean 'lr'?"),
        ("1: 2", "'1' is not a key"),
        ("a: 2024-13-99", "not a config in YAML"),
    ],
)
def test_file_that_is_not_a_config_is_refused_with_a_reason(tmp_path, content, expected):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(expected)):
        parsing.load(path)


@pytest.mark.parametrize("path", ["none_such.yaml", "."])
def test_file_that_cannot_be_read_is_named(tmp_path, path):
    with pytest.raises(ConfigError, match="cannot be read"):
        parsing.load(tmp_path / path)


def test_loading_a_stored_config_executes_nothing(make_config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"x: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n" + parsing.dump(make_config()))
    with pytest.raises(ConfigError):
        parsing.load(path)
    assert not Path(tmp_path, "made").exists()


def test_flattened_config_has_every_leaf_by_its_dotted_name(make_config):
    flat = dict(parsing.flatten(parsing.to_dict(make_config())))
    assert flat["lr"] == 0.9
    assert flat["model.channels"] == [6, 16]
    assert set(flat) == {path for path in LEAVES if path in flat} >= {"tracking.uri", "optimizer.momentum"}


def _replaced(config, path, value, remove=False):
    """`config` as nested dicts, with the value at `path` changed or removed."""
    values = parsing.to_dict(config)
    holder = values
    *sections, name = path.split(".")
    for section in sections:
        holder = holder[section]
    if remove:
        del holder[name]
    else:
        holder[name] = value
    return values


@pytest.mark.parametrize("text", ["x: &x {y: *x}\n", "a: &a [1, 2]\nb: [*a, *a, *a]\n"])
def test_stored_config_with_an_alias_is_refused_at_once(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="aliases are not allowed"):
        parsing.load(tmp_path / "config.yaml")

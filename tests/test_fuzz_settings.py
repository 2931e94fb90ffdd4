"""Settings drawn at random: each gives an experiment that could begin, or one line of UserError."""

import collections
import importlib
import math
import pathlib
import typing

import jax
import pytest
from etils import epath
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cjepa_jax import settings
from cjepa_jax.errors import UserError
from cjepa_jax.evaluate.config import Evaluation, resolve
from cjepa_jax.methods import METHODS, find_method
from cjepa_jax.train.setup import set_up
from tests.conftest import small

CONFIGS = sorted(path.stem for path in pathlib.Path("configs").glob("*.py") if not path.stem.startswith("study_"))
JUNK = (None, True, "x", "", 1, -1, 0.5, (), (1, "x"), {}, [[1]], b"x")
WORDS = ("", "train", "test", "train[:10%]", "train[:0]", "train[5:", "+", "%", "\0", "\udcff", "a\nb", "x" * 5000)
WORDS += ("/proc/x", "/dev/null", "64x3x4", "16x1x2", "8x1x2xnan", "8x1x2xinf", "0x0x0", "4x1x1x1e-9", "B", "knn")
NUMBERS = (0, 1, -1, 2, 3, 7, 8, 16, 0.0, 0.5, 1e-300, 1e-30, 1e300, math.inf, -math.inf, math.nan)
NUMBERS += (2**31, 2**32, 2**63, 10**400, -(10**400), 100_000, 255.0)


def explored(examples, *strategies):
    """Runs a function on so many draws, which are the same each time."""
    about = {"max_examples": examples, "derandomize": True, "deadline": None, "database": None}
    about |= {"suppress_health_check": list(HealthCheck), "phases": (Phase.generate, Phase.shrink)}
    return lambda check: hypothesis_settings(**about)(given(*strategies)(check))


def values(key):
    """Draws values of a setting: most of the right type, at the ends of its range, beside them or in between."""
    hint = key.hint
    if type(None) in typing.get_args(hint):
        hint = typing.get_args(hint)[0]
    pair = typing.get_origin(hint) is tuple and typing.get_args(hint)[-1] is not Ellipsis
    one = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
    if one is bool:
        element = st.booleans()
    elif key.within:
        low, high = map(float, key.within[1:-1].split(","))
        near = [low, high, math.nextafter(low, -math.inf), math.nextafter(high, math.inf), (low + high) / 2]
        near = [*near, *(round(x) for x in near)] if one is float else [round(x) for x in (*near, low - 1, high + 1)]
        draw = (lambda a, b: st.integers(math.ceil(a), int(b))) if one is int else st.floats
        few = draw(low, min(high, low + (20 if one is int else 1)))
        element = st.one_of(st.sampled_from(near), draw(low, high), few, st.sampled_from(NUMBERS))
    elif typing.get_origin(one) is typing.Literal:
        element = st.sampled_from((*typing.get_args(one), "", "X"))
    else:
        element = st.sampled_from(WORDS)
    if typing.get_origin(hint) is tuple:
        element = st.lists(element, min_size=2 if pair else 0, max_size=2 if pair else 4)
    return st.one_of(element, element, element, st.sampled_from(JUNK))


def changes(cls, *, most):
    """Draws some settings of a class and a value for each, as {"group.key": value}."""
    keys = {key.name: key for key in settings.keys(cls)}
    one = st.sampled_from(list(keys)).flatmap(lambda name: st.tuples(st.just(name), values(keys[name])))
    return st.lists(one, min_size=1, max_size=most).map(dict)


def changed(nested, flat):
    nested = {name: dict(value) if isinstance(value, dict) else value for name, value in nested.items()}
    for name, value in flat.items():
        group, _, key = name.rpartition(".")
        place = nested.setdefault(group, {}) if group else nested
        place[key] = value
    return nested


def outcome(build):
    """Says whether something was built or refused in one line; whatever else happens is an error."""
    try:
        build()
        return "valid"
    except UserError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 8000, str(error)
        return "refused"


def numbers(config):
    for value in settings.flatten(config).values():
        yield from (x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int | float))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "evaluate"])
@pytest.mark.parametrize("examples", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_settings_of_every_config(name, examples):
    """As far as the method, which has the sizes of its networks and masks."""
    nested = importlib.import_module(f"configs.{name}").get_config().to_dict()
    seen = collections.Counter()

    def build(flat):
        stated = changed(nested, flat)
        kind = find_method(stated)
        config = settings.parse(stated, kind.settings)
        assert all(math.isfinite(number) for number in numbers(config))
        if kind.needs_labels and not (config.model.size and config.model.patch_size):
            return  # they come from a checkpoint
        kind(config, classes=10)

    @explored(examples, changes(find_method(nested).settings, most=3))
    def check(flat):
        seen[outcome(lambda: build(flat))] += 1

    check()
    print(name, dict(seen))
    assert seen["refused"] > examples / 10 and seen["valid"] > examples / 20


@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_settings_of_evaluation(examples, make_config):
    saved, seen = settings.flatten(make_config()), collections.Counter()

    @explored(examples, changes(Evaluation, most=3), changes(type(make_config()), most=2))
    def check(flat, also):
        seen[outcome(lambda: resolve(settings.parse(changed({}, flat), Evaluation), saved | also))] += 1

    check()
    print(dict(seen))
    assert seen["refused"] > examples / 10 and seen["valid"] > examples / 20


@pytest.mark.parametrize("examples", [16, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_set_up_on_the_digits(method, examples, tmp_path):
    """With images, devices and a workdir, and all that precedes compiling."""
    nested = changed({}, settings.flatten(small()))
    if method == "supervised":
        nested = importlib.import_module("configs.finetune_digits").get_config().to_dict()
        nested["model"] |= {"encoder": "random", "size": "16x1x2", "patch_size": 2}
    cls, seen = METHODS[method].settings, collections.Counter()

    def begin(stated):
        with jax.numpy_dtype_promotion("standard"):  # as for the command: JAX' own attention promotes
            set_up(settings.parse(stated, find_method(stated).settings), epath.Path(tmp_path / "run"), None)

    @explored(examples, changes(cls, most=2))
    def check(flat):
        stated = changed(nested, flat)
        if stated.get("data", {}).get("source") in ("tfds", "clevr_count", "clevr_distance"):
            return  # TFDS would look for them
        seen[outcome(lambda: begin(stated))] += 1

    check()
    print(method, dict(seen))
    assert not (tmp_path / "run").exists() and seen["refused"] and seen["valid"]

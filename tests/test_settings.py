"""Settings: defaults, old keys, keys that a workdir does not know, and what is said of mistakes."""

import dataclasses
import math
from typing import Literal

import pytest

from cjepa_jax import settings
from cjepa_jax.errors import UserError
from cjepa_jax.evaluate.config import Evaluation
from cjepa_jax.methods import METHODS
from cjepa_jax.settings import group, required, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net:
    width: int = setting(8, "Width.", within="[0, 100)")
    kind: Literal["a", "b"] = setting("a", "Kind.", formerly="sort")
    sizes: tuple[int, ...] = setting((), "Sizes.", within="[1, 9]")
    share: tuple[float, float] = setting((0.2, 1.0), "Share of the area.", within="(0, 1]")
    fast: bool = setting(True, "Whether a new way is taken.", before=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    name: str = required("Name.")
    seed: int = setting(0, "Seed.", within="[0, 1e9]")
    net: Net = group(Net, "The network.", formerly="model")


def test_what_is_not_given_has_its_default():
    parsed = settings.parse({"name": "x", "net": {"width": 9}}, Tree)
    assert parsed == Tree(name="x", net=Net(width=9))
    assert settings.flatten(parsed) == {
        "name": "x",
        "seed": 0,
        "net.width": 9,
        "net.kind": "a",
        "net.sizes": [],
        "net.share": [0.2, 1.0],
        "net.fast": True,
    }


def test_old_names_of_settings_and_groups_are_understood():
    assert settings.parse({"name": "x", "model": {"sort": "b"}}, Tree).net.kind == "b"
    flat = {"name": "x", "model.sort": "b", "model.width": 3, "something.else": 1}
    assert settings.parse_flat(flat, Tree).net == Net(width=3, kind="b", fast=False)
    assert settings.parse_flat({"net.width": 4, "net.fast": True}, Net, "net.") == Net(width=4)


@pytest.mark.parametrize(
    "values, says",
    [
        ({}, "name is missing"),
        ({"name": "x", "sed": 1}, "unknown key sed: did you mean 'seed'?"),
        ({"name": "x", "net": {"widht": 1}}, "unknown key net.widht: did you mean 'width'?"),
        ({"name": "x", "net": 3}, "net must be a group of settings, got 3"),
        ({"name": "x", "net": {"width": 1.5}}, "net.width must be int, got 1.5"),
        ({"name": "x", "net": {"width": True}}, "net.width must be int, got True"),
        ({"name": "x", "net": {"kind": "c"}}, "net.kind must be one of a, b, got 'c'"),
        ({"name": "x", "net": {"sizes": 3}}, "net.sizes must be a tuple, got 3"),
        ({"name": "x", "net": {"sizes": ("a",)}}, "net.sizes must be int, got 'a'"),
        ({"name": "x", "net": {"sizes": ((1,),)}}, "net.sizes must hold int only, got ((1,),)"),
        ({"name": "x", "net": {"width": 100}}, "net.width must be in [0, 100), got 100: Width."),
        ({"name": "x", "net": {"width": -1}}, "net.width must be in [0, 100), got -1: Width."),
        ({"name": "x", "net": {"sizes": (1, 0)}}, "net.sizes must be in [1, 9], got 0: Sizes."),
        ({"name": "x", "net": {"share": (0, 1)}}, "net.share must be in (0, 1], got 0: Share of the area."),
        ({"name": "x", "net": {"share": (0.1, math.nan)}}, "net.share must be in (0, 1], got nan: Share of the area."),
        ({"name": "x", "net": {"share": (0.1, math.inf)}}, "net.share must be in (0, 1], got inf: Share of the area."),
        (
            {"name": "x", "net": {"share": (0.1, 10**400)}},
            f"net.share must be in (0, 1], got {10**400}: Share of the area.",
        ),
        ({"name": "x", "net": {"share": (0.5, 0.4)}}, "net.share must be an increasing pair, got (0.5, 0.4)"),
    ],
)
def test_mistakes_are_named(values, says):
    with pytest.raises(UserError) as error:
        settings.parse(values, Tree)
    assert str(error.value) == says


def test_a_workdir_goes_on_as_it_was_begun():
    """A default that came later gives way; what was asked for does not."""
    old = {"name": "x", "seed": 0, "model.width": 8, "model.sort": "a"}
    kept, notes, changed = settings.adopt(old, Tree(name="x"))
    assert kept == Tree(name="x", net=Net(fast=False)) and changed == []
    assert notes == ["net.fast = False, as when this workdir was begun (now the default is True)"]
    _, _, changed = settings.adopt(old, Tree(name="y", net=Net(width=9, sizes=(1,))))
    assert changed == ["name: x -> y", "net.sizes: [] -> [1]", "net.width: 8 -> 9"]


@pytest.mark.parametrize("hint", [int, float, int | None, tuple[int, ...], tuple[float, float]])
def test_a_setting_with_numbers_cannot_do_without_a_range(hint):
    forgotten = dataclasses.make_dataclass("Forgotten", [("key", hint, setting(None, "Key."))], frozen=True)
    with pytest.raises(TypeError, match=r"Forgotten\.key: a setting has a range"):
        settings.parse({}, forgotten)


@pytest.mark.parametrize("cls", [*(method.settings for method in METHODS.values()), Evaluation])
def test_every_range_is_finite_and_holds_the_default(cls):
    for key in settings.keys(cls):
        if key.within:
            low, high = map(float, key.within[1:-1].split(","))
            assert -math.inf < low < high < math.inf and key.within[0] in "[(" and key.within[-1] in "])", key
            defaults = key.default if isinstance(key.default, tuple) else (key.default,)
            assert all(d in (None, dataclasses.MISSING) or low <= d <= high for d in defaults), key


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_says_what_it_means(name):
    """A sentence each, for --help."""
    found = settings.keys(METHODS[name].settings)
    assert len({key.name for key in found}) == len(found) > 50
    for key in found:
        assert key.meaning[:1].isupper() or key.meaning[:4] in ("npz:", "tfds", "simp", "k of"), key
        assert key.meaning.endswith("."), key


def test_help_lists_all_settings():
    text = settings.describe(Tree, settings.flatten(Tree(name="x")))
    assert "net: The network." in text and "net.width = 8" in text and "One of a, b." in text and "seed = 0" in text
    assert "Width. In [0, 100)." in text

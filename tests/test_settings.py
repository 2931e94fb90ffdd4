"""Settings: defaults, old keys, keys that a workdir does not know, and what is said of mistakes."""

import dataclasses
from typing import Literal

import pytest

from cjepa_jax import settings
from cjepa_jax.errors import UserError
from cjepa_jax.methods import METHODS
from cjepa_jax.settings import group, required, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net:
    width: int = setting(8, "Width.")
    kind: Literal["a", "b"] = setting("a", "Kind.", formerly="sort")
    sizes: tuple[int, ...] = setting((), "Sizes.")
    fast: bool = setting(True, "Whether a new way is taken.", before=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    name: str = required("Name.")
    seed: int = setting(0, "Seed.")
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

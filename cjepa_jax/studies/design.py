"""What a study is: its arms, the runs that they ask for, and the checks of both.

A config of a study gives

    base        settings of an experiment, or the name of a config that comes with the package
    arms        name -> {"settings": nested settings over the base, "tune": {"group.key": values to try},
                "base": another base}; all of them may be left out
    seeds       of the runs that the tables are about
    splits      {"train", "held_out", "test"}: split expressions, as data.train_split has them
    baseline    the arm that the others are compared with; default: the first
    tune        for arms that have no "tune" of their own; without any, nothing is tuned
    choose_by   the evaluator whose accuracy on the held-out images chooses; default: logistic
    probes      evaluations of a run on the held-out images, its end included; default: 10
    evaluators  what judges the finished runs on the test split; default: knn, logistic and collapse

All runs of a study are judged on the images of its splits, in the same way.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

from etils import epath

from cjepa_jax import settings
from cjepa_jax.command import load_config
from cjepa_jax.config import EVALUATED_ON, Config, Data
from cjepa_jax.data import sources
from cjepa_jax.errors import UserError, nearest, require
from cjepa_jax.evaluate.config import Evaluation
from cjepa_jax.files import read_json
from cjepa_jax.methods import METHODS, find_method
from cjepa_jax.train.setup import count_steps

_KEYS = {"base", "arms", "seeds", "splits", "baseline", "tune", "choose_by", "probes", "evaluators"}
_SPLITS = ("train", "held_out", "test")
_CHOOSING = ("knn", "logistic", "linear")  # evaluators that give one accuracy
_OF_THEIR_OWN = ("davis", "segmentation")  # evaluators with images of their own, which a study does not name
# As in one workdir, but for how runs are judged.
_FREE = tuple(name for name in settings.FREE_TO_CHANGE if name != "eval.")


class Run(NamedTuple):
    """One ordinary training of a study."""

    folder: epath.Path
    config: Config
    steps: int


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of training, and the settings to choose from."""

    name: str
    values: dict[str, Any]  # nested settings
    trials: list[dict[str, Any]]  # flat settings of each trial; [] where nothing is tuned
    steps: int
    batch_size: int
    images: int  # in the training split
    fingerprints: tuple[str, ...]  # of the three splits' images

    @property
    def images_seen(self) -> int:
        """Returns how many images a run sees, those that come again counted again."""
        return self.steps * self.batch_size


@dataclasses.dataclass(frozen=True)
class Study:
    """A study whose settings have been checked."""

    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    splits: dict[str, str]
    baseline: str
    choose_by: str
    probes: int
    evaluators: tuple[str, ...]
    workdir: epath.Path

    @property
    def trials(self) -> int:
        """Returns the number of trials of each arm, which is the same for all."""
        return len(next(iter(self.arms.values())).trials)

    def trial(self, arm: Arm, number: int) -> Run:
        """Describes one trial of an arm. Its seed is none of `seeds`, so that no run of the tables was chosen."""
        return self._run(arm, arm.trials[number], max(self.seeds) + 1, f"trial{number}")

    def final(self, arm: Arm, chosen: Mapping[str, Any], seed: int) -> Run:
        """Describes the run of an arm with one of the seeds and the settings that its trials have chosen."""
        return self._run(arm, chosen, seed, f"seed{seed}")

    def _run(self, arm: Arm, changes: Mapping[str, Any], seed: int, name: str) -> Run:
        config = _parse(with_flat(arm.values, {**changes, "seed": seed}), arm.name)
        return Run(self.workdir / "runs" / arm.name.replace(" ", "_") / name, config, arm.steps)

    def describe(self) -> dict[str, Any]:
        """Says what makes this study the one that it is, as JSON: two of the same description may share a workdir."""
        arms = {
            arm.name: {
                "settings": settings.flatten(_parse(arm.values, arm.name)),
                "trials": arm.trials,
                "images": arm.fingerprints,
            }
            for arm in self.arms.values()
        }
        rest = {name: getattr(self, name) for name in ("seeds", "splits", "baseline", "choose_by", "evaluators")}
        described: dict[str, Any] = json.loads(json.dumps({"arms": arms, **rest, "probes": self.probes}))
        return described

    def adopted(self) -> "Study":
        """Gives the study as its workdir has it: a setting that is newer than the workdir stays as the code was then.

        Raises UserError where the workdir holds another study.
        """
        require("\0" not in str(self.workdir), "--workdir holds a character that no path may hold")
        path = self.workdir / "study.json"
        if not path.exists():
            require(not (self.workdir / "config.json").exists(), f"--workdir {self.workdir} holds a run, and no study")
            return self
        old, new = read_json(path), self.describe()
        changed = [
            f"{name}: {old.get(name)} -> {new[name]}" for name in new if name != "arms" and old.get(name) != new[name]
        ]
        arms = old.get("arms", {})
        changed += [f"arm {name!r} is new" for name in new["arms"] if name not in arms]
        changed += [f"arm {name!r} is gone" for name in arms if name not in new["arms"]]
        found = dict(self.arms)
        for name in [name for name in new["arms"] if name in arms]:
            was, now = arms[name], new["arms"][name]
            if was["trials"] != now["trials"]:
                changed.append(f"arm {name!r} tries {now['trials']} instead of {was['trials']}")
            if was.get("images", now["images"]) != now["images"]:  # which older files do not have
                changed.append(f"arm {name!r} has other images")
            kept, notes, differences = settings.adopt(was["settings"], _parse(found[name].values, name), free=_FREE)
            changed += [f"arm {name!r}, {difference}" for difference in differences]
            older = {key: value for key, value in settings.flatten(kept).items() if value != now["settings"][key]}
            found[name] = dataclasses.replace(found[name], values=with_flat(found[name].values, older))
            for note in notes:
                print(f"arm {name!r}: {note}", file=sys.stderr, flush=True)
        require(
            not changed,
            f"--workdir {self.workdir} holds another study ({'; '.join(changed)[:1000]}); use another workdir",
        )
        return dataclasses.replace(self, arms=found)


def read(values: Mapping[str, Any], workdir: epath.Path) -> Study:
    """Makes a study of what its config gives. Raises UserError; nothing is compiled or written."""
    for key in values:
        require(key in _KEYS, f"a study has no {key!r}; {nearest(str(key), _KEYS)}")
    for key in ("base", "arms", "seeds", "splits"):
        require(key in values, f"the study lacks {key!r}")
    require(isinstance(values["seeds"], tuple | list), f"seeds must be a list of numbers, got {values['seeds']!r}")
    require(isinstance(values["splits"], Mapping), f"splits must be a mapping, got {values['splits']!r}")
    seeds, splits = tuple(values["seeds"]), dict(values["splits"])
    require(len(seeds) >= 1, "seeds: a study needs at least one seed, and at least three to support a claim")
    require(all(type(seed) is int and seed >= 0 for seed in seeds), f"seeds must be whole numbers, got {seeds}")
    require(len(set(seeds)) == len(seeds), f"seeds: one is there twice: {seeds}")
    require(set(splits) == set(_SPLITS), f"splits must be train, held_out and test, got {', '.join(splits)}")
    require(bool(values["arms"]) and isinstance(values["arms"], Mapping), "arms: a study needs at least one arm")
    for name in values["arms"]:
        require(isinstance(name, str), f"arms: the name of an arm must be text, got {name!r}")
    given = {name: dict(arm or {}) for name, arm in values["arms"].items()}
    baseline = values.get("baseline", next(iter(given)))
    require(
        isinstance(baseline, str) and baseline in given,
        f"baseline = {baseline!r} is not an arm; {nearest(str(baseline), given)}",
    )
    probes = values.get("probes", 10)
    require(type(probes) is int and probes >= 1, f"probes must be a whole number from 1, got {probes!r}")
    known = Evaluation().evaluators
    evaluators = tuple(values.get("evaluators", ("knn", "logistic", "collapse")))
    for name in evaluators:
        require(name in known, f"evaluators: {name!r} is not known; {nearest(name, known)}")
        require(name not in _OF_THEIR_OWN, f"evaluators: {name!r} has images of its own, which a study cannot name")
    choose_by = values.get("choose_by", "logistic")
    arms, lengths = {}, {}
    for name, arm in given.items():
        fits = re.fullmatch(r"[\w(][\w .,+=()-]*", name)
        require(bool(fits), f"arm {name!r}: its name is also a folder's: letters, digits, spaces and . , + - = ( )")
        for key in arm:
            require(key in ("base", "settings", "tune"), f"arm {name!r} has no {key!r}; known: base, settings, tune")
        arms[name] = _arm(name, arm, values, splits, probes, choose_by)
        lengths[name] = len(arms[name].trials)
    require(len({name.replace(" ", "_") for name in arms}) == len(arms), "arms: two names differ only in spaces and _")
    first = next(iter(lengths))
    for name, length in lengths.items():
        require(
            length == lengths[first],
            f"arm {name!r} has {length} trials and arm {first!r} {lengths[first]}: give each the same number",
        )
    heads = [arm.name for arm in arms.values() if METHODS[_parse(arm.values, arm.name).method].needs_labels]
    require(
        "accuracy" not in evaluators or len(heads) == len(arms),
        "evaluators: accuracy judges a network's own head, which only fine-tuning trains",
    )
    return Study(arms, seeds, splits, baseline, choose_by, probes, evaluators, workdir).adopted()


def _arm(
    name: str, arm: Mapping[str, Any], study: Mapping[str, Any], splits: Mapping[str, str], probes: int, choose_by: str
) -> Arm:
    base = arm.get("base", study["base"])
    base = load_config(base) if isinstance(base, str) else base
    require(isinstance(base, Mapping), f"arm {name!r}: base must be settings or the name of a config, got {base!r}")
    changes = arm.get("settings", {})
    require(isinstance(changes, Mapping), f"arm {name!r}: settings must be nested settings, got {changes!r}")
    values = settings.merged(base, changes)
    values = settings.merged(values, {"data": {"train_split": splits["train"], "test_split": splits["held_out"]}})
    tune = dict(arm.get("tune", study.get("tune", {})))
    with _naming(f"arm {name!r}"):
        known = {key.name for key in settings.keys(cast(Any, find_method(values).settings))}
    for key, tried in tune.items():
        fixed = key in ("seed", "optim.epochs") or key.startswith(("data.", "eval.", "log.", "checkpoint."))
        fits = key in known and not fixed
        require(fits, f"arm {name!r} cannot tune {key!r}; {nearest(key, known)}")
        require(
            isinstance(tried, tuple | list) and bool(tried), f"arm {name!r} tunes {key!r} over no values: {tried!r}"
        )
    trials = [dict(zip(tune, choice, strict=True)) for choice in itertools.product(*tune.values())] if tune else []
    config = _parse(values, name)
    with _naming(f"arm {name!r}"):
        look = {split: _look_at(config.data, splits, split) for split in _SPLITS}
        images, classes, labels, _ = look["train"]
        for split, which in (("held_out", "held-out"), ("test", "test")):
            found = look[split][2]
            require(len(labels) > 1 and bool(found), "a study needs images with labels of at least two classes")
            require(
                labels <= found,
                f"splits: of {classes} classes the {which} images, {splits[split]!r}, lack {len(labels - found)}; "
                "a study needs images of all of them",
            )
            require(
                found <= labels,
                f"splits: the training images, {splits['train']!r}, lack {len(found - labels)} classes that the "
                f"{which} images, {splits[split]!r}, have",
            )
        own = [key for key in EVALUATED_ON if getattr(config.eval, key) is not None]
        require(not own, f"eval.{' and eval.'.join(own)}: a study judges on its own splits; leave this out")
        require(
            config.log.collapse != "stop",
            "log.collapse = 'stop' would end the runs that collapse, and a study judges all of them; use 'warn'",
        )
        steps = count_steps(config, images=images)
        require(steps >= probes, f"probes = {probes} are more than its {steps} steps")
        require(
            choose_by in config.eval.evaluators,
            f"choose_by = {choose_by!r} is none of eval.evaluators; {nearest(choose_by, config.eval.evaluators)}",
        )
        require(
            not tune or choose_by in _CHOOSING,
            f"choose_by = {choose_by!r} gives no single accuracy; use one of {', '.join(_CHOOSING)}",
        )
    # Rounded up, so that the last probe but one is not just before the end.
    values = settings.merged(values, {"eval": {"every": -(-steps // probes)}})
    for trial in trials or [{}]:
        config = _parse(with_flat(values, trial), name)
        with _naming(f"arm {name!r}"):
            METHODS[config.method](config, classes=classes)
    fingerprints = tuple(seen[3] for seen in look.values())
    return Arm(name, values, trials, steps, config.data.batch_size, images, fingerprints)


def _look_at(data: Data, splits: Mapping[str, str], split: str) -> tuple[int, int, frozenset[int], str]:
    with _naming(f"splits.{split}"):
        return look_at(data, splits[split])


@functools.lru_cache
def look_at(data: Data, split: str) -> tuple[int, int, frozenset[int], str]:
    """Counts images and classes of a split, lists the labels that there are, and gives the images' fingerprint."""
    source = sources.load(data, split)
    labels = source.labels() if source.classes else []
    there = frozenset(label for label in labels if label is not None)
    return len(source), len(source.classes), there, source.fingerprint


def with_flat(values: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Puts settings by their full names, "group.key", over nested ones."""
    both = dict(values)
    for name, value in flat.items():
        place, _, key = name.rpartition(".")
        both = settings.merged(both, {place: {key: value}} if place else {key: value})
    return both


def _parse(values: Mapping[str, Any], arm: str) -> Config:
    with _naming(f"arm {arm!r}"):
        parsed: Config = settings.parse(values, find_method(values).settings)
        return parsed


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Says in an error what it is about, such as an arm."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from None

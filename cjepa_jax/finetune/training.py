"""Fine-tuning: its data, network, state and evaluation; the loop is in cjepa_jax/loop.py."""

import dataclasses
import functools
import hashlib
import json
import sys
from typing import Any

import grain
import jax
import numpy as np
from etils import epath

from cjepa_jax import checkpoint, config, loop, plots, pretrained, sharding, step
from cjepa_jax.config import require
from cjepa_jax.data import pipeline, sources
from cjepa_jax.data.randaugment import RandAugment
from cjepa_jax.finetune import tuning
from cjepa_jax.finetune.config import Finetune
from cjepa_jax.parsing import flatten

_EVALUATION = "evaluation.json"


def finetune(settings: Finetune, checkpoint_path: epath.Path, workdir: epath.Path) -> tuning.TunedState:
    """Trains to the end, or from where the workdir stands, or until SIGTERM or Ctrl-C; returns the last state.

    Raises UserError for settings that do not fit the data, the devices, the
    checkpoint or the workdir, before anything is compiled or written; DivergedError as
    `loop.run` does.
    """
    state: tuning.TunedState = loop.run(Finetuning(settings, checkpoint_path, workdir), workdir)
    if jax.process_index() == 0 and (workdir / _EVALUATION).exists():
        print(format_table(json.loads((workdir / _EVALUATION).read_text())))
    return state


class Finetuning:
    """Fine-tuning of a checkpoint's encoder, as `loop.Training`."""

    panels = plots.FINETUNING

    def __init__(self, settings: Finetune, path: epath.Path, workdir: epath.Path):
        """Checks everything."""
        data = settings.data
        source, test = (sources.load(data, split) for split in (data.train_split, data.test_split))
        _check_labels(data, source, test)
        tower = settings.model.tower
        loaded = pretrained.load(path, () if tower == "random" else (tower,))
        for key in ("mean", "std"):
            given, wanted = getattr(data, key), getattr(loaded, key)
            require(given == wanted, f"data.{key} = {given}, but --checkpoint {path} was trained with {wanted}")
        computed = {key: getattr(settings.model, key) for key in ("dtype", "layers", "remat")}
        model = dataclasses.replace(loaded.model, **computed)

        self.seed, self.log, self.checkpoint = settings.seed, settings.log, settings.checkpoint
        self.steps = loop.count_steps(settings.optim, images=len(source), batch_size=data.batch_size)
        self._settings, self._workdir, self._model = settings, workdir, model
        method = tuning.Tuning(settings, model, len(source.classes), self.steps)
        init = {"path": str(path), "step": loaded.step, "digest": _digest(loaded.params)}
        flat = flatten(settings) | {f"model.{key}": value for key, value in vars(model).items()}
        flat |= {"classes": list(source.classes)} | {f"init.{key}": value for key, value in init.items()}
        self.meta: dict[str, Any] = {"config": flat, "fingerprint": source.fingerprint}
        checkpoint.check_workdir(workdir, self.meta)
        self.reader = pipeline.Reader(source, data)
        self._test = pipeline.Reader(test, data)
        self.program = step.build(
            method,
            sharding.make_mesh(settings.mesh),
            init=tuning.init_state,
            take_step=tuning.train_step,
            labelled=True,
        )
        self._encoder = loaded.params.get(tower)
        if self._encoder is not None:
            wanted = self.program.state.params["encoder"]
            pretrained.check(self._encoder, wanted, f"--checkpoint {path}: its {tower}")
        loop.set_precision(model.dtype)
        self.probe_every = settings.eval.every
        self._score = jax.jit(
            functools.partial(tuning.score, method=self.program.method, gather=self.program.gather),
            out_shardings=self.program.whole,
        )

    def fresh(self, rng: jax.Array) -> tuning.TunedState:
        """With the checkpoint's encoder."""
        state = self.program.init(rng)
        encoder, self._encoder = self._encoder, None
        if encoder is not None:
            average = jax.tree.map(np.copy, encoder)  # the step gives both away: they must not share memory
            state = state.replace(
                params=state.params | {"encoder": encoder}, ema_params=state.ema_params | {"encoder": average}
            )
            state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, self.program.state))
        return state

    def batches(self, start: int, rows: list[int]) -> grain.DatasetIterator:
        """Images and labels."""
        augment, data = self._settings.augment, self._settings.data
        mean = tuple(round(255 * x) for x in data.mean)
        distort = RandAugment(
            operations=augment.randaugment,
            probability=augment.probability,
            magnitude=augment.magnitude,
            magnitude_std=augment.magnitude_std,
            fill=mean if data.channels > 1 else mean[0],
        )
        return pipeline.train_batches(
            self.reader,
            seed=self.seed,
            start=start,
            rows=rows,
            labelled=True,
            distort=distort if augment.randaugment else None,
        )

    def begin(self, state: tuning.TunedState, start: int) -> None:
        """Says what is trained on what."""
        network = f"{self._model.size}/{self._model.patch_size} ({self._settings.model.tower})"
        said = loop.headline(self, state, start, network=network, classes=len(self.reader.source.classes))
        print(said, file=sys.stderr, flush=True)

    def observe(self, seen: tuple[()]) -> dict[str, jax.Array]:
        """Nothing."""
        return {}

    def probe(self, state: tuning.TunedState) -> dict[str, float]:
        """Accuracies."""
        return _as_metrics(self._evaluate(state)[0])

    def report(self, state: tuning.TunedState, rng: jax.Array) -> dict[str, float]:
        """The same, and evaluation.json."""
        results, images = self._evaluate(state)
        if jax.process_index() == 0:
            report = {
                "results": results,
                "images": images,
                "step": int(state.step),
                "config": self.meta["config"],
                "fingerprints": {"train": self.meta["fingerprint"], "test": self._test.source.fingerprint},
                "jax": jax.__version__,
                "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            }
            checkpoint.write_whole(self._workdir / _EVALUATION, json.dumps(report, indent=1) + "\n")
        return _as_metrics(results)

    def _evaluate(self, state: tuning.TunedState) -> tuple[dict[str, dict[str, float]], int]:
        """Top 1, top 5 and loss of the parameters and, where there is one, of their average; and on how many images."""
        networks = {"parameters": state.params}
        if self._settings.ema != config.Ema(0.0, 0.0):
            networks["average"] = state.ema_params
        shapes = self.program.inputs
        sums: dict[str, Any] = {name: {} for name in networks}
        for batch in pipeline.labelled_batches(
            self._test,
            range(len(self._test.source)),
            size=self._settings.data.batch_size,
            view=pipeline.central_view(self._test, crop_fraction=self._settings.eval.crop_fraction),
            rows=sharding.local_rows(shapes[0]),
        ):
            inputs = jax.tree.map(sharding.from_local_rows, batch, shapes)
            for name, params in networks.items():
                found = jax.device_get(self._score(params, inputs))
                sums[name] = {key: sums[name].get(key, 0) + value.item() for key, value in found.items()}
        images = sums["parameters"]["images"]
        require(images > 0, f"data.test_split = {self._settings.data.test_split!r}: none of its images can be read")
        return {
            name: {key: found[key] / images for key in ("top1", "top5", "loss")} for name, found in sums.items()
        }, images


def _check_labels(data: config.Data, train: sources.Source, test: sources.Source) -> None:
    """Raises UserError where accuracy on `test` would mean nothing for a classifier that `train` has taught."""
    for key, source in (("train_split", train), ("test_split", test)):
        require(bool(source.classes), f"data.{key} = {getattr(data, key)!r} has no labels; fine-tuning needs them")
    name = f"data.test_split = {data.test_split!r}"
    other = [c for c in test.classes if c not in train.classes]
    require(not other, f"{name} has classes that data.train_split lacks: {_some(other)}")
    labels = test.labels()
    unlabelled = [test.name(index) for index, label in enumerate(labels) if label is None]
    require(not unlabelled, f"{name} holds {len(unlabelled)} images without a label: {_some(unlabelled)}")
    present = {test.classes[label] for label in set(labels) if label is not None}
    missing = [c for c in train.classes if c not in present]
    require(not missing, f"{name} has no image of {len(missing)} of the {len(train.classes)} classes: {_some(missing)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _digest(params: Any) -> str:
    """Tells these parameters from any others."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()[:16]


def _as_metrics(results: dict[str, dict[str, float]]) -> dict[str, float]:
    prefix = {"parameters": "eval/", "average": "eval/ema_"}
    return {prefix[name] + key: row[key] for name, row in results.items() for key in ("top1", "top5")}


def format_table(report: dict[str, Any]) -> str:
    """evaluation.json for the screen."""
    lines = [f"\naccuracy on {report['images']} held-out images, %   top 1   top 5     loss"]
    for name, row in report["results"].items():
        lines.append(f"{name:>38}{100 * row['top1']:10.2f}{100 * row['top5']:8.2f}{row['loss']:9.4f}")
    return "\n".join(lines)

"""Writes the model card: what the checkpoint is, and the numbers that its own run measured."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from etils import epath

from cjepa_jax.config import Eval
from cjepa_jax.errors import UserError
from cjepa_jax.evaluate.base import ERROR, written
from cjepa_jax.files import read_json
from cjepa_jax.methods import METHODS, find_method
from cjepa_jax.models.vit import parse_size
from cjepa_jax.pretrained import Pretrained
from cjepa_jax.settings import parse_flat
from cjepa_jax.train import writer

_SETTINGS = (
    *("data.source", "data.name", "data.train_split", "data.batch_size", "optim.epochs", "optim.learning_rate"),
    *("predictor.width", "predictor.depth", "mask.recipe", "vicreg.weight", "sigreg.weight", "ema.start", "ema.end"),
    *("seed",),
)


Table = Mapping[str, Mapping[str, str]]  # encoder or baseline -> measure -> number, and its standard error


class Measured(NamedTuple):
    """Holds what a file says about the quality of the checkpoint."""

    where: str  # on which images
    tables: Mapping[str, Table]  # by evaluator


class TrainedRun(NamedTuple):
    """Holds what a workdir says about the checkpoint that is converted; fields are empty where it says nothing."""

    source: str  # the name of its folder or file
    encoder: str  # the name of the encoder that is converted
    config: Mapping[str, Any] = MappingProxyType({})
    metrics: Mapping[str, float] = MappingProxyType({})  # the last ones logged up to the checkpoint
    evaluation: Sequence[Measured] = ()  # by the run itself and, afterwards, by the command

    @property
    def crop_fraction(self) -> float:
        """Returns the side of the central crop that is evaluated, over that of the largest one of its shape."""
        return parse_flat({"eval.crop_fraction": self.config.get("eval.crop_fraction")}, Eval, "eval.").crop_fraction


def read_run(workdir: epath.Path, *, step: int, encoder: str) -> TrainedRun:
    """Reads what a workdir says about its checkpoint at `step`. Raises UserError for a damaged file."""
    lines = writer.read(workdir)
    last: dict[str, float] = {}
    for line in lines:  # a step may have two lines, one of training and one of evaluation
        if line["step"] <= step:
            last = (last if line["step"] == last.get("step") else {}) | line
    config = read_json(workdir / "config.json")
    # evaluation.json is written at the end of a run, about the target encoder where the method has one.
    method = _method(config)
    has_target = "target_encoder" in method.averaged if method else encoder == "target_encoder"
    at_the_end = (encoder == "target_encoder") == has_target and (not lines or lines[-1]["step"] <= step)
    measured = []
    for path in (workdir / "evaluation.json", *sorted((workdir / "evaluation").glob("*.json"))):
        evaluation = read_json(path) if path.exists() else {}
        of = evaluation.get("encoder", evaluation.get("tower"))  # where the command has written it; its former name
        at = evaluation.get("step", step)  # older runs do not say it
        its_own = (at_the_end if of is None else of == encoder.removeprefix("ema_")) and at == step
        try:
            tables = _tables(evaluation) if its_own else {}
            if tables:
                measured.append(Measured(_where(evaluation, config), tables))
        except (AttributeError, TypeError, KeyError, RecursionError):
            raise UserError(f"{path} is damaged: it holds no tables of numbers") from None
    return TrainedRun(workdir.name, encoder, config, last, measured)


def _where(evaluation: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Says on which images an evaluation was made."""
    images, data = (found if isinstance(found := evaluation.get(key), dict) else {} for key in ("images", "data"))
    splits = [
        f"{images[split]['images']} {what} (`{data[f'{split}_split']}`)"
        for split, what in (("train", "training images"), ("test", "test images"))
        if split in images and f"{split}_split" in data
    ]
    return " and ".join(splits) or f"the run's own test split (`{config.get('data.test_split')}`)"


def _tables(evaluation: Mapping[str, Any]) -> dict[str, Table]:
    """Returns the numbers of evaluation.json by evaluator, encoder and measure; draws become their mean.

    Runs from before there were evaluators have one table, which gets the name "". It lies in "results" where the run
    was fine-tuning, and else is the whole file.
    """
    results = evaluation.get("results", evaluation)
    if any(isinstance(value, int | float) for row in results.values() for value in row.values()):  # not by evaluator
        results = {"": results}
    tables: dict[str, Table] = {}
    for evaluator, rows in results.items():
        table = {name: {_plain(key): x for key in row if (x := _number(row, key))} for name, row in rows.items()}
        if any(table.values()):
            tables[evaluator] = table
    return tables


def _number(row: Mapping[str, Any], key: str) -> str:
    """Writes a measure's number, or its mean over draws, with its standard error; "" for anything else."""
    value = row[key]
    drawn = value if isinstance(value, dict) else {"mean": value, ERROR: row.get(ERROR, {}).get(key)}
    number, error = drawn.get("mean"), drawn.get(ERROR)
    if not isinstance(number, int | float):
        return ""
    return written(number) + (f" ± {error:.2g}" if error is not None else "")


def _plain(measure: str) -> str:
    """Returns the name of a measure without the sign % that it once had, because the numbers are fractions."""
    return measure.replace("%", "percent")


def _method(config: Mapping[str, Any]) -> Any:
    """Finds the method of a run; None for one that a program has added."""
    try:
        return find_method(config)
    except UserError:
        return None


def _training(config: Mapping[str, Any]) -> str:
    """Says how a run with these settings was trained."""
    method = _method(config)
    if method is None:
        return f"Trained with the method {config.get('method')} of a program"
    if method.needs_labels:
        return f"{'Trained from scratch' if config.get('model.encoder') == 'random' else 'Fine-tuned'} with labels"
    name = method.__name__
    if method is METHODS["cjepa"]:
        name = "C-JEPA" if config.get("vicreg.weight") else "I-JEPA"
        name += " and SIGReg" if config.get("sigreg.weight") else ""
    return f"Pre-trained with {name}, self-supervised"


def readme(networks: Pretrained, run: TrainedRun) -> str:
    """Returns the card in Markdown."""
    size, patch = networks.model.size, networks.model.patch_size
    head = "head" in networks.params
    millions = sum(x.size for x in jax.tree.leaves(networks.params)) / 1e6
    (rows, columns), width = networks.grid, parse_size(size).width
    pixels, note = " x ".join(map(str, networks.image_shape)), ""
    if not networks.is_square:
        pixels += " (height x width)"
        note = """
The image processor resizes the short side and crops the centre: crop an image of another aspect ratio before.
"""
    name = size if "x" in size else f"ViT-{size}"
    what = f"a classifier of {len(networks.params['head']['bias'])} classes" if head else "an encoder"
    text = f"""---
library_name: transformers
pipeline_tag: {"image-classification" if head else "image-feature-extraction"}
tags:
- ijepa
- self-supervised
---

# {name}/{patch} of {run.source}

A Vision Transformer without class token, {what} of {millions:.2f} M parameters for images of {pixels}
pixels, written by cjepa_jax from the {run.encoder.replace("_", " ")}{_when(networks)}.
The last hidden state holds {rows * columns} patch features of {width} numbers, after the final LayerNorm; the
feature of an image is their mean. Normalisation: mean {_numbers(networks.mean)}, standard deviation
{_numbers(networks.std)}.
{note}"""
    settings = [(key, run.config[key]) for key in _SETTINGS if run.config.get(key, "") != ""]
    trained = "optim.epochs" in run.config
    text += "\n## Training\n\n"
    if trained:
        text += f"{_training(run.config)}. Settings:\n\n| | |\n|---|---|\n"
        text += "".join(f"| `{key}` | {value} |\n" for key, value in settings)
    else:
        text += "The checkpoint does not say how it was trained.\n"
    if run.metrics:
        left_out = ("step", "time", "seconds_left")  # say nothing about a checkpoint
        text += f"\nMetrics at step {run.metrics['step']}:\n\n| | |\n|---|---|\n"
        text += "".join(f"| `{key}` | {value:.4g} |\n" for key, value in run.metrics.items() if key not in left_out)
    text += "\n## Evaluation\n\n"
    if run.evaluation:
        text += "Accuracies are fractions of 1; ± is one standard error.\n"
        for where, tables in run.evaluation:
            text += f"\nOn {where}:\n"
            for evaluator, table in tables.items():
                keys = list(dict.fromkeys(key for row in table.values() for key in row))
                text += f"\n| {evaluator} | {' | '.join(keys)} |\n|---{'|---' * len(keys)}|\n"
                for name, row in table.items():
                    text += f"| {name} | {' | '.join(row.get(key, '') for key in keys)} |\n"
    else:
        text += "Not measured.\n"
    model = "IJepaForImageClassification" if head else "IJepaModel"
    return f"""{text}
## Use

```python
from transformers import AutoImageProcessor, {model}

processor = AutoImageProcessor.from_pretrained(FOLDER)
model = {model}.from_pretrained(FOLDER)
```
"""


def _when(networks: Pretrained) -> str:
    if networks.step:
        return f" at step {networks.step}"
    return f" at epoch {networks.epoch}" if networks.epoch else ""


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)

"""The model card: what the checkpoint is, and the numbers that its run measured, none others."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from etils import epath

from cjepa_jax import metrics
from cjepa_jax.config import UserError, one_line
from cjepa_jax.models.vit import parse_size
from cjepa_jax.pretrained import Pretrained

_SETTINGS = (
    *("data.source", "data.name", "data.train_split", "data.batch_size", "optim.epochs", "optim.learning_rate"),
    *("predictor.width", "predictor.depth", "mask.recipe", "vicreg.weight", "ema.start", "ema.end", "seed"),
)


class Run(NamedTuple):
    """What a workdir says about the checkpoint that is converted; empty where it says nothing."""

    source: str  # the name of its folder or file
    tower: str
    config: Mapping[str, Any] = MappingProxyType({})
    metrics: Mapping[str, float] = MappingProxyType({})  # the last ones up to the checkpoint
    evaluation: Mapping[str, Mapping[str, float]] = MappingProxyType({})  # the table of evaluation.json

    @property
    def crop_fraction(self) -> float:
        """Side of the central crop that is evaluated, over the short side of the image."""
        return float(self.config.get("eval.crop_fraction", 0.875))


def read_run(workdir: epath.Path, *, step: int, tower: str) -> Run:
    """Of the checkpoint at `step` of a workdir. Raises UserError for a damaged file."""
    lines = metrics.read(workdir)
    last: dict[str, float] = {}
    for line in lines:  # a step may have two, of training and of probes
        if line["step"] <= step:
            last = (last if line["step"] == last.get("step") else {}) | line
    path = workdir / "evaluation.json"
    try:
        config = json.loads((workdir / "config.json").read_text())
        # It is written at the end of a run: about the target encoder, or by fine-tuning about both of its networks.
        its_own = (tower == "target_encoder") == _pretrained(config) and (not lines or lines[-1]["step"] <= step)
        evaluation = json.loads(path.read_text()) if path.exists() and its_own else {}
    except ValueError as error:
        raise UserError(f"a JSON file in {workdir} is damaged ({one_line(error)})") from None
    tables = {name: row for name, row in evaluation.get("results", evaluation).items() if isinstance(row, dict)}
    return Run(workdir.name, tower, config, last, tables)


def _pretrained(config: Mapping[str, Any]) -> bool:
    return "vicreg.weight" in config


def readme(networks: Pretrained, run: Run) -> str:
    """The card, in Markdown."""
    size, patch = networks.model.size, networks.model.patch_size
    head = "head" in networks.params
    millions = sum(x.size for x in jax.tree.leaves(networks.params)) / 1e6
    pixels, width = networks.image_size, parse_size(size).width
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

A Vision Transformer without class token, {what} of {millions:.2f} M parameters for images of {pixels} x {pixels}
pixels, written by cjepa_jax from the {run.tower.replace("_", " ")}{_when(networks)}.
The last hidden state holds {(pixels // patch) ** 2} patch features of {width} numbers, after the final LayerNorm; the
feature of an image is their mean. Normalisation: mean {_numbers(networks.mean)}, standard deviation
{_numbers(networks.std)}.
"""
    settings = [(key, run.config[key]) for key in _SETTINGS if run.config.get(key, "") != ""]
    trained = "optim.epochs" in run.config
    text += "\n## Training\n\n"
    if trained:
        method = "C-JEPA" if run.config.get("vicreg.weight") else "I-JEPA"
        how = f"Pre-trained with {method}, self-supervised" if _pretrained(run.config) else "Fine-tuned with labels"
        text += f"{how}. Settings:\n\n| | |\n|---|---|\n"
        text += "".join(f"| `{key}` | {value} |\n" for key, value in settings)
    else:
        text += "The checkpoint does not say how it was trained.\n"
    if run.metrics:
        text += f"\nMetrics at step {run.metrics['step']}:\n\n| | |\n|---|---|\n"
        text += "".join(f"| `{key}` | {value:.4g} |\n" for key, value in run.metrics.items() if key != "step")
    text += "\n## Evaluation\n\n"
    if run.evaluation:
        keys = list(dict.fromkeys(key for row in run.evaluation.values() for key in row))
        text += f"As the run measured it, on its own test split (`{run.config.get('data.test_split')}`):\n\n"
        text += f"| | {' | '.join(keys)} |\n|---{'|---' * len(keys)}|\n"
        for name, row in run.evaluation.items():
            text += f"| {name} | {' | '.join(_cell(row.get(key)) for key in keys)} |\n"
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


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""

"""Results of evaluators: one format for files, one table for the screen."""

import datetime
import json
import platform
import sys
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
from etils import epath

from cjepa_jax.data.sources import Source
from cjepa_jax.errors import UserError, require
from cjepa_jax.evaluate.base import ERROR, Evaluator, Rows, written
from cjepa_jax.evaluate.frozen import Frozen
from cjepa_jax.files import read_json, write_whole
from cjepa_jax.settings import flatten, parse_flat

_PACKAGES = ("jax", "flax", "optax", "numpy", "scikit-learn", "simplejpeg", "opencv-python-headless", "pillow")


def describe(frozen: Frozen, settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Says what it takes to repeat an evaluation, as JSON; `settings` are flat."""
    said = {
        **more,
        "encoders": sorted(frozen.params),
        "model": vars(frozen.model),
        "data": {"crop_fraction": frozen.crop_fraction, **vars(frozen.data)},
        "settings": dict(settings),
    }
    repeated: dict[str, Any] = json.loads(json.dumps(said))
    return repeated


def check(path: epath.Path, description: Mapping[str, Any], groups: Mapping[str, type]) -> None:
    """Raises UserError where `path` holds results of another description, or is none of ours.

    groups: the dataclass of the settings of each group, such as "data"; a setting that `path` lacks means what the code
    did before the setting existed.
    """
    if not path.exists():
        return
    try:
        old = read_json(path)
        for name, cls in groups.items():
            whole = {**flatten(parse_flat(old[name], cls)), **old[name]}
            old[name] = {key: whole.get(key) for key in description[name]}
    except (UserError, KeyError, TypeError):
        old = {}
    changed = sorted(key for key, value in description.items() if old.get(key) != value)
    require(
        not changed,
        f"{path} exists with another {' and '.join(changed)}; --name gives the new results another name",
    )


def write(
    path: epath.Path, frozen: Frozen, results: Mapping[str, Rows], description: Mapping[str, Any], *, seconds: float
) -> None:
    """Writes {"results": {evaluator: {encoder: {measure: value}}}, ...} from process 0; replaces what was there."""
    if jax.process_index() != 0:
        return
    images = {
        split: {"images": len(reader.source), "fingerprint": reader.source.fingerprint}
        | ({"unreadable": reader.unreadable} if reader.unreadable else {})
        for split, reader in frozen.readers.items()
    }
    circumstances = {
        "images": images,
        "versions": {package: metadata.version(package) for package in _PACKAGES}
        | {"python": platform.python_version()},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "command": sys.argv,
        "seconds": round(seconds, 2),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps({"results": results, **description, **circumstances}, indent=1) + "\n")


def is_of(workdir: epath.Path, step: int) -> bool:
    """Tells whether WORKDIR/evaluation.json is there, and is about this step."""
    try:
        return bool(json.loads((workdir / "evaluation.json").read_text())["step"] == step)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def header(frozen: Frozen) -> str:
    """Says what is judged, by which images, and what guessing their classes would reach; of splits in use so far."""
    assert frozen.origin
    workdir, encoder, networks = frozen.origin
    model, data = networks.model, frozen.data
    lines = [f"{workdir}, step {networks.step}: {encoder}, {model.size}/{model.patch_size}"]
    for split, reader in frozen.readers.items():
        name = data.train_split if split == "train" else data.test_split
        classes = len(reader.source.classes)
        of = f" of {classes} classes" if classes else ""
        lines.append(f"{split} images: {len(reader.source)}{of}, {data.name or data.source} {name!r}")
        if classes and split == "test":
            lines.append(f"guessing reaches {100 / classes:.2f} %" + _commonest(reader.source))
    return "\n".join(lines)


def _commonest(source: Source) -> str:
    """Says how many images are of the commonest class, where labels can be had without reading the images."""
    labels = [label for label in source.labels() if label is not None] if source.label else []
    if not labels:
        return ""
    (label, count), *_ = Counter(labels).most_common(1)
    return f", always the commonest class, {source.classes[label]!r}, {100 * count / len(labels):.2f} %"


def table(evaluator: Evaluator, rows: Rows) -> str:
    """Shows a row an encoder; of its measures the numbers, shares of images as %, and their standard errors."""
    shown = evaluator.shown(rows)
    columns = [
        key
        for key, value in next(iter(shown.values())).items()
        if isinstance(value, int | float) or "mean" in _dict(value)
    ]
    percent = {key: key not in evaluator.numbers and key != "images" for key in columns}
    head = [evaluator.name, *(f"{key} %" if percent[key] else key for key in columns)]
    body = [
        [name, *(_cell(row, key, percent=percent[key]) if key in row else "" for key in columns)]
        for name, row in shown.items()
    ]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *body)]
    with_errors = any("+-" in cell for line in body for cell in line)
    legend = ["+- is one standard error: over the test images, and where there are draws of labels, over these"]
    return "\n".join(["", *lines, *(legend if with_errors else []), *evaluator.notes(rows)])


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _cell(row: Mapping[str, Any], key: str, *, percent: bool) -> str:
    value, error = row[key], row.get(ERROR, {}).get(key)
    if isinstance(value, dict):
        value, error = value["mean"], value.get(ERROR)
    cells = [f"{100 * x:.2f}" if percent else written(x) for x in (value, error) if x is not None]
    return " +- ".join(cells)

"""Results of a method: a table for the screen, and a file with all that it takes to repeat them."""

import datetime
import json
import platform
import sys
from importlib import metadata
from typing import Any

import jax
from etils import epath

from cjepa_jax.config import require
from cjepa_jax.evaluate.subject import Subject
from cjepa_jax.parsing import flatten

Rows = dict[str, dict[str, Any]]  # encoder's name -> measure -> number, or whatever JSON holds
_PACKAGES = ("jax", "flax", "optax", "numpy", "scikit-learn", "simplejpeg", "opencv-python-headless", "pillow")


class File:
    """WORKDIR/evaluation/NAME.METHOD.json."""

    def __init__(self, subject: Subject, method: str, name: str | None):
        """Raises UserError where it exists with other settings, or is none of ours."""
        name = name or f"step{subject.networks.step}_{subject.tower}"
        self.path: epath.Path = subject.workdir / "evaluation" / f"{name}.{method}.json"
        self._repeat = {
            "method": method,
            "checkpoint": str(subject.workdir),
            "step": subject.networks.step,
            "tower": subject.tower,
            "encoders": sorted(subject.params),
            "model": vars(subject.networks.model),
            "data": {"crop_fraction": subject.crop_fraction, **vars(subject.data)},
            "settings": flatten(subject.settings),
        }
        self._subject = subject
        self._repeat = json.loads(json.dumps(self._repeat))
        if self.path.exists():
            try:
                old = json.loads(self.path.read_text())
            except ValueError:
                old = {}
            changed = sorted(key for key, value in self._repeat.items() if old.get(key) != value)
            require(
                not changed,
                f"{self.path} exists with another {' and '.join(changed)}; --name gives the new results another name",
            )

    def write(self, rows: Rows, *, seconds: float) -> None:
        """Replaces what the same settings gave before."""
        subject = self._subject
        images = {
            split: {"images": len(reader.source), "fingerprint": reader.source.fingerprint}
            | ({"unreadable": reader.unreadable} if reader.unreadable else {})
            for split, reader in (("train", subject.train), ("test", subject.test))
            if split in vars(subject)
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
        self.path.parent.mkdir(exist_ok=True)
        new = self.path.parent / f"{self.path.name}.new"
        new.write_text(json.dumps({"results": rows} | self._repeat | circumstances, indent=1) + "\n")
        new.replace(self.path)


def table(method: str, rows: Rows) -> str:
    """A row an encoder; of its measures the numbers, shares of images as %."""
    columns = [
        key
        for key, value in next(iter(rows.values())).items()
        if isinstance(value, int | float) or "mean" in _dict(value)
    ]
    head = [method, *columns]
    body = [[name, *(_cell(key, row[key]) if key in row else "" for key in columns)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *body)]
    return "\n" + "\n".join(lines)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _cell(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{_cell(key, value['mean'])} +- {_cell(key, value['std'])}"
    return f"{100 * value:.2f}" if key.endswith("%") else f"{value:.4g}"

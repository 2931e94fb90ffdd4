"""What tar shards and Parquet have in common: many images in one file, found by their places and never unpacked."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from etils import epath

from cjepa_jax.data.folder import SPLITS
from cjepa_jax.errors import require


class Place(NamedTuple):
    """Says where one image of an archive is, how large it is and of which class."""

    name: str  # of its file, relative to the folder, and member, or row
    bytes: int  # of the encoded image; 0 where that is not known without reading it
    label: int | None


class Archive(NamedTuple):
    """One split: its images in the order in which they are stored."""

    length: int
    name: Callable[[int], str]  # that of `place`, without reading anything
    place: Callable[[int], Place]
    read: Callable[[int], bytes]
    fingerprint: str  # of the files' names and sizes, and of what they say they hold


class Archives(NamedTuple):
    """All splits of a folder of archives."""

    splits: dict[str, Archive]
    classes: tuple[str, ...]  # () where there are no labels


def find_files(root: str, suffix: str) -> dict[str, list[epath.Path]]:
    """Lists the files by split: the last word of a path that is in SPLITS; a file without one belongs to "train"."""
    folder = epath.Path(os.path.expanduser(root))
    require(folder.is_dir(), f"the folder {root} does not exist")
    found: dict[str, list[epath.Path]] = {}
    depths = ("", "*/", "*/*/")  # folders of folders; on gs:// to look deeper would cost many requests
    paths = (path for depth in depths for path in folder.glob(f"{depth}*{suffix}"))
    for path in sorted(path for path in paths if not path.name.startswith(".")):
        words = re.split("[^a-z]+", str(path.relative_to(folder)).lower().removesuffix(suffix))
        split = next((word for word in reversed(words) if word in SPLITS), "train")
        found.setdefault(split, []).append(path)
    require(bool(found), f"the folder {root} holds no {suffix} files, nor do the folders one and two levels below")
    return found


def relative_names(files: Sequence[epath.Path], root: str) -> list[str]:
    """Gives the paths of `find_files`' files relative to the folder, by which they are named."""
    folder = epath.Path(os.path.expanduser(root))
    return [str(path.relative_to(folder)) for path in files]


def digest(files: Sequence[epath.Path], content: str) -> str:
    """Tells these files and their content from any others, by names and sizes."""
    about = [[path.name, path.stat().length] for path in files]
    return hashlib.sha256(json.dumps([about, content]).encode()).hexdigest()[:16]

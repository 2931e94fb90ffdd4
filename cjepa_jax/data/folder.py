"""Finds the splits, the labels and the files of a folder of images; the files are in a fixed random order."""

import dataclasses
import functools
import hashlib
import os
import sys
from collections.abc import Iterator

from cjepa_jax.errors import UserError, require, some

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SPLITS = ("train", "val", "valid", "validation", "test")


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """Describes one image file of a folder."""

    path: str  # relative to the folder, with "/"
    bytes: int
    label: int | None


@dataclasses.dataclass(frozen=True)
class Folder:
    """Lists all image files of a folder by split.

    Where the folder holds folders named as in `SPLITS`, in small letters or not, these
    are the splits; otherwise the whole folder is the split "train". The classes of a split are the
    first folders that not all of its images share. Where an image lies beside such
    folders, the split has no labels.
    """

    root: str
    splits: dict[str, list[ImageFile]]  # each in an order that the hashes of the paths give
    classes: tuple[str, ...]  # over all splits, sorted; () where there are no labels


def fingerprint(files: list[ImageFile]) -> str:
    """Returns a digest of paths, sizes and labels; the content of the files is not read."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(f"{file.path}\0{file.bytes}\0{file.label}\n"))
    return digest.hexdigest()[:16]


def scan(root: str) -> Folder:
    """Lists the image files below `root`, however deep, by their suffixes; hidden ones are left out.

    What has such a suffix and is not a file, such as a pipe, a device or a link that leads nowhere, is named on stderr.
    Raises UserError where there is no such folder or no image in it.
    """
    root = os.path.expanduser(root)
    require(os.path.exists(root), f"the folder of images {root} does not exist")
    require(os.path.isdir(root), f"{root} is not a folder of images, but a file")
    names = _split_folders(root)
    _say_what_lies_beside(root, names)
    found = {name: list(_walk(root, place)) for name, place in names.items()} or {"train": list(_walk(root, ""))}
    found = {name: files for name, files in found.items() if files}
    require(bool(found), f"the folder {root} holds no images ({', '.join(SUFFIXES)})")
    class_of = {}
    for split, files in found.items():
        class_of[split], stray = _classes([path for path, _ in files])
        if stray:
            place = os.path.join(root, names.get(split, ""))
            _say(
                f"{place}: the images have no labels, because {len(stray)} of them, such as {stray[0]}, lie beside the "
                "folders of the others"
            )
    classes = sorted({name for names in class_of.values() for name in names.values()})
    index = {name: i for i, name in enumerate(classes)}
    splits = {}
    for split, files in found.items():
        class_here = class_of[split]
        prefix = f"{names[split]}/" if names else ""
        listed = [
            ImageFile(prefix + path, size, index[class_here[path]] if class_here else None) for path, size in files
        ]
        # The order is not that of the disk, because a slice such as train[:95%] is to be a random sample.
        splits[split] = sorted(listed, key=lambda file: (hashlib.sha256(os.fsencode(file.path)).digest(), file.path))
    return Folder(root, splits, tuple(classes))


def _split_folders(root: str) -> dict[str, str]:
    """Finds the folders that are splits: the name of the split, and that of its folder, which may have capitals."""
    try:
        there = sorted(name for name in os.listdir(root) if name.lower() in SPLITS)
    except OSError as error:
        raise UserError(f"the folder {root} cannot be listed: {error.strerror}") from None
    found: dict[str, str] = {}
    for name in there:
        if os.path.isdir(os.path.join(root, name)):
            split = name.lower()
            require(split not in found, f"the folder {root} holds both {found.get(split)} and {name}: rename one")
            found[split] = name
    return {split: found[split] for split in SPLITS if split in found}


def _say_what_lies_beside(root: str, splits: dict[str, str]) -> None:
    """Names the images and folders of images that are left out, because they lie beside folders of splits."""
    others = [entry for entry in os.scandir(root) if splits and entry.name not in (*splits.values(),)]
    beside = sorted(
        entry.name
        for entry in others
        if not entry.name.startswith(".")
        and (next(_walk(root, entry.name), None) if entry.is_dir() else entry.name.lower().endswith(SUFFIXES))
    )
    if beside:
        _say(
            f"{root}: the images in {', '.join(splits.values())} are taken as splits, and those beside them are not "
            f"read: {some(beside)}"
        )


def _walk(root: str, below: str) -> Iterator[tuple[str, int]]:
    """Yields (path relative to root/below, bytes) of each image file; links are followed, but not round in circles."""
    base = os.path.join(root, below)
    open_folders: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(base),))]
    while open_folders:
        relative, above = open_folders.pop()
        try:
            entries = list(os.scandir(os.path.join(base, relative)))
        except OSError as error:
            raise UserError(f"the folder {os.path.join(base, relative)} cannot be listed: {error.strerror}") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = relative + entry.name
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if real not in above:
                    open_folders.append((path + "/", (*above, real)))
            elif entry.name.lower().endswith(SUFFIXES):
                if entry.is_file():
                    yield path, entry.stat().st_size
                else:
                    _say(f"skipped {entry.path}: it is not a file, but a pipe, a device or a link that leads nowhere")


@functools.cache
def _say(line: str) -> None:
    """Prints a line once, however often the folder is listed."""
    print(line, file=sys.stderr, flush=True)


def _classes(paths: list[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the class of each path of a split, or {} where it has no labels, and the paths because of which.

    These lie beside the folders of the others; there are none where all images lie in one folder.
    """
    common = os.path.commonpath({os.path.dirname(path) for path in paths})
    beside = [path for path in paths if os.path.dirname(path) == common]
    if beside:
        return {}, beside if len(beside) < len(paths) else []
    depth = common.count("/") + 1 if common else 0
    return {path: path.split("/")[depth] for path in paths}, []

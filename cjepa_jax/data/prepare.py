"""Makes a data set in TFDS' format of a folder of images, no larger than training needs them.

    python -m cjepa_jax.data.prepare --input=FOLDER --output=DIR

--input=FOLDER    images in folders, or tar shards (WebDataset) or Parquet (Hugging Face) in
                  them; docs/data.md says what are splits and labels
--output=DIR      a new folder
--short-side=320  pixels; larger images are shrunk to it and encoded as JPEG, others stay as they are
--quality=90      of that JPEG, 1 to 100
--threads=N       decoding threads; default one per core

Files that cannot be decoded are left out and listed in DIR/skipped.txt. The same
command goes on where it was stopped. TFDS reads DIR, once it is complete, with
`builder_from_directory`; its records {"image", "file_name", "label"} are in the
order of the folder. An image without a label in a folder that has labels gets -1.

Exit codes: 0 finished; 2 a mistake that the user can mend; 1 any other error; 130 and 143 ended by
Ctrl-C and SIGTERM.
"""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import functools
import itertools
import json
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import tensorflow_datasets as tfds
from absl import flags
from etils import epath
from tqdm import tqdm

from cjepa_jax import command, signals
from cjepa_jax.data import decode, folder, parquet, shard_file, tars, waiting
from cjepa_jax.errors import UserError, one_line, require
from cjepa_jax.files import TEMPORARY, write_whole

IMAGES_PER_SHARD = 4096
_INTERRUPTED = (
    f"interrupted; complete shards of {IMAGES_PER_SHARD} images stay, and the same command goes on after them"
)

_STATE = "prepare.json"  # in DIR: the settings, and what is known of each finished shard


@dataclasses.dataclass(frozen=True)
class _Stored(folder.ImageFile):
    """Describes an image that lies with others in one file."""

    read: Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class _Shard:
    name: str  # of its file in DIR
    split: str
    files: list[folder.ImageFile]


def prepare(source: str, output: str, *, short_side: int = 320, quality: int = 90, threads: int | None = None) -> None:
    """Writes the data set as the command does and prints a summary.

    Raises UserError for settings out of range, folders that do not fit, and images that mostly cannot be read.
    """
    threads = (os.cpu_count() or 1) if threads is None else threads
    require(short_side >= 1, f"--short-side must be at least 1, got {short_side}")
    require(1 <= quality <= 100, f"--quality must be in 1 to 100, got {quality}")
    require(threads >= 1, f"--threads must be at least 1, got {threads}")
    encodable = output.encode("utf-8", "ignore") == os.fsencode(output)  # as ArrayRecord wants names
    require(encodable, f"--output must be a name in UTF-8, got {output!r}")
    require(bool(output) and "://" not in output, f"--output must be a local folder, got {output!r}")
    output = os.path.expanduser(output)
    found, fingerprints = _list(source)
    for name in found.classes:  # TFDS keeps them as lines of a text file
        kept = name.encode(errors="ignore").decode().strip() == name and not {"\n", "\r"} & set(name)
        require(kept, f"the folder name {name!r} cannot be the name of a class in TFDS: rename it")
    real = os.path.realpath(found.root)
    inside = os.path.commonpath([real, os.path.realpath(output)]) == real
    require(not inside, f"--output {output} lies inside --input {source}: name a folder elsewhere")

    labels = {"label": tfds.features.ClassLabel(names=found.classes)} if found.classes else {}
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "file_name": tfds.features.Text(), **labels})
    # Folders that are half prepared know these keys.
    settings: dict[str, Any] = {"short_side": short_side, "quality": quality, "images_a_shard": IMAGES_PER_SHARD}
    settings |= fingerprints
    with claimed(output):
        for remains in pathlib.Path(output).glob(f"{_STATE}.*{TEMPORARY}"):  # of a killed command
            remains.unlink()
        state = _load_state(output, settings)
        shards = _shards(found, state["name"])
        record = functools.partial(_record, root=found.root, settings=settings, features=features)
        _write_shards(output, state, shards, record, threads)
        _finish(output, state, shards, features)


def _list(source: str) -> tuple[folder.Folder, dict[str, str]]:
    """Lists the images of a folder, or of the tar or Parquet files in it; gives each split's fingerprint too."""
    root = os.path.expanduser(source)
    for suffix, scan in ((".tar", tars.scan), (".parquet", parquet.scan)):
        archived = next(pathlib.Path(root).rglob(f"*{suffix}"), None) if os.path.isdir(root) else None
        if archived:
            files = (path for path in pathlib.Path(root).rglob("*") if path.suffix.lower() in folder.SUFFIXES)
            loose = next(files, None)
            require(
                loose is None,
                f"--input {root} holds images in {archived} and others as files, such as {loose}; move one kind away",
            )
            found = scan(root)
            splits: dict[str, list[folder.ImageFile]] = {}
            for name, archive in found.splits.items():
                places = map(archive.place, range(archive.length))
                splits[name] = [_Stored(*place, functools.partial(archive.read, i)) for i, place in enumerate(places)]
            prints = {name: archive.fingerprint for name, archive in found.splits.items()}
            return folder.Folder(root, splits, found.classes), prints
    listed = folder.scan(source)
    prints = {name: f"{len(files)} images {folder.fingerprint(files)}" for name, files in listed.splits.items()}
    return listed, prints


@contextlib.contextmanager
def claimed(output: str) -> Iterator[None]:
    """Keeps other commands from writing into the folder at the same time."""
    os.makedirs(output, exist_ok=True)
    handle = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another command is writing into {output}: wait for it, or stop it") from None
    except OSError:  # some network file systems know no such locks
        pass
    try:
        yield
    finally:
        os.close(handle)


def _load_state(output: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the state of an interrupted or finished command with these settings, else a new state."""
    path = os.path.join(output, _STATE)
    if not os.path.exists(path):
        others = sorted(os.listdir(output))
        require(not others, f"--output {output} is not empty, and not from this command: name a new folder")
        words = re.sub(r"[^a-z0-9]+", "_", os.path.basename(os.path.realpath(output)).lower()).strip("_")
        name = words if words[:1].isalpha() else f"images_{words}".strip("_")
        state: dict[str, Any] = {"name": name, "settings": settings, "shards": {}}
        write_whole(epath.Path(path), json.dumps(state, indent=1))
        return state
    try:
        with open(path) as file:
            state = json.load(file)
        old = state["settings"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} cannot be read: delete {output}, or name another --output") from None
    changed = [f"{k}: {old.get(k)} -> {settings.get(k)}" for k in {**old, **settings} if old.get(k) != settings.get(k)]
    about = f"--output {output} was begun with other settings or images ({'; '.join(changed)})"
    require(not changed, f"{about}: go back to those, or delete it, or name another --output")
    return state


def _shards(found: folder.Folder, name: str) -> list[_Shard]:
    shards = []
    for split, files in found.splits.items():
        parts = [files[i : i + IMAGES_PER_SHARD] for i in range(0, len(files), IMAGES_PER_SHARD)]
        template = tfds.core.ShardedFileTemplate("", dataset_name=name, split=split, filetype_suffix="array_record")
        names = template.sharded_filenames(len(parts))
        shards += [_Shard(name, split, part) for name, part in zip(names, parts, strict=True)]
    return shards


def _write_shards(
    output: str, state: dict[str, Any], shards: list[_Shard], record: Callable[[folder.ImageFile], Any], threads: int
) -> None:
    """Writes the shards that are missing or damaged."""
    if state["shards"]:
        print(f"checking {len(state['shards'])} finished shards of {len(shards)}", file=sys.stderr)
    todo = [shard for shard in shards if not _is_finished(os.path.join(output, shard.name), state)]
    metadata = os.path.join(output, "dataset_info.json")
    if not todo:
        if os.path.exists(metadata):
            print(f"{output} is already complete")
        return
    with contextlib.suppress(FileNotFoundError):  # where a shard is damaged: no data set until it is there again
        os.remove(metadata)
    total, left = (sum(len(shard.files) for shard in some) for some in (shards, todo))
    files = itertools.chain.from_iterable(shard.files for shard in todo)
    with (
        _pool(threads) as pool,
        tqdm(total=total, initial=total - left, unit="image", disable=not sys.stderr.isatty()) as bar,
    ):
        results = in_order(pool, record, files, window=2 * threads)
        for shard in todo:
            path = os.path.join(output, shard.name)
            state["shards"][shard.name] = _write_shard(path, shard.files, results, bar)
            write_whole(epath.Path(output) / _STATE, json.dumps(state, indent=1))
            left -= len(shard.files)
            if bar.disable:
                print(f"{total - left}/{total} images", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _pool(threads: int) -> Iterator[Executor]:
    """Makes threads that nothing waits for at the end: one may hang in a read."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def in_order(pool: Executor, function: Callable, items: Iterable, *, window: int) -> Iterator:
    """Works like `pool.map`, but holds at most `window` results."""
    futures: collections.deque[Future] = collections.deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) >= window:
            yield waiting.result(futures.popleft())
    while futures:
        yield waiting.result(futures.popleft())


def _record(
    file: folder.ImageFile, *, root: str, settings: dict[str, Any], features: tfds.features.FeaturesDict
) -> bytes | str:
    """Returns the record of an image, or the reason why there is none. Raises UserError where the storage fails."""
    try:
        path = os.path.join(root, file.path)
        with waiting.reading(lambda: path):
            raw = file.read() if isinstance(file, _Stored) else pathlib.Path(path).read_bytes()
        image = decode.shrink_file(raw, short_side=settings["short_side"], quality=settings["quality"])
    except decode.UnreadableError as error:
        return one_line(error)
    except OSError as error:
        # What the storage may give again, such as after EIO, must not be left out for good.
        require(
            error.errno in (None, errno.EACCES, errno.EPERM, errno.ENOENT),
            f"{file.path} cannot be read ({one_line(error)}); mend the storage, or move the file away, and give the "
            "same command again",
        )
        return f"{type(error).__name__}: {one_line(error)}"
    example: dict[str, Any] = {"image": image, "file_name": os.fsencode(file.path)}
    if "label" in features:
        example["label"] = -1 if file.label is None else file.label  # -1 is unknown in TFDS
    return features.serialize_example(example)


def _write_shard(path: str, files: list[folder.ImageFile], results: Iterator[bytes | str], bar: tqdm) -> dict[str, Any]:
    """Writes one shard, taking one result for each file, and returns what the state keeps of it."""
    size, source_size, skipped = 0, 0, []

    def records() -> Iterator[bytes]:
        nonlocal size, source_size
        for file, result in zip(files, results, strict=False):  # the results of later shards follow
            if isinstance(result, str):
                skipped.append([file.path, result])
            else:
                size, source_size = size + len(result), source_size + file.bytes
                yield result
            bar.update()

    count, digest = shard_file.write(path, records())
    return {"records": count, "digest": digest, "bytes": size, "source_bytes": source_size, "skipped": skipped}


def _is_finished(path: str, state: dict[str, Any]) -> bool:
    known = state["shards"].get(os.path.basename(path))
    if known is None:
        return False
    with contextlib.suppress(RuntimeError):
        if shard_file.content(path) == (known["records"], known["digest"]):
            return True
    print(f"{path} is damaged or missing and is prepared again", file=sys.stderr)
    return False


def _finish(output: str, state: dict[str, Any], shards: list[_Shard], features: tfds.features.FeaturesDict) -> None:
    """Writes skipped.txt and TFDS' metadata, and prints the summary."""
    known = [state["shards"][shard.name] for shard in shards]
    skipped = [entry for shard in known for entry in shard["skipped"]]
    listed = os.path.join(output, "skipped.txt")
    if skipped:
        write_whole(epath.Path(listed), "".join(f"{path}\t{reason}\n" for path, reason in skipped))
    infos = []
    for split in dict.fromkeys(shard.split for shard in shards):
        here = [entry for shard, entry in zip(shards, known, strict=True) if shard.split == split]
        lengths, bad = [shard["records"] for shard in here], sum(len(shard["skipped"]) for shard in here)
        require(
            bad <= sum(lengths),
            f"{bad} of the {bad + sum(lengths)} images of the split {split} cannot be read; {listed} says why: "
            f"mend or remove them, delete {output}, and give the same command again",
        )
        size = sum(shard["bytes"] for shard in here)
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
    images, settings = sum(info.num_examples for info in infos), state["settings"]
    tfds.folder_dataset.write_metadata(
        data_dir=output,
        features=features,
        split_infos=infos,
        check_data=False,  # it would need TensorFlow
        description=f"{images} images from a folder. Those whose short side was longer were shrunk to "
        f"{settings['short_side']} pixels and encoded as JPEG of quality {settings['quality']}.",
    )
    classes = features["label"].num_classes if "label" in features else 0
    before, after = (sum(shard[key] for shard in known) / 1e6 for key in ("source_bytes", "bytes"))
    counts = ", ".join(f"{info.name} {info.num_examples}" for info in infos)
    print(f"{images} images ({counts}), {classes} classes, {before:.1f} MB -> {after:.1f} MB")
    print(f"{len(skipped)} files skipped" + (f", see {listed}" if skipped else ""))
    print(f"train with: --config.data.source=tfds --config.data.name= --config.data.data_dir={shlex.quote(output)}")


def main() -> None:
    """Runs the command; exit code 0, 2 after a mistake that the user can mend, 1 after any other error."""
    source = flags.DEFINE_string("input", None, "The folder of images.")
    output = flags.DEFINE_string("output", None, "The new folder.")
    short_side = flags.DEFINE_integer("short-side", 320, "Pixels of the short side of a stored image, at most.")
    flags.DEFINE_alias("short_side", "short-side")
    quality = flags.DEFINE_integer("quality", 90, "Quality of the JPEG files.")
    threads = flags.DEFINE_integer("threads", None, "Decoding threads.")

    def body() -> None:
        for flag in (source, output):
            require(flag.value is not None, f"--{flag.name} is missing; --help explains the command")
        try:
            with signals.cleaned_up(_INTERRUPTED):
                prepare(
                    str(source.value),
                    str(output.value),
                    short_side=short_side.value,
                    quality=quality.value,
                    threads=threads.value,
                )
        except OSError as error:
            raise UserError(one_line(error)) from None

    command.run(body, __doc__)


if __name__ == "__main__":
    main()

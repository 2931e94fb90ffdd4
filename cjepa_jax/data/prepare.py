"""A folder of images -> a data set in TFDS' format, of pictures no larger than training needs.

    python -m cjepa_jax.data.prepare --input=FOLDER --output=DIR

--input=FOLDER    images in folders; cjepa_jax/data/folder.py says what are splits and labels
--output=DIR      a new folder
--short-side=320  pixels; larger images are shrunk to it and encoded as JPEG, others stay as they are
--quality=90      of that JPEG, 1 to 100
--threads=N       decoding threads; default one a core

Files that cannot be decoded are left out and listed in DIR/skipped.txt. The same
command goes on where it was stopped. TFDS reads DIR, once it is complete, with
`builder_from_directory`; its records {"image", "file_name", "label"} are in the
order of the folder. An image without a label in a folder that has labels gets -1.
"""

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import simplejpeg
import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image
from tqdm import tqdm

from cjepa_jax.config import UserError, one_line, require
from cjepa_jax.data import decode, folder

IMAGES_A_SHARD = 4096

_STATE = "prepare.json"  # in DIR: the settings, and what is known of each finished shard
_TEMPORARY = ".tmp"


@dataclasses.dataclass(frozen=True)
class _Shard:
    name: str  # of its file in DIR
    split: str
    files: list[folder.File]


def prepare(source: str, output: str, *, short_side: int = 320, quality: int = 90, threads: int | None = None) -> None:
    """What the command does; prints a summary.

    Raises UserError.
    """
    threads = (os.cpu_count() or 1) if threads is None else threads
    require(short_side >= 1, f"--short-side must be at least 1, got {short_side}")
    require(1 <= quality <= 100, f"--quality must be in 1 to 100, got {quality}")
    require(threads >= 1, f"--threads must be at least 1, got {threads}")
    require(bool(output) and "://" not in output, f"--output must be a local folder, got {output!r}")
    output = os.path.expanduser(output)
    found = folder.scan(source)
    for name in found.classes:  # TFDS keeps them as lines of a text file
        kept = name.encode(errors="ignore").decode().strip() == name and not {"\n", "\r"} & set(name)
        require(kept, f"the folder name {name!r} cannot be the name of a class in TFDS: rename it")
    real = os.path.realpath(found.root)
    inside = os.path.commonpath([real, os.path.realpath(output)]) == real
    require(not inside, f"--output {output} lies inside --input {source}: name a folder elsewhere")

    labels = {"label": tfds.features.ClassLabel(names=found.classes)} if found.classes else {}
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "file_name": tfds.features.Text(), **labels})
    settings: dict[str, Any] = {"short_side": short_side, "quality": quality, "images_a_shard": IMAGES_A_SHARD}
    settings |= {split: f"{len(files)} images {folder.fingerprint(files)}" for split, files in found.splits.items()}
    with _claimed(output):
        state = _load_state(output, settings)
        shards = _shards(found, state["name"])
        record = functools.partial(_record, root=found.root, settings=settings, features=features)
        _write_shards(output, state, shards, record, threads)
        _finish(output, state, shards, features)


def encode(raw: bytes, *, short_side: int, quality: int) -> bytes:
    """The image file to store for an image file: itself where it is small enough, else a JPEG.

    Raises UnreadableError or anything else that the codecs raise where the file is damaged.
    """
    size = decode.jpeg_size(raw)
    if size and math.prod(size) <= decode.MAX_PIXELS:
        grey = simplejpeg.decode_jpeg_header(raw)[2] == "Gray"
        # Pillow would fill what is damaged with something.
        pixels = simplejpeg.decode_jpeg(raw, "GRAY" if grey else "RGB", strict=True)
        image, as_it_is = Image.fromarray(pixels[..., 0] if grey else pixels), True
    else:
        header = Image.open(io.BytesIO(raw))
        image = decode.open_picture(raw, 1 if Image.getmodebase(header.mode) == "L" else 3)
        as_it_is = header.format in ("PNG", "WEBP", "BMP")
    factor = short_side / min(image.size)
    if as_it_is and factor >= 1:
        return raw
    if factor < 1:
        width, height = (max(short_side, round(side * factor)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


@contextlib.contextmanager
def _claimed(output: str) -> Iterator[None]:
    """Two commands must not write into one folder."""
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
    """The state of an interrupted or finished command with these settings, else a new one."""
    path = os.path.join(output, _STATE)
    if not os.path.exists(path):
        others = sorted(set(os.listdir(output)) - {_STATE + _TEMPORARY})
        require(not others, f"--output {output} is not empty, and not from this command: name a new folder")
        words = re.sub(r"[^a-z0-9]+", "_", os.path.basename(os.path.realpath(output)).lower()).strip("_")
        name = words if words[:1].isalpha() else f"images_{words}".strip("_")
        state: dict[str, Any] = {"name": name, "settings": settings, "shards": {}}
        _save(path, json.dumps(state, indent=1))
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
        parts = [files[i : i + IMAGES_A_SHARD] for i in range(0, len(files), IMAGES_A_SHARD)]
        template = tfds.core.ShardedFileTemplate("", dataset_name=name, split=split, filetype_suffix="array_record")
        names = template.sharded_filenames(len(parts))
        shards += [_Shard(name, split, part) for name, part in zip(names, parts, strict=True)]
    return shards


def _write_shards(
    output: str, state: dict[str, Any], shards: list[_Shard], record: Callable[[folder.File], Any], threads: int
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
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=total, initial=total - left, unit="image", disable=not sys.stderr.isatty()) as bar,
    ):
        results = _in_order(pool, record, files, window=2 * threads)
        for shard in todo:
            path = os.path.join(output, shard.name)
            state["shards"][shard.name] = _write_shard(path, shard.files, results, bar)
            _save(os.path.join(output, _STATE), json.dumps(state, indent=1))
            left -= len(shard.files)
            if bar.disable:
                print(f"{total - left}/{total} images", file=sys.stderr, flush=True)


def _in_order(pool: Executor, function: Callable, items: Iterable, *, window: int) -> Iterator:
    """`pool.map` that holds at most `window` results."""
    futures: collections.deque[Future] = collections.deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) >= window:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _record(
    file: folder.File, *, root: str, settings: dict[str, Any], features: tfds.features.FeaturesDict
) -> bytes | str:
    """The record of an image, or why there is none."""
    try:
        with open(os.path.join(root, file.path), "rb") as opened:
            image = encode(opened.read(), short_side=settings["short_side"], quality=settings["quality"])
    except Exception as error:  # a broken file makes the codecs raise almost anything
        return f"{type(error).__name__}: {one_line(error).split(' <_io')[0]}"  # without the address of an object
    example: dict[str, Any] = {"image": image, "file_name": os.fsencode(file.path)}
    if "label" in features:
        example["label"] = -1 if file.label is None else file.label  # -1 is unknown in TFDS
    return features.serialize_example(example)


def _write_shard(path: str, files: list[folder.File], results: Iterator[bytes | str], bar: tqdm) -> dict[str, Any]:
    """Takes a result a file -> what is to be known of the shard."""
    digest, records, size, source_size, skipped = hashlib.sha256(), 0, 0, 0, []
    temporary = path + _TEMPORARY
    try:
        writer = ArrayRecordWriter(temporary, "group_size:1")
        for file, result in zip(files, results, strict=False):  # the results of later shards follow
            if isinstance(result, str):
                skipped.append([file.path, result])
            else:
                writer.write(result)
                digest.update(hashlib.sha256(result).digest())
                records, size, source_size = records + 1, size + len(result), source_size + file.bytes
            bar.update()
        writer.close()
        with open(temporary, "rb") as file_written:
            os.fsync(file_written.fileno())
        written = _content(temporary)
    except RuntimeError as error:
        raise UserError(f"{path} cannot be written: is the disk full? ({one_line(error)})") from None
    same = written == (records, digest.hexdigest())
    require(same, f"{path} does not hold what was written to it: check the disk, then give the same command again")
    os.replace(temporary, path)
    return {"records": records, "digest": written[1], "bytes": size, "source_bytes": source_size, "skipped": skipped}


def _is_finished(path: str, state: dict[str, Any]) -> bool:
    known = state["shards"].get(os.path.basename(path))
    if known is None:
        return False
    with contextlib.suppress(RuntimeError):
        if _content(path) == (known["records"], known["digest"]):
            return True
    print(f"{path} is damaged or missing and is prepared again", file=sys.stderr)
    return False


def _content(path: str) -> tuple[int, str]:
    """The number of records in a file, and a digest of all."""
    reader, digest = ArrayRecordReader(path), hashlib.sha256()
    try:
        count = reader.num_records()  # 0 where the end of the file is damaged
        for start in range(0, count, 64):
            for record in reader.read(start, min(start + 64, count)):
                digest.update(hashlib.sha256(record).digest())
    finally:
        reader.close()
    return count, digest.hexdigest()


def _finish(output: str, state: dict[str, Any], shards: list[_Shard], features: tfds.features.FeaturesDict) -> None:
    """Writes skipped.txt and TFDS' metadata, and prints the summary."""
    known = [state["shards"][shard.name] for shard in shards]
    skipped = [entry for shard in known for entry in shard["skipped"]]
    listed = os.path.join(output, "skipped.txt")
    if skipped:
        _save(listed, "".join(f"{path}\t{reason}\n" for path, reason in skipped))
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


def _save(path: str, text: str) -> None:
    """All of a file or nothing, even when the power goes."""
    with open(path + _TEMPORARY, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + _TEMPORARY, path)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help explains the command")


def main() -> None:
    """Exit code 0; 2 after a mistake that the user can mend; 1 after any other error."""
    logging.set_verbosity("error")  # TFDS' chatter
    parser = _Parser("python -m cjepa_jax.data.prepare", "%(prog)s --input=FOLDER --output=DIR", allow_abbrev=False)
    parser.format_help = lambda: __doc__  # type: ignore[method-assign]
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--short-side", "--short_side", type=int, default=320)
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--threads", type=int)
    try:
        given = vars(parser.parse_args())
        prepare(given.pop("input"), given.pop("output"), **given)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


if __name__ == "__main__":
    main()

"""Measures how fast images can reach the devices.

    python -m cjepa_jax.bench.input --images=FOLDER

--images=FOLDER   JPEG files, however nested
--size=224        pixels per side of a crop
--count=320       images that are read
--short-side=256  pixels of the short side of a prepared image
--rounds=7        turns that each way takes

The command reads a folder of images as it is, from a tar and a Parquet file of the same
files, and, after `cjepa_jax.data.prepare`, from shards. It compares them with
torchvision's recipe (Pillow: decode, crop, bilinear resize) on the same files and the same
boxes. All ways take turns for several rounds, and the table shows medians. "Loop" is a bare
loop over decoding and cropping; "pipeline" is what training reads from;
"two views" is the same with the two augmented views of configs/vicreg_vitb16.py, counted in
images, not in views.
"""

import dataclasses
import math
import os
import pathlib
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow
import pyarrow.parquet
from absl import flags
from PIL import Image

from cjepa_jax import command, signals
from cjepa_jax.config import Data
from cjepa_jax.data import decode, folder, pipeline, prepare, sources
from cjepa_jax.data.augment import Augmentation
from cjepa_jax.errors import require

BATCH = 32
_FILLING = 3  # batches taken before the clock starts
REPEATS = 3000  # of the folder: Grain shuffles a set of a few hundred images several times as slowly as a million
# Estimates, not measurements: FLOPs of one training image of configs/vitb16.py, by tpu/flops.py, and the share of a
# chip's peak that a good step reaches.
GIGAFLOPS_PER_IMAGE = 90
USE = 0.45
VIEWS = tuple(
    Augmentation((0.08, 1.0), (3 / 4, 4 / 3), flip=0.5, color=0.5, blur=blur, solarize=solarize, saturation=0.5)
    for blur, solarize in ((1.0, 0.0), (0.1, 0.2))
)
CONSUMERS = {  # name -> (bfloat16 TFLOP/s of all chips, vCPUs)
    "TPU v5e host, 4 chips": (4 * 197, 112),
    "node of 8 A100": (8 * 312, 96),
    "node of 8 H100": (8 * 989, 208),
}


class _Repeated(Sequence[sources.Record]):
    def __init__(self, records: Sequence[sources.Record]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records) * REPEATS

    def __getitem__(self, index):
        return self._records[index % len(self._records)]


class _Recorder(pipeline.Reader):
    """Remembers which box was cropped from which image."""

    def __init__(self, source: sources.Source, data: Data):
        super().__init__(source, data)
        self.boxes: list[tuple[int, decode.CropBox]] = []

    def crops(self, index, choose_boxes):
        def choose(width, height):
            self.boxes.append((index, choose_boxes[0](width, height)))
            return self.boxes[-1][1]

        return super().crops(index, [choose])


class Bench:
    """Holds the ways to read one split of a source."""

    def __init__(self, data_dir: str, size: int, count: int, **where: str):
        self._settings = dict(
            data_dir=data_dir, train_split="train", test_split="", image_size=size, crop_scale=(0.3, 1.0),
            crop_ratio=(3 / 4, 4 / 3), flip=0.0, color=0.0, blur=0.0, mean=(0.5,) * 3, std=(0.5,) * 3,
            batch_size=BATCH, decoder="fast", prefetch=2, max_bad_fraction=0.0, **where,
        )  # fmt: skip
        data = self._data(1)
        self._size = size
        source = sources.load(data, data.train_split)
        self.batches = math.ceil(count / BATCH)
        self._source = dataclasses.replace(source, records=_Repeated(source.records))
        recorder = _Recorder(self._source, data)
        stream = pipeline.train_batches(recorder, seed=0)
        first = _FILLING + data.prefetch  # what the pipeline works on while the clock runs
        for _ in range(first + self.batches):
            next(stream)
        stream.close()
        self._boxes = recorder.boxes[first * BATCH : (first + self.batches) * BATCH]

    def _data(self, threads: int) -> Data:
        return Data(threads=threads, **self._settings)  # type: ignore[arg-type]

    def torchvision(self) -> list[np.ndarray]:
        """Crops all boxes with Pillow, as torchvision does."""
        return [
            np.asarray(
                decode.open_file(self._source.records[index]["image"])
                .convert("RGB")
                .crop(box)
                .resize((self._size, self._size), Image.Resampling.BILINEAR)
            )
            for index, box in self._boxes
        ]

    def loop(self) -> list[np.ndarray]:
        """Crops all boxes with the fast decoder, in a bare loop."""
        return [
            decode.crop(
                self._source.records[index]["image"],
                lambda width, height, box=box: box,  # type: ignore[misc]
                shape=(self._size, self._size),
                channels=3,
                decoder="fast",
            )
            for index, box in self._boxes
        ]

    def pipeline(self, threads: int, views: Sequence[Augmentation] | None = None) -> Callable[[], None]:
        """Returns a function that takes as many images from the pipeline as the loops read; the pipeline is filled."""

        def run() -> None:
            for _ in range(self.batches):
                next(stream)

        stream = pipeline.train_batches(pipeline.Reader(self._source, self._data(threads)), seed=0, views=views)
        for _ in range(_FILLING):
            next(stream)
        return run


def _archives(sample: str, scratch: str) -> tuple[str, str]:
    """Writes the files of a folder into a tar and a Parquet file, with 100 images a row group as `datasets` does."""
    tars, parquet = (os.path.join(scratch, name) for name in ("tar", "parquet"))
    os.mkdir(tars)
    os.mkdir(parquet)
    rows = []
    with tarfile.open(os.path.join(tars, "train.tar"), "w", dereference=True) as tar:
        for file in folder.scan(sample).splits["train"]:
            tar.add(os.path.join(sample, file.path), file.path)
            rows.append({"bytes": pathlib.Path(sample, file.path).read_bytes(), "path": file.path})
    table = pyarrow.table({"image": pyarrow.array(rows)})
    pyarrow.parquet.write_table(table, os.path.join(parquet, "train.parquet"), row_group_size=100)
    return tars, parquet


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * float(np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2))))


def measure(images: str, *, size: int, count: int, short_side: int, rounds: int) -> str:
    """Times every way on `count` images of a folder and returns the tables.

    Raises UserError for a folder without images.
    """
    cores = os.cpu_count() or 1
    found = folder.scan(images)
    files = next(iter(found.splits.values()))[:count]
    with tempfile.TemporaryDirectory() as scratch:
        sample, shards = (os.path.join(scratch, name) for name in ("files", "shards"))
        os.mkdir(sample)
        for i, file in enumerate(files):
            name = f"{i}{os.path.splitext(file.path)[1]}"
            os.symlink(os.path.realpath(os.path.join(found.root, file.path)), os.path.join(sample, name))
        prepare.prepare(sample, shards, short_side=short_side)
        tars, parquet = _archives(sample, scratch)
        stored = {
            "files": Bench(sample, size, count, source="folder", name=""),
            "tar": Bench(tars, size, count, source="webdataset", name=""),
            "parquet": Bench(parquet, size, count, source="parquet", name=""),
            "shards": Bench(shards, size, count, source="tfds", name=""),
        }
        ways: dict[str, Callable[[], Callable[[], object]]] = {"torchvision": lambda: stored["files"].torchvision}
        for name, bench in stored.items():
            ways[f"{name}, loop"] = lambda bench=bench: bench.loop  # type: ignore[misc]
            for threads in sorted({1, cores}):
                ways[f"{name}, pipeline, {threads} threads"] = lambda b=bench, t=threads: b.pipeline(t)  # type: ignore[misc]
        for name, bench in ((name, stored[name]) for name in ("files", "shards")):
            ways[f"{name}, two views, {cores} threads"] = lambda b=bench: b.pipeline(cores, VIEWS)  # type: ignore[misc]
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, make in ways.items():
                run = make()
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        exact = stored["files"].torchvision()
        fidelity = {
            name: statistics.median(_psnr(a, b) for a, b in zip(bench.loop(), exact, strict=True))
            for name, bench in stored.items()
        }
        timed = stored["files"].batches * BATCH
    speed = {name: timed / statistics.median(values) for name, values in seconds.items()}
    lines = [
        f"{timed} images per round, of {len(files)}, {rounds} rounds, crops of {size} pixels, {cores} cores",
        f"{'':30} {'images/s':>9} {'per core':>8} {'x torchvision, per core':>23}",
    ]
    for name, value in speed.items():
        per_core = value / (cores if name.endswith(f"{cores} threads") else 1)
        lines.append(f"{name:30} {value:9.0f} {per_core:8.0f} {per_core / speed['torchvision']:23.2f}")
    for name, decibels in fidelity.items():
        lines.append(f"{name}: PSNR to torchvision's crops of the files is {decibels:.1f} dB in the median")
    for name in stored:
        loop, one = speed[f"{name}, loop"], speed[f"{name}, pipeline, 1 threads"]
        lines.append(f"{name}: the pipeline adds {loop / one - 1:.1%} to the loop")
        if cores > 1:
            all_cores = speed[f"{name}, pipeline, {cores} threads"]
            lines.append(f"{name}: {cores} threads are {all_cores / one:.2f} times as fast as one")
    lines.append(f"\nto train B/16 (estimate: {GIGAFLOPS_PER_IMAGE} GFLOP per image, {USE:.0%} of the chips' peak)")
    for consumer, (teraflops, cpus) in CONSUMERS.items():
        need = teraflops * USE * 1000 / GIGAFLOPS_PER_IMAGE
        by = {name: need / speed[f"{name}, pipeline, {cores} threads"] * cores for name in stored}
        fed = ", ".join(f"{value:.1f} from {name}" for name, value in by.items())
        lines.append(f"{consumer}, {cpus} vCPUs: {need:.0f} images/s; cores like these: {fed}")
    return "\n".join(lines)


def main() -> None:
    """Runs the command; exit code 0, 2 after a mistake that the user can mend, 1 after any other error."""
    images = flags.DEFINE_string("images", None, "The folder of images.")
    size = flags.DEFINE_integer("size", 224, "Pixels per side of a crop.", lower_bound=1)
    count = flags.DEFINE_integer("count", 320, "Images that are read.", lower_bound=1)
    short_side = flags.DEFINE_integer("short-side", 256, "Pixels of the short side of a prepared image.", lower_bound=1)
    flags.DEFINE_alias("short_side", "short-side")
    rounds = flags.DEFINE_integer("rounds", 7, "Turns that each way takes.", lower_bound=1)

    def body() -> None:
        require(bool(images.value), "--images is missing; --help explains the command")
        options = {"size": size.value, "count": count.value, "short_side": short_side.value, "rounds": rounds.value}
        with signals.cleaned_up():
            print(measure(str(images.value), **options))

    command.run(body, __doc__)


if __name__ == "__main__":
    main()

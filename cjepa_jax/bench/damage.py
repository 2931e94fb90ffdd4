"""Decodes damaged image files and the largest ones, and reports what came of it and what took longest.

    python -m cjepa_jax.bench.damage

--count=10000   damaged files
--size=224      pixels per side of a crop
--seed=0        of the damage

A damaged file is a small JPEG, PNG, WebP, BMP or GIF file in which bytes, a stretch,
the size or the end were changed. The largest files hold images at the limits of what
is decoded, and beyond them, in few bytes. Each file is decoded by both decoders and
shrunk as `cjepa_jax.data.prepare` does. The command ends with exit code 1 where any
of these raised something else than UnreadableError.
"""

import collections
import dataclasses
import io
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from absl import flags
from PIL import Image

from cjepa_jax import command
from cjepa_jax.data import decode

SHORT_SIDE = 64  # pixels, of what is shrunk


@dataclasses.dataclass
class Tally:
    """Counts what came of the files."""

    read: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # by the way of decoding
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    slowest: dict[str, tuple[float, str]] = dataclasses.field(default_factory=dict)  # seconds, name of the file
    raised: list[str] = dataclasses.field(default_factory=list)  # what was not an UnreadableError

    def add(self, way: str, name: str, decode_it: Callable[[], object]) -> float:
        """Decodes a file and returns the seconds of a core that it took."""
        start = time.process_time()  # of the processor, which a busy machine changes little
        try:
            decode_it()
            self.read[way] += 1
        except decode.UnreadableError:
            self.refused[way] += 1
        except Exception as error:
            self.raised.append(f"{way}, {name}: {type(error).__name__}: {error}")
        seconds = time.process_time() - start
        self.slowest[way] = max(self.slowest.get(way, (0.0, "")), (seconds, name))
        return seconds


def _encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def whole() -> dict[str, bytes]:
    """Makes small image files of every kind, by name."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((120, 90), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    seen = noise.copy()
    seen.putalpha(noise.convert("L"))
    deep = Image.fromarray(np.asarray(noise.convert("L")).astype(np.uint16) * 257)
    frames = {"save_all": True, "append_images": [noise.rotate(90), noise.rotate(180)]}
    return {
        "jpeg": _encoded(noise, "JPEG"),
        "progressive jpeg": _encoded(noise, "JPEG", progressive=True),
        "grey jpeg": _encoded(noise.convert("L"), "JPEG"),
        "cmyk jpeg": _encoded(noise.convert("CMYK"), "JPEG"),
        "turned jpeg": _encoded(noise, "JPEG", exif=turned),
        "png": _encoded(noise, "PNG"),
        "transparent png": _encoded(seen, "PNG"),
        "palette png": _encoded(noise.quantize(16), "PNG"),
        "16-bit png": _encoded(deep, "PNG"),
        "animated png": _encoded(noise, "PNG", **frames),
        "webp": _encoded(noise, "WEBP"),
        "lossless webp": _encoded(seen, "WEBP", lossless=True),
        "animated webp": _encoded(noise, "WEBP", **frames),
        "bmp": _encoded(noise, "BMP"),
        "palette bmp": _encoded(noise.quantize(16), "BMP"),
        "gif": _encoded(noise, "GIF"),
        "animated gif": _encoded(noise, "GIF", **frames),
    }


def damaged(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yields files with damage of every kind, and their names."""
    rng = np.random.default_rng(seed)
    files = list(whole().items())
    for number in range(count):
        name, raw = files[rng.integers(len(files))]
        codes = np.frombuffer(raw, np.uint8).copy()
        kind = ("bytes", "head", "stretch", "cut", "doubled", "size")[rng.integers(6)]
        if kind == "bytes":
            places = rng.integers(0, len(codes), rng.integers(1, 30))
            codes[places] = rng.integers(0, 256, len(places))
        elif kind == "head":
            codes[rng.integers(0, 64, rng.integers(1, 4))] = rng.integers(0, 256)
        elif kind == "size":  # most forms keep it among these bytes, which become large
            codes[rng.integers(4, 32, 2)] = (0, 255, 127)[rng.integers(3)]
        else:
            start, stop = np.sort(rng.integers(0, len(codes) + 1, 2))
            if kind == "stretch":
                codes[start:stop] = rng.integers(0, 256, stop - start) if rng.random() < 0.5 else 0
            elif kind == "cut":
                codes = codes[:stop]
            else:
                codes = np.concatenate([codes[:stop], codes[start:]])
        yield f"{name}, {kind}, number {number}", codes.tobytes()


def largest() -> Iterator[tuple[str, bytes]]:
    """Yields small files of large images, at and beyond the limits, and their names."""
    square = int(decode.MAX_PIXELS**0.5)
    long = decode.MAX_SIDE
    for width, height in ((square, square), (long, decode.MAX_PIXELS // long), (1, long), (long, 1)):
        for mode in ("1", "L", "P", "RGB", "RGBA"):
            yield f"{mode} png {width} x {height}", _encoded(Image.new(mode, (width, height)), "PNG", compress_level=1)
        for form in ("GIF", "BMP"):
            yield f"{form.lower()} {width} x {height}", _encoded(Image.new("L", (width, height)), form)
        for progressive in (False, True):
            raw = _encoded(Image.new("L", (width, height)), "JPEG", progressive=progressive)
            yield f"{'progressive ' * progressive}jpeg {width} x {height}", raw
            if progressive and width == height:
                scan = raw[raw.rindex(b"\xff\xda") : -2]
                for scans in (20, 1000):
                    yield f"jpeg {width} x {height}, {scans} scans more", raw[:-2] + scan * scans + raw[-2:]
    for width, height in ((16_383, 8_192), (1, 16_383)):  # WebP has no longer sides
        yield f"webp {width} x {height}", _encoded(Image.new("RGB", (width, height)), "WEBP", method=0)
    for width, height in ((1, 1_000_000), (1_000_000, 1), (1, long + 1), (square + 1, square + 1), (100_000, 100_000)):
        yield f"png {width} x {height}", _encoded(Image.new("1", (width, height)), "PNG")
    yield "eps named .jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 moveto showpage\n"


def measure(*, count: int, size: int, seed: int) -> tuple[str, list[str]]:
    """Decodes all files; returns the report, and a line for whatever was raised that should not have been."""
    damage, extremes = Tally(), Tally()
    times: list[tuple[float, str, str]] = []
    for tally, files in ((damage, damaged(count, seed)), (extremes, largest())):
        for name, raw in files:
            for way, decode_it in _ways(raw, size).items():
                seconds = tally.add(way, name, decode_it)
                if tally is extremes:
                    times.append((seconds, way, f"{name} ({len(raw) / 1000:,.0f} kB)"))
    lines = [f"crops of {size} pixels, the whole image; seed {seed}"]
    for title, tally in ((f"{count} damaged files", damage), (f"{len(times) // 3} large files", extremes)):
        lines.append(f"\n{title:22} {'read':>6} {'refused':>8} {'slowest, s':>11}")
        for way, (seconds, name) in tally.slowest.items():
            lines.append(f"{way:22} {tally.read[way]:6} {tally.refused[way]:8} {seconds:11.3f}  {name}")
    lines.append("\nthe slowest large files, seconds of a core")
    lines += [f"{seconds:7.2f}  {way:8} {name}" for seconds, way, name in sorted(times, reverse=True)[:10]]
    raised = damage.raised + extremes.raised
    lines.append(f"\n{len(raised)} errors other than UnreadableError")
    return "\n".join(lines), raised


def _ways(raw: bytes, size: int) -> dict[str, Callable[[], object]]:
    def crop(decoder: decode.Decoder) -> np.ndarray:
        return decode.crop(raw, lambda w, h: (0, 0, w, h), shape=(size, size), channels=3, decoder=decoder)

    return {
        "fast": lambda: crop("fast"),
        "pillow": lambda: crop("pillow"),
        "prepare": lambda: decode.shrink_file(raw, short_side=SHORT_SIDE, quality=90),
    }


def main() -> None:
    """Runs the command; exit code 0, 2 after a mistake that the user can mend, 1 after any other error."""
    count = flags.DEFINE_integer("count", 10_000, "Damaged files.", lower_bound=1)
    size = flags.DEFINE_integer("size", 224, "Pixels per side of a crop.", lower_bound=1)
    seed = flags.DEFINE_integer("seed", 0, "Of the damage.", lower_bound=0)

    def body() -> None:
        warnings.simplefilter("ignore")  # of Pillow, about what was damaged
        report, raised = measure(count=count.value, size=size.value, seed=seed.value)
        print(report)
        if raised:
            sys.exit("\n".join(raised))

    command.run(body, __doc__)


if __name__ == "__main__":
    main()

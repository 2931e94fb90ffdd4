"""Crops against torchvision's rule and Pillow's pixels; pictures of every kind; and damaged files."""

import io
import math
import pathlib
import random
import re

import cv2
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image, ImageEnhance

from cjepa_jax.data import decode
from cjepa_jax.data.augment import Augmentation, augment
from cjepa_jax.errors import UserError
from tests.helpers import encoded

PHOTOS = sorted((pathlib.Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))  # two JPEGs of 640x427

CROP = dict(scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3))


# Boxes


def torchvision_box(width, height, scale, ratio, rng):
    """RandomResizedCrop.get_params, line by line -> left, top, right, bottom."""
    for _ in range(10):
        target_area = width * height * rng.uniform(*scale)
        aspect_ratio = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            i, j = rng.randint(0, height - h), rng.randint(0, width - w)
            return j, i, j + w, i + h
    in_ratio = width / height
    if in_ratio < min(ratio):
        w = width
        h = round(w / min(ratio))
    elif in_ratio > max(ratio):
        h = height
        w = round(h * max(ratio))
    else:
        w, h = width, height
    i, j = (height - h) // 2, (width - w) // 2
    return j, i, j + w, i + h


@pytest.mark.parametrize(
    "width, height, crop",
    [(500, 375, CROP), (500, 375, dict(scale=(0.08, 0.4), ratio=(0.4, 0.9))), (8, 8, CROP), (30, 90, CROP)],
)
def test_random_box_is_distributed_as_in_torchvision(width, height, crop):
    """No statistic differs by more than two samples do by chance (Kolmogorov-Smirnov, p = 0.001)."""
    count, theirs_rng, ours_rng = 20_000, random.Random(0), np.random.default_rng(0)
    ours = np.array([decode.random_box(width, height, **crop, rng=ours_rng) for _ in range(count)])
    theirs = np.array([torchvision_box(width, height, **crop, rng=theirs_rng) for _ in range(count)])
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] <= (width, height)).all() and (ours[:, :2] < ours[:, 2:]).all()

    def statistics(boxes):
        left, top, right, bottom = boxes.T
        w, h = right - left, bottom - top
        return left, top, right, bottom, w, h, w * h, w / h, left / (width - w + 1), top / (height - h + 1)

    for a, b in zip(statistics(ours), statistics(theirs), strict=True):
        places = np.unique(np.concatenate([a, b]))
        shares = [np.searchsorted(np.sort(x), places, side="right") / count for x in (a, b)]
        assert np.abs(shares[0] - shares[1]).max() < 1.95 * math.sqrt(2 / count)


@pytest.mark.parametrize("width, height", [(1, 100), (100, 1), (1000, 3), (3, 1001), (7, 1000)])
def test_random_box_of_a_thin_image_is_central(width, height):
    expected = torchvision_box(width, height, **CROP, rng=random.Random(0))
    assert decode.random_box(width, height, **CROP, rng=np.random.default_rng(0)) == expected


@pytest.mark.parametrize(
    "width, height, fraction, box",
    [
        (8, 8, 1.0, (0, 0, 8, 8)),
        (500, 375, 1.0, (62, 0, 437, 375)),
        (256, 320, 224 / 256, (16, 48, 240, 272)),
        (400, 100, 0.5, (175, 25, 225, 75)),
    ],
)
def test_central_box_is_a_share_of_the_short_side(width, height, fraction, box):
    assert decode.central_box(width, height, aspect=1.0, fraction=fraction) == pytest.approx(box)


# Pixels


def pillow(picture, box, size):
    """What torchvision makes of a box: decode, crop, bilinear with antialiasing."""
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB").crop(box).resize((size, size), Image.BILINEAR))


def psnr(a, b):
    return 10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2)))


def crop(picture, box=None, *, size=24, channels=3, decoder="fast"):
    """The box, or all of the picture."""
    return decode.crop(
        picture, lambda w, h: box or (0, 0, w, h), shape=(size, size), channels=channels, decoder=decoder
    )


@pytest.mark.parametrize("size, box", [(224, (100, 30, 480, 370)), (32, (0, 0, 640, 427)), (224, (40, 50, 120, 110))])
def test_pillow_crops_are_torchvisions_bit_for_bit(size, box):
    for path in PHOTOS:
        picture = path.read_bytes()
        resized = crop(picture, box, size=size, decoder="pillow")
        np.testing.assert_array_equal(resized, pillow(picture, box, size))


@pytest.mark.parametrize("size", [224, 160, 96])
def test_fast_crops_are_close_to_pillows(size):
    """At least 40 dB in the median, shrunk decoding included."""
    rng = np.random.default_rng(0)
    found, aliased = [], []
    for path in PHOTOS:
        picture = path.read_bytes()
        pixels = np.asarray(Image.open(path))
        for _ in range(20):
            box = decode.random_box(640, 427, **CROP, rng=rng)
            left, top, right, bottom = box
            expected = pillow(picture, box, size)
            found.append(psnr(crop(picture, box, size=size), expected))
            aliased.append(psnr(cv2.resize(pixels[top:bottom, left:right], (size, size)), expected))
    assert np.median(found) > 40 and min(found) > 30
    assert np.median(found) > np.median(aliased) + 3  # the comparison can tell


@pytest.mark.parametrize("box", [(0, 0, 640, 427), (101, 33, 622, 417), (3, 5, 635, 420)])
def test_a_shrunk_decode_does_not_move_the_picture(box):
    """Half a pixel of the result to either side fits worse."""
    picture = PHOTOS[0].read_bytes()
    for size in (40, 100, 190):  # decoded at an eighth, a quarter and a half
        found, expected = crop(picture, box, size=size), pillow(picture, box, size)
        half = (box[2] - box[0]) // size // 2 or 1
        for dx, dy in ((half, 0), (-half, 0), (0, half), (0, -half)):
            left, top, right, bottom = box
            shifted = np.asarray(
                Image.open(PHOTOS[0])
                .crop((left + dx, top + dy, right + dx, bottom + dy))
                .resize((size, size), Image.BILINEAR)
            )
            inner = slice(2, -2)
            assert psnr(found[inner, inner], expected[inner, inner]) > psnr(found[inner, inner], shifted[inner, inner])


@pytest.mark.parametrize("scale", [0.4, 1.0, 1.2, 1.5, 2.0, 2.2, 3.0, 5.5])
def test_the_low_pass_has_the_variance_that_a_triangle_wants(scale):
    """Linear interpolation has 1/6 in the mean, Pillow's triangle scale^2 / 6: the taps add the difference."""
    taps = decode.low_pass(scale).astype(float)
    offsets = np.arange(len(taps)) - len(taps) // 2
    assert taps.sum() == pytest.approx(1) and (taps >= 0).all()
    assert (taps * offsets**2).sum() == pytest.approx(max(0, scale**2 - 1) / 6, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("form", ["png", "jpeg"])
@pytest.mark.parametrize("box, size", [((0, 0, 1280, 854), 12), ((3, 5, 1277, 43), 30), ((100, 9, 137, 851), 20)])
def test_large_reductions_are_close_to_pillows(form, box, size):
    """Including thin boxes, which are reduced along one side alone."""
    picture = encoded(Image.open(PHOTOS[0]).resize((1280, 854), Image.LANCZOS), form)
    found, expected = crop(picture, box, size=size), pillow(picture, box, size)
    assert psnr(found, expected) > 40
    assert abs(found.mean() - expected.mean()) < 0.25


@pytest.mark.parametrize("width, height", [(1, 60_000), (60_000, 1), (3000, 3000), (3000, 1500)])
def test_filtering_takes_no_more_taps_a_pixel_however_large_the_picture(width, height, monkeypatch):
    work = []

    def count(pixels, depth, taps_x, taps_y, **options):
        work.append(pixels.shape[0] * pixels.shape[1] * (len(taps_x) + len(taps_y)))
        return pixels

    monkeypatch.setattr(cv2, "sepFilter2D", count)
    crop(encoded(Image.new("1", (width, height))), size=8)
    assert sum(work) < 150 * width * height


def test_ordinary_crops_are_only_filtered(monkeypatch):
    """A crop less than 32 times as large as the result is what it was before larger ones were averaged first."""
    used = []
    monkeypatch.setattr(
        cv2, "resize", lambda *args, of=cv2.resize, **options: used.append(options) or of(*args, **options)
    )
    crop(encoded(Image.open(PHOTOS[0])), (0, 0, 639, 426), size=20)
    assert used == [{"interpolation": cv2.INTER_LINEAR}]
    crop(encoded(Image.open(PHOTOS[0])), (0, 0, 640, 426), size=20)
    assert used[1:] == [{"interpolation": cv2.INTER_AREA}, {"interpolation": cv2.INTER_LINEAR}]


@pytest.mark.parametrize("decoder", ["fast", "pillow"])
def test_channels_are_in_order_and_grey_is_luma(decoder):
    red = encoded(Image.new("RGB", (30, 20), (200, 10, 40)), "jpeg", quality=95)
    np.testing.assert_allclose(crop(red, decoder=decoder)[5, 5], (200, 10, 40), atol=3)
    np.testing.assert_allclose(
        crop(red, channels=1, decoder=decoder)[5, 5], 0.299 * 200 + 0.587 * 10 + 0.114 * 40, atol=2
    )
    grey = encoded(Image.new("L", (30, 20), 77), "jpeg")
    assert crop(grey, decoder=decoder).shape == (24, 24, 3)
    np.testing.assert_allclose(crop(grey, decoder=decoder), 77, atol=1)


# Pictures of every kind, and what is none


def photo(width=60, height=40):
    return Image.open(PHOTOS[1]).resize((width, height), Image.BILINEAR)


def noisy_16_bits():
    """[40, 60] uint16, and what a viewer with 8 bits shows."""
    shown = np.asarray(photo().convert("L"))
    return shown.astype(np.uint16) * 257, shown


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
UPRIGHT |= {7: "TRANSVERSE", 8: "ROTATE_270"}


@pytest.mark.parametrize("decoder", ["fast", "pillow"])
@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(decoder, form, orientation):
    """As stored, the picture is turned so that the tag turns it back."""
    upright = photo()
    stored = upright
    if orientation > 1:
        stored = upright.transpose(Image.Transpose[UPRIGHT[orientation]])
    options = dict(exif=exif(orientation), **({"lossless": True} if form == "webp" else {"quality": 95}))
    picture = encoded(stored, form, **options)
    seen = []
    found = decode.crop(
        picture, lambda w, h: seen.append((w, h)) or (0, 0, w, h), shape=(40, 40), channels=3, decoder=decoder
    )
    assert seen == [(60, 40)]
    expected = np.asarray(upright.resize((40, 40), Image.BILINEAR))
    assert psnr(found, expected) > 30 > psnr(found, expected[::-1]) and psnr(found, expected[:, ::-1]) < 30


def segment(kind, content):
    return b"\xff" + kind + (2 + len(content)).to_bytes(2, "big") + content


@pytest.mark.parametrize("decoder", ["fast", "pillow"])
@pytest.mark.parametrize(
    "before",
    [
        segment(b"\xe2", b"the marks of a scan: \xff\xda, and of its end: \xff\xd9"),
        2 * segment(b"\xfe", bytes(40_000)),
        b"\xff" * 3,
        200 * segment(b"\xfe", b""),
        segment(b"\xe1", b"http://ns.adobe.com/xap/1.0/\0"),
    ],
    ids=["marks", "80 KB", "fill bytes", "200 segments", "XMP"],
)
def test_exif_is_found_behind_other_segments(decoder, before):
    upright = photo()
    stored = encoded(upright.transpose(Image.Transpose.ROTATE_180), "jpeg", exif=exif(3), quality=95)
    found = crop(stored[:2] + before + stored[2:], decoder=decoder)
    assert psnr(found, crop(encoded(upright, "jpeg", quality=95), decoder=decoder)) > 30


@pytest.mark.parametrize("decoder", ["fast", "pillow"])
def test_the_orientation_of_xmp_alone_is_applied(decoder):
    upright = photo()
    stored = encoded(upright.transpose(Image.Transpose.ROTATE_180), "jpeg", quality=95)
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    found = crop(stored[:2] + segment(b"\xe1", xmp) + stored[2:], decoder=decoder)
    assert psnr(found, crop(encoded(upright, "jpeg", quality=95), decoder=decoder)) > 30


@pytest.mark.parametrize("decoder", ["fast", "pillow"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_become_eight(decoder, channels):
    deep, shown = noisy_16_bits()
    expected = crop(np.ascontiguousarray(shown), channels=channels, decoder=decoder)
    np.testing.assert_array_equal(crop(encoded(Image.fromarray(deep)), channels=channels, decoder=decoder), expected)
    colours = cv2.imencode(".png", np.dstack([deep] * 3))[1].tobytes()
    np.testing.assert_array_equal(crop(colours, channels=channels, decoder=decoder), expected)


@pytest.mark.parametrize("decoder", ["fast", "pillow"])
@pytest.mark.parametrize("mode, form", [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "webp")])
def test_transparency_lies_on_white(decoder, mode, form):
    alpha = Image.new("L", (60, 40), 255)
    alpha.paste(0, (0, 0, 30, 40))  # the left half cannot be seen
    image = Image.new("RGB", (60, 40), (50, 50, 50))
    image.putalpha(alpha)
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    options = {"lossless": True, "exact": True} if form == "webp" else {}
    found = crop(encoded(image, form, **options), size=20, decoder=decoder)
    np.testing.assert_allclose(found[:, :9], 255, atol=1)
    np.testing.assert_allclose(found[:, 11:], 50, atol=2)


@pytest.mark.parametrize("decoder", ["fast", "pillow"])
def test_the_transparent_grey_of_sixteen_bits_is_white(decoder):
    """The chunk tRNS of a PNG file names one value that cannot be seen; 8 bits of others can be the same."""
    deep = np.full((40, 60), 0x3240, np.uint16)
    deep[:, :30] = 0x3241
    found = crop(encoded(Image.fromarray(deep), "png", transparency=0x3241), size=20, decoder=decoder)
    assert (found[:, :9] == 255).all() and (found[:, 11:] == 0x32).all()


@pytest.mark.parametrize("decoder", ["fast", "pillow"])
@pytest.mark.parametrize(
    "mode, form, options",
    [
        ("RGB", "png", {}),
        ("P", "png", {}),
        ("RGB", "bmp", {}),
        ("RGB", "webp", {"lossless": True}),
        ("RGB", "jpeg", {"quality": 98, "subsampling": 0}),
        ("RGB", "jpeg", {"quality": 98, "subsampling": 0, "progressive": True}),
        ("CMYK", "jpeg", {"quality": 98}),
    ],
)
def test_every_kind_of_file_shows_the_same_picture(decoder, mode, form, options):
    image = photo().convert(mode)
    found = crop(encoded(image, form, **options), size=40, decoder=decoder)
    assert psnr(found, np.asarray(image.convert("RGB").resize((40, 40), Image.BILINEAR))) > 33


@pytest.mark.parametrize("decoder", ["fast", "pillow"])
@pytest.mark.parametrize("form", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_counts(decoder, form):
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "webp" else {}
    picture = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_allclose(crop(picture, decoder=decoder)[12, 12], (255, 0, 0), atol=2)


@pytest.mark.parametrize("decoder", ["fast", "pillow"])
@pytest.mark.parametrize("form", ["jpeg", "png", "bmp", "webp"])
def test_one_pixel_is_a_picture(decoder, form):
    found = crop(encoded(Image.new("RGB", (1, 1), (9, 99, 199)), form), decoder=decoder)
    np.testing.assert_allclose(found, np.broadcast_to((9, 99, 199), (24, 24, 3)), atol=6)


def png_bomb(side=12_000):
    """A few kilobytes that unpack to 144 megapixels of one bit, a tenth more than are allowed."""
    return encoded(Image.new("1", (side, side)), "png")


def jpeg_bomb():
    """A JPEG whose header says 30,000 x 30,000."""
    picture = bytearray(encoded(photo(), "jpeg"))
    start = picture.index(b"\xff\xc0") + 5
    picture[start : start + 4] = (30_000).to_bytes(2, "big") * 2
    return bytes(picture)


def many_scans():
    """A megapixel of progressive JPEG whose last scan is repeated until it takes minutes."""
    picture = encoded(Image.new("L", (1024, 1024)), "jpeg", progressive=True)
    scan = picture[picture.rindex(b"\xff\xda") : -2]
    return picture[:-2] + scan * 6000 + picture[-2:]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 moveto showpage\n"
JPEG = PHOTOS[0].read_bytes()
BAD = {
    "eps": EPS,
    "tiff": encoded(photo(), "tiff"),
    "jpeg 2000": encoded(photo(), "jpeg2000"),
    "icon": encoded(photo(), "ico"),
    "a png of a long side": encoded(Image.new("1", (1, 1_000_000))),
    "a jpeg of many scans": many_scans(),
    "empty": b"",
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "half of a jpeg": JPEG[: len(JPEG) // 2],
    "a jpeg without its last two bytes": JPEG[:-2],
    "only the head of a jpeg": JPEG[:300],
    "a jpeg with a hole": JPEG[:60_000] + bytes(2000) + JPEG[62_000:],
    "half of a png": encoded(photo())[:2000],
    "half of a webp": encoded(photo(), "webp")[:400],
    "half of a bmp": encoded(photo(), "bmp")[:3000],
    "a png with a flipped bit": encoded(photo())[:2000] + b"\xff\x00\xff" + encoded(photo())[2003:],
    "a jpeg bomb": jpeg_bomb(),
    "a png bomb": png_bomb(),
}


# Pillow fills the hole, as it does for torchvision.
BAD_FOR = [(d, name) for d in ("fast", "pillow") for name in BAD if (d, name) != ("pillow", "a jpeg with a hole")]


@pytest.mark.parametrize("decoder, name", BAD_FOR)
def test_what_is_no_picture_is_unreadable(decoder, name):
    with pytest.raises(decode.UnreadableError) as error:
        crop(BAD[name], decoder=decoder)
    _check_reason(name, str(error.value))


@pytest.mark.parametrize("name", [name for name in BAD if name != "half of a bmp"])
def test_what_is_no_picture_is_not_stored(name):
    """Of a BMP that was cut off, Pillow has said so already."""
    with pytest.raises(decode.UnreadableError) as error:
        decode.shrink_file(BAD[name], short_side=8, quality=90)
    _check_reason(name, str(error.value))


def _check_reason(name, reason):
    wanted = {
        "a jpeg bomb": "30000 x 30000",
        "a png bomb": "12000 x 12000",
        "a png of a long side": "1 x 1000000 pixels",
    }
    wanted |= {"a jpeg of many scans": "a JPEG of 600. scans"}
    wanted |= dict.fromkeys(("eps", "tiff", "jpeg 2000", "icon"), "not a JPEG, PNG, WebP, BMP or GIF file")
    assert re.match(wanted.get(name, ""), reason)


@pytest.mark.parametrize("decoder", ["fast", "pillow"])
def test_several_pictures_in_one_jpeg_file_are_read_as_the_first(decoder):
    picture = encoded(
        Image.new("RGB", (30, 20), "red"), "mpo", save_all=True, append_images=[Image.new("RGB", (30, 20))]
    )
    assert picture[:2] == b"\xff\xd8"
    np.testing.assert_allclose(crop(picture, decoder=decoder)[5, 5], (255, 0, 0), atol=3)


def test_a_film_behind_a_jpeg_is_no_scan():
    """Photos of telephones carry films, whose bytes look like the mark of a scan by chance."""
    photo_and_film = JPEG + random.Random(0).randbytes(2**22)
    np.testing.assert_array_equal(crop(photo_and_film), crop(JPEG))


@pytest.mark.filterwarnings("default")  # whatever the codecs say about such files
@pytest.mark.parametrize("decoder", ["fast", "pillow"])
def test_damage_of_any_kind_is_a_picture_or_unreadable(decoder):
    """Never another exception, never another shape."""
    rng, outcomes = random.Random(0), set()
    pictures = [encoded(photo(), form) for form in ("jpeg", "png", "webp", "bmp", "gif")]
    for _ in range(400):
        picture = bytearray(rng.choice(pictures))
        for _ in range(rng.choice([1, 3, 30])):
            picture[rng.randrange(len(picture))] = rng.randrange(256)
        try:
            assert crop(bytes(picture[: rng.choice([len(picture), rng.randrange(len(picture))])])).shape == (24, 24, 3)
            outcomes.add("picture")
        except decode.UnreadableError:
            outcomes.add("unreadable")
    assert outcomes == {"picture", "unreadable"}


# Augmentation


@pytest.fixture
def make_data(make_config):
    return lambda **keys: (
        make_config(
            **{"data__mean": (0.5,) * 3, "data__std": (0.5,) * 3} | {f"data__{k}": v for k, v in keys.items()}
        ).data
    )


def test_nothing_is_augmented_by_default(make_data):
    pixels = np.asarray(photo())
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    assert augment(pixels, Augmentation.of(make_data()), rng) is pixels and rng.bit_generator.state == state


@pytest.mark.parametrize("channels", [1, 3])
def test_flips_come_with_their_probability(make_data, channels):
    pixels = np.asarray(photo())[..., :channels]
    data = make_data(flip=0.3, mean=(0.5,) * channels, std=(0.5,) * channels)
    rng = np.random.default_rng(0)
    flipped = 0
    for _ in range(1000):
        found = augment(pixels, Augmentation.of(data), rng)
        if (found == pixels[:, ::-1]).all():
            flipped += 1
        else:
            np.testing.assert_array_equal(found, pixels)
    assert abs(flipped - 300) < 4 * math.sqrt(1000 * 0.3 * 0.7)


def test_colours_change_within_simclrs_bounds(make_data):
    """Of a grey picture only brightness can change (by 1 +- 0.8 s), with probability 0.8; of a red one hue too."""
    rng, data = np.random.default_rng(0), make_data(color=0.5)
    grey = np.full((4, 4, 3), 100, np.uint8)
    values = np.array([augment(grey, Augmentation.of(data), rng)[0, 0] for _ in range(1000)]).astype(int)
    assert (np.ptp(values, axis=1) <= 2).all()
    assert 59 <= values.min() < 66 and 134 < values.max() <= 141
    assert abs((values[:, 0] == 100).mean() - 0.2) < 0.05
    red = np.zeros((4, 4, 3), np.uint8) + np.array([200, 20, 20], np.uint8)
    values = np.array([augment(red, Augmentation.of(data), rng)[0, 0] for _ in range(1000)]).astype(int)
    grey_share = (np.ptp(values, axis=1) == 0).mean()
    assert abs(grey_share - 0.2) < 0.05
    hues = np.array([colour_hue(v) for v in values[np.ptp(values, axis=1) > 80]])
    assert 0.08 < np.abs(hues).max() < 0.12  # of the circle: 0.2 s, and rounding
    assert abs((hues > 0.01).mean() - (hues < -0.01).mean()) < 0.1


def colour_hue(rgb):
    """Signed distance to red, as a share of the circle."""
    import colorsys

    hue = colorsys.rgb_to_hsv(*(rgb / 255))[0]
    return hue - 1 if hue > 0.5 else hue


def test_blur_comes_with_its_probability_and_smooths(make_data):
    rng, data = np.random.default_rng(0), make_data(blur=0.5)
    dot = np.zeros((21, 21, 3), np.uint8)
    dot[10, 10] = 255
    peaks = np.array([augment(dot, Augmentation.of(data), rng)[10, 10, 0] for _ in range(400)])
    assert abs((peaks == 255).mean() - 0.5) < 0.11
    assert 8 < peaks.min() < 14  # radius 2: 255 / (2 pi 2^2) = 10.1


def test_colours_need_colours(make_data):
    with pytest.raises(UserError, match=r"data\.color needs RGB"):
        make_data(color=1.0, mean=(0.5,), std=(0.5,))


def test_solarisation_comes_with_its_probability_and_inverts_bright_values():
    rng, view = np.random.default_rng(0), Augmentation((1.0, 1.0), (1.0, 1.0), solarize=0.3)
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    inverted = np.where(ramp < 128, ramp, 255 - ramp)
    found = [augment(ramp, view, rng) for _ in range(400)]
    share = np.mean([(pixels == inverted).all() for pixels in found])
    assert abs(share - 0.3) < 0.1
    assert all((pixels == inverted).all() or (pixels == ramp).all() for pixels in found)


@pytest.mark.parametrize("saturation", [1.0, 0.5])
def test_saturation_has_a_strength_of_its_own(monkeypatch, saturation):
    factors = {"Brightness": [], "Contrast": [], "Color": []}
    for name, found in factors.items():
        enhance = getattr(ImageEnhance, name).enhance
        record = lambda self, factor, found=found, enhance=enhance: (found.append(factor), enhance(self, factor))[1]  # noqa: E731
        monkeypatch.setattr(getattr(ImageEnhance, name), "enhance", record)
    view = Augmentation((1.0, 1.0), (1.0, 1.0), color=0.5, saturation=saturation)
    rng = np.random.default_rng(0)
    for _ in range(600):
        augment(np.zeros((4, 4, 3), np.uint8), view, rng)
    strengths = {"Brightness": 0.4, "Contrast": 0.4, "Color": 0.4 * saturation}
    for name, strength in strengths.items():
        lowest, highest = min(factors[name]), max(factors[name])
        assert 1 - strength <= lowest < 1 - 0.95 * strength and 1 + 0.95 * strength < highest <= 1 + strength

"""Videos in DAVIS' layout whose answer is known, and what is said about folders that are not in it."""

import numpy as np
import pytest
from etils import epath
from PIL import Image

from cjepa_jax.errors import UserError
from cjepa_jax.evaluate import davis

PATCH, ROWS, COLUMNS = 8, 8, 16
FRAMES = 11  # more than the memory holds
WIDTH = 3  # patches, of each of the two objects


def bands(t):
    """[ROWS, COLUMNS]: background, and two objects as high as the image, which move apart and touch the borders."""
    labels = np.zeros((ROWS, COLUMNS), np.uint8)
    shift = min(t // 2, 5)
    labels[:, 5 - shift : 5 - shift + WIDTH] = 1
    labels[:, 8 + shift : 8 + shift + WIDTH] = 2
    return labels


def colours(labels):
    """A picture of the labels [H, W, 3]: the channel says which, the strength where on the object (or background)."""
    picture = np.zeros((ROWS, COLUMNS, 3), np.uint8)
    for k in range(3):
        rows, columns = np.nonzero(labels == k)
        first = columns.min(initial=COLUMNS) if k else 0
        picture[rows, columns, k] = 120 + (rows * 16 + columns - first)
    return picture.repeat(PATCH, axis=0).repeat(PATCH, axis=1)


def write(root, name, labels_of=bands, size=None):
    for kind in ("JPEGImages", "Annotations"):
        (root / kind / "480p" / name).mkdir(parents=True)
    for t in range(FRAMES):
        labels = labels_of(t)
        picture = Image.fromarray(colours(labels))
        mask = Image.fromarray(labels.repeat(PATCH, axis=0).repeat(PATCH, axis=1))
        if size:
            picture, mask = (x.resize(size, Image.Resampling.NEAREST) for x in (picture, mask))
        mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        picture.save(root / f"JPEGImages/480p/{name}/{t:05}.jpg", "png")  # without loss; content counts
        mask.save(root / f"Annotations/480p/{name}/{t:05}.png")
    listing = root / "ImageSets/2017/val.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    with listing.open("a") as file:
        file.write(f"{name}\n")


def centres(frames):
    """The pixel in the middle of each patch, [n, N, 3]."""
    start = PATCH // 2
    return frames[:, start::PATCH, start::PATCH].reshape(len(frames), -1, 3)


def by_colour(frames):
    """Features: much of the very colour, and a little of its channel, by which what was hidden is known."""
    colour = centres(frames)
    kind, strength = colour.argmax(axis=-1), colour.max(axis=-1)
    return np.concatenate([np.eye(768)[kind * 256 + strength], 0.5 * np.eye(3)[kind]], axis=-1).astype(np.float32)


def by_place(frames):
    """Features that see nothing but where a patch is."""
    n = centres(frames).shape[1]
    return np.broadcast_to(np.eye(n, dtype=np.float32), (len(frames), n, n))


def track(root, encode, **settings):
    options = {"channels": 3, "short_side": ROWS * PATCH, "patch_size": PATCH, "batch_size": 4} | settings
    return {video.name: davis.track(video, encode, **options) for video in davis.find(str(root))}


def test_perfect_features_track_perfectly(tmp_path):
    write(tmp_path, "bands")
    found = track(tmp_path, by_colour)["bands"]
    truth = np.stack([bands(t) for t in range(FRAMES)]).repeat(PATCH, axis=1).repeat(PATCH, axis=2)
    np.testing.assert_array_equal(found.masks, truth)
    assert found.scores == {"J": [1, 1], "F": [1, 1]}


def test_blind_features_leave_the_masks_where_they_are(tmp_path):
    write(tmp_path, "bands")
    result = track(tmp_path, by_place)["bands"]
    assert (result.masks == result.masks[0]).all()
    shifts = [min(t // 2, 5) for t in range(1, FRAMES - 1)]
    overlap = np.mean([max(WIDTH - s, 0) / min(WIDTH + s, 2 * WIDTH) for s in shifts])
    assert result.scores["J"] == pytest.approx([overlap, overlap])


def test_frames_of_any_size_are_scored_at_their_own(tmp_path):
    """Of 284 x 128 pixels, which are encoded as 128 x 64."""
    write(tmp_path, "bands", size=(284, 128))
    found = track(tmp_path, by_colour)["bands"]
    assert found.masks.shape == (FRAMES, 128, 284)
    assert min(found.scores["J"]) > 0.97 and min(found.scores["F"]) > 0.97


def test_the_summary_is_over_all_objects(tmp_path):
    """Three of them, in two videos: not a mean of means."""
    write(tmp_path, "two")
    write(tmp_path, "one", lambda t: np.where(bands(0) == 1, 1, 0).astype(np.uint8))
    results = track(tmp_path, by_place)
    moving, still = results["two"].scores, results["one"].scores
    assert still == {"J": [1], "F": [1]}
    summary = davis.summary(results)
    assert summary["J"] == pytest.approx((sum(moving["J"]) + 1) / 3)
    assert summary["F"] == pytest.approx((sum(moving["F"]) + 1) / 3)
    assert summary["J&F"] == pytest.approx((summary["J"] + summary["F"]) / 2)
    assert summary["objects"] == {"two": moving, "one": still}


@pytest.mark.parametrize(
    "size, patch_size, expected",
    [
        ((854, 480), 16, (832, 480)),  # most of DAVIS, as in DINO
        ((854, 480), 8, (832, 480)),
        ((854, 480), 14, (826, 476)),
        ((480, 854), 16, (480, 832)),
        ((1920, 1080), 16, (832, 480)),
        ((500, 500), 16, (448, 480)),
    ],
)
def test_frames_are_encoded_at_480(size, patch_size, expected):
    assert davis.frame_size(*size, short_side=480, patch_size=patch_size) == expected


def remove(path):
    return lambda root: (root / path).unlink()


def replace(path, content):
    return lambda root: (root / path).write_bytes(content)


def without_objects(root):
    path = root / "Annotations/480p/bands/00000.png"
    Image.fromarray(np.full((64, 128), 255, np.uint8)).save(path)


def in_colour(root):
    Image.new("RGB", (128, 64)).save(root / "Annotations/480p/bands/00003.png")


def of_another_size(root):
    Image.new("P", (120, 64)).save(root / "Annotations/480p/bands/00003.png")


@pytest.mark.parametrize(
    "damage, says",
    [
        (remove("ImageSets/2017/val.txt"), r"ImageSets/2017/val\.txt is missing"),
        (replace("ImageSets/2017/val.txt", b"\n"), r"val\.txt names no videos"),
        (replace("ImageSets/2017/val.txt", b"bear\n"), r"JPEGImages/480p/bear is missing"),
        (remove("Annotations/480p/bands/00000.png"), r"bands/00000\.png is missing: the mask of the first frame"),
        (remove("Annotations/480p/bands/00004.png"), r"bands/00004\.png is missing, and 0 more"),
        (replace("Annotations/480p/bands/00004.png", b"x"), r"bands/00004\.png cannot be read"),
        (replace("JPEGImages/480p/bands/00004.jpg", b"x"), r"bands/00004\.jpg cannot be read"),
        (without_objects, r"00000\.png has no object"),
        (in_colour, r"00003\.png is a RGB image"),
        (of_another_size, r"00003\.png is \(64, 120\)"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, damage, says):
    write(tmp_path, "bands")
    damage(tmp_path)
    with pytest.raises(UserError, match=says):
        track(tmp_path, by_colour)


def test_the_folder_must_be_given():
    with pytest.raises(UserError, match=r"davis\.data_dir is empty"):
        davis.find("")


def test_a_video_of_two_frames_is_refused(tmp_path):
    write(tmp_path, "bands")
    for path in (tmp_path / "JPEGImages/480p/bands").glob("*.jpg"):
        if path.stem > "00001":
            path.unlink()
    with pytest.raises(UserError, match=r"holds 2 \.jpg files"):
        davis.find(str(tmp_path))


def test_a_short_side_below_a_patch_is_refused():
    with pytest.raises(UserError, match=r"davis\.short_side = 10 is too small for patches of 16"):
        davis.frame_size(854, 480, short_side=10, patch_size=16)


def test_a_mask_of_another_format_is_refused(tmp_path):
    """Pillow would call Ghostscript for this one."""
    (tmp_path / "00000.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(UserError, match=r"00000\.png cannot be read: not a JPEG, PNG"):
        davis.read_mask(epath.Path(tmp_path / "00000.png"))

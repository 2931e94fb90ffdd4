"""Damaged and hostile checkpoints of every format: each is converted, or refused in one line, in little memory."""

import collections
import json
import os
import pickle
import resource
import shutil
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import torch
from etils import epath
from hypothesis import strategies as st

from cjepa_jax import pretrained
from cjepa_jax.errors import UserError
from cjepa_jax.interop.conversion import convert
from cjepa_jax.interop.tensors import ImportOptions
from cjepa_jax.models.predictor import PredictorConfig
from cjepa_jax.train import orbax
from tests.test_convert import make_networks
from tests.test_fuzz_settings import explored

NAMES = {"orbax": "ours", "ijepa": "theirs.pth.tar", "timm": "timm.safetensors", "transformers": "folder"}
MEGABYTES = 700  # that the process may grow by: what JAX, PyTorch and Orbax take when they are first used among it
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
VALUES = (None, True, -1, 0, 1, 3, 2**40, 1e308, float("nan"), float("inf"), "", "x", "64x9999x4", [], [None] * 3, {})
VALUES += (
    [[1], [2], [3]],
    ["a", "b", "c"],
    [0.5, 0.5],
    [300.0] * 3,
    [0.0] * 3,
    {"0": None},
    {"²": "x"},
    "\ud800",
    10**30,
)


def to(source, folder):
    """Converts to timm, the quickest to write."""
    output = folder / "out.safetensors"
    output.unlink(missing_ok=True)
    return convert(str(source), str(output), "timm", encoder=None, force=False, options=ImportOptions(num_heads=2))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A small checkpoint in every format, converted from one another."""
    folder = tmp_path_factory.mktemp("good")
    networks = make_networks("16x1x2", image=8, patch=4, predictor=PredictorConfig(width=8, depth=1))
    pretrained.save(epath.Path(folder / "ours"), networks)
    for kind, name in list(NAMES.items())[1:]:
        options = ImportOptions()
        convert(str(folder / "ours"), str(folder / name), kind, encoder=None, force=False, options=options)
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Where Orbax fails, nobody waits for its other threads to have said so."""
    monkeypatch.setattr(orbax.time, "sleep", lambda seconds: None)


def refused(source, tmp_path, message):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as error:
        to(source, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 3000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024 * MEGABYTES
    assert not (tmp_path / "out.safetensors").exists()


# What a file may claim.


def test_a_width_that_no_other_tensor_has_is_found_before_anything_of_that_size_is_made(good, tmp_path):
    tensors = safetensors.numpy.load_file(good / NAMES["timm"])
    tensors["patch_embed.proj.bias"] = np.zeros(10_000_000, np.float32)  # 40 MB
    safetensors.numpy.save_file(tensors, tmp_path / "wide.safetensors")
    refused(tmp_path / "wide.safetensors", tmp_path, "pos_embed is (1, 4, 16), and should be (1, 4, 10000000)")


def test_a_tensor_that_repeats_one_number_is_not_written_out(good, tmp_path):
    content = torch.load(good / NAMES["ijepa"], weights_only=True)
    content["target_encoder"]["blocks.0.mlp.fc2.weight"] = torch.zeros(1).expand(100_000, 100_000)
    torch.save(content, tmp_path / "wide.pth.tar")
    refused(tmp_path / "wide.pth.tar", tmp_path, "its target_encoder claims 400000")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("data.image_size", 100_000, "data.image_size must be in [1, 8192], got 100000"),
        ("data.image_size", 8192, "2048x2048 patches are too many for a width of 16"),
        ("data.mean", None, "config.json is damaged: data.mean is missing"),
        ("data.mean", [None] * 3, "data.mean must be float, got None"),
        ("data.std", [1e-30] * 3, "data.std must be in [0.004, 1], got 1e-30"),
        ("model.size", "16x100000x2", "model.size = '16x100000x2': every number must be positive, and"),
        ("model.size", "16384x256x2x64", "does not fit the config"),
        ("predictor.depth", 10**9, "predictor.depth must be in [1, 256], got 1000000000"),
        ("epoch", "x", "epoch must be a number of epochs"),
        ("classes", 5, "classes must be a list of names"),
    ],
)
def test_what_our_own_config_may_claim(key, value, message, good, tmp_path):
    shutil.copytree(good / "ours", tmp_path / "ours")
    file = tmp_path / "ours" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    refused(tmp_path / "ours", tmp_path, message)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("preprocessor_config.json", {"image_mean": None}, "it says mean = None"),
        ("preprocessor_config.json", {"image_mean": ["a"] * 3}, "it says mean = ('a', 'a', 'a')"),
        ("preprocessor_config.json", {"image_std": [58.0] * 3}, "data.std must be in [0.004, 1], got 58.0"),
        ("config.json", {"num_attention_heads": None}, "it says num_heads = None"),
        ("config.json", {"num_attention_heads": 10**9}, "must be positive, and WIDTHxDEPTHxHEADSxMLP_RATIO at most"),
        ("config.json", {"id2label": ["x"]}, "an id2label that does not number its names from 0"),
        ("config.json", {"id2label": {"²": "x"}}, "an id2label that does not number its names from 0"),
        ("config.json", {"id2label": {"0": None}}, "its names of classes must be a list of names"),
    ],
)
def test_what_a_folder_of_transformers_may_claim(file, change, message, good, tmp_path):
    shutil.copytree(good / "folder", tmp_path / "folder")
    path = tmp_path / "folder" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        convert(
            str(tmp_path / "folder"), str(tmp_path / "o"), "orbax", encoder=None, force=False, options=ImportOptions()
        )
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ours", "folder"])
def test_json_that_is_deep_or_far_too_long_and_a_pipe_in_its_place(name, good, tmp_path):
    shutil.copytree(good / name, tmp_path / name)
    file = tmp_path / name / "config.json"
    file.write_text(DEEP)
    refused(tmp_path / name, tmp_path, "config.json is damaged (maximum recursion depth exceeded")
    with file.open("wb") as opened:
        opened.truncate(10**10)  # a hole, which takes no room on the disk
    refused(tmp_path / name, tmp_path, "config.json is damaged: 10000000000 bytes are too many")
    file.unlink()
    os.mkfifo(file)
    refused(tmp_path / name, tmp_path, "config.json is missing" if name == "ours" else "is not a checkpoint")


def test_pipes_and_pickles_that_end_too_soon(good, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", tmp_path, "is neither a file nor a folder")
    for content in (b"\x80", b"\x80\x02", b"\x80\x02}q\x00(X\x05", pickle.dumps([1])[:-1], b"\x80\x02I9\n."):
        (tmp_path / "cut.pth.tar").write_bytes(content)
        refused(tmp_path / "cut.pth.tar", tmp_path, f"--input {tmp_path}/cut.pth.tar ")


def test_a_folder_named_by_a_superscript_digit_is_no_step(good, tmp_path):
    shutil.copytree(good / "ours", tmp_path / "ours")
    for name in ("²", "٣", "9" * 30):
        (tmp_path / "ours" / "checkpoints" / name).mkdir()
    assert "target_encoder" in to(tmp_path / "ours", tmp_path)
    (tmp_path / "ours" / "checkpoints" / "7").rename(tmp_path / "ours" / "checkpoints" / "⁷")
    refused(tmp_path / "ours", tmp_path, "holds no checkpoint")


# Damage.


def rewritten(kind, name, raw, key, value):
    """Changes one value of a file that is JSON, or begins with it; gives other files back as they are."""
    if name.endswith(".json"):
        content = json.loads(raw)
        keys = sorted(content)
        return json.dumps(content | {keys[key % len(keys)]: value}).encode() if keys else raw
    if name.endswith(".safetensors"):
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        keys = sorted(header)
        chosen = keys[key % len(keys)]
        if chosen == "__metadata__":
            inside = sorted(header[chosen])
            header[chosen][inside[key // 7 % len(inside)]] = json.dumps(value)
        else:
            header[chosen][("dtype", "shape", "data_offsets")[key // 7 % 3]] = value
        made = json.dumps(header).encode()
        return struct.pack("<Q", len(made)) + made + raw[8 + length :]
    return raw


def damaged(raw, what, place, amount):
    """Flips bits, cuts, zeroes, repeats or fills a stretch of some bytes."""
    raw, at = bytearray(raw), int(place * max(1, len(raw) - 1))
    if what == "bit" and raw:
        raw[at] ^= 1 << (amount % 8)
    elif what == "cut":
        del raw[at:]
    elif what == "zero":
        raw[at : at + amount] = bytes(len(raw[at : at + amount]))
    elif what == "repeat":
        raw[at:at] = raw[at : at + amount]
    elif what == "fill":
        raw[at : at + amount] = b"\xff" * len(raw[at : at + amount])
    return bytes(raw)


def unpacked(path):
    """The members of a .pth.tar, which is a zip archive, without their checksums."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# Orbax's other reads of a damaged checkpoint fail after the first one was reported, to nobody.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("examples", [20, pytest.param(150, marks=pytest.mark.slow)])
def test_damaged_files_of_every_format(kind, examples, good, tmp_path):
    source, seen = good / NAMES[kind], collections.Counter()
    if source.is_file():
        files = {"": source.read_bytes()}
    else:
        files = {str(p.relative_to(source)): p.read_bytes() for p in sorted(source.rglob("*")) if p.is_file()}
    inside = {f"!{name}": raw for name, raw in unpacked(source).items()} if kind == "ijepa" else {}
    spoiled = tmp_path / NAMES[kind]
    draws = (
        st.sampled_from([*files, *inside]),
        st.sampled_from(["bit", "cut", "zero", "repeat", "fill", "value", "value"]),
    )
    numbers = st.floats(0, 1), st.integers(0, 2000), st.sampled_from(VALUES)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @explored(examples, *draws, *numbers)
    def check(name, what, place, amount, value):
        shutil.rmtree(spoiled, ignore_errors=True)
        for each, raw in files.items():
            path = spoiled / each if each else spoiled
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
        if name.startswith("!"):
            with zipfile.ZipFile(spoiled, "w") as archive:
                for member, raw in inside.items():
                    archive.writestr(member[1:], damaged(raw, what, place, amount) if member == name else raw)
        else:
            path, raw = (spoiled / name if name else spoiled), files[name]
            new = (
                rewritten(kind, path.name, raw, amount, value) if what == "value" else damaged(raw, what, place, amount)
            )
            path.write_bytes(new)
        try:
            to(spoiled, tmp_path)
            seen["converted"] += 1
        except UserError as error:
            assert "\n" not in str(error) and 10 < len(str(error)) < 8000, str(error)
            assert not (tmp_path / "out.safetensors").exists()
            seen["refused"] += 1

    check()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    print(f"{kind}: {dict(seen)}, {grown:.0f} MB more than before")
    assert seen["refused"] and grown < MEGABYTES

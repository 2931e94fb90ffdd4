"""Checks conversion of checkpoints against the programs whose formats they have."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from etils import epath
from PIL import Image

import cjepa_jax
from cjepa_jax import pretrained
from cjepa_jax.config import Model
from cjepa_jax.errors import UserError
from cjepa_jax.interop import card, conversion, formats
from cjepa_jax.interop.conversion import convert, in_our_format
from cjepa_jax.interop.tensors import ImportOptions
from cjepa_jax.models.masking import Masks
from cjepa_jax.models.predictor import PredictorConfig, build_predictor
from cjepa_jax.models.vit import build_encoder, parse_size, patchify
from cjepa_jax.pretrained import Pretrained
from cjepa_jax.train.loop import train
from tests import commands, torch_ijepa
from tests.conftest import small
from tests.helpers import lines, same

ROOT = pathlib.Path(__file__).parents[1]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = {"orbax": "ours", "ijepa": "theirs.pth.tar", "timm": "timm.safetensors", "transformers": "folder"}
ODD = "24x2x3x2.5"  # no two of its numbers are equal, so none can be mistaken for another
PREDICTOR = PredictorConfig(width=12, depth=2)
TOLERANCE = 1e-4  # relative to the largest feature


def to(source, output, kind, *, encoder=None, force=False, **options):
    return convert(str(source), str(output), kind, encoder=encoder, force=force, options=ImportOptions(**options))


def make_networks(size=ODD, *, image=32, patch=8, predictor=PREDICTOR, classes=0, seed=0):
    """Returns networks of random numbers; no parameter has its initial value, and the two encoders differ."""
    model = Model(size=size, patch_size=patch, dtype="float32")
    networks = Pretrained(model, predictor, image, MEAN, STD, 7, {}, tuple(f"class {i}" for i in range(classes)))
    shapes = pretrained.shapes(networks, classes=classes)
    if not classes:
        shapes.pop("head")
    random = np.random.default_rng(seed)

    def value(path, x):
        noise, name = random.standard_normal(x.shape, np.float32), jax.tree_util.keystr(path)
        if "kernel" in name or "mask_token" in name:
            return noise / np.float32(np.sqrt(x.shape[0]))
        return ("scale" in name) + np.float32(0.2) * noise

    return networks._replace(params={k: jax.tree_util.tree_map_with_path(value, v) for k, v in shapes.items()})


def features_of_ours(path, images, network="target_encoder"):
    networks = pretrained.load(epath.Path(path), (network,))
    encoder = build_encoder(networks.model, grid=networks.grid)
    return np.asarray(encoder.apply({"params": networks.params[network]}, patchify(images, networks.model.patch_size)))


def features_of_theirs(path, images, size, network="target_encoder"):
    content = torch.load(path, weights_only=True)
    width, depth, heads, ratio = parse_size(size)
    patch = content[network]["patch_embed.proj.weight"].shape[-1]
    encoder = torch_ijepa.Encoder(
        width=width,
        depth=depth,
        heads=heads,
        hidden=round(width * ratio),
        grid=tuple(n // patch for n in images.shape[1:3]),
        patch=patch,
    )
    encoder.load_state_dict(content[network])
    return run(encoder, images)


def features_of_timm(path, images, size):
    import timm

    width, depth, heads, ratio = parse_size(size)
    with torch.device("cpu"):
        model = timm.create_model(
            "vit_base_patch16_gap_224",
            img_size=images.shape[1:3],
            patch_size=patch_of(path),
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=ratio,
            num_classes=0,
            checkpoint_path=str(path),
        )
    return run(model.eval().forward_features, images)


def patch_of(path):
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return file.get_slice("patch_embed.proj.weight").get_shape()[-1]


def features_of_transformers(path, images, size=None):
    from transformers import IJepaModel

    model, report = IJepaModel.from_pretrained(path, output_loading_info=True, local_files_only=True)
    assert not report["missing_keys"] and not report["mismatched_keys"] and not report["error_msgs"]
    assert {name.split(".")[0] for name in report["unexpected_keys"]} <= {"classifier"}
    return run(lambda x: model.eval()(x).last_hidden_state, images)


def run(model, images):
    with torch.inference_mode():
        return model(torch.tensor(images).permute(0, 3, 1, 2)).numpy()


def features(kind, path, images, size):
    if kind == "orbax":
        return features_of_ours(path, images)
    return {"ijepa": features_of_theirs, "timm": features_of_timm, "transformers": features_of_transformers}[kind](
        path, images, size
    )


def assert_close(found, wanted):
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def make_images(size, seed=1):
    return np.random.default_rng(seed).standard_normal((2, size, size, 3), np.float32)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Makes a folder that holds the same networks in every format."""
    folder = tmp_path_factory.mktemp("odd")
    pretrained.save(epath.Path(folder / "ours"), make_networks())
    for kind, name in NAMES.items():
        if kind != "orbax":
            to(folder / "ours", folder / name, kind)
    return folder


# Features.


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("kind", NAMES)
def test_every_pair_of_formats_gives_the_same_features(odd, tmp_path, source, kind):
    images = make_images(32)
    to(odd / NAMES[source], tmp_path / NAMES[kind], kind)
    assert_close(features(kind, tmp_path / NAMES[kind], images, ODD), features_of_ours(odd / "ours", images))


def check_full_size(tmp_path, size, patch, pairs):
    images, networks = make_images(224)[:1], make_networks(size, image=224, patch=patch, predictor=None)
    del networks.params["encoder"]
    pretrained.save(epath.Path(tmp_path / "ours"), networks)
    wanted = features_of_ours(tmp_path / "ours", images)
    for source, kind in pairs:
        output = tmp_path / f"from_{source}_{NAMES[kind]}"
        path = tmp_path / ("ours" if source == "orbax" else f"from_orbax_{NAMES[source]}")
        to(path, output, kind)
        found = features(kind, output, images, size)
        print(f"{size}/{patch} {source} -> {kind}: {np.abs(found - wanted).max() / np.abs(wanted).max():.1e}")
        assert_close(found, wanted)


def test_features_at_224_pixels(tmp_path):
    """Converts a Ti/16 by three pairs of formats; other pairs read the same files."""
    check_full_size(tmp_path, "Ti", 16, [("orbax", "ijepa"), ("ijepa", "timm"), ("orbax", "transformers")])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "patch"), [("B", 16), ("H", 14)])
def test_every_pair_at_full_size(tmp_path, size, patch):
    others = [kind for kind in NAMES if kind != "orbax"]
    pairs = [("orbax", kind) for kind in others]
    pairs += [(source, kind) for source in others for kind in NAMES if source != kind]
    check_full_size(tmp_path, size, patch, pairs)


def test_the_predictor_of_ijepa(odd):
    loaded = pretrained.load(epath.Path(odd / "ours"), ("predictor",))
    random = np.random.default_rng(2)
    context, order = random.standard_normal((2, 6, 24), np.float32), random.permutation(16)
    visible, hidden = order[:6], order[6:10]
    ours = jax.jit(build_predictor(loaded.predictor, loaded.model, grid=(4, 4)).apply)(
        {"params": loaded.params["predictor"]},
        jnp.asarray(context),
        Masks(
            jnp.tile(visible, (2, 1)), jnp.ones((2, 6), bool), jnp.tile(hidden, (2, 1, 1)), jnp.ones((2, 1, 4), bool)
        ),
    )[:, 0]
    reference = torch_ijepa.Predictor(features=24, width=12, depth=2, heads=3, grid=(4, 4))
    reference.load_state_dict(torch.load(odd / NAMES["ijepa"], weights_only=True)["predictor"])
    with torch.inference_mode():
        theirs = reference(torch.tensor(context), torch.tensor(visible), torch.tensor(hidden)).numpy()
    assert_close(np.asarray(ours), theirs)


def test_which_encoder(odd, tmp_path):
    images = make_images(32)
    to(odd / "ours", tmp_path / "folder", "transformers", encoder="encoder")
    context = features_of_ours(odd / "ours", images, "encoder")
    assert_close(features_of_transformers(tmp_path / "folder", images), context)
    assert_close(features_of_theirs(odd / NAMES["ijepa"], images, ODD, "encoder"), context)
    with pytest.raises(AssertionError):
        assert_close(features_of_ours(odd / "ours", images), context)
    with pytest.raises(UserError, match="--encoder goes with timm and transformers"):
        to(odd / "ours", tmp_path / "x", "ijepa", encoder="encoder")
    with pytest.raises(UserError, match="has no encoder, only target_encoder"):
        to(odd / "folder", tmp_path / "x.safetensors", "timm", encoder="encoder")


def test_timm_pools_after_the_norm_as_we_do(odd):
    """timm's models with fc_norm would pool before the norm, and they refuse the file."""
    import timm

    call = to(odd / "ours", odd / "call.safetensors", "timm").splitlines()[-1]
    images = make_images(32)
    model = eval(call, {"timm": timm}).eval()
    wanted = features_of_ours(odd / "ours", images).mean(axis=1)
    assert_close(run(model, images), wanted)
    with pytest.raises(RuntimeError, match="fc_norm"):
        eval(call.replace("num_classes", "fc_norm=True, num_classes"), {"timm": timm})


def test_a_classifier_keeps_its_head(tmp_path):
    import timm
    from transformers import IJepaForImageClassification

    networks = make_networks(predictor=None, classes=5)
    del networks.params["encoder"]
    pretrained.save(epath.Path(tmp_path / "ours"), networks)
    images = make_images(32)
    head = networks.params["head"]
    logits = features_of_ours(tmp_path / "ours", images).mean(axis=1) @ head["kernel"] + head["bias"]
    call = to(tmp_path / "ours", tmp_path / "a.safetensors", "timm").splitlines()[-1]
    assert_close(run(eval(call, {"timm": timm}).eval(), images), logits)
    to(tmp_path / "a.safetensors", tmp_path / "folder", "transformers")
    model, report = IJepaForImageClassification.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.id2label[3] == "class 3" and model.config.label2id["class 4"] == 4
    assert_close(run(lambda x: model.eval()(x).logits, images), logits)
    assert_close(features_of_transformers(tmp_path / "folder", images), features_of_ours(tmp_path / "ours", images))
    to(tmp_path / "folder", tmp_path / "again", "orbax")
    again = pretrained.load(epath.Path(tmp_path / "again"), ("target_encoder", "head"))
    same(again.params, networks.params)
    assert again.classes == networks.classes


@pytest.mark.parametrize("encoder", [None, "ema_encoder"])
def test_a_fine_tuned_network_gives_its_parameters_or_their_average(tmp_path, encoder):
    networks = make_networks(predictor=None, classes=5)
    params = networks.params
    average = {"kernel": params["head"]["kernel"][::-1], "bias": params["head"]["bias"] + 1}
    tuned = {key: params[key] for key in ("encoder", "head")} | {
        "ema_encoder": params["target_encoder"],
        "ema_head": average,
    }
    pretrained.save(epath.Path(tmp_path / "ours"), networks._replace(params=tuned))
    to(tmp_path / "ours", tmp_path / "folder", "transformers", encoder=encoder)
    to(tmp_path / "folder", tmp_path / "again", "orbax")
    again = pretrained.load(epath.Path(tmp_path / "again"), ("target_encoder", "head")).params
    same(again["head"], average if encoder else tuned["head"])
    same(again["target_encoder"], tuned["ema_encoder" if encoder else "encoder"])
    card = (tmp_path / "folder" / "README.md").read_text()
    assert f"from the {'ema encoder' if encoder else 'encoder'}" in card


def test_images_are_prepared_as_for_evaluation(odd):
    """Takes a picture whose short side already has the size that it would be resized to, so only the crop counts."""
    from transformers import AutoImageProcessor, pipeline

    side = round(32 / 0.875)
    random = np.random.default_rng(3)
    picture = random.integers(0, 256, (side, side + 12, 3)).astype(np.uint8)
    crop = picture[(side - 32) // 2 :, (side + 12 - 32) // 2 :][:32, :32]
    found = AutoImageProcessor.from_pretrained(odd / "folder")(Image.fromarray(picture), return_tensors="np")
    pixels = np.asarray(found["pixel_values"]).transpose(0, 2, 3, 1)
    normalised = ((crop / 255 - np.array(MEAN)) / np.array(STD)).astype(np.float32)[None]
    np.testing.assert_allclose(pixels, normalised, atol=1e-5)
    extract = pipeline("image-feature-extraction", model=str(odd / "folder"))
    assert_close(np.asarray(extract(Image.fromarray(picture)), np.float32), features_of_ours(odd / "ours", normalised))


# Files.


class Code:
    def __reduce__(self):
        return os.mkdir, ("made_by_the_pickle",)


def release(path, *, prefix="module.", width=24, grid=4, **changes):
    """Writes a .pth.tar of random numbers with everything that I-JEPA's training saves; returns its content."""
    torch.manual_seed(0)
    sizes = {"width": width, "depth": 2, "heads": 3, "hidden": 60, "grid": (grid, grid), "patch": 8}
    networks = {part: torch_ijepa.Encoder(**sizes) for part in ("encoder", "target_encoder")}
    networks["predictor"] = torch_ijepa.Predictor(features=width, width=12, depth=2, heads=3, grid=(grid, grid))
    optimizer = torch.optim.AdamW(networks["encoder"].parameters(), lr=1e-3)
    sum(p.sum() for p in networks["encoder"].parameters()).backward()
    optimizer.step()
    content = {
        part: {prefix + name: x.clone() for name, x in network.state_dict().items()}
        for part, network in networks.items()
    }
    content |= {"opt": optimizer.state_dict(), "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0}}
    content |= {"epoch": 300, "loss": 0.125, "batch_size": 128, "world_size": 16, "lr": 1e-6}
    torch.save(content | changes, path)
    return content


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_round_trip_of_a_release_bit_for_bit(tmp_path, prefix):
    content = release(tmp_path / "in.pth.tar", prefix=prefix)
    to(tmp_path / "in.pth.tar", tmp_path / "ours", "orbax", num_heads=3)
    to(tmp_path / "ours", tmp_path / "out.pth.tar", "ijepa")
    again = torch.load(tmp_path / "out.pth.tar", weights_only=True)
    assert [again.pop(name) for name in ("epoch", "num_heads", "mean", "std")] == [300, 3, MEAN, STD]
    assert again.keys() == {"encoder", "predictor", "target_encoder"}
    for part, tensors in again.items():
        assert {prefix + name for name in tensors} == content[part].keys()
        for name, x in tensors.items():
            assert x.dtype == torch.float32 and torch.equal(x, content[part][prefix + name]), name


def test_files_of_old_pytorch(tmp_path):
    content = release(tmp_path / "new.pth.tar")
    torch.save(content, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    for name in ("new", "old"):
        to(tmp_path / f"{name}.pth.tar", tmp_path / f"{name}.safetensors", "timm", num_heads=3)
    new, old = (safetensors.numpy.load_file(tmp_path / f"{name}.safetensors") for name in ("new", "old"))
    same(new, old)


def test_heads_sizes_and_images_of_an_import(tmp_path):
    release(tmp_path / "in.pth.tar")
    with pytest.raises(UserError, match="does not say how many heads its width of 24 has: give --num-heads=N"):
        to(tmp_path / "in.pth.tar", tmp_path / "ours", "orbax")
    to(tmp_path / "in.pth.tar", tmp_path / "ours", "orbax", num_heads=3, mean=(0.1, 0.2, 0.3))
    loaded = pretrained.load(epath.Path(tmp_path / "ours"), ("predictor",))
    assert (loaded.model.size, loaded.model.patch_size, loaded.image_size) == (ODD, 8, 32)
    assert (loaded.mean, loaded.std, loaded.predictor, loaded.epoch) == ((0.1, 0.2, 0.3), STD, PREDICTOR, 300)
    release(tmp_path / "ti.pth.tar", width=192, grid=2)  # 192 wide is in the table, two blocks of 60 are not
    to(tmp_path / "ti.pth.tar", tmp_path / "ti", "orbax")
    assert pretrained.load(epath.Path(tmp_path / "ti"), ("encoder",)).model.size == "192x2x3x0.3125"
    for kind in ("timm", "ijepa"):  # files that were written here say the heads, so no flag is needed
        to(tmp_path / "ours", tmp_path / NAMES[kind], kind)
        to(tmp_path / NAMES[kind], tmp_path / f"again_{kind}", "orbax")
        again = pretrained.load(epath.Path(tmp_path / f"again_{kind}"), ("target_encoder",))
        assert (again.model.size, again.mean) == (ODD, (0.1, 0.2, 0.3))
        with pytest.raises(UserError, match=r"--num-heads = 4, but --input .* says 3: leave the flag out"):
            to(tmp_path / NAMES[kind], tmp_path / "x", "orbax", num_heads=4)


def test_sizes_are_those_of_timm():
    """Heads above all, which the tensors of a released checkpoint do not tell."""
    import timm

    names = {"Ti": "tiny_patch16", "S": "small_patch16", "B": "base_patch16", "L": "large_patch16", "H": "huge_patch14"}
    for name, theirs in (names | {"g": "giant_patch14"}).items():
        with torch.device("meta"):
            model = timm.create_model(f"vit_{theirs}_224")
        block, size = model.blocks[0], parse_size(name)
        hidden = round(size.width * size.mlp_ratio)
        found = model.embed_dim, len(model.blocks), block.attn.num_heads, block.mlp.fc1.out_features
        assert found == (size.width, size.depth, size.heads, hidden)


def test_timm_prepares_images_as_the_printed_line_says(odd, tmp_path):
    """For the line that the command prints: the network and its preprocessing are those of the checkpoint."""
    import timm

    said = to(odd / "ours", tmp_path / "x.safetensors", "timm").splitlines()[-1]
    model = eval(said, {"timm": timm})
    prepared = timm.data.resolve_model_data_config(model)
    networks = pretrained.load(epath.Path(odd / "ours"), ("target_encoder",))
    assert (prepared["mean"], prepared["std"]) == (networks.mean, networks.std)
    assert prepared["input_size"] == (3, *networks.image_shape) and prepared["interpolation"] == "bilinear"
    assert prepared["crop_pct"] == 0.875


def test_a_workdir_that_holds_an_exported_file_stays_one(odd, tmp_path):
    shutil.copytree(odd / "ours", tmp_path / "run")
    to(tmp_path / "run", tmp_path / "run" / "encoder.safetensors", "timm")
    assert in_our_format(epath.Path(tmp_path / "run")) == epath.Path(tmp_path / "run")


def test_flags_mend_the_mean_that_transformers_fills_in(odd, tmp_path, capsys):
    shutil.copytree(odd / "folder", tmp_path / "folder")
    file = tmp_path / "folder" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    to(tmp_path / "folder", tmp_path / "a", "orbax")
    assert "mean and std of 0.5, which is what transformers fills in" in capsys.readouterr().err
    assert pretrained.load(epath.Path(tmp_path / "a"), ("target_encoder",)).mean == (0.5, 0.5, 0.5)
    given = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    to(tmp_path / "folder", tmp_path / "b", "orbax", **given)
    loaded = pretrained.load(epath.Path(tmp_path / "b"), ("target_encoder",))
    assert {"mean": loaded.mean, "std": loaded.std} == given and not capsys.readouterr().err


def test_python_loads_every_format(odd, tmp_path):
    shutil.copytree(odd / "folder", tmp_path / "folder")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    found = cjepa_jax.load(tmp_path / "folder")(images)
    np.testing.assert_allclose(found, cjepa_jax.load(odd / "ours")(images), atol=1e-5)


def test_a_flag_that_the_input_needs_is_that_of_convert(tmp_path):
    release(tmp_path / "in.pth.tar")
    says = r"give --num-heads=N; that is a flag of python -m cjepa_jax\.convert --input=.*in\.pth\.tar --output="
    with pytest.raises(UserError, match=says):
        in_our_format(epath.Path(tmp_path / "in.pth.tar"))


def test_a_conversion_is_used_as_long_as_its_source_is_the_same(odd, tmp_path):
    """A file that takes the place of another one may be older than it."""
    source, other = tmp_path / "latest.safetensors", tmp_path / "other.safetensors"
    shutil.copy(odd / NAMES["timm"], source)
    shutil.copy(odd / NAMES["timm"], other)
    os.utime(other, (1, 1))
    ours = in_our_format(epath.Path(source))
    assert in_our_format(epath.Path(source)) == ours
    (ours / "config.json").write_text((ours / "config.json").read_text())  # as who changes a setting there does
    other.replace(source)
    with pytest.raises(UserError, match=r"latest\.safetensors has changed since .*\.orbax was made from it"):
        in_our_format(epath.Path(source))


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(odd, tmp_path, monkeypatch):
    def refuse(path, key):
        raise UserError(f"{key} '{path}' cannot be written (Read-only file system); name another place")

    monkeypatch.setattr(conversion, "check_writable", refuse)
    shutil.copy(odd / NAMES["timm"], tmp_path / "m.safetensors")
    says = r"^--checkpoint .*m\.safetensors is converted beside itself, and .* cannot be written .*; convert it"
    with pytest.raises(UserError, match=says):
        in_our_format(epath.Path(tmp_path / "m.safetensors"))


def test_flags_correct_what_a_checkpoint_of_ours_says(odd, tmp_path):
    to(odd / "ours", tmp_path / "a.safetensors", "timm", mean=(0.1, 0.2, 0.3), std=(0.9, 0.8, 0.7))
    to(tmp_path / "a.safetensors", tmp_path / "a", "orbax")
    found = pretrained.load(epath.Path(tmp_path / "a"), ("target_encoder",))
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.9, 0.8, 0.7))
    with pytest.raises(UserError, match=r"--num-heads = 4, but --input .* says 3: leave the flag out"):
        to(odd / "ours", tmp_path / "b.safetensors", "timm", num_heads=4)
    with pytest.raises(UserError, match="--mean and --std need 3 numbers each"):
        to(odd / "ours", tmp_path / "b.safetensors", "timm", mean=(0.1,))


def test_a_run_of_a_programs_own_method_converts(sharded, tmp_path):
    shutil.copytree(sharded[0], tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"method": "mine"}))
    to(tmp_path / "run", tmp_path / "folder", "transformers")
    assert "Trained with the method mine of a program" in (tmp_path / "folder" / "README.md").read_text()


def test_an_output_that_is_a_link_stays_one(odd, tmp_path):
    to(odd / "ours", tmp_path / "there", "transformers")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for _ in range(2):
        to(odd / "ours", tmp_path / "link", "transformers", force=True)
    assert (tmp_path / "link").is_symlink() and sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]


def test_an_output_is_there_again_where_its_successor_cannot_take_its_place(odd, tmp_path, monkeypatch):
    to(odd / "ours", tmp_path / "out", "transformers")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            to(odd / "ours", tmp_path / "out", "transformers", force=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_names_on_disk_are_those_of_the_published_checkpoints(odd):
    found = safetensors.numpy.load_file(odd / "folder" / "model.safetensors")
    layer = [f"attention.attention.{part}" for part in ("query", "key", "value")]
    layer += ["attention.output.dense", "intermediate.dense", "output.dense", "layernorm_before", "layernorm_after"]
    modules = ["embeddings.patch_embeddings.projection", "layernorm"]
    modules += [f"encoder.layer.{i}.{name}" for i in range(2) for name in layer]
    names = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    assert found.keys() == names | {"embeddings.position_embeddings"}
    files = [odd / "folder" / name for name in ("model.safetensors", "config.json")]
    assert len({file.stat().st_mode for file in files}) == 1
    config = json.loads(files[1].read_text())
    assert config["model_type"] == "ijepa" and config["layer_norm_eps"] == 1e-6


def test_what_transformers_saves_is_read(odd, tmp_path):
    from transformers import IJepaModel

    IJepaModel.from_pretrained(odd / "folder").save_pretrained(tmp_path / "saved")
    to(tmp_path / "saved", tmp_path / "ours", "orbax")
    found, wanted = (pretrained.load(epath.Path(x), ("target_encoder",)) for x in (tmp_path / "ours", odd / "ours"))
    same(found.params, wanted.params)


def refused(tmp_path, source, message, kind="timm", **options):
    """Checks that a conversion fails with this message in one line, and that it writes nothing; returns the message."""
    output = tmp_path / ("no.safetensors" if kind == "timm" else "no")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as error:
        to(source, output, kind, **options)
    assert sorted(tmp_path.iterdir()) == before
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_wrong_tensors_are_listed_by_name(odd, tmp_path):
    content = release(tmp_path / "in.pth.tar")
    encoder, predictor = content["target_encoder"], content["predictor"]
    encoder["module.blocks.1.norm2.weight"] = torch.zeros(25)
    encoder["module.cls_token"] = torch.zeros(1, 1, 24)
    del encoder["module.blocks.0.attn.proj.bias"], predictor["module.predictor_blocks.1.mlp.fc2.weight"]
    torch.save(content, tmp_path / "in.pth.tar")
    message = refused(tmp_path, tmp_path / "in.pth.tar", "does not hold what it should", "orbax", num_heads=3)
    for problem in (
        "target_encoder: blocks.0.attn.proj.bias is missing",
        "target_encoder: blocks.1.norm2.weight is (25,), not (24,)",
        "target_encoder: cls_token is not wanted",
        "predictor: predictor_blocks.1.mlp.fc2.weight is missing",
    ):
        assert problem in message
    tensors = safetensors.numpy.load_file(odd / NAMES["timm"])
    for name, message in (
        ("pos_embed", ": pos_embed is missing"),
        ("norm.bias", "target_encoder: norm.bias is missing"),
        ("patch_embed.proj.weight", "patch_embed.proj.weight is missing"),
    ):
        some = {k: x for k, x in tensors.items() if k != name}
        safetensors.numpy.save_file(some, tmp_path / "some.safetensors")
        refused(tmp_path, tmp_path / "some.safetensors", message, num_heads=3)
    half = tensors | {"norm.bias": tensors["norm.bias"].astype(np.float16)}
    safetensors.numpy.save_file(half, tmp_path / "some.safetensors")
    refused(tmp_path, tmp_path / "some.safetensors", "must hold float32 only: norm.bias is F16", num_heads=3)


def test_our_own_parameters_are_checked(odd, tmp_path):
    pretrained.save(epath.Path(tmp_path / "ours"), make_networks())
    path = tmp_path / "ours" / "config.json"
    path.write_text(path.read_text().replace(ODD, "24x2x3"))
    refused(tmp_path, tmp_path / "ours", r"its target_encoder does not fit the config: .*block00/fc1/bias is \(60,\)")


def test_other_positions_are_an_error(tmp_path):
    content = release(tmp_path / "in.pth.tar")
    stored = content["target_encoder"]["module.pos_embed"]
    assert stored.abs().max() == 1
    rows_first = stored.reshape(4, 4, 24).transpose(0, 1).reshape(1, 16, 24)
    for changed, fine in ((rows_first, False), (stored + 3e-5, False), (stored + 3e-6, True)):
        content["target_encoder"]["module.pos_embed"] = changed
        torch.save(content, tmp_path / "in.pth.tar")
        if fine:
            to(tmp_path / "in.pth.tar", tmp_path / "yes.safetensors", "timm", num_heads=3)
        else:
            refused(tmp_path, tmp_path / "in.pth.tar", "pos_embed differs from the fixed sin-cos", num_heads=3)
    content = release(tmp_path / "in.pth.tar")
    content["predictor"]["module.predictor_pos_embed"] += 1
    torch.save(content, tmp_path / "in.pth.tar")
    refused(tmp_path, tmp_path / "in.pth.tar", "predictor_pos_embed differs", "orbax", num_heads=3)


def test_a_pickle_with_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    release(tmp_path / "in.pth.tar", extra=Code())
    refused(tmp_path, tmp_path / "in.pth.tar", r"is refused: .* a pickle may run code \(.*posix.mkdir", num_heads=3)


def test_bad_inputs(odd, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello, I am no checkpoint")
    torch.save({"state_dict": {}, "arch": "resnet"}, tmp_path / "other.pth.tar")
    (tmp_path / "cut.pth.tar").write_bytes((odd / NAMES["ijepa"]).read_bytes()[:5000])
    (tmp_path / "cut.safetensors").write_bytes((odd / NAMES["timm"]).read_bytes()[:50])
    for name, message in (
        ("none", "does not exist"),
        ("empty", "is not a checkpoint: neither a workdir"),
        ("text", "is neither a .pth.tar of PyTorch nor a safetensors file"),
        ("other.pth.tar", "it has neither encoder nor target_encoder, but state_dict, arch"),
        ("cut.pth.tar", "cannot be read by PyTorch"),
        ("cut.safetensors", "is damaged"),
    ):
        refused(tmp_path, tmp_path / name, message)
    refused(tmp_path, odd / "folder" / "model.safetensors", "is part of a folder of transformers: name the folder")
    for key, value, message in (
        ("model_type", "vit", "describes a model of the type vit, not ijepa"),
        ("layer_norm_eps", 1e-12, "layer_norm_eps = 1e-12; only 1e-06"),
        ("hidden_act", "relu", "hidden_act = relu; only gelu"),
    ):
        folder = tmp_path / key
        to(odd / "ours", folder, "transformers")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        refused(tmp_path, folder, message)
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(tmp_path, odd / NAMES["ijepa"], "need PyTorch: pip install torch")
    refused(tmp_path, odd / "ours", "need PyTorch: pip install torch", "ijepa")


def test_an_output_is_replaced_only_by_force_and_only_by_a_whole_one(odd, tmp_path, monkeypatch):
    file, folder = tmp_path / "a.safetensors", tmp_path / "folder"
    for path, kind in ((file, "timm"), (folder, "transformers")):
        to(odd / "ours", path, kind)
        with pytest.raises(UserError, match="exists and is not replaced without --force"):
            to(odd / "ours", path, kind)
        before = (file if path == file else folder / "model.safetensors").read_bytes()

        def fail(path, networks, run, kind=kind):
            WRITERS[kind](path, networks, run)
            raise OSError("no space left")

        monkeypatch.setitem(formats.WRITERS, kind, fail)
        for output in (path, path.with_name(f"new_{path.name}")):
            with pytest.raises(OSError, match="no space"):
                to(odd / "ours", output, kind, encoder="encoder", force=True)
        monkeypatch.undo()
        assert (file if path == file else folder / "model.safetensors").read_bytes() == before
        to(odd / "ours", path, kind, encoder="encoder", force=True)
        assert (file if path == file else folder / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "folder"]
    (folder / "thesis.tex").write_text("years of work")
    for path, kind, message in (
        (folder, "transformers", "holds what is not of this command, and is not deleted: thesis.tex"),
        (folder, "ijepa", "exists and is not a file"),
        (file, "transformers", "exists and is not a folder"),
        (tmp_path / "a.bin", "timm", "must end in .safetensors"),
        (tmp_path / "none" / "a", "orbax", "none does not exist; make it first"),
    ):
        with pytest.raises(UserError, match=message):
            to(odd / "ours", path, kind, force=True)
    to(odd / "ours", tmp_path / "ours", "orbax")
    for source in (tmp_path / "ours", tmp_path / "ours" / "checkpoints" / "7"):
        with pytest.raises(UserError, match="is --input, or holds it"):
            to(source, tmp_path / "ours", "orbax", force=True)


WRITERS = dict(formats.WRITERS)


# With the rest of the package.


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Trains two steps on eight devices that share the parameters; returns the workdir and the last state."""
    workdir = tmp_path_factory.mktemp("runs") / "sharded"
    settings = {"model__size": "256x1x4", "predictor__width": 128, "mesh__fsdp": 8, "mesh__parameters": "zero1"}
    settings |= {"data__train_split": "train[:32]", "optim__epochs": 1.0, "optim__warmup_epochs": 0.0}
    settings |= {"checkpoint__every": 1, "log__every": 1}
    return workdir, train(small(**settings), epath.Path(workdir))


def test_a_sharded_checkpoint_converts_on_one_device(sharded, tmp_path):
    workdir, state = sharded
    kernel = state.averages["target_encoder"]["block00"]["fc1"]["kernel"]
    assert len(kernel.sharding.device_set) == 8 and not kernel.is_fully_replicated
    arguments = [f"--input={workdir}", f"--output={tmp_path / 'a.safetensors'}", "--format=timm"]
    done = commands.run("cjepa_jax.convert", *arguments, XLA_FLAGS=commands.QUICK)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].endswith("256x1x4/2, target_encoder")
    found = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(found["blocks.0.mlp.fc1.weight"], np.asarray(kernel).T)


def test_the_command_says_what_is_wrong(tmp_path):
    arguments = ["--input=/nowhere", f"--output={tmp_path / 'a'}", "--format=orbax", "--num-heads=3", "--mean=x"]
    done = commands.run("cjepa_jax.convert", *arguments, "--tower=encoder")  # the former name of --encoder
    assert (done.returncode, done.stderr) == (2, "error: --mean must be numbers, such as 0.5,0.5,0.5\n")


def test_pretraining_goes_on_from_an_import(tmp_path):
    """With a learning rate of 0 the networks stay what they were."""
    release(tmp_path / "in.pth.tar", prefix="")
    to(tmp_path / "in.pth.tar", tmp_path / "ours", "orbax", num_heads=3)
    images = {
        f"{split}_images": np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), np.uint8)
        for split in ("train", "test")
    }
    np.savez(tmp_path / "images.npz", **images)
    settings = {"model__size": ODD, "model__patch_size": 8, "predictor__width": 12, "predictor__depth": 2}
    settings |= {"data__image_size": 32, "data__mean": MEAN, "data__std": STD, "data__source": "npz"}
    settings |= {"data__data_dir": str(tmp_path / "images.npz"), "optim__epochs": 1.0, "optim__warmup_epochs": 0.0}
    settings |= {f"optim__{key}": 0.0 for key in ("learning_rate_start", "learning_rate", "learning_rate_end")}
    state = train(small(**settings), epath.Path(tmp_path / "run"), init=epath.Path(tmp_path / "ours"))
    assert int(state.step) == 2
    to(tmp_path / "run", tmp_path / "out.pth.tar", "ijepa")
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("in.pth.tar", "out.pth.tar"))
    for part in ("encoder", "predictor"):
        assert all(torch.equal(x, after[part][name]) for name, x in before[part].items())


def test_the_card_quotes_the_run(sharded, tmp_path):
    workdir, _ = sharded
    loss = {line["step"]: line["loss/total"] for line in lines(workdir)}
    with (workdir / "metrics.jsonl").open("a") as file:  # a run with evaluation leaves such a line at its end
        file.write(json.dumps({"step": 2, "eval/knn": 0.625}) + "\n")
    tables = {"trained": {"knn": 0.625, "linear": 0.75}, "untrained": {"knn": 0.5}}
    (workdir / "evaluation.json").write_text(json.dumps(tables))
    for name, source, encoder in (("last", "", None), ("early", "checkpoints/1", None), ("context", "", "encoder")):
        to(workdir / source, tmp_path / name, "transformers", encoder=encoder)
        card = (tmp_path / name / "README.md").read_text()
        step = 1 if name == "early" else 2
        assert f"at step {step}." in card and f"| `loss/total` | {loss[step]:.4g} |" in card
        assert "Pre-trained with C-JEPA" in card and "| `data.train_split` | train[:32] |" in card
        assert ("| trained | 0.625 | 0.75 |\n| untrained | 0.5 |  |\n" in card) == (name == "last")
        assert ("Not measured." in card) == (name != "last")
    to(workdir, tmp_path / "a.safetensors", "timm")
    to(tmp_path / "a.safetensors", tmp_path / "imported", "transformers")
    assert "does not say how it was trained" in (tmp_path / "imported" / "README.md").read_text()


DRAWS = {"mean": 0.5, "std": 0.01, "draws": [0.49, 0.51]}


@pytest.mark.parametrize(
    ("settings", "encoder", "evaluation", "said"),
    [
        (  # pre-training from before there were evaluators
            {"vicreg.weight": 0.0},
            "target_encoder",
            {"trained": {"knn": 0.625, "linear": 0.75}, "untrained": {"knn": 0.5}},
            [
                "Pre-trained with I-JEPA",
                "|  | knn | linear |\n|---|---|---|\n| trained | 0.625 | 0.75 |\n| untrained | 0.5 |  |\n",
            ],
        ),
        (  # fine-tuning from before there were evaluators
            {"augment.mixup": 0.8},
            "encoder",
            {"results": {"parameters": {"top1": 0.5, "loss": 2.25}}, "images": 360, "config": {"seed": 0}},
            ["Fine-tuned with labels", "|  | top1 | loss |\n|---|---|---|\n| parameters | 0.5 | 2.25 |\n"],
        ),
        (
            {"method": "cjepa", "vicreg.weight": 0.001},
            "target_encoder",
            {
                "results": {
                    "logistic": {"trained": {"10 labels": DRAWS, "rates": [1, 2]}, "raw pixels": {"10 labels": DRAWS}},
                    "collapse": {"trained": {"rank": 12.5, "spectrum": [3.0, 1.0], "note": "text"}},
                    "attention": {"trained": {"files": ["a.png"]}},
                },
                "settings": {"seed": 0},
            },
            [
                "Pre-trained with C-JEPA",
                "| logistic | 10 labels |\n|---|---|\n| trained | 0.5 |\n| raw pixels | 0.5 |\n"
                "\n| collapse | rank |\n|---|---|\n| trained | 12.5 |\n\n## Use",
            ],
        ),
        (
            {"method": "supervised", "model.encoder": "random"},
            "ema_encoder",
            {"results": {"accuracy": {"average": {"top1": 0.5, "images": 360}}}, "settings": {}},
            [
                "Trained from scratch with labels",
                "| accuracy | top1 | images |\n|---|---|---|\n| average | 0.5 | 360 |\n",
            ],
        ),
    ],
)
def test_the_card_reads_every_format_of_the_evaluation(tmp_path, settings, encoder, evaluation, said):
    (tmp_path / "config.json").write_text(json.dumps({"optim.epochs": 1.0, **settings}))
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "evaluation").mkdir()
    row = {"linear": 0.25, "standard error": {"linear": 0.0625}, "1 % of labels": {"mean": 0.5, "standard error": 0.1}}
    command = {"results": {"linear": {"its own": row | {"exported": "x"}}}, "encoder": encoder.removeprefix("ema_")}
    command |= {"images": {"test": {"images": 48}}, "data": {"test_split": "val"}}
    for step in (6, 7):
        (tmp_path / f"evaluation/step{step}.linear.json").write_text(json.dumps(command | {"step": step}))
    text = card.readme(make_networks(), card.read_run(epath.Path(tmp_path), step=7, encoder=encoder))
    table = "| linear | linear | 1 percent of labels |\n|---|---|---|\n| its own | 0.25 ± 0.062 | 0.5 ± 0.1 |\n"
    command_says = f"\nOn 48 test images (`val`):\n\n{table}"
    assert text.count(command_says) == 1  # only that of this step
    for words in said:
        assert words in text.replace(command_says, "")
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation | {"step": 6}))  # of a run that was made longer
    text = card.readme(make_networks(), card.read_run(epath.Path(tmp_path), step=7, encoder=encoder))
    assert not [words for words in said if words.startswith("|") and words.partition("\n\n")[0] in text]
    other = "encoder" if encoder == "target_encoder" else "target_encoder"
    assert "Not measured." in card.readme(make_networks(), card.read_run(epath.Path(tmp_path), step=7, encoder=other))


def test_the_readmes_lines_of_pytorch(odd, tmp_path, monkeypatch):
    """Runs the lines of the page exactly as they are printed."""
    page = (ROOT / "docs" / "pytorch.md").read_text()
    code = re.search(r"```python.*?\n(.*?)```", page, re.DOTALL).group(1)
    assert 8 <= len(code.splitlines()) <= 10
    to(odd / "ours", tmp_path / "encoder", "transformers")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)).save(
        tmp_path / "image.jpg"
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["patches"].shape == (1, 16, 24)
    pixels = names["pixels"].numpy().transpose(0, 2, 3, 1)
    assert_close(names["feature"].numpy(), features_of_ours(odd / "ours", pixels).mean(axis=1))


MEMORY = """
import pathlib, re, sys
from cjepa_jax.interop import conversion
from cjepa_jax.interop import formats, tensors
if "pth" in "".join(sys.argv):
    import torch

def peak():  # in KiB; getrusage would count the peak of the parent process, too
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text()).group(1))

before = peak()
conversion.convert(*sys.argv[1:], encoder=None, force=False, options=tensors.ImportOptions())
print((peak() - before) * 1024)
"""


@pytest.mark.slow
def test_peak_memory(tmp_path):
    """Measures the peak above what the imports take; for H/14 these take a sixth of the parameters."""
    networks = make_networks("B", image=224, patch=16, predictor=PredictorConfig(width=384, depth=6))
    pretrained.save(epath.Path(tmp_path / "ours"), networks)
    of = {part: sum(4 * x.size for x in jax.tree.leaves(tree)) for part, tree in networks.params.items()}
    whole, one = sum(of.values()), of["target_encoder"]
    for source, output, kind, size in (
        ("ours", "a.pth.tar", "ijepa", whole),
        ("ours", "a.safetensors", "timm", one),
        ("ours", "folder", "transformers", one),
        ("a.pth.tar", "back", "orbax", whole),
        ("a.pth.tar", "b.safetensors", "timm", one),
        ("folder", "back_too", "orbax", one),
        ("a.safetensors", "b.pth.tar", "ijepa", one),
    ):
        arguments = [sys.executable, "-c", MEMORY, str(tmp_path / source), str(tmp_path / output), kind]
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=True)
        peak = int(done.stdout) / size
        print(f"{source} -> {output}: {peak:.2f} times the parameters")
        assert 1 <= peak <= 2.5  # below 1 the measurement would have missed the parameters

"""Methods that compare augmented views use the common parts: devices, microbatches, the loop, evaluation, formats."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from cjepa_jax import pretrained
from cjepa_jax.batch import Batch
from cjepa_jax.bench import step as bench_step
from cjepa_jax.data import pipeline, sources
from cjepa_jax.errors import UserError
from cjepa_jax.evaluate.frozen import from_checkpoint
from cjepa_jax.interop import conversion
from cjepa_jax.interop.tensors import ImportOptions
from cjepa_jax.methods import METHODS
from cjepa_jax.methods.siamese import Siamese
from cjepa_jax.models.vit import normalise, patchify
from cjepa_jax.tpu import flops
from cjepa_jax.train.loop import train
from cjepa_jax.train.writer import TIMED
from tests.helpers import lines
from tests.siamese import WIDTH, small_config, small_method
from tests.test_microbatch import assert_same, exchanges, flops_of_products, gradient

NAMES = [name for name, method in METHODS.items() if issubclass(method, Siamese)]


# SimSiam's four batch norms in a row enlarge the rounding of the features: 4e-6 were seen.
TOLERANCE = {"simsiam": 1e-5}  # of microbatches on one device; others have 1e-6


def views_of_images() -> Batch:
    """Two views of images that differ by more than noise, of which the mean over the patches would leave nothing."""
    coarse = np.random.default_rng(0).integers(0, 256, (32, 2, 2, 2, 1)).astype(np.uint8)
    return Batch(coarse.repeat(4, axis=2).repeat(4, axis=3), np.zeros(32, np.int32))


@functools.cache
def of_the_whole_batch(name):
    return gradient(small_method(name, data__batch_size=32), 1, data=views_of_images(), spread=4.0)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("microbatches, devices", [(4, 1), (1, 8), (4, 8)])
def test_parts_and_devices_give_the_same_loss_and_gradient(name, microbatches, devices):
    """Also the batch norm of the projector, so that its statistics are those of the global batch; no image moves."""
    method = small_method(name, data__batch_size=32)
    found, program = gradient(method, microbatches, devices=devices, data=views_of_images(), spread=4.0)
    assert_same(found, of_the_whole_batch(name), tolerance=1e-5 if devices > 1 else TOLERANCE.get(name, 1e-6))
    assert not [kind for kind in exchanges(program) if kind.startswith(("u8", "(u8"))]


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_others(name):
    method = small_method(name)
    params = method.init(jax.random.key(0))
    images = views_of_images()
    outputs = {}
    for count in (4, 8):
        inputs = method.prepare(Batch(images.images[:count], images.labels[:count]), jax.random.key(1))
        outputs[count] = jax.jit(method.forward)(params, {}, inputs)
    assert outputs[8]["views"].shape == (8, len(method.views), WIDTH)
    np.testing.assert_allclose(outputs[4]["views"], outputs[8]["views"][:4], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(outputs[8]["features"], outputs[8]["views"][:, 0])


@pytest.mark.parametrize("name", NAMES)
def test_its_flops_are_those_of_its_products(name):
    method = small_method(name)
    params = jax.eval_shape(method.init, jax.random.key(0))
    inputs = jax.eval_shape(method.prepare, views_of_images(), jax.random.key(1))
    counted = flops_of_products(jax.make_jaxpr(method.forward)(params, {}, inputs).jaxpr)
    assert counted == 32 * sum(flops.forward(stack) for stack in method.transformers().values())


@pytest.fixture(scope="module", params=NAMES)
def finished(request, tmp_path_factory):
    """A workdir of six steps with evaluation at the end, its settings and its last state."""
    workdir = epath.Path(tmp_path_factory.mktemp("runs") / request.param)
    splits = {"data__train_split": "train[:96]", "data__test_split": "test[:40]"}
    run = dict(optim__epochs=1.0, optim__warmup_epochs=0.2, log__every=1, checkpoint__every=3)
    config = small_config(request.param, **splits, **run, eval__every=6, eval__draws=1, eval__shots=2)
    return workdir, config, jax.device_get(train(config, workdir))


@pytest.mark.parametrize(
    "finished",
    ["vicreg", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "vicreg")],
    indirect=True,
)
def test_a_run_resumes_bit_for_bit(finished, tmp_path):
    workdir, config, state = finished
    again = epath.Path(tmp_path / "again")
    shutil.copytree(workdir, again)
    (again / "checkpoints" / "6").rmtree()
    resumed = jax.device_get(train(config, again))
    jax.tree.map(np.testing.assert_array_equal, state, resumed)
    timed = TIMED | {"eval/seconds"}
    straight, after = (
        [{k: v for k, v in line.items() if k not in timed} for line in lines(folder)] for folder in (workdir, again)
    )
    assert straight == after
    assert state.averages == {}


def test_a_run_is_watched_and_evaluated(finished):
    workdir, config, _ = finished
    found = lines(workdir)
    training = [line for line in found if "loss/total" in line]
    assert [line["step"] for line in training] == list(range(1, 7))
    assert all({"rep/std", "rep/rank", "rep/cosine", "rep/collapsed"} <= line.keys() for line in training)
    shown = {metric for panel in METHODS[config.method].panels.values() for metric in panel}
    assert shown <= {key for line in found for key in line}
    results = json.loads((workdir / "evaluation.json").read_text())["results"]
    assert list(results["knn"]) == ["trained", "untrained", "raw pixels"]
    assert (workdir / "curves.png").exists() and not (workdir / "masks.png").exists()


def test_its_encoder_is_judged_and_converted(finished, tmp_path):
    workdir, config, state = finished
    data = config.data
    frozen = from_checkpoint(workdir, "encoder", data=data, crop_fraction=1.0, baselines=False)
    wanted = jax.tree.leaves(state.params["encoder"])
    for ours, theirs in zip(jax.tree.leaves(frozen.params[frozen.judged]), wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    options = ImportOptions(num_heads=2, mean=(0.5,), std=(0.5,))
    for kind, file in (("transformers", "folder"), ("timm", "a.safetensors"), ("ijepa", "a.pth.tar"), ("orbax", "b")):
        said = conversion.convert(str(workdir), str(tmp_path / file), kind, encoder=None, force=False, options=options)
        assert f"-> {kind}" in said
        back = tmp_path / f"{kind}-back"
        conversion.convert(str(tmp_path / file), str(back), "orbax", encoder=None, force=False, options=options)
        name = next(name for name in pretrained.ENCODERS if name in pretrained.available(epath.Path(back)))
        loaded = pretrained.load(epath.Path(back), [name])
        for ours, theirs in zip(jax.tree.leaves(loaded.params[name]), wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert f"Pre-trained with {METHODS[config.method].__name__}, self-supervised" in card


def test_views_differ_by_crop_and_by_their_own_probabilities():
    config = small_config(
        NAMES[0],
        views__blur=(0.0, 0.0),
        views__solarize=(0.0, 1.0),
        data__crop_scale=(1.0, 1.0),
        data__crop_ratio=(1.0, 1.0),
    )
    method = METHODS[config.method](config)
    reader = pipeline.Reader(sources.load(config.data, "train"), config.data)
    images = next(pipeline.train_batches(reader, seed=0, views=method.views)).images
    assert images.shape == (16, 2, 8, 8, 1)
    first, second = images[:, 0].astype(int), images[:, 1].astype(int)
    np.testing.assert_array_equal(second, np.where(first < 128, first, 255 - first))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"views__blur": (0.5,)}, r"views\.blur and views\.solarize must have one number for each view"),
        ({"views__blur": (0.5,), "views__solarize": (0.5,)}, r"at least two, got \(0\.5,\) and \(0\.5,\)"),
        ({"data__blur": 0.5}, r"data\.blur = 0\.5 must be 0: views\.blur says it for each view"),
        ({"views__solarize": (0.0, 1.5)}, r"views\.solarize must be in \[0, 1\], got 1\.5"),
        ({"model__patch_size": 3}, r"model\.patch_size = 3 does not divide data\.image_size = 8"),
    ],
)
def test_settings_that_do_not_fit(changes, says):
    with pytest.raises(UserError, match=says):
        small_method(NAMES[0], **changes)


def test_its_step_is_timed_like_others():
    config = small_config(NAMES[0])
    said = bench_step.measure(config, rounds=1, against_torch=False)
    assert "16x1x2/2, 16 images, float32" in said and "images/s" in said
    with pytest.raises(UserError, match=rf"--against=torch knows the method cjepa only, not '{NAMES[0]}'"):
        bench_step.measure(config, rounds=1, against_torch=True)


def test_a_view_is_the_mean_of_the_encoders_features():
    method = small_method("vicreg")
    data, params = method.config.data, jax.jit(method.init)(jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 256, (3, 2, *data.image_shape, data.channels), np.uint8)
    found = method.forward(params, {}, images)["views"]
    for number in range(2):
        patches = patchify(normalise(images[:, number], mean=data.mean, std=data.std), method.config.model.patch_size)
        expected = method.encoder.apply({"params": params["encoder"]}, patches).mean(axis=1)
        np.testing.assert_allclose(found[:, number], expected, atol=1e-5)


def test_each_view_is_augmented_as_its_settings_say():
    changes = dict(data__flip=0.3, views__blur=(0.5, 0.1), views__solarize=(0.0, 0.2))
    views = small_method("vicreg", views__saturation=0.5, **changes).views
    assert [(view.flip, view.saturation) for view in views] == [(0.3, 0.5)] * 2
    assert [(view.blur, view.solarize) for view in views] == [(0.5, 0.0), (0.1, 0.2)]

"""Fine-tuning: its step on any mesh, its optimizer, its evaluation, resuming, and what it says of mistakes."""

import contextlib
import functools
import json
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath

from cjepa_jax import pretrained
from cjepa_jax.batch import Batch
from cjepa_jax.config import Ema, Model
from cjepa_jax.data import pipeline, sources
from cjepa_jax.errors import UserError
from cjepa_jax.evaluate.accuracy import Accuracy
from cjepa_jax.methods.supervised import MixedImages, Supervised, SupervisedConfig
from cjepa_jax.models.vit import build_encoder, normalise
from cjepa_jax.settings import parse
from cjepa_jax.tpu import flops
from cjepa_jax.train import nonfinite, optimizer, sharding, step
from cjepa_jax.train.loop import train
from cjepa_jax.train.setup import set_up
from cjepa_jax.train.writer import TIMED
from configs import finetune_digits, finetune_folder, finetune_vitb16
from tests import commands
from tests.helpers import lines, same

ROOT = pathlib.Path(__file__).parents[1]
RUN = dict(data__train_split="train[:96]", optim__epochs=1.0, optim__warmup_epochs=0.2, checkpoint__every=3)


def settings(**overrides) -> SupervisedConfig:
    """configs/finetune_digits.py with batches of 16, and overrides as `group__key=value`."""
    values = finetune_digits.get_config().to_dict()
    small = {"data__batch_size": 16, "eval__every": 1000, "log__every": 1}
    for name, value in (small | overrides).items():
        group, _, key = name.partition("__")
        values.setdefault(group, {})[key] = value
    return parse(values, SupervisedConfig)


def method_of(size: str = "16x2x2", **overrides) -> Supervised:
    """The method as a checkpoint of this size would complete its settings."""
    chosen = settings(model__size=size, model__patch_size=2, model__init="fan_in", **overrides)
    return Supervised(chosen, classes=10)


def finetune(chosen: SupervisedConfig, checkpoint: epath.Path, workdir: epath.Path) -> step.TrainState:
    return train(chosen, workdir, checkpoint)


def model(size: str = "16x2x2", **changes) -> Model:
    return Model(
        **(dict(size=size, patch_size=2, init="fan_in", dtype="float32", layers="unrolled", remat="none") | changes)
    )


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> epath.Path:
    """A checkpoint with a target encoder of random numbers and nothing else."""
    encoder = jax.device_get(
        build_encoder(model(), grid=(4, 4)).init(jax.random.key(7), jnp.zeros((1, 16, 4)))["params"]
    )
    path = epath.Path(tmp_path_factory.mktemp("runs") / "network")
    pretrained.save(path, pretrained.Pretrained(model(), None, 8, (0.5,), (0.5,), 3, {"target_encoder": encoder}))
    return path


@pytest.fixture(scope="module")
def finished(network, tmp_path_factory) -> tuple[pathlib.Path, step.TrainState]:
    """The workdir and the last state of six steps, checkpoints at 3 and 6."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return workdir, finetune(settings(**RUN, eval__every=4), network, epath.Path(workdir))


# One step, on any mesh


WAYS = {  # devices, parameters, fsdp, layers, remat
    "eight": (8, "replicated", 1, "unrolled", "none"),
    "zero1 of 4": (8, "zero1", 4, "unrolled", "none"),
    "fsdp of 8, scanned": (8, "fsdp", 8, "scanned", "full"),
}


def three_steps(devices, parameters, fsdp, layers, remat):
    """Metrics of three steps, and the last state."""
    method = method_of(
        "256x2x4", mesh__parameters=parameters, mesh__fsdp=fsdp, model__layers=layers, model__remat=remat,
        augment__erase=0.5, augment__cutmix=1.0, model__drop_path=0.3, optim__warmup_epochs=0.0,
    )  # fmt: skip
    program = step.build(method, 10, sharding.make_mesh(method.config.mesh, jax.devices()[:devices]))
    images = jax.random.randint(jax.random.key(1), (16, 8, 8, 1), 0, 256).astype(jnp.uint8)
    inputs = jax.device_put(Batch(images, jnp.arange(16, dtype=jnp.int32) % 10), program.split)
    state, metrics = program.init(jax.random.key(0)), []
    for _ in range(3):
        state, found, _ = program.step(state, inputs, jax.random.key(2))
        metrics.append(found)
    return jax.device_get(metrics), state


@pytest.fixture(scope="module")
def on_one_device():
    return three_steps(1, "replicated", 1, "unrolled", "none")


@pytest.mark.parametrize(
    "way", ["eight", *(pytest.param(way, marks=pytest.mark.slow) for way in ("zero1 of 4", "fsdp of 8, scanned"))]
)
def test_every_way_takes_the_same_steps(on_one_device, way):
    expected, reference = on_one_device
    found, state = three_steps(*WAYS[way])
    for a, b in zip(expected, found, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=1e-6, err_msg=name)
    assert len({float(m["loss/total"]) for m in expected}) == 3
    for name in ("params", "averages"):
        ours, theirs = (jax.tree.leaves(jax.device_get(getattr(s, name))) for s in (reference, state))
        for a, b in zip(ours, theirs, strict=True):
            assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a) + 1e-5 * a.size**0.5
    kernel = state.params["encoder"]["block00"]["fc1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[0] == 256 // WAYS[way][2]


def test_the_loss_without_mixing_is_torchs_and_nothing_is_dropped():
    off = dict(augment__mixup=0.0, model__drop_path=0.0, optim__warmup_epochs=0.0)
    method = method_of(**off)
    state = jax.jit(functools.partial(step.init_state, method=method, steps=10))(jax.random.key(0))
    head = {"kernel": jax.random.normal(jax.random.key(4), (16, 10)), "bias": jnp.arange(10.0)}
    state = state.replace(params=state.params | {"head": head})
    images = jax.random.randint(jax.random.key(1), (16, 8, 8, 1), 0, 256).astype(jnp.uint8)
    labels = jnp.arange(16, dtype=jnp.int32) % 10
    _, metrics, _ = jax.jit(functools.partial(step.train_step, method=method, steps=10))(
        state, Batch(images, labels), jax.random.key(2)
    )
    pixels = np.asarray(images, np.float32).reshape(16, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(16, 16, 4)
    features = method.encoder.apply({"params": state.params["encoder"]}, (pixels / 255 - 0.5) / 0.5)
    logits = np.asarray(features, np.float64).mean(axis=1) @ np.asarray(head["kernel"], np.float64) + np.arange(10)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(np.asarray(labels)).long(), label_smoothing=0.1
    )
    assert float(metrics["loss/total"]) == pytest.approx(float(expected), rel=1e-4)


def test_draws_are_new_each_step_and_the_average_follows_all_parameters():
    method = method_of(optim__learning_rate_start=0.1, optim__schedule_offset=0)
    state = jax.jit(functools.partial(step.init_state, method=method, steps=10))(jax.random.key(0))
    head = {"kernel": jax.random.normal(jax.random.key(4), (16, 10)), "bias": jnp.zeros(10)}
    state = state.replace(params=state.params | {"head": head})
    images = jax.random.randint(jax.random.key(1), (16, 8, 8, 1), 0, 256).astype(jnp.uint8)
    inputs = Batch(images, jnp.arange(16, dtype=jnp.int32) % 10)
    take_step = jax.jit(functools.partial(step.train_step, method=method, steps=10))
    after, metrics, _ = take_step(state, inputs, jax.random.key(2))
    _, same_again, _ = take_step(state, inputs, jax.random.key(2))
    _, later, _ = take_step(state.replace(step=jnp.int32(1)), inputs, jax.random.key(2))
    assert metrics["loss/total"] == same_again["loss/total"] != later["loss/total"]
    current = {f"ema_{name}": tree for name, tree in after.params.items()}
    average = jax.tree.map(lambda a, p: 0.98 * a + 0.02 * p, state.averages, current)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), after.averages, average)
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (state.params, after.params)), strict=True)]
    assert min(moved) > 1e-3


# The optimizer


@pytest.mark.parametrize("depth, decay", [(3, 0.65), (12, 0.75)])
def test_layers_have_the_steps_that_mae_gives_them(depth, decay):
    method = method_of(f"16x{depth}x2", optim__layer_decay=decay)
    found = method.update_scale(jax.eval_shape(method.init, jax.random.key(0)))
    expected = {"embed": decay ** (depth + 1), "norm": 1.0}
    expected |= {f"block{i:02}": decay ** (depth + 1 - (i + 1)) for i in range(depth)}
    for name, factor in expected.items():
        np.testing.assert_allclose(jax.tree.leaves(found["encoder"][name]), factor, rtol=1e-6)
    np.testing.assert_allclose(found["head"]["kernel"], 1)


def test_adamw_with_layer_decay_is_torchs_with_parameter_groups():
    method = method_of(optim__learning_rate=0.02, optim__eps=1e-3, optim__weight_decay_start=0.3,
                       optim__weight_decay_end=0.3, optim__layer_decay=0.6, optim__epochs=20.0,
                       optim__warmup_epochs=4.0, optim__schedule_offset=0)  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = {"embed": (5, 4), "block00": (4, 3), "block01": (4,), "norm": (4,)}
    factors = {"embed": 0.6**3, "block00": 0.6**2, "block01": 0.6, "norm": 1.0}
    draw = lambda: {"encoder": {n: {"x": rng.normal(size=s).astype(np.float32)} for n, s in shapes.items()}}  # noqa: E731
    params = draw()
    theirs = {
        name: torch.nn.Parameter(torch.tensor(p["x"], dtype=torch.float64)) for name, p in params["encoder"].items()
    }
    adamw = torch.optim.AdamW([{"params": [p]} for p in theirs.values()], betas=(0.9, 0.999), eps=1e-3)
    ours = optimizer.build(method, 20, params)
    state = ours.init(params)
    for number in range(20):
        grads = draw()
        with jax.numpy_dtype_promotion("standard"):
            updates, state = ours.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        rate = 0.02 * number / 4 if number < 4 else 1e-6 + (0.02 - 1e-6) * (1 + np.cos(np.pi * (number - 4) / 16)) / 2
        for group, (name, p) in zip(adamw.param_groups, theirs.items(), strict=True):
            group["lr"], group["weight_decay"] = rate * factors[name], 0.3 if p.ndim > 1 else 0
            p.grad = torch.tensor(grads["encoder"][name]["x"], dtype=torch.float64)
        adamw.step()
    for name, p in theirs.items():
        np.testing.assert_allclose(params["encoder"][name]["x"], p.detach(), rtol=1e-5, atol=1e-6)


def test_the_average_of_a_short_run_follows_the_parameters():
    """Parameters rise from 0 to 1 over 180 steps: the momentum of 0.9999 alone would leave the average near 0."""
    values = {}
    for warmup in (False, True):
        schedule = optimizer.ema_step_size(Ema(start=0.9999, end=0.9999, warmup=warmup), 180)
        steps = [float(schedule(t)) for t in range(180)]
        average = 0.0
        for t, size in enumerate(steps):
            average += size * ((t + 1) / 180 - average)
        values[warmup] = average
    assert values[False] < 0.01 and 0.85 < values[True] < 0.95
    np.testing.assert_allclose(steps, [1 - min(0.9999, (1 + t) / (10 + t)) for t in range(180)], rtol=1e-5)


def test_the_folders_config_follows_checkpoint_and_batch(network):
    chosen = parse(finetune_folder.get_config().to_dict(), SupervisedConfig)
    assert chosen.rate_scale == 0.25
    loaded = pretrained.load(network, ("target_encoder",))
    done = Supervised.resolve(chosen, "x", loaded._replace(mean=chosen.data.mean, std=chosen.data.std))
    assert (done.data.image_shape, done.model.size, done.model.patch_size) == ((8, 8), "16x2x2", 2)
    random = {"model": {"encoder": "random", "size": "16x2x2", "patch_size": 2}, "eval": {"every": 1}}
    scratch = parse(random | {"data": {"source": "digits", "image_size": 0}}, SupervisedConfig)
    with pytest.raises(UserError, match=r"data\.image_size = 0 follows the checkpoint --init, which is missing"):
        Supervised.resolve(scratch, "None", None)


# Whole runs


def test_the_checkpoint_holds_a_network_that_loads_with_its_head(finished):
    workdir, state = finished
    loaded = pretrained.load(epath.Path(workdir), ("encoder", "head", "ema_encoder", "ema_head"))
    assert loaded.step == 6 and loaded.model.size == "16x2x2" and loaded.predictor is None
    same(loaded.params, jax.device_get({**state.params, **state.averages}))
    assert loaded.params["head"]["kernel"].shape == (16, 10) and loaded.params["head"]["bias"].shape == (10,)
    assert json.loads((workdir / "config.json").read_text())["classes"] == [str(i) for i in range(10)]
    with pytest.raises(UserError, match="has no target_encoder"):
        pretrained.load(epath.Path(workdir), ("target_encoder",))


def test_the_evaluation_is_that_of_all_test_images_at_once(finished):
    workdir, state = finished
    report = json.loads((workdir / "evaluation.json").read_text())
    data = settings(**RUN).data
    test = sources.load(data, "test")
    images = np.stack([record["image"] for record in test.records])[..., None]
    labels = np.array([record["label"] for record in test.records])
    method = method_of(**RUN)
    assert report["images"]["test"]["images"] == 360 and report["step"] == 6
    average = {name.removeprefix("ema_"): tree for name, tree in state.averages.items()}
    rows = report["results"]["accuracy"]
    assert list(rows) == ["parameters", "average"]
    for name, params in (("parameters", state.params), ("average", average)):
        inputs = MixedImages(normalise(jnp.asarray(images), mean=(0.5,), std=(0.5,)), jnp.zeros((360, 10)), None)
        logits = np.asarray(method.forward(jax.device_get(params), {}, inputs)["logits"])
        right = np.argsort(-logits, axis=1, kind="stable") == labels[:, None]
        assert rows[name]["top1"] == pytest.approx(right[:, 0].mean(), abs=0.003)
        assert rows[name]["top5"] == pytest.approx(right[:, :5].any(axis=1).mean(), abs=0.003)
    evaluated = [line for line in lines(workdir) if "eval/top1" in line]
    assert [line["step"] for line in evaluated] == [4, 6]
    assert evaluated[-1]["eval/ema_top5"] == rows["average"]["top5"]
    config = json.loads((workdir / "config.json").read_text())
    assert config["init.step"] == 3 and config["model.size"] == report["settings"]["model.size"] == "16x2x2"
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_starts_from_the_checkpoint(network, tmp_path):
    """With a learning rate of 0 the encoder stays what it was, and so does its average."""
    frozen = {f"optim__{key}": 0.0 for key in ("learning_rate_start", "learning_rate", "learning_rate_end")}
    run = RUN | {"data__train_split": "train[:16]", "optim__warmup_epochs": 0.0}
    state = finetune(settings(**run, **frozen), network, epath.Path(tmp_path / "run"))
    encoder = pretrained.load(network, ("target_encoder",)).params["target_encoder"]
    same(jax.device_get(state.params["encoder"]), encoder)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
                 jax.device_get(state.averages["ema_encoder"]), encoder)  # fmt: skip


def test_six_steps_equal_three_and_three_bit_for_bit(finished, network, tmp_path):
    """State, losses and accuracies, so images, labels, mixing and drop path too."""
    workdir, straight = finished
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "6")
    resumed = finetune(settings(**RUN, eval__every=4), network, epath.Path(again))
    same(jax.device_get(straight), jax.device_get(resumed))
    timed = TIMED | {"eval/seconds"}
    for a, b in zip(lines(workdir), lines(again), strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}
    assert len({line["loss/total"] for line in lines(again) if "loss/total" in line}) == 6


def test_the_command(network, tmp_path):
    """A larger image, which the fixed positions allow, RandAugment on grey images, and no average."""
    command = ["cjepa_jax.finetune", "--config=configs/finetune_digits.py"]
    small = ["data.train_split=train[:16]", "data.image_size=12", "data.batch_size=8", "augment.randaugment=2"]
    small += ["optim.epochs=1", "optim.warmup_epochs=0", "ema.start=0", "ema.end=0", "eval.every=1000"]
    arguments = [f"--workdir={tmp_path / 'run'}", f"--checkpoint={network}", *(f"--config.{s}" for s in small)]
    done = commands.run(*command, *arguments)
    assert done.returncode == 0, done.stderr
    assert "supervised: 16x2x2/2 on 16 images of 10 classes" in done.stderr
    assert "accuracy" in done.stdout and "parameters" in done.stdout and "average" not in done.stdout
    done = commands.run(*command, arguments[0])
    assert done.returncode == 2 and done.stderr.startswith("error: --init is missing")


# Labels


def test_labels_come_with_their_images():
    images = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None], (40, 8, 8)).copy()
    source = sources.from_arrays(images, np.arange(40) % 10)
    reader = pipeline.Reader(source, settings().data)
    batches = pipeline.train_batches(reader, seed=1, start=2)
    some = pipeline.train_batches(reader, seed=1, start=2, rows=[1, 5, 6])
    for _ in range(5):
        pixels, labels = next(batches)
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(labels, pixels[:, 0, 0, 0] % 10)
        few, few_labels = next(some)
        np.testing.assert_array_equal(few, pixels[[1, 5, 6]])
        np.testing.assert_array_equal(few_labels, labels[[1, 5, 6]])


def npz(path: pathlib.Path, train_labels, test_labels) -> str:
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8), np.uint8)
    arrays = {"train_images": images, "test_images": images}
    for name, labels in (("train", train_labels), ("test", test_labels)):
        if labels is not None:
            arrays[f"{name}_labels"] = labels
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize(
    "train_labels, test_labels, message",
    [
        (None, np.arange(32) % 4, r"data\.train_split = 'train' has no labels"),
        (np.arange(32) % 4, None, r"data\.test_split = 'test' has no labels"),
        (np.arange(32) % 4, np.arange(32) % 2 * 3, r"'test' has no image of 2 of the 4 classes: 1, 2"),
        (np.arange(32) % 4, np.arange(32) % 5, r"'test' has classes that data\.train_split lacks: 4"),
    ],
)
def test_labels_that_do_not_fit(network, tmp_path, train_labels, test_labels, message):
    path = npz(tmp_path / "images.npz", train_labels, test_labels)
    with pytest.raises(UserError, match=message):
        finetune(
            settings(data__source="npz", data__data_dir=path, data__train_split="train"),
            network,
            epath.Path(tmp_path / "run"),
        )
    assert not (tmp_path / "run").exists()


def test_classes_that_no_image_teaches_are_named(network, tmp_path, capsys):
    path = npz(tmp_path / "images.npz", np.arange(32) % 2 * 3, np.arange(32) % 4)
    config = settings(data__source="npz", data__data_dir=path, data__train_split="train")
    set_up(config, epath.Path(tmp_path / "run"), network)
    assert (
        "'train' has no image of 2 of the 4 classes, so that they cannot be learnt: 1, 2\n" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "classes, says",
    [(("dog", "fox"), "'test' numbers classes otherwise than the head does, such as dog, fox"), (("cat", "dog"), None)],
)
def test_a_head_is_judged_by_its_own_classes(classes, says):
    """Names that the head does not know, such as those of ImageNet's folders, are taken by their order."""
    head = {"bias": np.zeros(3)}
    frozen = types.SimpleNamespace(
        heads={"trained": head},
        test=types.SimpleNamespace(source=types.SimpleNamespace(classes=classes)),
        data=types.SimpleNamespace(test_split="test"),
        origin=types.SimpleNamespace(networks=types.SimpleNamespace(classes=("cat", "dog", "fox"))),
    )
    with pytest.raises(UserError, match=says) if says else contextlib.nullcontext():
        Accuracy().check(frozen)
    frozen.test.source.classes = ("n01440764", "n01443537", "n01484850")
    Accuracy().check(frozen)
    frozen.test.source.classes = ()
    with pytest.raises(UserError, match=r"data\.test_split = 'test' has no labels"):
        Accuracy().check(frozen)


def test_an_image_without_a_label_stops_the_run():
    source = sources.from_arrays(np.zeros((32, 8, 8), np.uint8))
    with pytest.raises(UserError, match=r"data\.train_split holds images without a label"):
        pipeline.check_labelled(next(pipeline.train_batches(pipeline.Reader(source, settings().data), seed=0)))


def test_each_change_of_the_images_is_made_where_it_is_asked_for():
    """By its own setting and no other."""
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
    batch, off = Batch(images, np.arange(8, dtype=np.int32)), dict(augment__mixup=0.0, augment__cutmix=0.0)

    def prepared(**changes):
        method = method_of(**off | dict(augment__erase=0.0, augment__randaugment=0) | changes)
        return np.asarray(method.prepare(batch, jax.random.key(0)).images)

    plain = prepared()
    np.testing.assert_allclose(plain, normalise(images, mean=(0.5,), std=(0.5,)), atol=1e-6)
    erased, cut, mixed = prepared(augment__erase=1.0), prepared(augment__cutmix=1.0), prepared(augment__mixup=1.0)
    assert (erased != plain).any(axis=(1, 2, 3)).all() and (erased == plain).any()  # a rectangle of each
    assert ((cut == plain) | (cut == plain[::-1])).all() and (cut != plain).any()  # one of another image
    for new, old, other in zip(mixed, plain, plain[::-1], strict=True):
        share = ((new - old) / (other - old))[abs(other - old) > 0.1]
        assert 0 < share.mean() < 1 and share.std() < 1e-4  # all pixels are blended alike
    assert method_of(augment__randaugment=0).views[0].distort is None
    assert method_of(augment__randaugment=2).views[0].distort.operations == 2


def test_a_frozen_encoder_has_no_backward_pass_to_count():
    whole, frozen = (method_of(optim__frozen=names).transformers()["encoder"] for names in ((), ("encoder",)))
    assert flops.step([whole]) == 3 * flops.step([frozen]) == 3 * flops.forward(frozen)


# Mistakes


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"model__encoder": "encoder"}, r"has no encoder, only target_encoder; --config.model.encoder=target_encoder"),
        ({"data__image_size": 9}, r"data\.image_size = 9 is not divisible by the checkpoint's patch size, 2"),
        ({"data__mean": (0.4,)}, r"data\.mean = \(0\.4,\), but --init .* was trained with \(0\.5,\)"),
        ({"data__batch_size": 12}, r"data\.batch_size = 12 is not divisible by the 8 devices"),
        ({"augment__mixup": -1.0}, r"augment\.mixup must be in \[0, 100\]"),
        ({"augment__magnitude": 11.0}, r"augment\.magnitude must be in \[0, 10\]"),
        ({"augment__erase": 1.5}, r"augment\.erase must be in \[0, 1\]"),
        ({"checkpoint__keep_best": "ema_top1", "ema__start": 0.0, "ema__end": 0.0}, r"there is no moving average"),
        ({"optim__layer_decay": 0.0}, r"optim\.layer_decay must be in \(0, 1\]"),
        ({"model__drop_path": 1.0}, r"model\.drop_path must be in \[0, 1\)"),
        ({"optim__epochs": 0.01, "optim__warmup_epochs": 0.0}, r"are less than one batch"),
        ({"mesh__parameters": "fsdp", "mesh__fsdp": 8}, r"needs model\.remat = 'dots' or 'full'"),
    ],
)
def test_bad_settings_are_one_line_before_compilation(overrides, message, network, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "jit", lambda *a, **k: pytest.fail("compiled before the check"))
    with pytest.raises(UserError, match=message) as error:
        finetune(settings(**overrides), network, epath.Path(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_another_checkpoint_in_the_workdir(finished, network, tmp_path):
    other = tmp_path / "other"
    loaded = pretrained.load(network, ("target_encoder",))
    changed = jax.tree.map(lambda x: x + 1, loaded.params)
    pretrained.save(epath.Path(other), loaded._replace(params=changed))
    with pytest.raises(UserError, match=r"holds another experiment.*init\.digest: \w+ -> \w+$"):
        finetune(settings(**RUN), epath.Path(other), epath.Path(finished[0]))


def test_a_loss_that_is_no_number_stops_the_run(network, tmp_path):
    wild = dict(optim__learning_rate=1e30, optim__learning_rate_start=1e30, optim__warmup_epochs=0.0)
    with pytest.raises(nonfinite.DivergedError, match=r"is not finite.* at step"):
        finetune(settings(**(RUN | wild)), network, epath.Path(tmp_path / "run"))


def test_the_recipe_of_vitb16_builds_from_shapes_alone():
    values = finetune_vitb16.get_config().to_dict()
    values["model"] |= {"size": "B", "patch_size": 16}
    recipe = parse(values, SupervisedConfig)
    assert recipe.optim.learning_rate == pytest.approx(5e-4 * recipe.data.batch_size / 256)
    method = Supervised(recipe, classes=1000)
    inputs = Batch(jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.uint8), jax.ShapeDtypeStruct((8,), jnp.int32))
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention itself mixes bfloat16 and float32
        state = jax.eval_shape(functools.partial(step.init_state, method=method, steps=100), jax.random.key(0))
        take_step = functools.partial(step.train_step, method=method, steps=100)
        after, metrics, _ = jax.eval_shape(take_step, state, inputs, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(after.params))


def test_old_names_of_settings_are_understood():
    assert settings(model__tower="random").model.encoder == "random"


def test_training_from_scratch_needs_no_checkpoint(tmp_path):
    chosen = settings(**RUN, model__encoder="random", model__size="16x1x2", model__patch_size=2)
    state = train(chosen, epath.Path(tmp_path / "run"))
    assert int(state.step) == 6
    with pytest.raises(UserError, match="--init is missing"):
        train(settings(**RUN), epath.Path(tmp_path / "other"))


def test_an_architecture_that_is_not_the_checkpoints(network, tmp_path):
    with pytest.raises(UserError, match=r"model\.size = B, but --init .* has 16x2x2"):
        finetune(settings(**RUN, model__size="B"), network, epath.Path(tmp_path / "run"))

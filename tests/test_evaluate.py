"""Features of a checkpoint, and the command that judges them."""

import functools
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from etils import epath

from cjepa_jax import pretrained
from cjepa_jax.config import Mesh
from cjepa_jax.data import pipeline
from cjepa_jax.errors import UserError
from cjepa_jax.evaluate import __main__ as evaluate
from cjepa_jax.evaluate import collapse, features
from cjepa_jax.evaluate.checkpoint import judge
from cjepa_jax.evaluate.config import Evaluation, resolve
from cjepa_jax.evaluate.frozen import Frozen, from_checkpoint
from cjepa_jax.evaluate.knn import Knn
from cjepa_jax.methods.cjepa import CJEPA
from cjepa_jax.models.vit import build_encoder, normalise, patchify
from cjepa_jax.settings import parse
from cjepa_jax.train.sharding import make_mesh
from cjepa_jax.train.step import init_state

QUICK = {"linear__min_steps": 30, "linear__epochs": 2, "logistic__draws": 2, "collapse__objects": 20}
QUICK |= {"collapse__views": 3, "knn__draws": 2}


def settings(**overrides) -> Evaluation:
    values: dict = {}
    for name, value in (QUICK | {"data__batch_size": 60} | overrides).items():
        group, key = name.split("__")
        values.setdefault(group, {})[key] = value
    return parse(values, Evaluation)


def freeze(checkpoint, encoder: str, chosen: Evaluation, *, baselines: bool, layers: int = 1) -> Frozen:
    """What the command makes of a checkpoint."""
    path = epath.Path(checkpoint)
    data, crop_fraction = resolve(chosen, pretrained.describe(path)[1])
    options = dict(data=data, crop_fraction=crop_fraction, seed=chosen.seed)
    return from_checkpoint(path, encoder, baselines=baselines, layers=layers, **options)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> epath.Path:
    """An untrained checkpoint of two layers, 300 images of the digits."""
    from cjepa_jax.settings import flatten
    from tests.conftest import small

    config = small(model__size="16x2x2", data__train_split="train[:300]", data__test_split="test[:150]")
    state = jax.device_get(jax.jit(functools.partial(init_state, method=CJEPA(config), steps=1))(jax.random.key(7)))
    params = {
        "encoder": state.params["encoder"],
        "target_encoder": jax.tree.map(lambda x: x * 1.1, state.averages["target_encoder"]),
    }
    path = epath.Path(tmp_path_factory.mktemp("runs")) / "run"
    data = config.data
    pretrained.save(path, pretrained.Pretrained(config.model, None, data.image_size, data.mean, data.std, 3, params))
    (path / "config.json").write_text(json.dumps(flatten(config)))
    return path


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layers", [1, 2])
def test_products_of_a_float32_encoder_are_exact(make_config, dtype, layers):
    """Also where a TPU or GPU would round their operands, as the evaluation during training has them."""
    config = make_config(model__size="16x2x2", model__dtype=dtype)
    apply = features.mean_features(config.model, config.data, trained_shape=(8, 8), layers=layers)
    with jax.numpy_dtype_promotion("standard"):  # jax's own attention mixes bfloat16 and float32
        params = jax.eval_shape(CJEPA(config).init, jax.random.key(0))["encoder"]
        text = jax.jit(apply).lower(params, jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.uint8)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 1 + 2 * 6  # the embedding; of each block q, k and v, attention's two, and three more
    assert all(("HIGHEST, HIGHEST" in line) == (dtype == "float32") for line in products)


def test_the_command_keeps_products_of_float32_exact(workdir, monkeypatch):
    seen, real = [], Knn.run

    def run(*arguments):
        seen.append(jax.config.jax_default_matmul_precision)
        return real(*arguments)

    monkeypatch.setattr(Knn, "run", run)
    judge(workdir, settings(), ["knn"], name="exact")
    assert seen == ["highest"]


def reference_features(params, images: np.ndarray, config) -> list[np.ndarray]:
    """Means of the normed outputs of each of the two blocks: the encoder, block by block, on one device."""
    import flax.linen as nn

    from cjepa_jax.models.vit import Block, sincos_positions

    patches = patchify(normalise(jnp.asarray(images), mean=config.mean, std=config.std), 2)
    with jax.numpy_rank_promotion("allow"):
        x = patches @ params["embed"]["kernel"] + params["embed"]["bias"] + sincos_positions(16, (4, 4))
    block, norm, found = Block(2, 4, "fan_in", jnp.dtype("float32")), nn.LayerNorm(1e-6), []
    for name in ("block00", "block01"):
        x = block.apply({"params": params[name]}, x)
        found.append(np.asarray(norm.apply({"params": params["norm"]}, x).mean(axis=1)))
    return found


@pytest.mark.parametrize("encoder", ["target_encoder", "encoder"])
def test_features_are_the_means_of_the_last_blocks_on_eight_devices(workdir, encoder):
    frozen = freeze(workdir, encoder, settings(), baselines=True, layers=4)
    assert frozen.mesh.size == 8 and frozen.extractor.size == 64
    images, labels = zip(*pipeline.ordered_batches(frozen.test, size=150, crop_fraction=1.0), strict=True)
    expected = reference_features(frozen.origin.networks.params[encoder], images[0], frozen.data)
    found = frozen.test_features["trained"]
    np.testing.assert_allclose(found.features, np.stack(expected, axis=1), atol=1e-4)
    np.testing.assert_array_equal(found.labels, labels[0])
    both = frozen.splits(layers=4)["trained"].test.features
    np.testing.assert_allclose(both, np.concatenate(expected, axis=1), atol=1e-4)
    np.testing.assert_allclose(frozen.splits(layers=1)["trained"].test.features, expected[1], atol=1e-4)
    pixels = frozen.splits(layers=4)["raw pixels"].test.features
    np.testing.assert_allclose(pixels, images[0].reshape(150, -1) / 255, atol=1e-6)
    assert frozen.splits(layers=4)["untrained"].train.features.shape == (300, 32)


def test_unreadable_images_are_left_out(make_config, monkeypatch):
    from cjepa_jax.data import decode, sources

    config = make_config(data__max_bad_fraction=1.0, data__train_split="train[:20]")
    read = sources.Source.read

    def sometimes(self, index):
        if index % 3 == 0:
            raise decode.UnreadableError("torn")
        return read(self, index)

    monkeypatch.setattr(sources.Source, "read", sometimes)
    reader = pipeline.Reader(sources.load(config.data, config.data.train_split), config.data)
    extractor = features.Extractor({"pixels": features.pixels}, make_mesh(Mesh()), batch_size=8)
    view = pipeline.central_view(reader, crop_fraction=1.0)
    found = extractor.split({"pixels": {}}, reader, range(20), view)["pixels"]
    kept = [i for i in range(20) if i % 3]
    assert found.labels.tolist() == [read(reader.source, i)["label"] for i in kept]
    np.testing.assert_allclose(found.features[5].reshape(8, 8), read(reader.source, kept[5])["image"] / 255, atol=1e-6)


def test_random_views_are_a_function_of_the_seed_and_the_image(make_config):
    from cjepa_jax.data import sources

    config = make_config(data__crop_scale=(0.2, 0.6))
    reader = pipeline.Reader(sources.load(config.data, "train[:5]"), config.data)
    first, again, other = (pipeline.random_view(reader, seed=(0, number)) for number in (0, 0, 1))
    np.testing.assert_array_equal(first(3)[0], again(3)[0])
    assert (first(3)[0] != other(3)[0]).any()


def test_images_of_another_size_get_interpolated_positions(workdir):
    frozen = freeze(workdir, "encoder", settings(data__image_size=12), baselines=False)
    encoder = features.encoder_for(frozen.model, image_shape=(12, 12), trained_shape=(8, 8))
    params = frozen.origin.networks.params["encoder"]
    patches = jnp.ones((1, 36, 4))
    moved = jax.jit(encoder.apply)({"params": params}, patches)
    computed = jax.jit(build_encoder(frozen.model, grid=(6, 6)).apply)({"params": params}, patches)
    assert moved.shape == (1, 36, 16) and np.abs(moved - computed).max() > 0.01
    assert frozen.splits()["trained"].test.features.shape == (150, 16)


def run(monkeypatch, *arguments: str) -> None:
    """Runs the command in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    flags.FLAGS.unparse_flags()
    try:
        evaluate.main()
    finally:
        for name in ("checkpoint", "method", "name", "encoder"):
            flags.FLAGS[name].value = None
        flags.FLAGS["baselines"].value = True


def test_what_reads_the_checkpoint_again_comes_first(workdir, monkeypatch, capsys):
    """A run that goes on deletes it in time."""
    run(monkeypatch, f"--checkpoint={workdir}", "--method=knn,attention", "--name=order", *FAST)
    said = capsys.readouterr().out
    assert 0 < said.index("order.attention.json") < said.index("order.knn.json")


def test_who_looks_at_no_images_of_data_need_not_say_which_they_are():
    released = {"data.image_size": 32, "data.mean": [0.5] * 3, "data.std": [0.5] * 3}
    with pytest.raises(UserError, match=r"data\.source: the checkpoint does not say it"):
        resolve(Evaluation(), released)
    assert resolve(Evaluation(), released, reads_data=False)[0].image_size == 32
    assert [name for name, one in Evaluation().evaluators.items() if not one.reads_data] == ["davis", "segmentation"]


FAST = [f"--config.{key.replace('__', '.')}={value}" for key, value in QUICK.items()]


def test_the_command_prints_tables_and_leaves_what_it_takes_to_repeat(workdir, monkeypatch, capsys):
    arguments = [f"--checkpoint={workdir}", "--method=knn,linear,lowshot,collapse", *FAST]
    run(monkeypatch, *arguments)
    printed = capsys.readouterr()
    said = printed.out
    assert "--method=lowshot is called logistic now" in printed.err
    found = {}
    for method in ("knn", "linear", "logistic", "collapse"):
        path = workdir / "evaluation" / f"step3_target_encoder.{method}.json"
        assert str(path) in said
        found[method] = json.loads(path.read_text())
        assert found[method]["step"] == 3 and found[method]["encoder"] == "target_encoder"
        assert found[method]["settings"]["seed"] == 0 and found[method]["data"]["source"] == "digits"
        assert found[method]["versions"]["jax"] == jax.__version__ and found[method]["devices"].startswith("8 x ")
        assert found[method]["images"]["train"]["images"] == 300 and "fingerprint" in found[method]["images"]["train"]
        assert list(found[method]["results"]) == [method]
        found[method]["results"] = found[method]["results"][method]
        assert list(found[method]["results"]) == ["trained", "untrained", "raw pixels"]
    raw = {method: found[method]["results"]["raw pixels"] for method in found}
    assert raw["knn"]["weighted"] > 0.9 and raw["linear"]["linear"] > 0.85 and raw["logistic"]["all labels"] > 0.85
    assert f"{100 * raw['knn']['plain']:.2f}" in said
    drawn = raw["logistic"]["10 a class"]
    assert (
        drawn["mean"] == pytest.approx(np.mean(drawn["draws"])) and drawn["mean"] > raw["logistic"]["1 a class"]["mean"]
    )
    assert found["linear"]["results"]["trained"]["all"].keys() == {"last 1 layers", "last 2 layers"}
    assert raw["collapse"]["LiDAR"] > 2 and len(raw["collapse"]["spectrum"]) == 64
    picture = workdir / "evaluation" / "step3_target_encoder.collapse.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and f"-> {picture}\n" in said

    assert said.startswith(f"{workdir}, step 3: target_encoder, 16x2x2/2\ntrain images: 300 of 10 classes, digits 'tr")
    assert "\ntest images: 150 of 10 classes, digits 'test[:150]'\nguessing reaches 10.00 %, always the com" in said
    passes = ("features of training images", "linear probes", "logistic regressions", "random views")
    assert all(what in printed.err for what in passes)
    share = raw["knn"]["plain"]
    assert raw["knn"]["standard error"]["plain"] == pytest.approx((share * (1 - share) / 150) ** 0.5)
    assert f"{100 * share:.2f} +- {100 * raw['knn']['standard error']['plain']:.2f}" in said
    assert drawn["standard error"] == pytest.approx(np.std(drawn["draws"], ddof=1) / 2**0.5)
    assert f"{100 * drawn['mean']:.2f} +- {100 * drawn['standard error']:.2f}" in said
    assert not any("%" in key for rows in found.values() for row in rows["results"].values() for key in row)
    assert "verdict: no alarm\n  in multiples of the untrained encoder's on the same images: std 1." in said

    last = found["linear"]["results"]["trained"]["all"]["last 1 layers"]["test"]
    (line,) = [line for line in said.splitlines() if "trained, last layer (exported)  " in line]
    assert f" {100 * last:.2f} +- " in line
    exported = pathlib.Path(found["linear"]["results"]["trained"]["exported"])
    assert f"exported with its head, the probe of the last layer: {exported}\n" in said
    left = json.loads((exported / "evaluation.json").read_text())
    (row,) = left["results"]["linear"].items()
    assert row[0] == "trained, last layer (exported)" and row[1]["linear"] == last
    assert left["encoder"] == "target_encoder" and left["step"] == 3 and left["data"]["test_split"] == "test[:150]"

    before = picture.parent / "step3_target_encoder.knn.json"
    older = json.loads(before.read_text())
    for group, key in (("settings", "knn.temperature"), ("settings", "decoder.strengths"), ("data", "image_width")):
        del older[group][key]  # which older code did not know
    before.write_text(json.dumps(older))
    run(monkeypatch, f"--checkpoint={workdir}", "--method=knn", *FAST)  # the same settings may be repeated
    content = before.read_bytes()
    assert b"image_width" in content
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, f"--checkpoint={workdir}", "--method=knn", "--config.knn.neighbours=3")
    assert "knn.json exists with another settings; --name gives" in capsys.readouterr().err
    assert before.read_bytes() == content


@pytest.mark.parametrize("augment", [False, True])
def test_the_linear_probe_is_left_as_a_checkpoint_with_its_head(workdir, tmp_path, augment):
    chosen = settings(linear__augment=augment)
    frozen = freeze(workdir, "target_encoder", chosen, baselines=False, layers=4)
    rows = chosen.linear.run(frozen, epath.Path(tmp_path) / "probe")
    left = pretrained.load(epath.Path(tmp_path) / "probe.linear", ("target_encoder", "head"))
    assert left.classes == tuple(frozen.train.source.classes) and left.image_size == 8
    about = json.loads((tmp_path / "probe.linear" / "config.json").read_text())
    assert about["eval.crop_fraction"] == frozen.crop_fraction == 1.0
    images, labels = next(pipeline.ordered_batches(frozen.test, size=150, crop_fraction=1.0))
    pooled = reference_features(left.params["target_encoder"], images, frozen.data)[-1]
    right = (pooled @ left.params["head"]["kernel"] + left.params["head"]["bias"]).argmax(axis=1) == labels
    assert abs(right.mean() - rows["trained"]["all"]["last 1 layers"]["test"]) < 0.01
    if not augment:  # what was measured of the probe is not lost when it is made again
        (tmp_path / "probe.linear" / "evaluation").mkdir()
        (tmp_path / "probe.linear" / "evaluation" / "x.json").write_text("{}")
        chosen.linear.run(frozen, epath.Path(tmp_path) / "probe")
        assert (tmp_path / "probe.linear.before" / "evaluation" / "x.json").exists()
        assert not (tmp_path / "probe.linear" / "evaluation").exists()


def test_test_images_choose_nothing_of_the_linear_probe(workdir):
    found = []
    for split in ("test[:150]", "test[150:300]"):
        chosen = settings(data__test_split=split)
        frozen = freeze(workdir, "target_encoder", chosen, baselines=False, layers=4)
        found.append(chosen.linear.run(frozen, None)["trained"])
    for key in ("layers", "learning rate", "weight decay", "held-out"):
        assert found[0][key] == found[1][key]
    assert found[0]["linear"] != found[1]["linear"]


def test_the_verdict_has_the_limits_of_the_alarm_while_training():
    def row(std: float, rank: float, cosine: float) -> dict[str, float]:
        return {"std": std, "rank": rank, "cosine": cosine}

    def lines(*stds: float) -> list[dict[str, float]]:
        spread = ({"rep/std": std, "rep/rank": 8.0, "rep/cosine": 0.5} for std in stds)
        return [{"step": 10 * i, **found} for i, found in enumerate(spread)] + [{"step": 90, "eval/knn": 0.5}]

    fine = collapse.verdict({"trained": row(0.6, 5, 0.7), "untrained": row(1, 9, 0)}, lines(1, 0.6, 0.4, 0.4), steps=0)
    assert fine["alarms"] == [] and "std 0.60 (alarm below 0.5), rank 0.56" in fine["compared"][0]
    assert fine["compared"][1] == "  in metrics.jsonl: no alarm at step 90"
    rows = {"trained": row(float("nan"), 4, 0.8), "untrained": row(1, 9, 0)}
    found = collapse.verdict(rows, lines(1, 0.6, 0.4, 0.4, 0.4), steps=100)["alarms"]
    starts = ["std is nan, less than 0.5 of the untrained encoder's 1: ", "rank is 4, less than 0.5 of the untrained"]
    starts += ["1 - cosine is 0.2, less than 0.25 of", "in metrics.jsonl rep/std is 0.4, below its limit of 0.5 since"]
    assert len(found) == 4 and all(map(str.startswith, found, starts))
    assert all(": the features " in alarm for alarm in found)
    assert collapse.verdict(rows, lines(1, 0.6, 0.4, 0.4, 0.4), steps=1000)["alarms"] == found[:3]  # not for long yet
    said = collapse.Collapse().notes({"trained": {"verdict": {"alarms": found, "compared": ["x"]}}})
    assert said[:2] == ["verdict: the features are collapsing", f"  alarm: {found[0]}"]
    assert collapse.verdict({"trained": row(1, 9, 0)}, [], steps=0) == {"alarms": [], "compared": []}
    assert collapse.Collapse().notes({"trained": {}})[0].startswith("verdict: none, for want of")


def test_the_linear_probe_without_the_last_layer_alone(workdir):
    """Raw pixels have one layer, which is taken all the same."""
    chosen = settings(linear__layers=(4,))
    rows = chosen.linear.run(freeze(workdir, "encoder", chosen, baselines=True, layers=4), None)
    assert {name: list(row["all"]) for name, row in rows.items()}["raw pixels"] == ["last 2 layers"]


def test_augmented_linear_probe(workdir):
    chosen = settings(linear__augment=True, views__flip=0.0)
    rows = chosen.linear.run(freeze(workdir, "encoder", chosen, baselines=True, layers=4), None)
    assert rows["raw pixels"]["linear"] > 0.4 and 0 <= rows["trained"]["linear"] <= 1


def test_accuracy_counts_by_the_book(workdir, tmp_path):
    """The head of a network, on images some of which do not count."""
    networks = pretrained.load(workdir, ("encoder",))
    rng = np.random.default_rng(3)
    head = {"kernel": rng.normal(size=(16, 10)).astype(np.float32), "bias": np.zeros(10, np.float32)}
    half = {name: x / 2 for name, x in head.items()}
    params = {"encoder": networks.params["encoder"], "head": head, "ema_encoder": networks.params["encoder"]}
    path = epath.Path(tmp_path / "tuned")
    pretrained.save(path, networks._replace(params=params | {"ema_head": half}))
    (path / "config.json").write_text((workdir / "config.json").read_text())
    frozen = freeze(path, "encoder", settings(), baselines=False)
    accuracy = settings().accuracy
    accuracy.check(frozen)
    test = frozen.test_features["parameters"]
    test.labels[::7] = -2
    rows = accuracy.run(frozen, None)
    logits = test.last(1).features.astype(np.float64) @ head["kernel"]
    order, counted = np.argsort(-logits, axis=1), test.labels >= 0
    right = (order == test.labels[:, None])[counted]
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert rows["parameters"]["images"] == counted.sum() == 128
    assert rows["parameters"]["top1"] == pytest.approx(right[:, 0].mean())
    assert rows["parameters"]["top5"] == pytest.approx(right[:, :5].any(axis=1).mean()) != right[:, 0].mean()
    expected = -logs[np.arange(150), test.labels][counted].mean()
    assert rows["parameters"]["loss"] == pytest.approx(expected, rel=1e-4) != rows["average"]["loss"]
    assert accuracy.metrics(rows).keys() == {"top1", "top5", "ema_top1", "ema_top5"}
    frozen.heads = {"parameters": {name: x[..., :6] for name, x in head.items()}}
    test.labels[:] %= 6
    few = accuracy.run(frozen, None)
    assert few["parameters"].keys() == {"top1", "loss", "images", "standard error"}  # of six classes five say nothing
    assert few["parameters"]["standard error"].keys() == {"top1"} == accuracy.metrics(few).keys()
    with pytest.raises(UserError, match="the checkpoint has no head"):
        accuracy.check(freeze(workdir, "encoder", settings(), baselines=False))


WORKDIR = "the workdir"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method=knn"], "--checkpoint is missing"),
        (["--checkpoint=none"], "--method is missing; known: knn, logistic, linear, accuracy, collapse"),
        (["--checkpoint=none", "--method=knn,lineer"], "--method 'lineer' is not known; did you mean 'linear'?"),
        ([WORKDIR, "--method=knn", "--tower=predictor"], "--encoder 'predictor' is not known"),
        (["--checkpoint=none", "--method=knn"], "--checkpoint none does not exist"),
        (["--checkpoint=none", "--method=knn", "--config.knn.k=1"], "--config has no such setting"),
    ],
)
def test_bad_flags_are_one_line(workdir, arguments, message, monkeypatch, capsys):
    arguments = [f"--checkpoint={workdir}" if argument == WORKDIR else argument for argument in arguments]
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "method, overrides, message",
    [
        ("knn", {"knn__neighbours": 301}, "knn.neighbours = 301 is more than the 300 training images"),
        (
            "knn",
            {"data__train_split": "train[:20]"},
            r"data.train_split = 'train\[:20\]' lacks \d class.* that data.test_",
        ),
        ("knn", {"data__image_size": 9}, "data.image_size = 9 is not divisible by the encoder's patch size, 2"),
        ("collapse", {"data__train_split": "train[:1]"}, "collapse compares training images, and there is only one"),
    ],
)
def test_what_a_user_trips_over(workdir, method, overrides, message):
    with pytest.raises(UserError, match=message):
        chosen = settings(**overrides)
        frozen = freeze(workdir, "encoder", chosen, baselines=False)
        chosen.evaluators[method].check(frozen)
        chosen.evaluators[method].run(frozen, None)


def test_labels_are_compared_before_anything_is_computed(workdir, monkeypatch, capsys):
    """A class that no test image has is named, and the others are judged."""
    monkeypatch.setattr(Frozen, "train_features", property(lambda self: pytest.fail("computed")))
    with pytest.raises(UserError, match=r"data.train_split = 'train\[:20\]' lacks"):
        judge(workdir, settings(data__train_split="train[:20]"), ["knn"], baselines=False)
    freeze(workdir, "encoder", settings(data__test_split="test[:4]"), baselines=False).check_classes()
    assert re.search(r"warning: data.test_split = 'test\[:4\]' lacks \d classes \(.*\), which", capsys.readouterr().err)


@pytest.mark.parametrize("source, name", [("digits", ""), ("tfds", "imagenet2012"), (None, "imagenet2012")])
def test_another_kind_of_images_forgets_where_those_of_the_training_lie(source, name):
    trained = {"data.source": "tfds", "data.name": "imagenet2012", "data.data_dir": "gs://bucket/tfds"}
    trained |= {"data.train_split": "train", "data.test_split": "validation", "data.image_size": 8}
    trained |= {"data.mean": [0.5], "data.std": [0.5]}
    found, _ = resolve(settings(**{"data__source": source} if source else {}), trained)
    assert (found.name, found.data_dir) == (name, "gs://bucket/tfds" if name else "")


def test_images_without_labels(workdir, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "bare.npz", train_images=images, test_images=images)
    bare = dict(data__source="npz", data__data_dir=str(tmp_path / "bare.npz"), data__train_split="train")
    chosen = settings(**bare, data__test_split="test")
    frozen = freeze(workdir, "encoder", chosen, baselines=False)
    *some, last = (name for name, evaluator in settings().evaluators.items() if not evaluator.needs_labels)
    needless = f"{', '.join(some)} and {last}"
    with pytest.raises(UserError, match=f"data.train_split = 'train' has no labels; the methods {needless} need"):
        frozen.splits()
    rows = chosen.collapse.run(frozen, epath.Path(tmp_path / "x"))
    assert rows["trained"]["rank"] >= 1 and (tmp_path / "x.collapse.png").exists()


def test_a_checkpoint_of_another_architecture(workdir, tmp_path):
    other = epath.Path(tmp_path / "other")
    loaded = pretrained.load(workdir, ("encoder",))
    pretrained.save(other, loaded)
    config = json.loads((workdir / "config.json").read_text()) | {"model.size": "32x2x2"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"its encoder does not fit the config.*block00"):
        freeze(other, "encoder", settings(), baselines=False)
    (other / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "data.source"}))
    with pytest.raises(UserError, match=r"data.source: the checkpoint does not say it; give --config.data.source="):
        freeze(other, "encoder", settings(), baselines=False)

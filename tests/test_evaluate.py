"""Features of a checkpoint, and the command that judges them."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from etils import epath

from cjepa_jax import pretrained
from cjepa_jax.config import Mesh, UserError
from cjepa_jax.data import pipeline
from cjepa_jax.evaluate import __main__ as evaluate
from cjepa_jax.evaluate import features, methods, subject
from cjepa_jax.evaluate.config import Evaluation
from cjepa_jax.models.vit import build_encoder, normalise, patchify
from cjepa_jax.parsing import parse
from cjepa_jax.sharding import make_mesh
from cjepa_jax.step import Method, init_state
from configs import evaluate as defaults


def settings(**overrides) -> Evaluation:
    config = defaults.get_config()
    config.update_from_flattened_dict({"linear.min_steps": 30, "linear.epochs": 2, "lowshot.draws": 2})
    config.update_from_flattened_dict({"collapse.objects": 20, "collapse.views": 3, "data.batch_size": 60})
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in overrides.items()})
    return parse(config.to_dict(), Evaluation)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> epath.Path:
    """An untrained checkpoint of two layers, 300 images of the digits."""
    from cjepa_jax.parsing import flatten
    from tests.conftest import small

    config = small(model__size="16x2x2", data__train_split="train[:300]", data__test_split="test[:150]")
    state = init_state(jax.random.key(7), Method(config, 1))
    params = {
        "encoder": state.params["encoder"],
        "target_encoder": jax.tree.map(lambda x: x * 1.1, state.target_params),
    }
    path = epath.Path(tmp_path_factory.mktemp("runs")) / "run"
    data = config.data
    pretrained.save(path, pretrained.Pretrained(config.model, None, data.image_size, data.mean, data.std, 3, params))
    (path / "config.json").write_text(json.dumps(flatten(config)))
    return path


def reference_features(params, images: np.ndarray, config) -> list[np.ndarray]:
    """Means of the normed outputs of each of the two blocks: the encoder, block by block, on one device."""
    import flax.linen as nn

    from cjepa_jax.models.vit import Block, sincos_positions

    patches = patchify(normalise(jnp.asarray(images), mean=config.mean, std=config.std), 2)
    x = patches @ params["embed"]["kernel"] + params["embed"]["bias"] + sincos_positions(16, 4)
    block, norm, found = Block(2, 4, "fan_in", jnp.dtype("float32")), nn.LayerNorm(1e-6), []
    for name in ("block00", "block01"):
        x = block.apply({"params": params[name]}, x)
        found.append(np.asarray(norm.apply({"params": params["norm"]}, x).mean(axis=1)))
    return found


@pytest.mark.parametrize("tower", ["target_encoder", "encoder"])
def test_features_are_the_means_of_the_last_blocks_on_eight_devices(workdir, tower):
    judged = subject.Subject(workdir, tower, settings(), baselines=True, layers=4)
    assert judged.mesh.size == 8 and judged.depth == 2 and judged.extractor.size == 64
    images, labels = zip(*pipeline.ordered_batches(judged.test, size=150, crop_fraction=1.0), strict=True)
    expected = reference_features(judged.networks.params[tower], images[0], judged.data)
    both = judged.splits(layers=4)["checkpoint"].test
    np.testing.assert_allclose(both.features, np.concatenate(expected, axis=1), atol=1e-4)
    np.testing.assert_array_equal(both.labels, labels[0])
    np.testing.assert_allclose(judged.splits(layers=1)["checkpoint"].test.features, expected[1], atol=1e-4)
    pixels = judged.splits(layers=4)["raw pixels"].test.features
    np.testing.assert_allclose(pixels, images[0].reshape(150, -1) / 255, atol=1e-6)
    assert judged.splits(layers=4)["untrained"].train.features.shape == (300, 32)


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
    extractor = features.Extractor({"pixels": features.pixels}, make_mesh(Mesh(1, "replicated")), batch_size=8)
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
    judged = subject.Subject(workdir, "encoder", settings(data__image_size=12), baselines=False)
    encoder = features.encoder_for(judged.networks.model, image_size=12, trained_size=8)
    params = judged.networks.params["encoder"]
    patches = jnp.ones((1, 36, 4))
    moved = encoder.apply({"params": params}, patches)
    computed = build_encoder(judged.networks.model, grid=6).apply({"params": params}, patches)
    assert moved.shape == (1, 36, 16) and np.abs(moved - computed).max() > 0.01
    assert judged.splits(layers=1)["checkpoint"].test.features.shape == (150, 16)


def run(monkeypatch, *arguments: str) -> None:
    """The command, in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    flags.FLAGS.unparse_flags()
    for name in list(flags.FLAGS):
        if name.startswith("config."):
            delattr(flags.FLAGS, name)
    try:
        evaluate.main()
    finally:
        for name in ("checkpoint", "method", "name"):
            flags.FLAGS[name].value = None
        flags.FLAGS["tower"].value, flags.FLAGS["baselines"].value = "target_encoder", True


loads_a_config = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
QUICK = ["--config.linear.min_steps=30", "--config.linear.epochs=2", "--config.lowshot.draws=2"]
QUICK += ["--config.collapse.objects=20", "--config.collapse.views=3"]


@loads_a_config
def test_the_command_prints_tables_and_leaves_what_it_takes_to_repeat(workdir, monkeypatch, capsys):
    arguments = [f"--checkpoint={workdir}", "--method=knn,linear,lowshot,collapse", *QUICK]
    run(monkeypatch, *arguments)
    said = capsys.readouterr().out
    found = {}
    for method in ("knn", "linear", "lowshot", "collapse"):
        path = workdir / "evaluation" / f"step3_target_encoder.{method}.json"
        assert str(path) in said
        found[method] = json.loads(path.read_text())
        assert found[method]["step"] == 3 and found[method]["tower"] == "target_encoder"
        assert found[method]["settings"]["seed"] == 0 and found[method]["data"]["source"] == "digits"
        assert found[method]["versions"]["jax"] == jax.__version__ and found[method]["devices"].startswith("8 x ")
        assert found[method]["images"]["train"]["images"] == 300 and "fingerprint" in found[method]["images"]["train"]
        assert list(found[method]["results"]) == ["checkpoint", "untrained", "raw pixels"]
    raw = {method: found[method]["results"]["raw pixels"] for method in found}
    assert raw["knn"]["weighted %"] > 0.9 and raw["linear"]["linear %"] > 0.85
    assert f"{100 * raw['knn']['plain %']:.2f}" in said
    drawn = raw["lowshot"]["10 a class %"]
    assert (
        drawn["mean"] == pytest.approx(np.mean(drawn["draws"]))
        and drawn["mean"] > raw["lowshot"]["1 a class %"]["mean"]
    )
    assert found["linear"]["results"]["checkpoint"]["all"].keys() == {"last 1 layers", "last 2 layers"}
    assert raw["collapse"]["LiDAR"] > 2 and len(raw["collapse"]["spectrum"]) == 64
    picture = workdir / "evaluation" / "step3_target_encoder.collapse.png"
    assert picture.read_bytes().startswith(b"\x89PNG")

    run(monkeypatch, f"--checkpoint={workdir}", "--method=knn", *QUICK)  # the same settings may be repeated
    before = picture.parent / "step3_target_encoder.knn.json"
    content = before.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, f"--checkpoint={workdir}", "--method=knn", "--config.knn.neighbours=3")
    assert "knn.json exists with another settings; --name gives" in capsys.readouterr().err
    assert before.read_bytes() == content


@pytest.mark.parametrize("augment", [False, True])
def test_the_linear_probe_is_left_as_a_checkpoint_with_its_head(workdir, tmp_path, augment):
    judged = subject.Subject(workdir, "target_encoder", settings(linear__augment=augment), baselines=False)
    rows = methods.METHODS["linear"].judge(judged, epath.Path(tmp_path) / "probe.linear.json")
    left = pretrained.load(epath.Path(tmp_path) / "probe.linear", ("target_encoder", "head"))
    assert left.classes == tuple(judged.train.source.classes) and left.image_size == 8
    images, labels = next(pipeline.ordered_batches(judged.test, size=150, crop_fraction=1.0))
    pooled = reference_features(left.params["target_encoder"], images, judged.data)[-1]
    right = (pooled @ left.params["head"]["kernel"] + left.params["head"]["bias"]).argmax(axis=1) == labels
    assert abs(right.mean() - rows["checkpoint"]["all"]["last 1 layers"]["test"]) < 0.01


def test_augmented_linear_probe(workdir):
    judged = subject.Subject(workdir, "encoder", settings(linear__augment=True, views__flip=0.0), baselines=True)
    rows = methods.METHODS["linear"].judge(judged, workdir / "unused.json")
    assert rows["raw pixels"]["linear %"] > 0.4 and 0 <= rows["checkpoint"]["linear %"] <= 1


@loads_a_config
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method=knn"], "--checkpoint is missing"),
        (["--checkpoint=none"], "--method is missing; known: knn, linear, lowshot, collapse"),
        (["--checkpoint=none", "--method=knn,lineer"], "--method 'lineer' is not known; did you mean 'linear'?"),
        (["--checkpoint=none", "--method=knn", "--tower=predictor"], "--tower 'predictor' is not known"),
        (["--checkpoint=none", "--method=knn"], "--checkpoint none does not exist"),
        (["--checkpoint=none", "--method=knn", "--config.knn.k=1"], "--config has no such setting"),
    ],
)
def test_bad_flags_are_one_line(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "method, overrides, message",
    [
        ("knn", {"knn__neighbours": 301}, "knn.neighbours = 301 is more than the 300 training images"),
        ("knn", {"data__test_split": "test[:4]"}, r"data.test_split = 'test\[:4\]' lacks .* classes"),
        ("knn", {"data__image_size": 9}, "data.image_size = 9 is not divisible by the encoder's patch size, 2"),
        ("collapse", {"collapse__objects": 301}, "collapse.objects = 301 is more than the 300 training images"),
    ],
)
def test_what_a_user_trips_over(workdir, method, overrides, message):
    with pytest.raises(UserError, match=message):
        judged = subject.Subject(workdir, "encoder", settings(**overrides), baselines=False)
        methods.METHODS[method].judge(judged, workdir / "unused.json")


def test_images_without_labels(workdir, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "bare.npz", train_images=images, test_images=images)
    bare = dict(data__source="npz", data__data_dir=str(tmp_path / "bare.npz"), data__train_split="train")
    judged = subject.Subject(workdir, "encoder", settings(**bare, data__test_split="test"), baselines=False)
    with pytest.raises(UserError, match=r"data.train_split = 'train' has no labels; the methods collapse"):
        judged.splits(layers=1)
    rows = methods.METHODS["collapse"].judge(judged, epath.Path(tmp_path / "x.json"))
    assert rows["checkpoint"]["rank"] >= 1 and (tmp_path / "x.png").exists()


def test_a_checkpoint_of_another_architecture(workdir, tmp_path):
    other = epath.Path(tmp_path / "other")
    loaded = pretrained.load(workdir, ("encoder",))
    pretrained.save(other, loaded)
    config = json.loads((workdir / "config.json").read_text()) | {"model.size": "32x2x2"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"its encoder does not fit the config.*block00"):
        subject.Subject(other, "encoder", settings(), baselines=False)
    (other / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "data.source"}))
    with pytest.raises(UserError, match=r"data.source: the checkpoint does not say it; give --config.data.source="):
        subject.Subject(other, "encoder", settings(), baselines=False)

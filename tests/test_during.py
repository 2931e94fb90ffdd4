"""Evaluation of networks in training: whose numbers the log shows, and what is written."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from sklearn.datasets import load_digits

from cjepa_jax.config import Mesh
from cjepa_jax.data import pipeline, sources
from cjepa_jax.errors import UserError
from cjepa_jax.evaluate import linear_grid
from cjepa_jax.evaluate.during import DuringTraining, reader_to_learn_from
from cjepa_jax.evaluate.frozen import labelled
from cjepa_jax.evaluate.linear import Linear
from cjepa_jax.evaluate.sets import Labelled
from cjepa_jax.models.vit import build_encoder
from cjepa_jax.train import sharding
from cjepa_jax.train.setup import set_up


def test_the_log_shows_the_trained_encoder_and_not_a_baseline(make_config, tmp_path, capsys):
    splits = {"data__train_split": "train[:200]", "data__test_split": "test[:100]"}
    config = make_config(eval__every=2, eval__draws=2, **splits)
    mesh = sharding.make_mesh(Mesh())
    train = pipeline.Reader(sources.load(config.data, config.data.train_split), config.data)
    encoder = build_encoder(config.model, grid=(4, 4))
    first, last = (encoder.init(jax.random.key(i), np.zeros((1, 16, 4), np.float32))["params"] for i in range(2))

    during = DuringTraining(config, train, mesh)
    quick = during.probe({"target_encoder": last, "encoder": first})
    found = during.report({"target_encoder": last, "encoder": first}, first, epath.Path(tmp_path), step=9)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    results = written["results"]
    assert written["step"] == 9 and list(results) == ["knn", "logistic"]
    for rows in results.values():
        assert list(rows) == ["trained", "untrained", "raw pixels"]
    assert results["knn"]["raw pixels"]["weighted"] > results["knn"]["trained"]["weighted"]  # so that a mix-up shows
    assert found["eval/knn"] == quick["eval/knn"] == results["knn"]["trained"]["weighted"]
    as_encoder = during.probe({"encoder": last})["eval/knn"], during.probe({"encoder": first})["eval/knn"]
    assert quick["eval/knn"] == as_encoder[0] != as_encoder[1]  # the target encoder is judged
    pixels = results["knn"]["raw pixels"]
    assert pixels["weighted, 10 a class"]["mean"] < pixels["weighted"]
    assert found["eval/logistic"] == quick["eval/logistic"] == results["logistic"]["trained"]["all labels"]
    assert len(results["knn"]["trained"]["weighted, 10 a class"]["draws"]) == 2
    assert "untrained" in capsys.readouterr().out


def test_images_without_a_label_do_not_judge(make_config, tmp_path):
    """A third of both splits has none: the accuracies are those of the rest."""
    digits, split = load_digits(), {"train": slice(0, 120), "test": slice(120, 180)}
    images, found = digits.images.astype(np.uint8) * 16, {}
    for name, kept in (("some", slice(None)), ("rest", np.arange(1797) % 3 != 0)):
        arrays = {f"{key}_images": images[rows][kept[rows] if name == "rest" else kept] for key, rows in split.items()}
        for key, rows in split.items():
            labels = np.where(np.arange(1797) % 3 == 0, -1, digits.target)[rows]
            arrays[f"{key}_labels"] = labels[labels >= 0] if name == "rest" else labels
        np.savez(tmp_path / f"{name}.npz", **arrays)
        config = make_config(data__source="npz", data__data_dir=str(tmp_path / f"{name}.npz"), eval__every=2)
        train = pipeline.Reader(sources.load(config.data, config.data.train_split), config.data)
        encoder = build_encoder(config.model, grid=(4, 4))
        params = encoder.init(jax.random.key(0), np.zeros((1, 16, 4), np.float32))["params"]
        found[name] = DuringTraining(config, train, sharding.make_mesh(Mesh())).probe({"encoder": params})
    assert {key: found["some"][key] for key in ("eval/knn", "eval/logistic")} == pytest.approx(
        {key: found["rest"][key] for key in ("eval/knn", "eval/logistic")}
    )
    nothing = {"trained": Labelled(np.zeros((2, 1, 4)), np.array([-1, -1]))}
    with pytest.raises(UserError, match=r"data.test_split = 'test': none of 2 images has a label"):
        labelled(nothing, "data.test_split = 'test'")


def test_unlabelled_images_are_trained_on_and_labelled_ones_judge(make_config, tmp_path):
    """The images to learn from are read anew only where they are others than those of training."""
    np.savez(tmp_path / "own.npz", train_images=np.zeros((40, 8, 8), np.uint8))
    own = {"data__source": "npz", "data__data_dir": str(tmp_path / "own.npz"), "eval__every": 2}
    judges = {"eval__source": "digits", "eval__train_split": "train[:60]", "eval__test_split": "test[:50]"}
    config = make_config(**own, **judges)
    run = set_up(config, epath.Path(tmp_path / "run"), None)
    assert run.evaluation and len(run.reader.source) == 40 and run.reader.source.classes == ()
    networks = run.program.init(jax.random.key(0)).params
    run.evaluation.report(networks, None, epath.Path(tmp_path), step=0)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert {split: found["images"] for split, found in written["images"].items()} == {"train": 60, "test": 50}
    assert written["data"]["source"] == "digits" and written["data"]["data_dir"] == ""
    assert set_up(make_config(**own), epath.Path(tmp_path / "run"), None).evaluation is None

    config = make_config(eval__every=2, eval__test_split="test[:50]")
    train = pipeline.Reader(sources.load(config.data, config.data.train_split), config.data)
    assert reader_to_learn_from(config, train) is train


@pytest.mark.parametrize(
    "overrides, says",
    [
        (
            {"eval__evaluators": ("knn", "logistik")},
            "eval.evaluators: 'logistik' is not known; did you mean 'logistic'",
        ),
        ({"eval__evaluators": ("davis",)}, "eval.evaluators: 'davis' judges checkpoints only"),
        ({"eval__evaluators": ("collapse",), "data__train_split": "train[:1]"}, "collapse compares training images"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_training(make_config, overrides, says):
    config = make_config(**{"data__train_split": "train[:200]"} | overrides)
    train = pipeline.Reader(sources.load(config.data, config.data.train_split), config.data)
    with pytest.raises(UserError, match=says):
        DuringTraining(config, train, sharding.make_mesh(Mesh()))


def test_a_head_is_not_judged_where_none_is_trained(make_config, tmp_path):
    config = make_config(eval__every=2, eval__evaluators=("knn", "accuracy"))
    with pytest.raises(UserError, match=r"eval\.evaluators: 'accuracy' judges a head, which only fine-tuning trains"):
        set_up(config, epath.Path(tmp_path / "run"), None)


def test_a_linear_probe_learns_for_as_long_from_few_images_of_a_shallow_encoder(make_config, monkeypatch):
    """As long as min_steps asks for; of the 1,437 images it sees 100."""
    config = make_config(eval__every=2, eval__evaluators=("linear",), eval__images=100)
    train = pipeline.Reader(sources.load(config.data, config.data.train_split), config.data)
    during = DuringTraining(config, train, sharding.make_mesh(Mesh()))
    encoder = build_encoder(config.model, grid=(4, 4))
    params = jax.jit(encoder.init)(jax.random.key(0), np.zeros((1, 16, 4), np.float32))["params"]
    steps = []

    def fit(epochs, members, *, decay_every, classes):
        steps.append(sum(1 for _ in next(iter(epochs))) * 28 * decay_every // 8)
        raise KeyboardInterrupt

    monkeypatch.setattr(linear_grid, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        during.probe({"target_encoder": params, "encoder": params})
    assert steps[0] >= Linear().min_steps

"""From a file as I-JEPA has released them to all that is measured of it, by one command."""

import json

import numpy as np
import pytest
import torch
from test_convert import release
from test_evaluate import run

from tests import torch_ijepa

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_one_command_judges_a_released_file(tmp_path, monkeypatch, capsys):
    """Its nearest neighbours are those of the features that the release's network has in PyTorch."""
    content = release(tmp_path / "IN1K-vit.pth.tar", width=192)
    rng, images = np.random.default_rng(0), {}
    for split, count in (("train", 60), ("test", 30)):
        images |= {f"{split}_images": rng.integers(0, 256, (count, 32, 32, 3), np.uint8)}
        images |= {f"{split}_labels": rng.permutation(np.arange(count) % 3)}  # which any other encoder gets otherwise
    np.savez(tmp_path / "images.npz", **images)
    data = ["source=npz", f"data_dir={tmp_path / 'images.npz'}", "train_split=train", "test_split=test"]
    quick = ["knn.neighbours=1", "linear.min_steps=20", "linear.epochs=1", "logistic.draws=2", "logistic.shots=(5,)"]
    quick += ["knn.shots=5", "knn.draws=2", "logistic.fraction=0.2", "data.crop_fraction=1.0"]
    overrides = [f"--config.{one}" for one in [*(f"data.{one}" for one in data), *quick]]
    arguments = [f"--checkpoint={tmp_path / 'IN1K-vit.pth.tar'}", *overrides, "--nobaselines"]
    run(monkeypatch, *arguments, "--method=knn,linear,logistic,attention")
    said = capsys.readouterr()
    assert "ijepa -> orbax: " in said.err and "step 0: target_encoder" in said.out
    folder = tmp_path / "IN1K-vit.pth.tar.orbax" / "evaluation"
    found = {path.name.split(".")[1]: json.loads(path.read_text())["results"] for path in folder.glob("*.json")}
    assert found.keys() == {"knn", "linear", "logistic", "attention"}
    assert (folder / "step0_target_encoder.attention.png").exists()

    def right(encoder: str) -> float:
        network = torch_ijepa.Encoder(width=192, depth=2, heads=3, hidden=60, grid=(4, 4), patch=8)
        network.load_state_dict({k.removeprefix("module."): x for k, x in content[encoder].items()})
        features = {}
        with torch.inference_mode():
            for split in ("train", "test"):
                pixels = (images[f"{split}_images"] / 255 - MEAN) / STD
                mean = network(torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)).mean(dim=1)
                features[split] = torch.nn.functional.normalize(mean, dim=1)
        nearest = (features["test"] @ features["train"].T).argmax(dim=1).numpy()
        return (images["train_labels"][nearest] == images["test_labels"]).mean()

    assert found["knn"]["knn"]["trained"]["plain"] == pytest.approx(right("target_encoder"))
    assert right("encoder") != right("target_encoder")

    run(monkeypatch, *arguments, "--method=knn")  # what was converted is used again
    assert "orbax, which was converted from" in capsys.readouterr().err
    (tmp_path / "IN1K-vit.pth.tar").touch()  # as if it were written anew
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments, "--method=knn")
    assert "IN1K-vit.pth.tar has changed since " in capsys.readouterr().err


def test_what_is_no_checkpoint_is_named_by_the_flag(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, f"--checkpoint={tmp_path / 'notes.txt'}", "--method=knn")
    assert f"error: --checkpoint {tmp_path}/notes.txt is neither a .pth.tar of PyTorch nor" in capsys.readouterr().err
    assert not (tmp_path / "notes.txt.orbax").exists()

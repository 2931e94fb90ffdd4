"""What a kill has kept a run from doing is made up for when the same command runs again, and nothing is done twice."""

import json
import pathlib
import shutil

import pytest
from etils import epath

from cjepa_jax.evaluate import during
from cjepa_jax.train import checkpoint, loop
from cjepa_jax.train.writer import TIMED
from tests import helpers


def lines(workdir: pathlib.Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    timed = TIMED | {"eval/seconds"}
    return [{name: value for name, value in line.items() if name not in timed} for line in helpers.lines(workdir)]


def results(workdir: pathlib.Path):
    return json.loads((workdir / "evaluation.json").read_text())["results"]


def test_an_evaluation_that_was_cut_off_is_made_up_for(make_config, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    config = make_config(
        **{"optim__epochs": 0.05, "optim__warmup_epochs": 0.01, "checkpoint__every": 2, "log__every": 1},
        **{"eval__every": 2, "eval__evaluators": ("knn",), "eval__images": 200},
    )

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # in the final report
        patch.setattr(during.report, "write", killed)
        patch.setattr(loop.Curves, "SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, epath.Path(workdir))
    assert [line["step"] for line in lines(workdir)] == [1, 2, 2, 3, 4] and not (workdir / "evaluation.json").exists()
    assert (workdir / "curves.png").exists()  # drawn while the run went on

    loop.train(config, epath.Path(workdir))
    first = lines(workdir)
    assert [line["step"] for line in first] == [1, 2, 2, 3, 4, 4]
    assert "eval/knn" in first[2] and first[5]["eval/knn"] == results(workdir)["knn"]["trained"]["weighted"]

    # Once more, after a kill between the checkpoint of step 2 and its probe.
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "4")
    (again / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in first[:2]))
    loop.train(config, epath.Path(again))
    assert lines(again) == first and results(again) == results(workdir)

    # Nothing is left to do.
    before = (again / "evaluation.json").stat().st_mtime_ns
    capsys.readouterr()
    loop.train(config, epath.Path(again))
    assert lines(again) == first and (again / "evaluation.json").stat().st_mtime_ns == before
    said = capsys.readouterr()
    assert "finished at step 4" in said.err and "knn" not in said.out


def test_the_checkpoint_is_complete_before_the_evaluation_that_is_about_it(make_config, tmp_path, monkeypatch):
    """A study takes evaluation.json for the end of a run."""
    order, finish, write = [], checkpoint.Checkpointer.finish, during.report.write

    def finished(checkpoints):
        finish(checkpoints)
        order.append("saved")

    def written(*arguments, **more):
        order.append("evaluated")
        write(*arguments, **more)

    monkeypatch.setattr(checkpoint.Checkpointer, "finish", finished)
    monkeypatch.setattr(during.report, "write", written)
    options = {"optim__epochs": 0.05, "optim__warmup_epochs": 0.01, "checkpoint__every": 1000, "eval__every": 1000}
    config = make_config(**options, **{"eval__evaluators": ("knn",), "eval__images": 200})
    loop.train(config, epath.Path(tmp_path / "run"))
    assert order.index("evaluated") > order.index(
        "saved", order.index("saved") + 1
    )  # the first is at the start of save

"""Studies: choices, statistics and tables against other formulas; a study that is ended in its midst goes on."""

import copy
import csv
import json
import os
import pathlib
import re
import shutil
import signal

import numpy as np
import pytest
import scipy.stats
from etils import epath

from cjepa_jax.command import load_config
from cjepa_jax.errors import UserError
from cjepa_jax.evaluate.during import DuringTraining
from cjepa_jax.methods import METHODS
from cjepa_jax.studies import design, results, runs
from cjepa_jax.train import nonfinite, step, writer
from tests import commands
from tests.conftest import small

ROOT = pathlib.Path(__file__).parents[1]
NUMBERS = [0.41, 0.52, 0.47, 0.66], [0.40, 0.49, 0.50, 0.60]


def base():
    """Six steps of a small network on some digits."""
    config = small(optim__epochs=0.32, optim__warmup_epochs=0.05, log__every=1, checkpoint__every=3, eval__draws=2)
    values = {name: vars(value) if hasattr(value, "__dict__") else value for name, value in vars(config).items()}
    return copy.deepcopy(values)


def values(**changes):
    return {
        "base": base(),
        "arms": {
            "I-JEPA": {"settings": {"vicreg": {"weight": 0.0}}},
            "C-JEPA": {"settings": {"vicreg": {"weight": 1.0}}},
        },
        "tune": {"optim.learning_rate": (1e-3, 0.3)},
        "seeds": (0, 1),
        "probes": 2,
        "splits": {"train": "train[:300]", "held_out": "train[300:450]", "test": "test[:100]"},
        "evaluators": ("knn", "logistic", "collapse"),
        **changes,
    }


def read(workdir, **changes):
    return design.read(values(**changes), epath.Path(workdir))


def lines(study):
    """The lines of metrics.jsonl of every run, but for times."""
    found = {}
    for path in sorted(study.workdir.glob("runs/*/*/metrics.jsonl")):
        name = f"{path.parent.parent.name}/{path.parent.name}"
        found[name] = [
            {key: value for key, value in line.items() if key not in writer.TIMED and key != "eval/seconds"}
            for line in writer.read(path.parent)
        ]
    return found


class KilledError(BaseException):
    """What ends a process without a word."""


def run(study):
    """Runs a study to its end; says for which settings the step was traced: once for each program."""
    traced = []
    with pytest.MonkeyPatch.context() as patch:
        train_step = step.train_step
        patch.setattr(step, "train_step", lambda *a, **k: traced.append(k["method"].config) or train_step(*a, **k))
        assert runs.run(study)
    return traced


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    study = read(tmp_path_factory.mktemp("study") / "whole")
    return study, run(study)


def test_seeds_share_a_program_and_become_a_row(tmp_path):
    """In short what the slow tests do with trials and every evaluator."""
    short = base()
    short["eval"] |= {"evaluators": ("knn",), "images": 100}
    study = read(tmp_path / "study", base=short, tune={}, evaluators=("knn",), choose_by="knn", probes=1)
    assert [config.vicreg.weight for config in run(study)] == [0.0, 1.0]
    start = {name: found[0]["loss/prediction"] for name, found in lines(study).items()}
    assert start["I-JEPA/seed0"] != start["I-JEPA/seed1"]
    assert start["I-JEPA/seed0"] == pytest.approx(start["C-JEPA/seed0"])  # a pair: all but the loss
    found = {}
    for arm in study.arms:
        files = [study.workdir / "runs" / arm / f"seed{seed}" / "evaluation" / "test.knn.json" for seed in (0, 1)]
        found[arm] = np.array([json.loads(f.read_text())["results"]["knn"]["trained"]["weighted"] for f in files])
        ended = json.loads((study.workdir / "runs" / arm / "seed0" / "evaluation.json").read_text())["results"]["knn"]
        assert ("raw pixels" in ended) == ("untrained" in ended) == (arm == "I-JEPA")  # once for each seed is enough
    row = results.table(study)["arms"]["C-JEPA"]["test"]["knn"]
    assert list(row["values"].values()) == found["C-JEPA"].tolist()
    assert row["difference"]["mean"] == pytest.approx((found["C-JEPA"] - found["I-JEPA"]).mean())
    assert f"| C-JEPA | 2 | {100 * found['C-JEPA'].mean():.1f} ± " in (study.workdir / "table.md").read_text()
    # A checkpoint before the last one must not be judged in its place.
    last = study.workdir / "runs" / "C-JEPA" / "seed1"
    (last / "evaluation" / "test.knn.json").unlink()
    (last / "checkpoints" / "6").rmtree()
    with pytest.raises(UserError, match=r"seed1 lacks the checkpoint of its last step, 6: delete its evaluation\.json"):
        runs.run(study)


@pytest.mark.slow
def test_each_arm_is_compiled_once_for_all_seeds(finished):
    study, traced = finished
    assert len(lines(study)) == 2 * (2 + 2)
    # Both trials of both arms, and each arm's choice, which is another program than the newest one.
    assert len(traced) == 2 * 2 + 2
    assert [config.vicreg.weight for config in traced[-2:]] == [0.0, 1.0]


@pytest.mark.slow
def test_the_choice_is_the_best_on_held_out_images(finished):
    study, _ = finished
    for arm in study.arms.values():
        reached = []
        for number in range(2):
            file = study.workdir / "runs" / arm.name / f"trial{number}"
            assert json.loads((file / "config.json").read_text())["seed"] == 2  # that of no run of the tables
            found = json.loads((file / "evaluation.json").read_text())
            assert found["settings"]["data.test_split"] == "train[300:450]"
            reached.append(found["results"]["logistic"]["trained"]["all labels"])
        assert reached[0] != reached[1]
        best = (1e-3, 0.3)[reached.index(max(reached))]
        assert results.chosen(study, arm) == {"optim.learning_rate": best}
        for seed in (0, 1):
            config = json.loads((study.workdir / "runs" / arm.name / f"seed{seed}" / "config.json").read_text())
            assert (config["seed"], config["optim.learning_rate"]) == (seed, best)
            assert config["data.test_split"] == "train[300:450]"  # the test split is for the end


@pytest.mark.slow
def test_tables_say_what_the_files_of_the_runs_say(finished):
    study, _ = finished
    table = json.loads((study.workdir / "table.json").read_text())
    lines = csv.DictReader((study.workdir / "table.csv").read_text().splitlines())
    rows = {(line["arm"], line["split"], line["measure"]): line for line in lines}
    found = {}
    for arm in study.arms:
        for seed in (0, 1):
            folder = study.workdir / "runs" / arm / f"seed{seed}"
            ended = json.loads((folder / "evaluation.json").read_text())["results"]
            judged = json.loads((folder / "evaluation" / "test.knn.json").read_text())
            assert judged["data"]["test_split"] == "test[:100]" and judged["data"]["train_split"] == "train[:300]"
            found[arm, "held_out", "logistic", seed] = ended["logistic"]["trained"]["all labels"]
            found[arm, "held_out", "knn", seed] = ended["knn"]["trained"]["weighted"]
            found[arm, "test", "knn", seed] = judged["results"]["knn"]["trained"]["weighted"]
    for arm, split, measure, _ in list(found):
        both = np.array([found[arm, split, measure, seed] for seed in (0, 1)])
        others = np.array([found["I-JEPA", split, measure, seed] for seed in (0, 1)])
        row = table["arms"][arm][split][measure]
        assert list(row["values"].values()) == both.tolist()
        assert row["mean"] == pytest.approx(both.mean()) == pytest.approx(float(rows[arm, split, measure]["mean"]))
        if arm != "I-JEPA":
            assert row["difference"]["mean"] == pytest.approx((both - others).mean())
            error = abs((both - others)[0] - (both - others)[1]) / 2  # of two numbers
            assert float(rows[arm, split, measure]["difference_standard_error"]) == pytest.approx(error)
    text = (study.workdir / "table.md").read_text()
    mean = np.mean([found["C-JEPA", "test", "knn", seed] for seed in (0, 1)])
    assert f"| C-JEPA | 2 | {100 * mean:.1f} ± " in text
    assert "Fewer than three seeds" in text and "2 trials of one seed" in text and "raw pixels" in text
    for name in ("convergence", "signs_of_collapse", "spectrum", "ablation"):
        assert (study.workdir / f"{name}.png").stat().length > 10_000


@pytest.mark.slow
def test_probes_are_at_the_same_fractions(finished):
    study, _ = finished
    for metric in ("eval/knn", "eval/logistic"):
        for images, found in results.curves(study, metric).values():
            assert images.tolist() == [3 * 16, 6 * 16] and found.shape == (2, 2)


@pytest.mark.slow
def test_a_study_that_is_ended_anywhere_goes_on_and_loses_nothing(finished, tmp_path, monkeypatch, capsys):
    """Ended by SIGTERM in a trial, killed in a run with a seed, and killed before the test split is judged."""
    whole, _ = finished
    study = read(tmp_path / "ended")
    shutil.copytree(whole.workdir, study.workdir)  # whose other runs are done
    for folder in ("I-JEPA/trial1", "C-JEPA/seed0"):
        shutil.rmtree(study.workdir / "runs" / folder)
    for file in (*study.workdir.glob("runs/*/*/evaluation/test.*"), *study.workdir.glob("table.*")):
        file.unlink()
    write, judge = writer.Writer.write, runs.judge

    def ended_at(folder, at, action):
        def then(self, step, metrics):
            write(self, step, metrics)
            if step == at and "lr" in metrics and folder in str(self._path):
                action()

        monkeypatch.setattr(writer.Writer, "write", then)

    def kill(*_, **__):
        raise KilledError

    ended_at("I-JEPA/trial1", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert not runs.run(study)
    assert "the study has stopped; the same command goes on from there" in capsys.readouterr().err
    assert not (study.workdir / "runs" / "C-JEPA" / "seed0").exists()  # no other run was begun
    assert results.chosen(study, study.arms["I-JEPA"]) is None
    monkeypatch.setattr(writer.Writer, "write", write)
    report = DuringTraining.report

    def ended(*arguments, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return report(*arguments, **more)

    monkeypatch.setattr(DuringTraining, "report", ended)
    assert not runs.run(study)  # it was asked to stop when the run had no more step to take
    assert "going on from step 5" in capsys.readouterr().err
    assert results.finished(study.trial(study.arms["I-JEPA"], 1))
    assert not (study.workdir / "runs" / "C-JEPA" / "seed0").exists()
    monkeypatch.setattr(DuringTraining, "report", report)
    ended_at("C-JEPA/seed0", 4, kill)
    with pytest.raises(KilledError):
        runs.run(study)
    monkeypatch.setattr(writer.Writer, "write", write)
    monkeypatch.setattr(runs, "judge", kill)
    with pytest.raises(KilledError):
        runs.run(study)
    assert "going on from step 3" in capsys.readouterr().err
    assert "Not yet judged." in (study.workdir / "table.md").read_text()
    monkeypatch.setattr(runs, "judge", judge)
    assert runs.run(study)
    assert lines(study) == lines(whole)
    for name in ("table.csv", "table.md"):
        assert (study.workdir / name).read_text() == (whole.workdir / name).read_text()

    monkeypatch.setattr(runs.loop, "train", kill)  # nothing is left to train or to judge
    monkeypatch.setattr(runs, "judge", kill)
    assert runs.run(study)


def test_a_run_that_diverges_is_an_outcome(tmp_path, monkeypatch):
    study = read(tmp_path / "run", evaluators=("knn",))

    def train(config, folder, compile_step, baselines):
        assert baselines == (config.seed in study.seeds and "C-JEPA" not in str(folder))
        folder.mkdir()
        if folder.name in ("trial0", "seed1") and "C-JEPA" in str(folder):
            raise nonfinite.DivergedError("the loss is not finite")
        found = {"knn": {"trained": {"weighted": 0.5}}, "logistic": {"trained": {"all labels": 0.6}}}
        (folder / "evaluation.json").write_text(json.dumps({"results": found, "step": 6}))

    def judge(folder, evaluation, evaluators, *, baselines, name):
        (folder / "evaluation").mkdir()
        found = {"knn": {"trained": {"weighted": 0.4}}}
        (folder / "evaluation" / "test.knn.json").write_text(json.dumps({"results": found}))

    monkeypatch.setattr(runs.loop, "train", train)
    monkeypatch.setattr(runs, "judge", judge)
    assert runs.run(study)
    assert results.chosen(study, study.arms["I-JEPA"]) == {"optim.learning_rate": 1e-3}
    assert results.chosen(study, study.arms["C-JEPA"]) == {"optim.learning_rate": 0.3}
    arm = results.table(study)["arms"]["C-JEPA"]
    assert arm["trials"][0]["logistic"] is None and arm["diverged"] == {1: "the loss is not finite"}
    assert arm["test"]["knn"]["n"] == arm["test"]["knn"]["difference"]["n"] == 1


def test_processes_share_out_a_study(tmp_path, monkeypatch, capsys):
    """Each trains and judges its own arms; the tables are written by a process that has them all."""
    begun, judged = [], []

    def train(config, folder, compile_step, baselines):
        begun.append(f"{folder.parent.name}/{folder.name}")
        folder.mkdir()
        better = {"trial0": 0.6, "trial1": 0.7}.get(folder.name, 0.5)
        found = {"knn": {"trained": {"weighted": 0.5}}, "logistic": {"trained": {"all labels": better}}}
        (folder / "evaluation.json").write_text(json.dumps({"results": found, "step": 6}))

    def judge(folder, evaluation, evaluators, *, baselines, name):
        judged.append(f"{folder.parent.name}/{folder.name}")
        assert evaluation.data.test_split == "test[:100]"
        (folder / "evaluation").mkdir()
        found = {"knn": {"trained": {"weighted": 0.4}}}
        (folder / "evaluation" / "test.knn.json").write_text(json.dumps({"results": found}))

    monkeypatch.setattr(runs.loop, "train", train)
    monkeypatch.setattr(runs, "judge", judge)
    for arm in ("C-JEPA", "I-JEPA"):
        begun.clear()
        judged.clear()
        assert runs.run(read(tmp_path / "run", evaluators=("knn",)), only=[arm])
        assert begun == [f"{arm}/{name}" for name in ("trial0", "trial1", "seed0", "seed1")]
        assert judged == [f"{arm}/{name}" for name in ("seed0", "seed1")]
        study = read(tmp_path / "run", evaluators=("knn",))
        assert results.chosen(study, study.arms[arm]) == {"optim.learning_rate": 0.3}  # of the better trial
        assert not list((tmp_path / "run").glob("table.*")) and "finished; the tables" not in capsys.readouterr().err
    begun.clear()
    judged.clear()
    assert runs.run(read(tmp_path / "run", evaluators=("knn",)))
    assert not begun and not judged
    assert "| C-JEPA | 2 | 40.0 ± 0.0" in (tmp_path / "run" / "table.md").read_text()
    with pytest.raises(UserError, match=re.escape("--arm='JEPA': the study has no such arm; did you mean 'I-JEPA'?")):
        runs.run(read(tmp_path / "run", evaluators=("knn",)), only=["I-JEPA", "JEPA"])


def test_statistics():
    ours, others = ({seed: x for seed, x in enumerate(found)} for found in NUMBERS)
    found = results.summary(list(ours.values()))
    assert found["mean"] == pytest.approx(np.mean(NUMBERS[0]))
    assert found["standard_error"] == pytest.approx(scipy.stats.sem(NUMBERS[0]))
    paired = results.paired(ours, others | {9: 0.5})
    t = scipy.stats.ttest_rel(*NUMBERS)
    assert paired["n"] == 4 and paired["mean"] / paired["standard_error"] == pytest.approx(t.statistic)
    assert results.summary([0.5]) == {"n": 1, "mean": 0.5, "standard_deviation": None, "standard_error": None}


ARM = {"I-JEPA": {}}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"sedes": (1,)}, "a study has no 'sedes'; did you mean 'seeds'"),
        ({"seeds": ()}, "seeds: a study needs at least one seed"),
        ({"seeds": (1, 1)}, "one is there twice"),
        ({"seeds": 3}, "seeds must be a list"),
        ({"baseline": "x"}, "baseline = 'x' is not an arm"),
        (
            {"arms": ARM | {"A": {"settings": {"vicreg": {"wait": 1}}}}},
            "arm 'A': unknown key vicreg.wait: did you mean",
        ),
        ({"arms": ARM | {"A": {"setting": {}}}}, "arm 'A' has no 'setting'"),
        ({"arms": ARM | {"A/B": {}}}, "arm 'A/B': its name is also a folder's"),
        ({"arms": ARM | {"A": {"base": "no_such"}}}, "'no_such' does not exist"),
        ({"tune": {"optim.rate": (1.0,)}}, "arm 'I-JEPA' cannot tune 'optim.rate'; did you mean"),
        ({"tune": {"optim.epochs": (1.0, 2.0)}}, "arm 'I-JEPA' cannot tune 'optim.epochs'"),
        ({"tune": {"log.collapse": ("stop", "off")}}, "arm 'I-JEPA' cannot tune 'log.collapse'"),
        ({"tune": {"optim.learning_rate": ()}}, "tunes 'optim.learning_rate' over no values"),
        ({"tune": {"optim.learning_rate": (1e-3, -1.0)}}, "arm 'I-JEPA': optim.learning_rate must be in"),
        ({"arms": ARM | {"A": {"tune": {"optim.learning_rate": (1e-3,)}}}}, "arm 'A' has 1 trials and arm 'I-JEPA' 2"),
        ({"splits": {"train": "train"}}, "splits must be train, held_out and test"),
        ({"splits": {"train": "train", "held_out": "train[:3]", "test": "test"}}, "of 10 classes the held-out images"),
        ({"splits": {"train": "train", "held_out": "train", "test": "test[:3]"}}, "of 10 classes the test images"),
        (
            {"splits": {"train": "train[:3]", "held_out": "train", "test": "test"}},
            "the training images, 'train[:3]', lack",
        ),
        (
            {"splits": {"train": "train", "held_out": "train", "test": "tset"}},
            "arm 'I-JEPA': splits.test: data: split 'tset' cannot be read",
        ),
        ({"base": base() | {"eval": {"test_split": "test"}}}, "eval.test_split: a study judges on its own splits"),
        ({"base": base() | {"log": {"collapse": "stop"}}}, "log.collapse = 'stop' would end the runs that collapse"),
        ({"arms": {0.01: {}}}, "the name of an arm must be text, got 0.01"),
        ({"baseline": 0.01}, "baseline = 0.01 is not an arm"),
        ({"probes": 100}, "arm 'I-JEPA': probes = 100 are more than its 6 steps"),
        ({"choose_by": "nkn"}, "choose_by = 'nkn' is none of eval.evaluators; did you mean 'knn'"),
        (
            {"choose_by": "collapse", "base": base() | {"eval": {"evaluators": ("knn", "collapse")}}},
            "choose_by = 'collapse' gives no single accuracy; use one of knn",
        ),
        ({"evaluators": ("x",)}, "evaluators: 'x' is not known"),
        ({"evaluators": ("knn", "davis")}, "evaluators: 'davis' has images of its own"),
        ({"evaluators": ("accuracy",)}, "evaluators: accuracy judges a network's own head"),
    ],
)
def test_mistakes(tmp_path, changes, says):
    with pytest.raises(UserError) as error:
        read(tmp_path / "run", **changes)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"seeds": (0, 1, 2)}, "seeds: [0, 1] -> [0, 1, 2]"),
        ({"tune": {"optim.learning_rate": (1e-3, 0.2)}}, "arm 'I-JEPA' tries"),
        (
            {"arms": {"I-JEPA": {"settings": {"vicreg": {"weight": 0.5}}}, "C": {}}},
            "arm 'C' is new; arm 'C-JEPA' is gone; ",
        ),
        ({"base": base() | {"eval": base()["eval"] | {"crop_fraction": 0.5}}}, "arm 'C-JEPA', eval.crop_fraction: "),
    ],
)
def test_a_workdir_of_another_study_is_refused(tmp_path, changes, says):
    (tmp_path / "study.json").write_text(json.dumps(read(tmp_path).describe()))
    with pytest.raises(UserError, match="holds another study") as error:
        read(tmp_path, **changes)
    assert says in str(error.value)


def test_a_study_does_not_mix_images(tmp_path):
    """A path may change, what lies there may not."""
    rng, npz = np.random.default_rng(0), tmp_path / "a.npz"
    labels = {f"{split}_labels": np.arange(200) % 10 for split in ("train", "test")}
    images = {f"{split}_images": rng.integers(0, 256, (200, 8, 8), np.uint8) for split in ("train", "test")}
    np.savez(npz, **labels, **images)
    splits = {"train": "train[:100]", "held_out": "train[100:]", "test": "test"}
    settings = base()
    settings["data"] |= {"source": "npz", "data_dir": str(npz)}
    settings["optim"] |= {"epochs": 1.0}
    changes = {"base": settings, "splits": splits}
    (tmp_path / "study.json").write_text(json.dumps(read(tmp_path, **changes).describe()))
    settings["data"]["data_dir"] = str(npz.rename(tmp_path / "b.npz"))
    read(tmp_path, **changes)
    np.savez(tmp_path / "b.npz", **labels, **images | {"test_images": images["train_images"]})
    design.look_at.cache_clear()
    with pytest.raises(UserError, match=r"holds another study .*arm 'C-JEPA' has other images"):
        read(tmp_path, **changes)
    described = json.loads((tmp_path / "study.json").read_text())
    for arm in described["arms"].values():
        del arm["images"]  # as older files are
    (tmp_path / "study.json").write_text(json.dumps(described))
    read(tmp_path, **changes)


def test_a_study_goes_on_with_the_settings_that_it_was_begun_with(tmp_path, capsys):
    """A setting that the study's file lacks is newer than the study; all runs have it as the code was before."""
    described = read(tmp_path).describe()
    for arm in described["arms"].values():
        del arm["settings"]["optim.schedule_offset"]
    (tmp_path / "study.json").write_text(json.dumps(described))
    study = read(tmp_path)
    assert "arm 'C-JEPA': optim.schedule_offset = 0, as when this workdir was begun" in capsys.readouterr().err
    arm = study.arms["C-JEPA"]
    assert study.trial(arm, 0).config.optim.schedule_offset == study.final(arm, {}, 1).config.optim.schedule_offset == 0
    assert study.describe()["arms"]["C-JEPA"]["settings"]["optim.schedule_offset"] == 0


def test_only_what_has_not_been_judged_is_judged(tmp_path, monkeypatch):
    """And on the images where they are now, which may not be where the run was trained."""
    study = read(tmp_path, tune={})
    arm, judged = study.arms["C-JEPA"], []
    one = study.final(arm, {}, 0)
    (one.folder / "evaluation").mkdir(parents=True)
    (one.folder / "evaluation" / "test.knn.json").write_text("{}")
    monkeypatch.setattr(runs, "judge", lambda folder, settings, wanted, **_: judged.append((settings.data, wanted)))
    runs._judge(study, arm, one)
    ((data, wanted),) = judged
    assert wanted == ["logistic", "collapse"] and data.data_dir == one.config.data.data_dir


def test_what_does_not_fit_the_devices_is_said_before_anything_is_written(tmp_path):
    study = read(tmp_path / "run", base=base() | {"mesh": {"fsdp": 3}})
    with pytest.raises(UserError, match="fsdp"):
        runs.run(study)
    assert not (tmp_path / "run").exists()


def test_plan_measures_in_a_new_workdir_and_writes_nothing(tmp_path):
    said = runs.plan(read(tmp_path / "run"))
    assert "2 arms; each has 2 trials" in said and "C-JEPA  4 runs of 6 steps, 96 images" in said and "in all" in said
    assert not (tmp_path / "run").exists()


def test_time_left_is_that_of_the_runs(tmp_path, monkeypatch):
    """The arm that has run is measured, the other one is guessed by its products."""
    study = read(tmp_path / "run")
    folder = study.trial(study.arms["I-JEPA"], 0).folder
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for at, speed in ((1, 9.0), (2, 4.0), (3, 3.0)):
            print(json.dumps({"step": at, "lr": 0.1, "images_per_second": speed}), file=file)
        print(json.dumps({"step": 3, "eval/knn": 0.1, "eval/seconds": 5.0, "images_per_second": 1.0}), file=file)
    seconds = 6 * 16 / 4 + 2 * 5
    assert runs.seconds_per_run(study) == pytest.approx({"I-JEPA": seconds, "C-JEPA": seconds})
    left = writer.duration((3.5 + 4) * seconds)
    said = runs.plan(study)
    assert f"study: 0 of 8 runs done, about {left} left" in said and "trials 0/2  seeds 0/2" in said
    half = writer.duration(4 * seconds)
    assert f"8 runs done, about {half} left for the arms of this process" in runs.plan(study, ["C-JEPA"])
    with pytest.raises(UserError, match="--arm='X': the study has no such arm"):
        runs.plan(study, ["X"])
    monkeypatch.setattr(METHODS["cjepa"], "transformers", lambda self: {})  # then by the images
    assert runs.seconds_per_run(study) == pytest.approx({"I-JEPA": seconds, "C-JEPA": seconds})


@pytest.mark.parametrize(
    "name, images",
    [
        ("study_collapse_digits", 0),
        ("study_collapse_cifar10", 20_000),
        ("study_terms_cifar10", 20_000),
        ("study_coefficient_cifar10", 20_000),
        ("study_rates_cifar10", 20_000),
        ("study_rates_terms_cifar10", 20_000),
        ("study_robustness_cifar10", 20_000),
        ("study_momenta_cifar10", 20_000),
        ("study_neighbours_cifar10", 20_000),
        ("study_convergence_cifar10", 20_000),
        ("study_convergence_tinyimagenet", 20_000),
        ("study_ablation", 45_000),
    ],
)
def test_shipped_studies_are_sound(name, images, tmp_path, monkeypatch):
    """Every arm and trial; the images of CIFAR-10 need not be there."""
    if images:
        monkeypatch.setattr(design, "look_at", lambda data, split: (images, 10, frozenset(range(10)), ""))
    study = design.read(load_config(name), epath.Path(tmp_path / "run"))
    assert study.trials != 1 and len(study.seeds) >= 3 and study.arms[study.baseline].name.count("I-JEPA") == 1
    seen = [arm.images_seen for arm in study.arms.values()]
    assert max(seen) - min(seen) < 256  # the rest of the last batch
    number = len(study.arms) * (study.trials + len(study.seeds))
    says = f"{number} runs of {study.arms[study.baseline].steps:,} steps|{number} runs of {min(seen):,} images"
    assert re.search(says, (ROOT / f"configs/{name}.py").read_text().replace("\n", " "))


def test_the_command_says_mistakes_in_one_line(tmp_path):
    done = commands.run("cjepa_jax.study", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2 and re.fullmatch(r"error: a study has no '\w+'; .*\n", done.stderr), done.stderr
    done = commands.run("cjepa_jax.study", "--config=study_collapse_digits", "--config.seed=1", "--workdir=x")
    assert done.returncode == 2 and "this command takes no overrides" in done.stderr
    arguments = "--config=study_collapse_digits", "--arm=JEPA", f"--workdir={tmp_path / 'x'}"
    done = commands.run("cjepa_jax.study", *arguments)
    assert done.returncode == 2 and "--arm='JEPA': the study has no such arm" in done.stderr, done.stderr
    assert not (tmp_path / "x").exists()

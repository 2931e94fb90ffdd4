"""Runs the benchmarks on little input; no test judges the numbers."""

import itertools
import pathlib
import re
import sys

import pytest
import sklearn.datasets
from absl.testing import flagsaver
from PIL import Image

from cjepa_jax.bench import attention as bench_attention
from cjepa_jax.bench import damage as bench_damage
from cjepa_jax.bench import input as bench
from cjepa_jax.bench import linear as bench_linear
from cjepa_jax.bench import step as bench_step
from cjepa_jax.data import decode
from cjepa_jax.errors import UserError

CHINA = pathlib.Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"


def test_input_measures_every_way(tmp_path):
    photo = Image.open(CHINA)
    for i in range(70):
        photo.crop((4 * i, 2 * i, 4 * i + 300, 2 * i + 200)).save(tmp_path / f"{i}.jpg")
    said = bench.measure(str(tmp_path), size=64, count=64, short_side=100, rounds=1)
    assert said.startswith("64 images per round, of 64, 1 rounds, crops of 64 pixels")
    for row in (
        "torchvision",
        "files, loop",
        "files, pipeline, 1 threads",
        "tar, loop",
        "parquet, loop",
        r"files, two views, \d+ threads",
        "shards, loop",
        "shards, pipeline, 1 threads",
    ):
        assert re.search(rf"^{row} +\d+ +\d+ +\d+\.\d\d$", said, re.MULTILINE), row
    files, tar, parquet, shards = map(float, re.findall(r"(\d+\.\d) dB", said))
    assert files == tar == parquet > 35 and 20 < shards < files


def test_input_needs_images(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        bench.measure(str(tmp_path), size=64, count=64, short_side=100, rounds=1)


@pytest.mark.filterwarnings("default")  # whatever the codecs say about such files
def test_damage_counts_what_is_read_and_what_is_refused(monkeypatch):
    some = list(itertools.islice(bench_damage.damaged(40, seed=1), 2))
    monkeypatch.setattr(bench_damage, "largest", lambda: iter(some))
    said, raised = bench_damage.measure(count=40, size=16, seed=0)
    assert not raised and said.endswith("\n0 errors other than UnreadableError")
    rows = re.findall(r"^(fast|pillow|prepare) +(\d+) +(\d+) +(\d\.\d+)  ", said, re.MULTILINE)
    assert [name for name, *_ in rows] == ["fast", "pillow", "prepare"] * 2
    for _, read, refused, _ in rows[:3]:
        assert int(read) + int(refused) == 40 and int(read) > 3 < int(refused)


def test_damage_names_other_errors(monkeypatch):
    monkeypatch.setattr(bench_damage, "largest", lambda: iter(()))
    monkeypatch.setattr(bench_damage.decode, "shrink_file", lambda *_, **__: 1 / 0)
    said, raised = bench_damage.measure(count=2, size=16, seed=0)
    assert said.endswith("\n2 errors other than UnreadableError") and len(raised) == 2
    assert raised[0].startswith("prepare, ") and "ZeroDivisionError" in raised[0]


def test_every_whole_file_is_read():
    for name, raw in bench_damage.whole().items():
        for decoder in ("fast", "pillow"):
            pixels = decode.crop(raw, lambda w, h: (0, 0, w, h), shape=(8, 8), channels=3, decoder=decoder)
            assert pixels.std() > 5, name


def test_attention_reads_the_schedule_of_the_inner_loop(tmp_path):
    bundles = "     0x0   :  { %s0 = smov }\n     0x1 LB: > { %v1 = vld }\n"
    bundles += "     0x2   : > > { %v2 = vadd }\n     0x3 LE: > > { %v3 = vst }\n     0x4 PF: > > { %v4 = vnop }\n"
    (tmp_path / "17-attention_forward_3x64.1-70-final_bundles.txt").write_text(bundles)
    (tmp_path / "17-attention_forward_3x64.1-71-schedule-analysis_final_bundles.txt").write_text("     0x0   : { }\n")
    (tmp_path / "17-attention_forward_3x64.1-35-critical-path.txt").write_text(
        "New basic block in region1\nLength to end: 7\nNew basic block in region2\nLength to end: 845\n"
    )
    assert bench_attention.read_schedule(tmp_path, "attention_forward_3x64") == (3, 845)
    with pytest.raises(FileNotFoundError, match="no schedule of attention_backward_3x64"):
        bench_attention.read_schedule(tmp_path, "attention_backward_3x64")


def test_linear_measures_both_ways():
    said = bench_linear.measure(images=64, width=8, classes=3, members=2, batch_size=32, rounds=1)
    assert re.search(r"^one by one +\d+ ms an epoch\n\d+\.\d times as fast in the median", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (bench, [], "--images is missing"),
        (bench, ["--images=/none"], "/none does not exist"),
        (bench, ["--images=/none", "--rounds=0"], "--rounds"),
        (bench_linear, ["--batch-size=x"], "--batch-size"),
        (bench_linear, ["--size=3"], "'size'"),
        (bench_linear, ["--images=100"], "--images=100 is less than a batch, --batch-size="),
        (bench_damage, ["--count=0"], "--count"),
        (bench_attention, ["--shape=56x12"], "--shape=56x12 is not like 56x12x64"),
        (bench_attention, ["--chip=v9"], "--chip"),
    ],
)
def test_mistakes_are_one_line(module, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
        module.main()
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.startswith("error: ") and shown.count("\n") == 1 and message in shown


def test_the_command_takes_its_flags(monkeypatch, capsys):
    flags = ["--images=64", "--width=8", "--classes=3", "--members=2", "--batch_size=32", "--rounds=1"]
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    with flagsaver.flagsaver():
        bench_linear.main()
    assert capsys.readouterr().out.startswith("2 members, 64 images of 8 features, 3 classes, batches of 32, ")


@pytest.mark.parametrize("module", [bench, bench_linear, bench_damage, bench_attention])
def test_help_is_the_docstring(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--help"])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
        module.main()
    assert not stop.value.code and capsys.readouterr().out == module.__doc__.strip() + "\n"


def test_step_takes_turns_with_the_same_step_in_pytorch(make_config):
    said = bench_step.measure(make_config(), rounds=1, against_torch=True)
    losses = re.findall(r"loss (\d+\.\d+)$", said, re.MULTILINE)
    assert len(losses) == 2
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=2e-6)
    assert re.search(r"cjepa_jax has \d+\.\d\d times the speed of PyTorch 2\.", said)


@pytest.mark.parametrize(
    "changes, needs",
    [
        ({"vicreg__projector": (8,)}, "vicreg.projector = ()"),
        ({"sigreg__weight": 0.1}, "sigreg.weight = 0"),
        ({"ema__warmup": True}, "ema.warmup = False"),
        ({"optim__clip_norm": 1.0}, "optim.clip_norm = 0"),
    ],
)
def test_step_says_what_pytorch_lacks(make_config, changes, needs):
    with pytest.raises(UserError, match=re.escape(needs)):
        bench_step.measure(make_config(**changes), rounds=1, against_torch=True)

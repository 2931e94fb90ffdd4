"""Command lines drawn at random: each command comes as far as its work, or says in one line what is wrong."""

import collections
import contextlib
import errno
import importlib.util
import io
import os
import pathlib
import sys
import tempfile

import jax
import pytest
import tensorflow_datasets as tfds
from absl import flags
from etils import epath
from hypothesis import strategies as st
from PIL import Image

from cjepa_jax import command, pretrained
from cjepa_jax.config import Model
from cjepa_jax.interop.conversion import convert
from cjepa_jax.interop.tensors import ImportOptions
from cjepa_jax.tpu import compile as compiling
from cjepa_jax.train import distributed, loop, setup, sharding, step
from tests.test_convert import make_networks
from tests.test_fuzz_settings import explored

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ("--config.model.size=16x1x2", "--config.predictor.width=8", "--config.predictor.depth=1")
OVERRIDES = (
    *("--config.data.batch_size=16", "--config.data.batch_size=1e3", "--config.data.std=(1,", "--config.data.std=58.0"),
    *("--config.optim.epochs=inf", "--config.optim.eps=nan", "--config.model.size=64x3x4xnan", "--config.method="),
    *("-config.method=supervised", "--config.method", "--noconfig.method", "--config.mask.keep=x", "--config.data=3"),
    *("--config.vicreg.projector=" + "(" * 3000, "--config.vicreg.projector=(8,)", "--config.seed=" + "9" * 5000),
    *("--config.=1", "--config.x.y.z=1", "--config.knn.neighbours=5", "--config.linear.layers=()", "--help", "stray"),
    *("--config.data.train_split=train[:0]", "--config.data.data_dir=\udcff", "--config.davis.data_dir=/proc"),
)
CONFIG_FILES = {  # name -> content, and what is said of it
    "syntax.py": ("def get_config(:\n", "syntax.py, line 1: SyntaxError: invalid syntax"),
    "raises.py": ("def get_config():\n    return 1 / 0\n", "raises.py, line 2: ZeroDivisionError: division by zero"),
    "unknown.py": ("import no_such_module\n", "unknown.py, line 1: ModuleNotFoundError: No module named 'no_such_"),
    "nothing.py": ("x = 1\n", "nothing.py has no function get_config()"),
    "number.py": ("def get_config():\n    return 5\n", "number.py: get_config() gave int, not settings"),
    "keys.py": ("def get_config():\n    return {1: 2}\n", "unknown key 1: "),
    "deep.py": ("def get_config():\n    return get_config()\n", "deep.py, line 2: RecursionError: maximum"),
    "null.py": ("\0", "null.py: SyntaxError: source code string cannot contain null bytes"),
    "latin.py": ("x = '\xff'\n", "latin.py"),
    "method.py": ("def get_config():\n    return {'method': ['x']}\n", "method = ['x'] is not known; known: cjepa, "),
    "good.txt": ("def get_config():\n    return {}\n", "good.txt is not a Python file: its name must end in .py"),
    "pipe": (None, "pipe' does not exist; known by name:"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of things that a path may name, by a word for each."""
    root = tmp_path_factory.mktemp("place")
    for name, (content, _) in CONFIG_FILES.items():
        if content is not None:
            (root / name).write_text(content, encoding="latin-1")
    (root / "folder").mkdir()
    (root / "file").write_text("text")
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to(root / "loop")
    (root / "images").mkdir()
    Image.new("RGB", (30, 20)).save(root / "images" / "a.png")
    pretrained.save(epath.Path(root / "ours"), make_networks())
    convert(str(root / "ours"), str(root / "a.safetensors"), "timm", encoder=None, force=False, options=ImportOptions())
    return root


def paths(place):
    names = [
        "",
        ".",
        "/",
        "/proc/x",
        "/dev/null",
        "no/such/place",
        "x" * 300,
        "\udcff",
        "~",
        "~nobody/x",
        "gs:/",
        "a\nb",
    ]
    names += [
        str(place / name) for name in (*CONFIG_FILES, "folder", "file", "file/x", "pipe", "loop", "images", "new")
    ]
    return [*names, *(str(place / name) for name in ("ours", "a.safetensors", "ours/checkpoints/7", "b.safetensors"))]


# The flags that do not belong to one command; other tests in this process may have imported commands already.
SHARED = frozenset(
    flag.name
    for module, found in flags.FLAGS.flags_by_module_dict().items()
    if not module.startswith("cjepa_jax") or module == "cjepa_jax.command"
    for flag in found
)


def remove_flags():
    for name in [name for name in flags.FLAGS if name not in SHARED]:
        delattr(flags.FLAGS, name)


@pytest.fixture(autouse=True)
def own_flags():
    """Puts aside the flags of commands that other tests have imported, and brings them back at the end."""
    aside = {name: flags.FLAGS[name] for name in flags.FLAGS if name not in SHARED}
    remove_flags()
    yield
    remove_flags()
    for name, flag in aside.items():
        flags.FLAGS[name] = flag


def open_module(name):
    """Runs a command's module anew; its flags replace those of the one before, of which some have the same names."""
    remove_flags()
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said_by(module, arguments, monkeypatch):
    """The exit code of a command and what it said on stderr."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    registry = flags.FLAGS
    for name in list(registry):
        registry[name].unparse()
    err, out = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            module.main()
        code = 0
    except SystemExit as left:
        code = left.code or 0
    return code, err.getvalue()


def check_command(module_name, arguments_of, examples, place, monkeypatch):
    """Draws command lines: some flags, some of them wrong, and overrides."""
    module = open_module(module_name)
    with contextlib.suppress(SystemExit):  # flags that main() defines itself are made once
        said_by(module, ["--help"], monkeypatch)
    main = {"names": [name for name in flags.FLAGS if name not in SHARED]}
    for define in ("string", "integer", "bool", "alias"):
        monkeypatch.setattr(flags, f"DEFINE_{define}", lambda name, *_, **__: flags.FLAGS[name.replace("_", "-")])
    junk = st.sampled_from((*paths(place), "-1", "0", "1", "3", "1e999", "nan", "9" * 30, "a,b", "0.5,0.5,0.5", "1:2"))
    wrong = st.tuples(st.sampled_from(main["names"]), junk).map(lambda pair: f"--{pair[0]}={pair[1]}")
    seen = collections.Counter()

    @explored(
        examples,
        st.lists(st.one_of(wrong, wrong, st.sampled_from(OVERRIDES)), max_size=3),
        st.sampled_from([*arguments_of]),
    )
    def check(mistakes, arguments):
        code, said = said_by(module, [*arguments, *mistakes], monkeypatch)
        seen[code] += 1
        if code == 2:
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 and said.endswith(errors[0] + "\n") and len(errors[0]) < 8000, said
        else:
            assert code == 0 and "Traceback" not in said, said

    check()
    print(module_name, dict(seen))
    assert seen[0] and seen[2]


SLOW = pytest.mark.parametrize("examples", [25, pytest.param(250, marks=pytest.mark.slow)])


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_a_bad_config_file_is_one_line(name, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = open_module("cjepa_jax.main")
    code, said = said_by(main, [f"--config={place / name}"], monkeypatch)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and CONFIG_FILES[name][1] in said, said


@pytest.mark.parametrize(
    "workdir, message",
    [
        ("/proc/x", "--workdir '/proc/x' cannot be written ("),
        ("PLACE/file/x", "PLACE/file does not exist; make it first, or mend the path"),
        ("PLACE/file", "--workdir PLACE/file is a file"),
        ("PLACE/pipe", "--workdir PLACE/pipe is a file"),
        ("PLACE/loop", "--workdir 'PLACE/loop' cannot be written (Too many levels of symbolic links)"),
        ("PLACE/" + "x" * 300, "xxx' cannot be written (File name too long)"),
        ("PLACE/sealed", "--workdir 'PLACE/sealed' cannot be written ("),
        ("PLACE/sealed/x", "--workdir 'PLACE/sealed/x' cannot be written ("),
    ],
)
def test_an_unusable_workdir_is_one_line(workdir, message, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = open_module("cjepa_jax.main")
    (place / "sealed").mkdir(exist_ok=True)
    seal(place / "sealed", monkeypatch)
    arguments = [f"--config={ROOT}/configs/digits.py", *SMALL, f"--workdir={workdir.replace('PLACE', str(place))}"]
    code, said = said_by(main, arguments, monkeypatch)
    assert code == 2 and said.count("\n") == 1 and message.replace("PLACE", str(place)) in said, said


def seal(folder, monkeypatch):
    """Nothing can be made in the folder, not even by root."""
    make = tempfile.TemporaryFile

    def refuse(*arguments, dir=None, **options):  # as a file system that is mounted read-only does
        if pathlib.Path(str(dir)) == folder:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))
        return make(*arguments, dir=dir, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


@SLOW
def test_main(examples, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    monkeypatch.setattr(distributed, "reach", lambda *_: None)
    monkeypatch.setattr(
        loop, "train", lambda config, workdir, init, profile, extend: setup.set_up(config, workdir, init)
    )
    known = [[f"--config={ROOT}/configs/digits.py", *SMALL], [f"--config={ROOT}/configs/finetune_digits.py"]]
    known += [[f"--config={place / name}"] for name in CONFIG_FILES]
    known += [[f"--config={ROOT}/configs/digits.py", *SMALL, f"--workdir={path}"] for path in paths(place)]
    check_command("cjepa_jax.main", known, examples, place, monkeypatch)


@SLOW
def test_convert(examples, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = [
        [
            f"--input={place / source}",
            f"--output={place / 'new'}{ending}",
            f"--format={kind}",
            "--force",
            "--num-heads=3",
        ]
        for source in ("ours", "a.safetensors")
        for kind, ending in (("orbax", ""), ("ijepa", ".pth"), ("timm", ".safetensors"), ("transformers", "s"))
    ]
    check_command("cjepa_jax.convert", known, examples, place, monkeypatch)


@SLOW
def test_evaluate(examples, place, tmp_path, monkeypatch):
    """As far as the evaluators, which run for real elsewhere."""
    from cjepa_jax.evaluate.config import Evaluation

    monkeypatch.chdir(tmp_path)
    for kind in map(type, Evaluation().evaluators.values()):
        monkeypatch.setattr(kind, "run", lambda self, frozen, stem: {"trained": {"x": 0.5}})
        monkeypatch.setattr(kind, "shown", lambda self, rows: rows)
        monkeypatch.setattr(kind, "notes", lambda self, rows: [])
    networks = make_networks("16x1x2", image=8, patch=2, predictor=None)._replace(mean=(0.5,), std=(0.5,))
    networks = networks._replace(model=Model(size="16x1x2", patch_size=2, dtype="float32"), params={})
    shapes = pretrained.shapes(networks, classes=3)
    params = {"target_encoder": jax.tree.map(lambda x: jax.numpy.ones(x.shape), shapes["target_encoder"])}
    pretrained.save(epath.Path(tmp_path / "ours"), networks._replace(params=params))
    digits = ["--config.data.source=digits", "--config.data.train_split=train", "--config.data.test_split=test"]
    known = [[f"--checkpoint={tmp_path / 'ours'}", f"--method={m}", *digits] for m in ("knn", "linear", "knn,collapse")]
    check_command("cjepa_jax.evaluate.__main__", known, examples, place, monkeypatch)


@SLOW
def test_compile(examples, place, tmp_path, monkeypatch):
    """As far as compiling, on a mesh of the devices at hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compiling, "make_mesh", lambda config, topology: sharding.make_mesh(config))
    monkeypatch.setattr(compiling.jax, "set_mesh", lambda mesh: contextlib.nullcontext())
    monkeypatch.setattr(compiling, "build", lambda method, steps, mesh: step.build(method, steps, mesh))

    class CompilingError(SystemExit):
        code = 0

    def compiling_begins(*_, **__):
        raise CompilingError

    monkeypatch.setattr(compiling, "lower_step", compiling_begins)
    monkeypatch.setattr(compiling, "lower_layer", compiling_begins)
    known = [[f"--config={ROOT}/configs/digits.py", *SMALL, "--topology=v5e:2x4", *more] for more in ([], ["--layer"])]
    check_command("cjepa_jax.compile", known, examples, place, monkeypatch)


@SLOW
def test_prepare(examples, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = [[f"--input={place / 'images'}", f"--output={tmp_path / name}", "--threads=1"] for name in "abc"]
    check_command("cjepa_jax.data.prepare", known, examples, place, monkeypatch)


@SLOW
@pytest.mark.parametrize("name", ["input", "linear"])
def test_benches(name, examples, place, tmp_path, monkeypatch):
    """As far as their flags."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "open_module", _measuring_nothing(open_module))
    known = [[f"--images={place / 'images'}" if name == "input" else "--images=300"]]
    check_command(f"cjepa_jax.bench.{name}", known, examples, place, monkeypatch)


def _measuring_nothing(open_it):
    def opened(name):
        module = open_it(name)
        module.measure = lambda *_, **__: ""
        return module

    return opened


assert command and tfds.features  # imported for their flags

"""What is written where there is no appending and no renaming: gs://, here by fsspec's files in memory."""

import json
import re

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from cjepa_jax import files
from cjepa_jax.errors import UserError
from cjepa_jax.train import checkpoint, writer

RUN = epath.Path("gs://bucket/run")


class Bucket(MemoryFileSystem):
    """An object store: whole objects only."""

    protocol = ("gs", "gcs")
    store: dict = {}
    pseudo_dirs = [""]

    def _open(self, path, mode="rb", **options):
        assert mode in ("rb", "wb"), mode
        return super()._open(path, mode, **options)

    def mv(self, *_, **__):
        raise AssertionError("objects are not renamed")


class Board:
    """In TensorBoard's place."""

    def __init__(self, *_, **__):
        pass

    def add_scalar(self, *_):
        pass

    def close(self):
        pass


@pytest.fixture
def bucket(monkeypatch):
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    monkeypatch.setattr(writer, "SummaryWriter", Board)
    yield
    Bucket.store.clear()


@pytest.mark.usefixtures("bucket")
def test_metrics_and_config_on_an_object_store():
    for start in (0, 2):  # the second run drops line 3, which will come again
        log = writer.Writer(RUN, start=start, steps=4, batch_size=2, images=8)
        for step in (start + 1, start + 2, start + 3)[: 3 - start // 2]:
            log.tick(step, 0.0)
            log.write(step, {"loss/total": step + start})
        log.close()
    assert [(line["step"], line["loss/total"]) for line in writer.read(RUN)] == [(1, 1), (2, 2), (3, 5), (4, 6)]
    checkpoint.write_config(RUN, {"seed": 1})
    assert json.loads((RUN / "config.json").read_text()) == {"seed": 1}
    checkpoint.write_config(RUN, {"seed": 2})
    assert json.loads((RUN / "config.json").read_text()) == {"seed": 2}


def test_paths_of_object_stores_stay_what_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint.absolute(RUN) == RUN
    assert checkpoint.absolute(epath.Path("run")) == epath.Path(tmp_path / "run")


def test_what_gs_needs_is_said_at_once():
    with pytest.raises(UserError, match=re.escape(f"gcsfs and google.cloud.storage missing; {files.GCS_INSTALL}")):
        checkpoint.check_workdir(RUN, None, {})


def test_launch_installs_what_gs_needs():
    root = epath.Path(__file__).parents[1]
    for file in ("tpu_vm.sh", "gke_jobset.yaml"):
        assert files.GCS_INSTALL.removeprefix("pip install ") in (root / "launch" / file).read_text(), file

"""What is written where there is no appending and no renaming: gs://, here by fsspec's files in memory."""

import functools
import json
import re

import fsspec
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from orbax.checkpoint._src.path import gcs_utils

from cjepa_jax import files, pretrained
from cjepa_jax.errors import UserError
from cjepa_jax.interop.conversion import in_our_format
from cjepa_jax.train import checkpoint, orbax, writer

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


@pytest.fixture
def bucket(monkeypatch):
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)  # which asks Google
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


@pytest.mark.usefixtures("bucket")
def test_events_are_uploaded_and_hold_what_was_written():
    log = writer.Writer(RUN, start=0, steps=2, batch_size=2, images=8)
    log.tick(1, 0.0)
    log.write(1, {"loss/total": 0.5})
    log.close()
    (path,) = (RUN / "tensorboard").iterdir()
    assert b"loss/total" in path.read_bytes()


@pytest.mark.usefixtures("bucket")
def test_a_bucket_that_fails_for_a_while_neither_ends_the_run_nor_loses_lines(monkeypatch, capfd):
    monkeypatch.setattr(writer, "UPLOAD_SECONDS", 0.0)
    at_once = functools.partial(writer.SummaryWriter, flush_secs=0)
    monkeypatch.setattr(writer, "SummaryWriter", lambda *where, flush_secs, **options: at_once(*where, **options))
    log = writer.Writer(RUN, start=0, steps=60, batch_size=2, images=8)
    log.write(1, {"loss/total": 1.0})
    with monkeypatch.context() as broken:
        broken.setattr(Bucket, "_open", lambda *_, **__: (_ for _ in ()).throw(OSError("503 for a minute")))
        for step in range(2, 40):  # TensorBoard's queue holds ten
            log.write(step, {"loss/total": 1.0})
    said = capfd.readouterr().err
    for name in ("metrics.jsonl", "tensorboard/events"):
        assert re.search(rf"gs://bucket/run/{name}.* could not be written \(503 for a minute\)", said), name
    assert len(writer.read(RUN)) == 1
    log.close()
    assert [line["step"] for line in writer.read(RUN)] == list(range(1, 40))
    (path,) = (RUN / "tensorboard").iterdir()
    assert path.read_bytes().count(b"loss/total") == 39


@pytest.mark.usefixtures("bucket")
def test_lines_are_uploaded_once_a_minute_and_before_a_checkpoint():
    log = writer.Writer(RUN, start=0, steps=9, batch_size=2, images=8)
    for step in (1, 2, 3):
        log.write(step, {"loss/total": 1.0})
    assert [line["step"] for line in writer.read(RUN)] == [1]
    log.upload()
    assert [line["step"] for line in writer.read(RUN)] == [1, 2, 3]


@pytest.mark.usefixtures("bucket")
def test_a_checkpoint_that_was_never_completed_is_none():
    """Orbax writes it under its final name on gs://, and marks it when it is complete."""
    folder = RUN / "checkpoints"
    for step, complete in ((50, True), (100, False)):
        (folder / str(step) / "_CHECKPOINT_METADATA").write_text("{}")
        (folder / str(step) / "state" / "manifest.ocdbt").write_bytes(b"x")
        if complete:
            (folder / str(step) / "commit_success.txt").write_text("")
    (RUN / "config.json").write_text("{}")
    assert orbax.saved_steps(RUN) == [50]


class Remembering(Bucket):
    """Lists a folder once, as gcsfs does: later it knows of its own writes only."""

    seen: dict = {}

    def ls(self, path, detail=True, **_):
        found = self.seen.setdefault(path, super().ls(path, detail=True))
        return found if detail else [one["name"] for one in found]

    def invalidate_cache(self, path=None):
        self.seen.clear()


@pytest.mark.usefixtures("bucket")
def test_checkpoints_of_other_processes_are_seen(monkeypatch):
    fsspec.register_implementation("gcs", Remembering, clobber=True)
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: Remembering())
    for step in (50, 100):
        for name in (f"{step}/_CHECKPOINT_METADATA", f"{step}/commit_success.txt"):
            Bucket().pipe_file(f"{RUN}/checkpoints/{name}", b"{}")  # by another client
        assert max(orbax.saved_steps(RUN)) == step


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("remote", [True, False])
def test_nothing_is_written_into_the_workdir_of_another_run(tmp_path, remote):
    workdir, ours = RUN if remote else epath.Path(tmp_path), True
    log = writer.Writer(workdir, start=0, steps=9, batch_size=2, images=8, is_ours=lambda: ours)
    log.write(1, {"loss/total": 1.0})
    log.upload()
    ours = False
    log.write(2, {"loss/total": 1.0})
    log.close()
    assert [line["step"] for line in writer.read(workdir)] == [1]


def test_paths_of_object_stores_stay_what_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint.absolute(RUN) == RUN
    assert checkpoint.absolute(epath.Path("run")) == epath.Path(tmp_path / "run")


def test_what_gs_needs_is_said_at_once():
    with pytest.raises(UserError, match=re.escape(f"gcsfs and google.cloud.storage missing; {files.GCS_INSTALL}")):
        checkpoint.check_workdir(RUN, None, {})
    for read in (pretrained.describe, in_our_format):
        with pytest.raises(UserError, match=r"--checkpoint gs://bucket/run: gcsfs and google.cloud.storage missing"):
            read(RUN)


def test_launch_installs_what_gs_needs():
    root = epath.Path(__file__).parents[1]
    for file in ("tpu_vm.sh", "gke_jobset.yaml"):
        assert files.GCS_INSTALL.removeprefix("pip install ") in (root / "launch" / file).read_text(), file

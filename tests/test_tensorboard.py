"""What a person sees in TensorBoard after kills, read with TensorBoard's own code."""

import itertools
import types

import pytest
from etils import epath
from tensorboard.backend.event_processing import event_accumulator

from cjepa_jax.train import writer


@pytest.mark.parametrize("cut", [0, 13], ids=["whole", "cut off within a record"])
def test_no_step_comes_twice_after_26_kills(tmp_path, monkeypatch, cut):
    """Each run goes on from a checkpoint at a tenth step, gets some steps further, and is killed."""
    clock = itertools.count(1_800_000_000, 100)  # event files are named by the second
    monkeypatch.setattr("tensorboardX.event_file_writer.time", types.SimpleNamespace(time=lambda: next(clock)))
    steps, start, expected = 270, 0, {}
    for run in range(27):
        log = writer.Writer(epath.Path(tmp_path), start=start, steps=steps, batch_size=4, images=8)
        last = min(start + 10 + run * 7 % 20, steps) if run < 26 else steps
        for step in range(start + 1, last + 1):
            log.tick(step, 0.0)
            log.write(step, {"loss/total": 1000.0 * run + step})
            expected["loss/total", step] = 1000.0 * run + step
            if step % 10 == 0:
                log.write(step, {"eval/knn": float(run)})
                expected["eval/knn", step] = float(run)
        log.close()
        start = last // 10 * 10
        if cut and run < 26:
            file = max((tmp_path / "tensorboard").iterdir())
            file.write_bytes(file.read_bytes()[:-cut])
    board = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    for tag in board.Tags()["scalars"]:
        found = [event.step for event in board.Scalars(tag)]
        assert found == sorted(set(found)), tag
    for tag in ("loss/total", "eval/knn"):
        for event in board.Scalars(tag):
            assert event.value == expected[tag, event.step], (tag, event.step)
    if not cut:
        assert [event.step for event in board.Scalars("loss/total")] == list(range(1, steps + 1))
    assert {"loss/total", "eval/knn", "data/wait_fraction", "images_per_second"} <= set(board.Tags()["scalars"])

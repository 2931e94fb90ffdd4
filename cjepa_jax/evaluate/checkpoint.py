"""Judges an encoder of a checkpoint by several evaluators, and writes what they find beside the checkpoint."""

import re
import time
from collections.abc import Sequence

from etils import epath

from cjepa_jax import pretrained
from cjepa_jax.config import Data, Model
from cjepa_jax.errors import require
from cjepa_jax.evaluate import report
from cjepa_jax.evaluate.config import Evaluation, resolve
from cjepa_jax.evaluate.frozen import from_checkpoint, warn_of_same_images
from cjepa_jax.files import check_writable
from cjepa_jax.models.vit import exact
from cjepa_jax.settings import flatten


def judge(
    path: epath.Path,
    settings: Evaluation,
    wanted: Sequence[str],
    *,
    encoder: str | None = None,
    baselines: bool = True,
    name: str | None = None,
) -> None:
    """Runs the evaluators `wanted`, prints their tables and writes WORKDIR/evaluation/NAME.EVALUATOR.json for each.

    path: a checkpoint, see `pretrained.describe`. encoder: by default the target encoder, where there is one.
    baselines: whether an untrained encoder and raw pixels are judged, too. name: of the results, by default step and
    encoder. Raises UserError before anything is computed.
    """
    known = settings.evaluators
    workdir, saved = pretrained.describe(path)
    encoder = pretrained.choose_encoder(path, encoder)
    data, crop_fraction = resolve(settings, saved, reads_data=any(known[one].reads_data for one in wanted))
    frozen = from_checkpoint(
        path,
        encoder,
        data=data,
        crop_fraction=crop_fraction,
        seed=settings.seed,
        baselines=baselines,
        layers=max(known[one].deepest for one in wanted),
    )
    assert frozen.origin
    require(not re.search(r"[/\0]", name or ""), f"--name={name} must be the name of a file")
    name = name or f"step{frozen.origin.networks.step}_{encoder}"
    stem = workdir / "evaluation" / name
    require(stem.parent.name == "evaluation", f"--name={name!r} must be a name without folders")
    require(not stem.parent.exists() or stem.parent.is_dir(), f"{stem.parent} is not a folder: move it away")
    check_writable(workdir, "--checkpoint")
    stem.parent.mkdir(exist_ok=True)
    check_writable(stem, "--name")
    about = {"checkpoint": str(workdir), "step": frozen.origin.networks.step, "encoder": encoder}
    files = {one: stem.with_name(f"{name}.{one}.json") for one in wanted}
    descriptions = {one: report.describe(frozen, flatten(settings), method=one, **about) for one in wanted}
    if any(known[one].needs_labels and one != "accuracy" for one in wanted):
        frozen.check_labels()
        frozen.check_classes()
        warn_of_same_images(frozen.data, frozen.train.source, frozen.test.source)
    for one in wanted:
        report.check(files[one], descriptions[one], {"settings": Evaluation, "model": Model, "data": Data})
        known[one].check(frozen)
    print(report.header(frozen), flush=True)
    # A run that goes on deletes the checkpoint in time: those that read it again come first.
    for one in sorted(wanted, key=lambda one: not known[one].reads_checkpoint):
        start = time.perf_counter()
        with exact(frozen.model.dtype):  # as during training
            rows = known[one].run(frozen, stem)
        report.write(files[one], frozen, {one: rows}, descriptions[one], seconds=time.perf_counter() - start)
        print(report.table(known[one], rows), flush=True)
        for file in (files[one], *(stem.with_name(f"{name}.{picture}") for picture in known[one].pictures)):
            print(f"-> {file}", flush=True)

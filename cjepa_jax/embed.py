"""Write the features of images to a file, to be used elsewhere.

    python -m cjepa_jax.embed --checkpoint=runs/digits --output=features.npz
    python -m cjepa_jax.embed --checkpoint=RUN --input=FOLDER --output=features.parquet

--checkpoint=PATH         a workdir (its newest checkpoint), WORKDIR/checkpoints/STEP,
                          or one of another program, such as I-JEPA's .pth.tar, which is
                          converted into the folder PATH.orbax
--input=FOLDER            a folder of images, an .npz file, or a set that data.prepare wrote;
                          default: the images of the checkpoint's own config
--split=train             which images of them, in TFDS' syntax with slices
--output=FILE             FILE.npz; FILE.parquet, which needs pyarrow; or a folder, for
                          large sets: files of --shard images each, and the same command
                          goes on where it was stopped
--shard=N                 images per file in such a folder; default: 65536, or with
                          --features=patches as many as have 262144 patches together
--features=mean           the mean over an image's patches [n, D], or patches: [n, N, D]
--encoder=target_encoder  or encoder: the context encoder, or that of a fine-tuned network
--config.data.KEY=VALUE   overrides how images are read: image_size, image_width,
                          crop_fraction, batch_size, decoder, threads, max_bad_fraction

Each file holds `features` (float32), `names` (of the images), and, where there are some,
`labels` (int32) and `classes` (their names). Images are cropped centrally, as in evaluation;
what cannot be read is left out and named. All devices share the work.

Exit codes: 0 finished; 2 a mistake that the user can mend; 1 any other error; 130 and 143 ended by
Ctrl-C and SIGTERM.
"""

import importlib.util
import math
import os
import sys
from typing import Any

from absl import flags
from etils import epath

from cjepa_jax import command
from cjepa_jax.errors import require

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Whose encoder.")
_INPUT = flags.DEFINE_string("input", None, "The images; default: those of the checkpoint's config.")
_SPLIT = flags.DEFINE_string("split", "train", "Which of them.")
_OUTPUT = flags.DEFINE_string("output", None, "FILE.npz, FILE.parquet, or a folder.")
_SHARD = flags.DEFINE_integer("shard", None, "Images a file of a folder.", lower_bound=1)
_FEATURES = flags.DEFINE_enum("features", "mean", ["mean", "patches"], "Of the image, or of each patch.")
_ENCODER = flags.DEFINE_string("encoder", None, "target_encoder or encoder.")


def _run() -> None:
    from cjepa_jax import pretrained  # after the flags: importing jax takes seconds
    from cjepa_jax.data import pipeline, sources
    from cjepa_jax.evaluate import embedding
    from cjepa_jax.evaluate.config import Evaluation, resolve
    from cjepa_jax.files import check_bucket_support, check_writable, is_remote
    from cjepa_jax.interop.conversion import in_our_format

    _, settings = command.read_config(lambda _: Evaluation, default="evaluate")
    require(bool(_CHECKPOINT.value), "--checkpoint is missing, e.g. --checkpoint=runs/digits")
    require(bool(_OUTPUT.value), "--output is missing, e.g. --output=features.npz")
    output = epath.Path(_OUTPUT.value)
    single = output.suffix in (".npz", ".parquet")
    require(single or not output.suffix, f"--output={output} must end in .npz or .parquet, or name a folder")
    require(
        output.suffix != ".parquet" or importlib.util.find_spec("pyarrow") is not None,
        f"--output={output} needs pyarrow: pip install pyarrow",
    )
    path = in_our_format(epath.Path(_CHECKPOINT.value))
    _, saved = pretrained.describe(path)
    encoder = pretrained.choose_encoder(path, _ENCODER.value)
    given = _data_of(_INPUT.value) if _INPUT.value else {}
    given |= {"data.train_split": _SPLIT.value, "data.test_split": _SPLIT.value}  # which a converted one does not know
    data, crop_fraction = resolve(settings, {**saved, **given})
    source = sources.load(data, _SPLIT.value)
    check_bucket_support(output, "--output")
    require(is_remote(output) or output.parent.is_dir(), f"--output: the folder {output.parent} does not exist")
    require(not (single and output.exists()), f"--output {output} exists already; remove it or name another one")
    require(single or not output.exists() or output.is_dir(), f"--output {output} is not a folder")
    check_writable(output, "--output")
    networks = pretrained.load(path, [encoder])
    patches = math.prod(side // networks.model.patch_size for side in data.image_shape)
    shard = _SHARD.value or (65536 if _FEATURES.value == "mean" else max(1, 262144 // max(1, patches)))
    size = len(source) if single else shard
    parts = [range(start, min(start + size, len(source))) for start in range(0, len(source), size)]
    height, width = data.image_shape
    about = {
        **{"checkpoint": str(path), "encoder": encoder, "features": _FEATURES.value, "images": source.fingerprint},
        **{
            "image_size": height if height == width else [height, width],
            "crop_fraction": crop_fraction,
            "shard": shard,
        },
    }
    about |= {"step": networks.step, "parameters": pretrained.digest(networks.params)}
    files = [output] if single else [output / f"features-{i:05}-of-{len(parts):05}.npz" for i in range(len(parts))]
    if not single:
        embedding.begin_folder(output, about)
    todo = [(file, part) for file, part in zip(files, parts, strict=True) if not file.exists()]
    reader = pipeline.Reader(source, data)
    embedder = embedding.Embedder(networks, reader, crop_fraction=crop_fraction, patches=_FEATURES.value == "patches")
    done = len(source) - sum(len(part) for _, part in todo)
    print(f"{encoder} of {path} on {len(source)} images, {done} of them done before", file=sys.stderr, flush=True)
    for file, part in todo:
        embedding.write(file, embedder.embed(part, done=done))
        done += len(part)
        print(f"-> {file}", flush=True)
    for name, reason in reader.unreadable.items():
        print(f"left out {name}: {reason}", file=sys.stderr)


def _data_of(path: str) -> dict[str, Any]:
    """Says by which settings the images at a path are read."""
    path = os.path.expanduser(path)
    if path.endswith(".npz"):
        return {"data.source": "npz", "data.data_dir": path}
    require(os.path.isdir(path), f"--input {path} does not exist; wanted: a folder of images or an .npz file")
    prepared = os.path.exists(os.path.join(path, "dataset_info.json"))
    return {"data.source": "tfds" if prepared else "folder", "data.name": "", "data.data_dir": path}


def main() -> None:
    """Runs the command; its exit codes are those that --help names."""
    command.run(_run, __doc__)


if __name__ == "__main__":
    main()

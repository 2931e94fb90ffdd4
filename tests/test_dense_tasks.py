"""The page's networks for detection and segmentation in PyTorch, on a few drawn images."""

import pathlib
import re

import numpy as np
import pytest
import torch
from etils import epath

from cjepa_jax import pretrained
from tests.test_convert import make_networks, to

ROOT = pathlib.Path(__file__).parents[1]
SIDE = 64
KEPT = torch.library.Library("torchvision", "IMPL")


def overlap(one, others):
    """Intersection over union of boxes (left, top, right, bottom)."""
    low, high = torch.maximum(one[:2], others[:, :2]), torch.minimum(one[2:], others[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    return shared / ((one[2:] - one[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - shared)


def nms(boxes, scores, threshold):
    """Non-maximum suppression, which the torchvision of these tests has for CUDA only."""
    order, kept = scores.argsort(descending=True), []
    while len(order):
        kept.append(order[0])
        order = order[1:][overlap(boxes[order[0]], boxes[order[1:]]) <= threshold]
    return torch.stack(kept) if kept else order


def drawn(count):
    """Images [count, 3, 64, 64] with a bright rectangle on noise, and its box and mask."""
    rng, images, boxes = np.random.default_rng(0), [], []
    masks = np.zeros((count, SIDE, SIDE), np.uint8)
    for i in range(count):
        (left, right), (top, bottom) = np.sort(rng.choice(np.arange(4, 60, 8), (2, 2), replace=False), axis=1)
        masks[i, top:bottom, left:right] = 1
        images.append(rng.normal(0, 0.2, (3, SIDE, SIDE)) + 2.0 * masks[i])
        boxes.append([left, top, right, bottom])
    return torch.tensor(np.array(images), dtype=torch.float32), torch.tensor(boxes).float(), torch.tensor(masks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit")  # by torchvision
def test_the_pages_networks_learn_drawn_shapes(tmp_path, monkeypatch):
    import torchvision

    KEPT.impl("nms", nms, "CPU")
    monkeypatch.setattr(torchvision.ops.boxes, "_assert_has_ops", lambda: None)
    torch.compiler.set_stance("force_eager")  # torchvision would compile its own way without CUDA
    pretrained.save(epath.Path(tmp_path / "ours"), make_networks("24x4x3", patch=16))
    to(tmp_path / "ours", tmp_path / "encoder", "transformers")
    page = (ROOT / "docs" / "pytorch.md").read_text().partition("## Detection and segmentation")[2]
    code = re.search(r"```python.*?\n(.*?)```", page, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    exec(code, names)
    images, boxes, masks = drawn(4)

    maps = names["segmenter"].maps(images)
    patch = names["segmenter"].maps.patch
    assert [x.shape[1:] for x in maps] == [(24, SIDE * 4 // patch // s, SIDE * 4 // patch // s) for s in (1, 2, 4, 8)]

    segmenter = names["UperNet"]("encoder", classes=2)
    optimizer = torch.optim.AdamW(segmenter.parameters(), 1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(segmenter(images), masks.long()).backward()
        optimizer.step()
    found = segmenter(images).argmax(1)
    assert ((found & masks).sum() / (found | masks).sum()) > 0.8

    few = {f"rpn_{when}_nms_top_n_{mode}": 50 for when in ("pre", "post") for mode in ("train", "test")}
    detector = names["MaskRCNN"](names["Pyramid"]("encoder"), num_classes=2, min_size=SIDE, max_size=SIDE, **few)
    targets = [
        {"boxes": box[None], "labels": torch.ones(1, dtype=torch.int64), "masks": mask[None]}
        for box, mask in zip(boxes, masks, strict=True)
    ]
    optimizer, losses = torch.optim.AdamW(detector.parameters(), 3e-4), []
    for _ in range(6):
        optimizer.zero_grad()
        parts = detector(list(images), targets)
        losses.append({name: float(part.detach()) for name, part in parts.items()})
        sum(parts.values()).backward()
        optimizer.step()
    assert {"loss_mask", "loss_box_reg", "loss_objectness"} < losses[0].keys()
    assert sum(losses[-1].values()) < 0.8 * sum(losses[0].values())
    assert detector.eval()(list(images))[0].keys() == {"boxes", "labels", "scores", "masks"}

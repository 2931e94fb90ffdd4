"""Training steps against a second implementation: PyTorch, float64, one image at a time, no padding.

The reference is written from the method's description. It shares with the package
the parameters it starts from and the masks (which have tests of their own), and
drops the invalid tokens before it computes anything: where the two agree, padding
has no influence.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from torch import nn
from torch.nn import functional as F

from cjepa_jax.batch import Batch
from cjepa_jax.methods.cjepa import CJEPA, CJEPAConfig
from cjepa_jax.models.masking import sample_masks
from cjepa_jax.settings import parse
from cjepa_jax.train import optimizer
from cjepa_jax.train.step import init_state, train_step
from configs.digits import get_config
from tests.torch_ijepa import Block, positions_2d

TOLERANCE = 1e-4  # relative, of a leaf: norm of the difference over norm of the reference
STEPS = 5
RUN_LENGTH = 6  # in steps, 2 of them warm-up: five steps see both parts of the learning rate's schedule
BATCH, IMAGE, PATCH, CHANNELS = 8, 32, 4, 3
WIDTH, DEPTH, HEADS = 32, 2, 4
PREDICTOR_WIDTH, PREDICTOR_DEPTH = 16, 2

RELEASED = {"mask": {"recipe": "released", "keep": "raster"}}
MLP = {"vicreg": {"projector": (24, 20, 16)}}
CONTEXT_TARGET = {"vicreg": {"views": "context_target"}}
SMALL_SPREAD = {"vicreg": {"gamma": 0.15}}  # what the hinge needs to be open and shut without a projector
WEIGHT_0 = {"vicreg": {"weight": 0.0}}
L2 = {"loss": {"kind": "l2"}}
NO_OFFSET = {"optim": {"schedule_offset": 0}}  # as before the setting existed
RECTANGLE = {"data": {"image_width": 48}, "mask": {"context_tokens": 48}}
CASES = {
    "blocks-identity-corrected": (SMALL_SPREAD,),
    "blocks-mlp-released": (MLP, RELEASED),
    "blocks-identity-corrected-rectangle": (SMALL_SPREAD, RECTANGLE),
    "context-identity-released": (CONTEXT_TARGET, RELEASED),
    "context-mlp-corrected": (CONTEXT_TARGET, MLP),
    "weight0-blocks-identity-corrected": (WEIGHT_0, SMALL_SPREAD, NO_OFFSET),
    "weight0-context-mlp-released-l2": (WEIGHT_0, CONTEXT_TARGET, MLP, RELEASED, L2),
}


def _config(*overrides):
    """Coefficients that differ from one another, and rates that move every parameter within five steps."""
    settings = get_config().to_dict()
    small = {
        "data": {
            "image_size": IMAGE,
            "batch_size": BATCH,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
        "model": {"size": f"{WIDTH}x{DEPTH}x{HEADS}", "patch_size": PATCH, "dtype": "float32"},
        "predictor": {"width": PREDICTOR_WIDTH, "depth": PREDICTOR_DEPTH},
        "mask": {
            "recipe": "corrected",
            "targets": 4,
            "target_scale": (0.15, 0.2),
            "target_aspect": (0.75, 1.5),
            "context_scale": (0.85, 1.0),
            "min_keep": 4,
            "context_tokens": 26,
            "keep": "random",
        },
        "loss": {"kind": "smooth_l1"},
        "vicreg": {
            "weight": 0.01,
            "views": "target_blocks",
            "invariance": 25.0,
            "variance": 20.0,
            "covariance": 3.0,
            # Amid the standard deviations: the hinge is open for some dimensions and shut for others.
            "gamma": 0.4,
            "eps": 1e-4,
            "projector": (),
        },
        "optim": {
            "epochs": float(RUN_LENGTH),
            "warmup_epochs": 2.0,
            "learning_rate_start": 1e-3,
            "learning_rate": 3e-3,
            "learning_rate_end": 1e-4,
            "weight_decay_start": 0.04,
            "weight_decay_end": 0.4,
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
        },
        "ema": {"start": 0.7, "end": 1.0},
    }
    for layer in (small, *overrides):
        for group, values in layer.items():
            settings.setdefault(group, {}).update(values)
    return parse(settings, CJEPAConfig)


# The reference: networks, for one image or one sequence at a time.


class TorchTransformer(nn.Module):
    """What encoder and predictor have in common."""

    def __init__(self, width, depth, grid):
        super().__init__()
        self.block_names = [f"block{i:02}" for i in range(depth)]
        for name in self.block_names:
            self.add_module(name, Block(width, HEADS, 4 * width))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.positions = positions_2d(width, grid)

    def transform(self, x):
        for name in self.block_names:
            x = getattr(self, name)(x)
        return self.norm(x)


class TorchEncoder(TorchTransformer):
    def __init__(self, grid):
        super().__init__(WIDTH, DEPTH, grid)
        self.embed = nn.Conv2d(CHANNELS, WIDTH, kernel_size=PATCH, stride=PATCH)

    def forward(self, image, visible=None):
        """Image [C, H, W] -> features of all patches, or of the visible ones only."""
        x = self.embed(image[None])[0].flatten(1).T + self.positions
        return self.transform(x if visible is None else x[visible])


class TorchPredictor(TorchTransformer):
    def __init__(self, grid):
        super().__init__(PREDICTOR_WIDTH, PREDICTOR_DEPTH, grid)
        self.embed = nn.Linear(WIDTH, PREDICTOR_WIDTH)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, PREDICTOR_WIDTH))
        self.head = nn.Linear(PREDICTOR_WIDTH, WIDTH)

    def forward(self, context, visible, hidden):
        """Features of the visible patches -> predicted features of one hidden block."""
        seen = self.embed(context) + self.positions[visible]
        asked = self.mask_token[0] + self.positions[hidden]
        return self.head(self.transform(torch.cat([seen, asked]))[len(seen) :])


class TorchProjector(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.layers = len(widths)
        for i, (before, after) in enumerate(itertools.pairwise((WIDTH, *widths))):
            self.add_module(f"fc{i}", nn.Linear(before, after, bias=False))
            if i < self.layers - 1:
                self.add_module(f"batch_norm{i}", nn.BatchNorm1d(after, eps=1e-5, track_running_stats=False))

    def forward(self, x):
        for i in range(self.layers):
            x = getattr(self, f"fc{i}")(x)
            if i < self.layers - 1:
                x = F.relu(getattr(self, f"batch_norm{i}")(x))
        return x


# The reference: losses and training.


def variance(z, vicreg):
    std = torch.sqrt(torch.var(z, dim=0) + vicreg.eps)
    return torch.clamp(vicreg.gamma - std, min=0).mean()


def covariance(z):
    matrix = torch.cov(z.T)
    return (matrix.square().sum() - matrix.diagonal().square().sum()) / z.shape[1]


def block_terms(views, vicreg):
    """Algorithm 1, pair by pair: (sim, std, cov)."""
    sims, stds, covs = [], [], []
    for z_i, z_j in itertools.permutations(views, 2):
        sims.append((z_i - z_j).square().mean())
        stds.append((variance(z_i, vicreg) + variance(z_j, vicreg)) / 2)
        covs.append(covariance(z_i) + covariance(z_j))
    return [sum(terms) / len(terms) for terms in (sims, stds, covs)]


def context_terms(context, target, vicreg):
    """The pseudocode: (sim, std, cov)."""
    return (context - target).square().mean(), variance(context, vicreg), covariance(context)


def schedules(number, config):
    """Step number -> rates, by the name that they are logged under."""

    def cosine(start, end, progress):
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

    optim, ema = config.optim, config.ema
    warmup = round(RUN_LENGTH * optim.warmup_epochs / optim.epochs)
    at = number + optim.schedule_offset  # the released code advances its schedules before it uses them, but the EMA's
    if at < warmup:
        lr = optim.learning_rate_start + (optim.learning_rate - optim.learning_rate_start) * at / warmup
    else:
        lr = cosine(optim.learning_rate, optim.learning_rate_end, (at - warmup) / (RUN_LENGTH - warmup))
    return {
        "lr": lr,
        "weight_decay": cosine(optim.weight_decay_start, optim.weight_decay_end, at / RUN_LENGTH),
        "ema_momentum": ema.start + (ema.end - ema.start) * number / RUN_LENGTH,
    }


class TorchTraining(nn.Module):
    """The trained networks, their target and AdamW."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.target = TorchEncoder(config.grid), TorchEncoder(config.grid)
        self.predictor = TorchPredictor(config.grid)
        self.projector = TorchProjector(config.vicreg.projector)
        self.double()
        self.trained = {name: p for name, p in self.named_parameters() if not name.startswith("target.")}
        optim = config.optim
        self.adamw = torch.optim.AdamW(
            [{"params": [p for p in self.trained.values() if decayed == (p.ndim > 1)]} for decayed in (True, False)],
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
        )

    def losses(self, images, masks):
        """Images [B, H, W, C] uint8 -> losses by the name that they are logged under, and the pooled features."""
        predictions, targets = [], []  # of each image, of each block
        contexts, pooled = [], []  # of each image
        for i, image in enumerate(self.normalised(images)):
            with torch.no_grad():
                features = F.layer_norm(self.target(image), [WIDTH], eps=1e-5)
            visible = torch.tensor(masks.context_idx[i][masks.context_valid[i]], dtype=torch.long)
            context = self.encoder(image, visible)
            blocks = [
                torch.tensor(idx[valid], dtype=torch.long)
                for idx, valid in zip(masks.target_idx[i], masks.target_valid[i], strict=True)
            ]
            contexts.append(context)
            pooled.append(features.mean(dim=0))
            predictions.append([self.predictor(context, visible, hidden) for hidden in blocks])
            targets.append([features[hidden] for hidden in blocks])

        predicted, wanted = (torch.cat(list(itertools.chain(*x))) for x in (predictions, targets))
        if self.config.loss.kind == "smooth_l1":
            prediction_loss = F.smooth_l1_loss(predicted, wanted, beta=1.0)
        else:
            prediction_loss = F.mse_loss(predicted, wanted)

        views, target_views = (
            [torch.stack([block.mean(dim=0) for block in of_images]) for of_images in zip(*x, strict=True)]
            for x in (predictions, targets)
        )
        vicreg = self.config.vicreg
        if vicreg.views == "target_blocks":
            sim, std, cov = block_terms([self.projector(p) for p in views], vicreg)
        else:
            context = torch.stack([c.mean(dim=0) for c in contexts])
            target = torch.stack([torch.cat(blocks).mean(dim=0) for blocks in targets])
            sim, std, cov = context_terms(self.projector(context), self.projector(target), vicreg)
        regulariser = vicreg.invariance * sim + vicreg.variance * std + vicreg.covariance * cov
        losses = {
            "loss/total": prediction_loss + vicreg.weight * regulariser,
            "loss/prediction": prediction_loss,
            "loss/invariance": sim,
            "loss/variance": std,
            "loss/covariance": cov,
            "rep/block_mean_error": (torch.stack(views) - torch.stack(target_views)).square().mean(),
        }
        return losses, torch.stack(pooled)

    def normalised(self, images):
        """[B, H, W, C] uint8 -> [B, C, H, W]."""
        mean, std = (torch.tensor(x, dtype=torch.float64) for x in (self.config.data.mean, self.config.data.std))
        return ((torch.tensor(images, dtype=torch.float64) / 255 - mean) / std).permute(0, 3, 1, 2)

    def step(self, number, images, masks):
        """One step -> metrics and pooled features; the gradients stay in the parameters."""
        losses, pooled = self.losses(images, masks)
        self.adamw.zero_grad(set_to_none=False)
        losses["loss/total"].backward()
        grad_norm = math.sqrt(sum(p.grad.square().sum().item() for p in self.trained.values()))
        rates = schedules(number, self.config)
        for group, decay in zip(self.adamw.param_groups, (rates["weight_decay"], 0.0), strict=True):
            group["lr"], group["weight_decay"] = rates["lr"], decay
        self.adamw.step()
        momentum = rates["ema_momentum"]
        with torch.no_grad():
            for average, value in zip(self.target.parameters(), self.encoder.parameters(), strict=True):
                average.copy_(momentum * average + (1 - momentum) * value)
        values = {name: loss.item() for name, loss in losses.items()}
        return values | rates | {"grad_norm": grad_norm}, pooled.numpy()


# Names and layouts of the parameters.


def _torch_name(name):
    *path, leaf = name.split("/")
    if path == ["projector"]:  # scale0, bias0, ... are those of the batch norms
        path, leaf = ["projector", f"batch_norm{leaf[-1]}"], leaf[:-1]
    if len(path) > 1 and path[-2].startswith("block"):
        path[-1] = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}.get(path[-1], path[-1])
    return ".".join([*path, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)])


def _is_patch_embedding(name):
    return name in ("encoder/embed/kernel", "target/embed/kernel")


def _to_torch(name, leaf):
    leaf = torch.tensor(leaf, dtype=torch.float64)
    if _is_patch_embedding(name):
        return leaf.reshape(PATCH, PATCH, CHANNELS, WIDTH).permute(3, 2, 0, 1)
    return leaf.T if name.endswith("/kernel") else leaf


def _from_torch(name, leaf):
    leaf = leaf.numpy(force=True)
    if _is_patch_embedding(name):
        return leaf.transpose(2, 3, 1, 0).reshape(-1, WIDTH)
    return leaf.T if name.endswith("/kernel") else leaf


def _leaves(**trees):
    """Parameter trees by name -> {"name/of/leaf": array}; the bias of qkv as three leaves.

    The key's bias adds the same number to all logits of a query, so its gradient is
    exactly 0; what rounding leaves of it Adam scales up to a full step. It gets a
    leaf of its own, for it has to be compared differently.
    """
    leaves = {}
    for name, leaf in flatten_dict(trees, sep="/").items():
        if name.endswith("/qkv/bias"):
            leaves |= {f"{name}/{part}": x for part, x in zip("qkv", np.split(np.asarray(leaf), 3), strict=True)}
        else:
            leaves[name] = np.asarray(leaf)
    return leaves


def _is_key_bias(name):
    return name.endswith("/qkv/bias/k")


def _without_key_biases(leaves):
    return {name: leaf for name, leaf in leaves.items() if not _is_key_bias(name)}


# Both runs.


@dataclasses.dataclass
class Run:
    """What five steps gave, in the layout of the package."""

    metrics: list[dict[str, float]] = dataclasses.field(default_factory=list)
    features: list[np.ndarray] = dataclasses.field(default_factory=list)
    gradient: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # of the first step
    final: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # parameters, and "target/..."


@dataclasses.dataclass
class Case:
    config: Any
    start: dict[str, np.ndarray]
    masks: list[Any]
    ours: Run
    reference: Run


def _images(random, shape):
    """[STEPS, BATCH, H, W, C] uint8: four noisy areas, so that images differ in their means too."""
    height, width = shape
    areas = (
        random.uniform(0, 255, (STEPS, BATCH, 2, 2, CHANNELS)).repeat(height // 2, axis=2).repeat(width // 2, axis=3)
    )
    return (areas + random.normal(0, 40, areas.shape)).clip(0, 255).astype(np.uint8)


def _value(random, name, shape):
    """A parameter away from its initial value: an error in a bias, a scale or an epsilon must show."""
    noise = random.normal(size=shape)
    if name.endswith("/kernel"):
        # The first projection is small, so that the batch norm's epsilon matters.
        return noise * (0.1 if name == "projector/fc0/kernel" else 0.6) / math.sqrt(shape[0])
    if name.startswith("target/norm/"):  # small too, for the epsilon of the targets' normalisation
        return 0.01 * (1 + noise)
    return (1.0 if "scale" in name else 0.0) + 0.1 * noise


def _start(method, random):
    """A state of the shapes of the initial one, with other values; the target is not a copy of the encoder."""
    shapes = jax.eval_shape(lambda: init_state(jax.random.key(0), method=method, steps=RUN_LENGTH))

    def values(**trees):
        flat = flatten_dict(trees, sep="/")
        flat = {name: jnp.asarray(_value(random, name, x.shape), x.dtype) for name, x in flat.items()}
        return unflatten_dict(flat, sep="/")

    params = values(**shapes.params)
    params.setdefault("projector", {})
    target_params = values(target=shapes.averages["target_encoder"])["target"]
    return shapes.replace(
        step=jnp.zeros((), jnp.int32),
        params=params,
        averages={"target_encoder": target_params},
        opt_state=optimizer.build(method, RUN_LENGTH, params).init(params),
    )


def _run_ours(method, state, images):
    """-> (run, masks of every step)."""

    @functools.partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": False})  # halves the compile time
    def step(state, images, rng):
        masks = sample_masks(
            jax.random.fold_in(rng, state.step), method.config.mask, grid=method.config.grid, batch=BATCH
        )
        batch = Batch(images, jnp.zeros(BATCH, jnp.int32))
        return masks, train_step(state, batch, rng, method=method, steps=RUN_LENGTH)

    run, all_masks = Run(), []
    for batch in images:
        masks, (state, metrics, observed) = step(state, jnp.asarray(batch), jax.random.key(1))
        all_masks.append(jax.tree.map(np.asarray, masks))
        run.metrics.append({name: float(value) for name, value in metrics.items()})
        run.features.append(np.asarray(observed.features))
        if not run.gradient:  # Adam's first moment is now (1 - beta1) times the gradient
            moments = _leaves(**optax.tree.get(state.opt_state, "mu"))
            run.gradient = {name: leaf / (1 - method.config.optim.beta1) for name, leaf in moments.items()}
    run.final = _leaves(**state.params, target=state.averages["target_encoder"])
    return run, all_masks


def _run_reference(config, state, images, masks):
    leaves = flatten_dict({**state.params, "target": state.averages["target_encoder"]}, sep="/")
    training = TorchTraining(config)
    training.load_state_dict({_torch_name(name): _to_torch(name, np.asarray(x)) for name, x in leaves.items()})
    parameters = dict(training.named_parameters())

    def trees(of):
        flat = {name: of(parameters[_torch_name(name)]) for name in leaves}
        return unflatten_dict({name: _from_torch(name, x) for name, x in flat.items() if x is not None}, sep="/")

    run = Run()
    for number, batch in enumerate(images):
        metrics, features = training.step(number, batch, masks[number])
        run.metrics.append(metrics)
        run.features.append(features)
        run.gradient = run.gradient or _leaves(**trees(lambda p: None if p.grad is None else p.grad.clone()))
    run.final = _leaves(**trees(lambda p: p))
    return run


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """Matrices of this size are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    config = _config(*CASES[request.param])
    random = np.random.default_rng(0)
    method, images = CJEPA(config), _images(random, config.data.image_shape)
    start = _start(method, random)
    ours, masks = _run_ours(method, start, images)
    reference = _run_reference(config, start, images, masks)
    return Case(config, _leaves(**start.params, target=start.averages["target_encoder"]), masks, ours, reference)


def _error(ours, reference):
    """Relative error; 0 or infinity where the reference is exactly 0."""
    difference, size = np.linalg.norm(np.ravel(ours - reference)), np.linalg.norm(np.ravel(reference))
    return difference / size if size else (math.inf if difference else 0.0)


def _too_far(ours, reference, tolerance=TOLERANCE):
    """{name: error} of the entries whose error is above the tolerance."""
    assert ours.keys() == reference.keys()
    errors = {name: _error(ours[name], reference[name]) for name in ours}
    return {name: error for name, error in errors.items() if not error <= tolerance}


def test_tokens_are_invalid_somewhere(case):
    """Or nothing is said about padding."""
    assert not all(masks.context_valid.all() for masks in case.masks)
    assert not all(masks.target_valid.all() for masks in case.masks)


def test_losses_rates_and_features(case):
    for ours, reference in zip(case.ours.metrics, case.reference.metrics, strict=True):
        assert not _too_far(ours, reference)
    for ours, reference in zip(case.ours.features, case.reference.features, strict=True):
        assert _error(ours, reference) <= TOLERANCE


def test_gradient_of_every_leaf(case):
    """At the first step, where both have the same parameters."""
    ours, reference = case.ours.gradient, case.reference.gradient
    for name in filter(_is_key_bias, ours):
        query = name.removesuffix("k") + "q"
        assert np.linalg.norm(ours[name]) <= TOLERANCE * np.linalg.norm(ours[query]), name
    assert not _too_far(_without_key_biases(ours), _without_key_biases(reference), tolerance=TOLERANCE / 5)


def test_parameters_and_average_after_five_steps(case):
    ours, reference, start = (_without_key_biases(x) for x in (case.ours.final, case.reference.final, case.start))
    assert any(name.startswith("target/") for name in ours)
    assert not _too_far(ours, reference)
    # And what the steps changed, by itself, for most of a parameter is where it started from.
    # Less exact: Adam scales small gradients up together with their rounding.
    changes = [{name: leaf - start[name] for name, leaf in x.items()} for x in (ours, reference)]
    assert not _too_far(*changes, tolerance=1e-3)

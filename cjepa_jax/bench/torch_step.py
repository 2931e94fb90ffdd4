"""C-JEPA's training step in PyTorch, to be timed beside ours: the same mathematics from the same parameters.

What differs favours PyTorch: masks are drawn beforehand, and only the gradient's norm is computed of the metrics.
"""

from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import PyTree
from torch import nn
from torch.nn import functional as F

from cjepa_jax.config import Grid
from cjepa_jax.errors import require
from cjepa_jax.interop.torch_names import ENCODER, PREDICTOR, to_torch
from cjepa_jax.methods.cjepa import CJEPA
from cjepa_jax.methods.losses import TARGET_NORM_EPS
from cjepa_jax.models.layer_norm import LAYER_NORM_EPS
from cjepa_jax.models.masking import Masks
from cjepa_jax.models.vit import sincos_positions


class TorchBlock(nn.Module):
    """Applies attention and an MLP, each after a LayerNorm and with a residual; names are those of I-JEPA's files."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=LAYER_NORM_EPS) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """Maps tokens [B, K, D] to the same shape; those that are not valid [B, 1, 1, K] are not attended to."""
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=valid)
        x = x + self.attn["proj"](attended.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class TorchEncoder(nn.Module):
    """Maps patches of images to features."""

    def __init__(self, method: CJEPA):
        super().__init__()
        size, data, patch = method.encoder.size, method.config.data, method.config.model.patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(data.channels, size.width, patch, patch)})
        self.blocks = nn.ModuleList(TorchBlock(size.width, size.heads, size.mlp_ratio) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=LAYER_NORM_EPS)
        self.positions = _positions(size.width, method.config.grid)

    def forward(
        self, images: torch.Tensor, idx: torch.Tensor | None = None, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Maps images [B, C, H, W] to features [B, N, D], or of the patches idx [B, K] to [B, K, D]."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.positions
        if idx is not None:
            x = _take(x, idx)
        for block in self.blocks:
            x = block(x, valid)
        return self.norm(x)


class TorchPredictor(nn.Module):
    """Maps context features to the features of hidden blocks."""

    def __init__(self, method: CJEPA):
        super().__init__()
        width, features = method.config.predictor.width, method.encoder.size.width
        self.predictor_embed, self.predictor_proj = nn.Linear(features, width), nn.Linear(width, features)
        self.predictor_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        heads, depth = method.encoder.size.heads, method.config.predictor.depth
        self.predictor_blocks = nn.ModuleList(TorchBlock(width, heads, 4) for _ in range(depth))
        self.positions = _positions(width, method.config.grid)

    def forward(self, context: torch.Tensor, masks: Any) -> torch.Tensor:
        """Predicts features [B, M, K_t, D] from context features [B, K_c, D]."""
        images, blocks, length = masks.target_idx.shape
        x = (self.predictor_embed(context) + self.positions[masks.context_idx]).repeat_interleave(blocks, 0)
        targets = self.mask_token + self.positions[masks.target_idx.flatten(0, 1)]
        valid = torch.cat([masks.context_valid.repeat_interleave(blocks, 0), masks.target_valid.flatten(0, 1)], 1)
        x = torch.cat([x, targets.to(x.dtype)], 1)
        for block in self.predictor_blocks:
            x = block(x, valid[:, None, None])
        return self.predictor_proj(self.predictor_norm(x[:, -length:])).unflatten(0, (images, blocks))


class TorchStep:
    """Takes training steps on one batch of images; on a GPU the networks are compiled."""

    def __init__(self, method: CJEPA, params: PyTree, images: np.ndarray, masks: Any, *, learning_rate: float):
        """Copies the parameters of our method. Raises UserError for settings that this step does not have."""
        config = method.config
        plain = config.vicreg.views == "target_blocks" and not config.vicreg.projector
        require(plain, "--against=torch needs vicreg.views = 'target_blocks' and vicreg.projector = ()")
        require(config.loss.kind == "smooth_l1", "--against=torch needs loss.kind = 'smooth_l1'")
        require(config.sigreg.weight == 0, "--against=torch needs sigreg.weight = 0")
        require(not config.ema.warmup, "--against=torch needs ema.warmup = False")
        require(
            config.optim.microbatches == 1 and config.optim.clip_norm == 0 and not config.optim.frozen,
            "--against=torch needs optim.microbatches = 1, optim.clip_norm = 0 and optim.frozen = ()",
        )
        self.config = config
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        patch = config.model.patch_size

        def loaded(net: nn.Module, tensors: dict[str, np.ndarray]) -> nn.Module:
            state = {key: torch.tensor(np.array(value)) for key, value in tensors.items()}
            net.load_state_dict({"positions": net.positions, **state})
            return net.to(self.device)

        encoder = to_torch(params["encoder"], ENCODER, patch)
        self.encoder, self.target_encoder = (loaded(TorchEncoder(method), encoder) for _ in range(2))
        self.predictor = loaded(TorchPredictor(method), to_torch(params["predictor"], PREDICTOR, patch))
        self.target_encoder.requires_grad_(False)
        networks = (self.encoder, self.predictor)
        self.trained = [p for network in networks for p in network.parameters() if p.requires_grad]
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.trained if p.ndim > 1], "weight_decay": optim.weight_decay_start},
                {"params": [p for p in self.trained if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=learning_rate,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=self.device == "cuda",
        )
        self.images = torch.from_numpy(images).to(self.device)
        tensors = (torch.from_numpy(np.array(x)) for x in masks)
        hold: Any = Masks  # of tensors here
        self.masks = hold(*((x if x.dtype == torch.bool else x.long()).to(self.device) for x in tensors))
        self.mean, self.std = (torch.tensor(x, device=self.device) for x in (config.data.mean, config.data.std))
        self.loss = torch.compile(self._loss) if self.device == "cuda" else self._loss

    def __call__(self) -> float:
        """Takes one step; returns its loss when the device is done."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.config.model.dtype == "bfloat16"):
            loss = self.loss()
        loss.backward()
        torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        self.optimizer.step()
        with torch.no_grad():
            averages = [p.data for p in self.target_encoder.parameters()]
            torch._foreach_lerp_(averages, [p.data for p in self.encoder.parameters()], 1 - self.config.ema.start)
        return float(loss.detach())

    def _loss(self) -> torch.Tensor:
        masks, vicreg = self.masks, self.config.vicreg
        images = ((self.images.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
        with torch.no_grad():
            full = self.target_encoder(images).float()
            full = F.layer_norm(full, full.shape[-1:], eps=TARGET_NORM_EPS)
            target = _take(full, masks.target_idx.flatten(1)).unflatten(1, masks.target_idx.shape[1:])
        context = self.encoder(images, masks.context_idx, masks.context_valid[:, None, None])
        prediction = self.predictor(context, masks).float()
        weight = masks.target_valid[..., None].float()
        error = F.smooth_l1_loss(prediction, target, reduction="none") * weight
        z = ((prediction * weight).sum(2) / weight.sum(2)).transpose(0, 1)  # [M, B, D]
        invariance = 2 * z.var(0).mean()
        variance = F.relu(vicreg.gamma - (z.var(1) + vicreg.eps).sqrt()).mean()
        centred = z - z.mean(1, keepdim=True)
        covariances = centred.transpose(1, 2) @ centred / (z.shape[1] - 1)
        off_diagonal = covariances - torch.diag_embed(covariances.diagonal(dim1=1, dim2=2))
        covariance = 2 * (off_diagonal.square().sum((1, 2)) / z.shape[2]).mean()
        terms = vicreg.invariance * invariance + vicreg.variance * variance + vicreg.covariance * covariance
        return error.sum() / (weight.sum() * prediction.shape[-1]) + vicreg.weight * terms


def _positions(width: int, grid: Grid) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(sincos_positions(width, grid)), requires_grad=False)


def _take(tokens: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    return tokens.gather(1, idx[..., None].expand(-1, -1, tokens.shape[-1]))

"""I-JEPA's networks in PyTorch, written from the method's description; what its names are, its released files say."""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F


def define_torchvision_operators() -> None:
    """Before timm, or transformers' image processors, are imported.

    Torchvision is served for CUDA only; with the PyTorch of CPUs it lacks the two operators that it asks for.
    """
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)  # or it would undefine them


_KEPT: list[torch.library.Library] = []
define_torchvision_operators()


def positions_2d(width, grid):
    """[N, width] float64: the column in the first half of the channels, the row in the second."""
    table = []
    for row, column in itertools.product(*map(range, grid)):
        channels = []
        for position in (column, row):
            angles = [position / 10_000 ** (i / (width / 4)) for i in range(width // 4)]
            channels += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        table.append(channels)
    return torch.tensor(table, dtype=torch.float64)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        """[..., tokens, width]"""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in self.qkv(x).chunk(3, dim=-1))
        attention = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return self.proj((attention @ v).transpose(-3, -2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals, [..., tokens, width]."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, images):
        """[B, C, H, W] -> [B, N, width], row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    def __init__(self, *, width, depth, heads, hidden, grid, patch, channels=3):
        super().__init__()
        self.patch_embed = PatchEmbed(channels, width, patch)
        self.pos_embed = nn.Parameter(positions_2d(width, grid).float()[None], requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads, hidden) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        """[B, C, H, W] -> [B, N, width]"""
        x = self.patch_embed(images) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    def __init__(self, *, features, width, depth, heads, grid):
        super().__init__()
        self.predictor_embed = nn.Linear(features, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_pos_embed = nn.Parameter(positions_2d(width, grid).float()[None], requires_grad=False)
        self.predictor_blocks = nn.ModuleList([Block(width, heads, 4 * width) for _ in range(depth)])
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, features)

    def forward(self, context, visible, hidden):
        """Context features [B, K_c, D] at `visible` [K_c], and one block `hidden` [K_t] -> [B, K_t, D]"""
        positions = self.predictor_pos_embed[0]
        x = self.predictor_embed(context) + positions[visible]
        asked = (self.mask_token + positions[hidden]).expand(len(x), -1, -1)
        x = torch.cat([x, asked], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x[:, -len(hidden) :]))

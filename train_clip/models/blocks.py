"""The transformer block that both towers are made of.

B  sequences      L  positions      W  width      H  heads      E  width of a head (W / H)

Parameter names are the field's (OpenAI's and open_clip's state dicts), so that weights pass both ways with no map.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train_clip.errors import UserError
from train_clip.models.recompute import BlockStack, run_blocks

# Positions up to which, on a CPU, plain products train faster than the fused kernel (benchmarks/attention.py).
PLAIN_UP_TO = 128

SHARPNESS = 1.702  # openai/CLIP, model.py, QuickGELU


class Transformer(BlockStack):
    """A stack of pre-norm residual blocks (CLIP paper, section 2.4).

    Args:
        width: W.
        layers: number of blocks.
        heads: H, divides the width.
        activation: a key of ``ACTIVATIONS``.
        causal: each position sees itself and those before it.

    Raises:
        UserError: the activation is unknown.
    """

    stochastic_depth: float = 0.0  # share of the rows that the last block is left out for in training

    def __init__(self, width: int, layers: int, heads: int, activation: str, causal: bool) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UserError(f"Unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}.")
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads, activation, causal) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, W) to (B, L, W)."""
        return run_blocks(list(self.blocks()), x, self.recompute, self.stochastic_depth if self.training else 0.0)

    def blocks(self) -> Iterator[ResidualBlock]:
        """The blocks, first to last."""
        return cast(Iterator[ResidualBlock], iter(self.resblocks))


class ResidualBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, activation: str, causal: bool) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = SelfAttention(width, heads, causal)
        self.ln_2 = LayerNorm(width)
        self.mlp = MLP(width, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, W) to (B, L, W)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class MLP(nn.Sequential):
    """A linear layer to four times the width, the activation, and back."""

    c_fc: nn.Linear
    gelu: nn.Module
    c_proj: nn.Linear

    def __init__(self, width: int, activation: str) -> None:
        expand, contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        super().__init__(OrderedDict(c_fc=expand, gelu=ACTIVATIONS[activation](), c_proj=contract))

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, W) to (…, W)."""
        if not isinstance(self.gelu, QuickGELU) or not type(self.c_fc) is type(self.c_proj) is nn.Linear:
            return super().forward(x)
        # x · σ(1.702 x) = silu(1.702 x) / 1.702, with the factor in the matrices: they hold fewer numbers than what
        # passes, of which one tensor is kept for the backward pass where there would be three.
        hidden = F.silu(F.linear(x, SHARPNESS * self.c_fc.weight, SHARPNESS * self.c_fc.bias))
        return F.linear(hidden, self.c_proj.weight / SHARPNESS, self.c_proj.bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention on one fused projection; starts as ``nn.MultiheadAttention`` does."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, W) to (B, L, W)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        return self.out_proj(attend(q, k, v, self.causal).transpose(1, 2).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Scaled dot-product attention, softmax(q kᵀ / √E) v, by whichever way is faster.

    Args:
        q: (B, H, L, E) float.
        k: (B, H, M, E) float.
        v: (B, H, M, E) float.
        causal: position i sees positions 0 to i.

    Returns:
        (B, H, L, E).
    """
    if q.device.type != "cpu" or k.shape[-2] > PLAIN_UP_TO:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        later = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).triu(1)
        weights = weights.masked_fill(later, -torch.inf)
    return weights.softmax(dim=-1) @ v


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 (or wider), returned in the input's dtype, as OpenAI's."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x."""
        if x.device.type == "cpu":
            # Its kernel takes both types at once, computes in float32, and rounds at the end.
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """x · σ(1.702 x), the GELU of OpenAI's models (openai/CLIP, model.py)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply to each element."""
        return x * torch.sigmoid(SHARPNESS * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}

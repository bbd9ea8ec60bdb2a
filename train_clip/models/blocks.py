"""The transformer block that both towers are made of, named as in OpenAI's state dicts, and how blocks are run.

B  sequences      L  positions      W  width      H  heads      E  width of a head (W / H)
"""

# The compiler sees through a function within another only where its annotations are not evaluated (test_compile.py).
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from train_clip.errors import UserError

# Positions up to which, on a CPU, plain products train faster than the fused kernel (benchmarks/attention.py).
PLAIN_UP_TO = 128
SHARPNESS = 1.702  # openai/CLIP, model.py, QuickGELU

Block = Callable[[Tensor], Tensor]
BatchNorm = nn.modules.batchnorm._BatchNorm  # of any kind


class Blocks(nn.Sequential):
    """Blocks one after the other, by ``run_blocks``."""

    recompute: int = 0  # blocks whose activations are recomputed together in the backward pass; 0 to keep everything
    stochastic_depth: float = 0.0  # fraction of the rows for which training skips the last block

    @override
    def forward(self, x: Tensor) -> Tensor:
        return run_blocks(list(self), x, self.recompute, self.stochastic_depth if self.training else 0.0)


class Transformer(nn.Module):
    """Pre-norm residual blocks (CLIP paper, section 2.4); where it is causal a position sees none after it."""

    def __init__(self, width: int, layers: int, heads: int, activation: str, causal: bool) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UserError(f"Unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}.")
        self.resblocks = Blocks(*(ResidualBlock(width, heads, activation, causal) for _ in range(layers)))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class ResidualBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, activation: str, causal: bool) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = SelfAttention(width, heads, causal)
        self.ln_2 = LayerNorm(width)
        self.mlp = MLP(width, activation)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class MLP(nn.Module):
    """A linear layer to four times the width, the activation, and back."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = ACTIVATIONS[activation]()
        self.c_proj = nn.Linear(4 * width, width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        if not (is_plain(self.gelu, QuickGELU) and is_plain(self.c_fc, nn.Linear) and is_plain(self.c_proj, nn.Linear)):
            return self.c_proj(self.gelu(self.c_fc(x)))
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

    @override
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(attend(q, k, v, self.heads, self.causal))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> Tensor:
    """Softmax(q kᵀ / √E) v, head by head, of (B, L, W) q, (B, M, W) k and v: (B, L, W)."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    if q.device.type != "cpu" or k.shape[-2] > PLAIN_UP_TO:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    else:
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if causal:
            later = torch.ones(weights.shape[-2:], dtype=torch.bool).triu(1)
            weights = weights.masked_fill(later, -torch.inf)
        out = weights.softmax(dim=-1) @ v
    return out.transpose(1, 2).flatten(2)


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 (or wider), returned in the input's dtype, as OpenAI's."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            # Its kernel takes both types at once, computes in float32, and rounds at the end.
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """x · σ(1.702 x), the GELU of OpenAI's models (openai/CLIP, model.py)."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(SHARPNESS * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a faster form may take the place of a call: the class is that, and nothing (pruning) hooks it."""
    return type(module) is kind and not (
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def run_blocks(blocks: Sequence[Block], x: Tensor, group: int, skipping: float = 0.0) -> Tensor:
    """Map x through blocks, the last of them left out for a share ``skipping`` of the rows, the others for less.

    Of a ``group`` of blocks, if not 0, only the input is kept; the rest is computed again in the backward pass (Chen et
    al. 2016, arXiv 1604.06174; CLIP paper, section 2.5). The gradient is the same: dropout and stochastic depth meet
    the same random state again, and running statistics of BatchNorms are updated once.
    """

    def run(x: Tensor, steps: Sequence[tuple[Block, float]]) -> Tensor:
        for block, rate in steps:
            x = through_some_rows(block, x, rate) if rate else block(x)
        return x

    steps = list(zip(blocks, skip_rates(skipping, len(blocks)), strict=True))
    if group == 0 or not torch.is_grad_enabled():
        return run(x, steps)
    for start in range(0, len(steps), group):
        some = steps[start : start + group]
        norms = [norm for block, _ in some if isinstance(block, nn.Module) for norm in training_norms(block)]
        x = checkpoint(run, x, some, use_reentrant=False, context_fn=partial(recomputing, norms))
    return x


def skip_rates(highest: float, number: int) -> list[float]:
    """The share of rows that each of ``number`` blocks is left out for: P · l / L, l = 1 … L (arXiv 1603.09382)."""
    return [highest * place / number for place in range(1, number + 1)]


def through_some_rows(block: Block, x: Tensor, rate: float) -> Tensor:
    """Map some rows through a block, its residual scaled up so that on average nothing changes; the others stay.

        y_i = x_i + (B / K) (block(x_i) - x_i)  for K rows,  x_i for the others        K = round((1 - rate) · B)

    Stochastic depth (Huang et al. 2016, arXiv 1603.09382) of a fixed number of rows, one at least, as DINOv2 has it
    (arXiv 2304.07193, section 5), so that what is left out costs nothing. ``block`` maps rows each by itself.
    """
    kept = max(1, round((1 - rate) * len(x)))
    if kept == len(x):
        return block(x)
    rows = torch.rand(len(x), device=x.device, dtype=torch.float32).topk(kept).indices
    some = x.index_select(0, rows)
    return x.index_add(0, rows, (block(some) - some).to(x.dtype), alpha=len(x) / kept)


def training_norms(module: nn.Module) -> list[BatchNorm]:
    """The BatchNorms of a module that are training and keep running statistics."""
    norms = [one for one in module.modules() if isinstance(one, BatchNorm)]
    return [norm for norm in norms if norm.training and norm.running_mean is not None]


@contextmanager
def scratch_statistics(norms: Iterable[BatchNorm], momentum: float = 0.0) -> Iterator[None]:
    """Within the block norms write into fresh buffers, with momentum 1 this batch's own statistics; theirs stay."""
    before = [(norm, dict(norm.named_buffers()), norm.momentum) for norm in norms]
    for norm, buffers, _ in before:
        norm._buffers.update({name: torch.zeros_like(buffer) for name, buffer in buffers.items()})
        norm.momentum = momentum
    try:
        yield
    finally:  # ``checkpoint`` leaves a recomputation by an exception, once it has what it needs
        for norm, buffers, own in before:
            norm._buffers.update(buffers)
            norm.momentum = own


def recomputing(norms: Iterable[BatchNorm]) -> tuple[Any, Any]:
    """What ``checkpoint`` runs a forward pass and its recomputation in, so that running statistics are updated once."""
    return nullcontext(), scratch_statistics(norms)

"""The transformer block that both towers are made of.

B  sequences      L  positions      W  width      H  heads      E  width of a head (W / H)

Parameter names are the field's (OpenAI's and open_clip's state dicts), so that weights pass both ways with no map.

What BatchNorms keep of the batches that they have seen, and how to hold it still.

C  channels of a norm

Stochastic depth: in training a block is left out for some rows by chance (Huang et al. 2016, arXiv 1603.09382).

A fixed number of rows goes through the block and the others are not computed, as DINOv2 does it (arXiv 2304.07193,
section 5), so that what is left out costs nothing.

B  rows of the chunk      K  rows that go through the block      L  blocks

Gradient checkpointing: of a group of blocks only the input is kept; the rest is computed again in the backward pass.

Chen et al. 2016, arXiv 1604.06174; CLIP paper, section 2.5. The gradient is the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from train_clip.errors import UserError


def training_norms(module: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms of a module that are training and keep running statistics."""
    return [
        norm
        for norm in module.modules()
        if isinstance(norm, _BatchNorm) and norm.training and norm.running_mean is not None
    ]


def get_statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of a norm's running mean (C,), running variance (C,) and () count of batches."""
    buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    mean, variance, tracked = (cast(Tensor, buffer).clone() for buffer in buffers)
    return mean, variance, tracked


@torch.no_grad()
def set_statistics(norm: _BatchNorm, statistics: tuple[Tensor, Tensor, Tensor]) -> None:
    """Give a norm the statistics of ``get_statistics``."""
    for buffer, value in zip((norm.running_mean, norm.running_var, norm.num_batches_tracked), statistics, strict=True):
        # By ``data``: a chunk that is kept has saved the buffer, which its backward pass in train mode does not read.
        cast(Tensor, buffer).data.copy_(value)


@contextmanager
def momentum(norm: _BatchNorm, value: float) -> Iterator[None]:
    """Another momentum within the block."""
    before, norm.momentum = norm.momentum, value
    try:
        yield
    finally:
        norm.momentum = before


@contextmanager
def still(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Leave running statistics as they are, for a forward pass that is computed a second time."""
    before = [(norm, get_statistics(norm)) for norm in norms]
    with ExitStack() as stack:
        for norm, _ in before:
            stack.enter_context(momentum(norm, 0.0))
        try:
            yield
        finally:
            # ``checkpoint`` leaves a recomputation by an exception, once it has what it needs.
            for norm, statistics in before:
                set_statistics(norm, statistics)


def skip_rates(highest: float, number: int) -> list[float]:
    """The share of rows that each of L blocks is left out for: P · l / L, l = 1 … L (Huang et al., section 3).

    Args:
        highest: P, the last block's, from 0 to below 1.
        number: L.
    """
    return [highest * place / number for place in range(1, number + 1)]


def through_some_rows(block: Callable[[Tensor], Tensor], x: Tensor, rate: float) -> Tensor:
    """Map some rows through a block, its residual scaled up so that on average nothing changes; the others stay.

        y_i = x_i + (B / K) (block(x_i) - x_i)  for K rows,  x_i for the others        K = round((1 - rate) · B)

    Args:
        block: maps rows to rows of the same shape, each by itself.
        x: (B, …).
        rate: from 0 to below 1; at least one row goes through.

    Returns:
        (B, …).
    """
    kept = max(1, round((1 - rate) * len(x)))
    if kept == len(x):
        return block(x)
    rows = torch.rand(len(x), device=x.device, dtype=torch.float32).topk(kept).indices
    some = x.index_select(0, rows)
    return x.index_add(0, rows, (block(some) - some).to(x.dtype), alpha=len(x) / kept)


Block = Callable[[Tensor], Tensor]
Steps = Sequence[tuple[Block, float]]
"""Blocks, and the share of the rows that each is left out for."""


class BlockStack(nn.Module):
    """What runs through blocks, a few of which may be recomputed together: ``run_blocks(…, self.recompute)``."""

    recompute: int = 0

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks, first to last."""
        raise NotImplementedError


def recompute_blocks(tower: nn.Module, group: int) -> None:
    """Have the blocks of a tower recomputed.

    Args:
        tower: of this package, or of a library that can do it by itself (transformers, timm).
        group: blocks that are recomputed together, at least 1; libraries recompute each by itself.

    Raises:
        UserError: the tower offers no such thing.
    """
    stacks = [module for module in tower.modules() if isinstance(module, BlockStack)]
    for stack in stacks:
        stack.recompute = group
    if stacks:
        return
    library: Any = tower
    kind = type(tower).__name__
    if group != 1:
        raise UserError(f"gradient_checkpointing is {group}; {kind} recomputes each block by itself. Expected 1.")
    if hasattr(library, "gradient_checkpointing_enable"):
        library.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif hasattr(library, "set_grad_checkpointing"):
        library.set_grad_checkpointing(True)
    else:
        raise UserError(
            f"{kind} has no gradient checkpointing: found neither gradient_checkpointing_enable (transformers) nor "
            "set_grad_checkpointing (timm). Leave gradient_checkpointing out; minibatch_size saves memory with any "
            "encoder."
        )


def run_blocks(blocks: Sequence[Block], x: Tensor, group: int, skipping: float = 0.0) -> Tensor:
    """Map x through blocks, one after the other.

    Args:
        blocks: each maps what the one before it gives. Dropout and stochastic depth meet the same random state in the
            recomputation, and running statistics of BatchNorms among them are updated once.
        x: what the first one takes.
        group: blocks that are recomputed together; 0 to keep everything.
        skipping: share of the rows that the last block is left out for (``stochastic_depth.py``); 0 for none.

    Returns:
        What the last one gives.
    """
    steps = list(zip(blocks, skip_rates(skipping, len(blocks)), strict=True))
    if group == 0 or not torch.is_grad_enabled():
        return _run(steps, x)
    for start in range(0, len(steps), group):
        some = steps[start : start + group]

        def contexts(some: Steps = some) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            """Of the forward pass and of the recomputation."""
            modules = [block for block, _ in some if isinstance(block, nn.Module)]
            return nullcontext(), still([norm for module in modules for norm in training_norms(module)])

        x = cast(Tensor, checkpoint(_run, some, x, use_reentrant=False, context_fn=contexts))
    return x


def _run(steps: Steps, x: Tensor) -> Tensor:
    for block, rate in steps:
        x = through_some_rows(block, x, rate) if rate else block(x)
    return x


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

"""Muon for the matrices inside the towers and AdamW for everything else, as one optimizer with one schedule.

    m ← μ m + (1 - μ) g        u = (1 - μ) g + μ m        O = orthogonalise(u)
    W ← W (1 - ηλ) - 0.2 η √max(A, B) O

(Jordan et al. 2024, kellerjordan.github.io/posts/muon. The factor is that of Liu et al. 2025, arXiv 2502.16982,
section 2.2: with equal learning rates an update is as large as AdamW's.) The same as
``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``, many matrices of one shape at a time.

A, B  rows and columns of a matrix      K  matrices of one shape
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from typing_extensions import override

from train_clip import errors, tensors
from train_clip.models import clip, resnet
from train_clip.models.blocks import SelfAttention
from train_clip.options import OptimizerOptions
from train_clip.training.half_precision import Groups, HalfOptimizer, draw, round_stochastically
from train_clip.training.optimizer import build_adamw

HIDDEN = "hidden"  # the key that tells Muon's groups from the others
# Muon's rate next to AdamW's (docs/recipes.md). At 5e-4, the paper's for ViT-B, its matrices of 768 then move by a
# spectral norm of 0.2 · 8 · 5e-4 · √768 = 0.022 a step; Jordan et al. 2024 move theirs by 0.02.
MUON_RATE = 8.0
RMS_OF_ADAMW = 0.2  # arXiv 2502.16982, equation 4
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, "Tuning the coefficients"
STEPS = 5  # of the iteration, likewise
EPS = 1e-7  # the least that a norm counts for
AT_ONCE = 1 << 25  # numbers of the matrices that are orthogonalised together, which bounds the memory
BUFFER = "momentum_buffer"  # as torch.optim.Muon calls it
STREAM = 2  # parts its random numbers from those of the other optimizer


def build_muon(groups: Groups, model: clip.DualEncoder, options: OptimizerOptions, fused: bool, seed: int) -> Any:
    """Muon for what is trained of ``hidden_matrices``, in groups that come first; AdamW for the rest."""
    matrices = {matrix for matrix in hidden_matrices(model) if matrix.requires_grad}
    if not matrices:
        raise errors.UserError(
            "optimizer is 'muon', which updates the matrices inside the towers, and none of them is trained. Train a "
            "tower, or use adamw or sgd for prompts or a projection alone."
        )
    rate: Any = options.muon_learning_rate
    factors = {True: MUON_RATE if rate is None else rate / options.learning_rate, False: 1.0}
    of_muon, rest = (
        [
            group | {"params": chosen, "lr": group["lr"] * factor, HIDDEN: hidden}
            for group in groups
            if (chosen := [parameter for parameter in group["params"] if (parameter in matrices) == hidden])
        ]
        for hidden, factor in factors.items()
    )
    return Muon(of_muon, build_adamw(rest, model, options, fused, seed), options, seed, held_back=fused)


def hidden_matrices(model: clip.DualEncoder) -> set[nn.Parameter]:
    """Weights of linear layers, and fused in-projections, inside both towers of CLIP's own or a library's.

    "Muon should only be applied to hidden layers": embeddings, what leads out of a tower, gains and biases take AdamW
    (Jordan et al. 2024). Convolutions take it here too.
    """
    modules = [module for tower in (model.visual, model.transformer) for module in tower.modules()]
    found: set[Any] = {module.weight for module in modules if isinstance(module, nn.Linear)}
    found |= {module.in_proj_weight for module in modules if isinstance(module, SelfAttention | nn.MultiheadAttention)}
    return found - {module.c_proj.weight for module in modules if isinstance(module, resnet.AttentionPool)} - {None}


class Muon(HalfOptimizer):
    """Updates matrices by Muon, and leaves the rest to another optimizer, with which it shares its groups and state."""

    def __init__(
        self, groups: Groups, rest: Any, options: OptimizerOptions, seed: int = 0, held_back: bool = False
    ) -> None:
        super().__init__(groups, {"momentum": options.momentum, "weight_decay": 0.0}, options, seed, held_back)
        self._num_groups = len(self.param_groups)
        self.rest = rest
        self.__setstate__({"state": self.state, "param_groups": [*self.param_groups, *rest.param_groups]})

    def __setstate__(self, state: dict) -> None:
        # Groups and state are shared with the other optimizer from the start, and after each loading.
        super().__setstate__(state)
        self.rest.__setstate__({"state": self.state, "param_groups": self.param_groups[self._num_groups :]})

    @override
    def add_param_group(self, param_group: dict) -> None:
        if not hasattr(self, "rest"):
            super().add_param_group(param_group)
            return
        # What is added later, such as what a callback unfreezes, goes to the other optimizer, whatever it is.
        self.rest.add_param_group(param_group)
        self.param_groups[self._num_groups :] = self.rest.param_groups

    @override
    def update(self) -> None:
        self.rest.found_inf = self.found_inf
        self.rest.step()
        for group in self.param_groups[: self._num_groups]:
            for some in _alike([parameter for parameter in group["params"] if parameter.grad is not None]):
                updates = [_lying(self._follow(parameter, group["momentum"])) for parameter in some]
                directions = orthogonalise(torch.cat(updates)).split([len(blocks) for blocks in updates])
                for parameter, blocks in zip(some, directions, strict=True):
                    self._move(parameter, blocks, group)

    def _follow(self, parameter: Tensor, momentum: float) -> Tensor:
        # Nesterov's mixture of momentum and gradient, (A, B) float32, whole also of a shard.
        buffer = self.next_state(parameter, BUFFER)[BUFFER]
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        mean = buffer.float().lerp(gradient, 1 - momentum)
        self._round(parameter, buffer, mean, 0)
        update = gradient.lerp(mean, momentum)
        return update.full_tensor() if isinstance(update, DTensor) else update

    def _move(self, parameter: Tensor, blocks: Tensor, group: dict) -> None:
        lies = parameter.shape[1] == blocks.shape[2]
        direction = (blocks if lies else blocks.mT).reshape(parameter.shape)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            direction = distribute_tensor(direction, mesh, placements, src_data_rank=None)
        rate, weights = group["lr"], parameter.detach()
        moved = weights.float() * (1 - rate * group["weight_decay"])
        moved.add_(direction, alpha=-RMS_OF_ADAMW * rate * math.sqrt(blocks.shape[2]))
        self._round(parameter, weights, moved, 1)

    def _round(self, parameter: Tensor, tensor: Tensor, values: Tensor, which: int) -> None:
        kept, values = tensors.local(tensor), tensors.local(values)
        if kept.dtype == torch.bfloat16:
            noise = draw(self.noise(parameter, STREAM, which), 1, values.numel()).view(values.shape)
            values = round_stochastically(values, noise)
        self.write(kept, values)


def orthogonalise(blocks: Tensor) -> Tensor:
    """Move singular values of (K, A, B), A ≤ B, near 1 (0.7 to 1.2, Jordan et al. 2024): U S Vᵀ → about U Vᵀ.

    X ← X / ‖X‖        five times:  X ← a X + (b G + c G²) X,   G = X Xᵀ
    """
    a, b, c = COEFFICIENTS
    blocks = blocks / blocks.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = blocks @ blocks.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        blocks = torch.baddbmm(blocks, polynomial, blocks, beta=a)
    return blocks


def row_blocks(matrix: Tensor) -> int:
    """Matrices that lie one upon the other in a parameter: three in a fused projection to query, key and value."""
    rows, columns = matrix.shape
    return 3 if rows == 3 * columns else 1


def _lying(update: Tensor) -> Tensor:
    # (A or 3 A, B) → its matrices, (1 or 3, A, B), or (…, B, A) where that is wider than high; bfloat16.
    blocks = update.bfloat16().unflatten(0, (row_blocks(update), -1))
    return blocks.mT if blocks.shape[1] > blocks.shape[2] else blocks


def _alike(matrices: list[Tensor]) -> list[list[Tensor]]:
    # By the shape of their blocks, of which there are three at most, a transpose being the same.
    found: dict[Any, list[Tensor]] = {}
    for matrix in matrices:
        rows, columns = matrix.shape
        key = *sorted((rows // row_blocks(matrix), columns)), matrix.device
        found.setdefault(key, []).append(matrix)
    parts = []
    for (low, high, _), some in found.items():
        size = -(-AT_ONCE // (3 * low * high))
        parts += [some[start : start + size] for start in range(0, len(some), size)]
    return parts

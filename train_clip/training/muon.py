"""Muon for hidden matrices and another optimizer for everything else, as one optimizer with one schedule.

    m ← μ m + (1 - μ) g        u = (1 - μ) g + μ m        O = orthogonalise(u)
    W ← W (1 - ηλ) - 0.2 η √max(A, B) O

(Jordan et al. 2024, kellerjordan.github.io/posts/muon. The factor is that of Liu et al. 2025, arXiv 2502.16982,
section 2.2: at one rate the numbers of a matrix move by as much as under AdamW.) The same as
``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``, many matrices of one shape at a time.

A, B  rows and columns of a matrix      K  matrices of one shape

Which parameters Muon updates: the matrices within the towers. Embeddings and what leads out of a tower are none.

"Muon should only be applied to hidden layers"; embeddings, the last layer, gains and biases take AdamW (Jordan et al.
2024, kellerjordan.github.io/posts/muon). Convolutions take it here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from train_clip.models.blocks import SelfAttention
from train_clip.models.clip import DualEncoder
from train_clip.models.resnet import AttentionPool
from train_clip.tensors import local, shard_of
from train_clip.training.end_of_step import known_at_once
from train_clip.training.half_precision import Noise, draw, keep_types, round_stochastically


def hidden_matrices(model: DualEncoder) -> set[nn.Parameter]:
    """Weights of linear layers, and fused in-projections, inside both towers.

    Args:
        model: CLIP's own towers, or encoders of a library.
    """
    found: set[nn.Parameter] = set()
    for module in (module for tower in (model.visual, model.transformer) for module in tower.modules()):
        if isinstance(module, nn.Linear):
            found |= {module.weight}  # type: ignore[arg-type]
        elif isinstance(module, SelfAttention | nn.MultiheadAttention):
            weight = module.in_proj_weight
            found |= set() if weight is None else {weight}
    for module in model.modules():
        if isinstance(module, AttentionPool):
            found.discard(module.c_proj.weight)
    return found


def row_blocks(matrix: Tensor) -> int:
    """How many matrices lie one upon the other in a parameter: three where it is three times as high as it is wide.

    Such are the fused projections to query, key and value, of this package and of libraries alike. Orthogonalised as
    one, the three would share one norm.

    Args:
        matrix: (rows, columns).
    """
    rows, columns = matrix.shape
    return 3 if rows == 3 * columns else 1


RMS_OF_ADAMW = 0.2  # arXiv 2502.16982, equation 4
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, "Tuning the coefficients"
STEPS = 5  # of the iteration, likewise
EPS = 1e-7  # the least that a norm counts for
AT_ONCE = 1 << 25  # numbers of the matrices that are orthogonalised together, which bounds the memory

BUFFER = "momentum_buffer"  # as torch.optim.Muon calls it
STREAM = 2  # parts its random numbers from those of the other optimizer


class Muon(Optimizer):
    """Updates matrices by Muon, and leaves the rest to an optimizer that was made for it.

    Both share one list of groups and one state, so that schedules, checkpoints and clipping meet one optimizer.

    Args:
        groups: of matrices, with ``lr`` and ``weight_decay``.
        rest: has all other parameters.
        momentum: μ.
        half_momentum: keep m in bfloat16, rounded by chance (``rounding.py``), as weights in bfloat16 are.
        seed: of what is rounded by chance, 0 or above.
        held_back: take ``found_inf``, () float32, as PyTorch's fused optimizers do: above 0, nothing changes.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        rest: Optimizer,
        momentum: float,
        *,
        half_momentum: bool = False,
        seed: int = 0,
        held_back: bool = False,
    ) -> None:
        super().__init__(groups, {"momentum": momentum, "weight_decay": 0.0})
        self._num_groups = len(self.param_groups)
        self._half_momentum = half_momentum
        self._step_supports_amp_scaling = held_back
        self._noise = Noise(seed)
        self.rest = rest
        self.__setstate__({"state": self.state, "param_groups": [*self.param_groups, *rest.param_groups]})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Share groups and state with the other optimizer, from the start and after each loading."""
        super().__setstate__(state)
        self.rest.__setstate__({"state": self.state, "param_groups": self.param_groups[self._num_groups :]})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters later, such as those that a callback unfreezes: to the other optimizer, whatever they are."""
        if not hasattr(self, "rest"):
            super().add_param_group(param_group)
            return
        self.rest.add_param_group(param_group)
        groups = [*self.param_groups[: self._num_groups], *self.rest.param_groups]
        self.__setstate__({"state": self.state, "param_groups": groups})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, whose statistics keep the type that they have there."""
        super().load_state_dict(state_dict)
        keep_types(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.found_inf is not None:
            if known_at_once(self.found_inf) and self.found_inf > 0:
                return loss
            self.rest.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.rest.step()
        place = 0
        for group in self.param_groups[: self._num_groups]:
            places = {parameter: place + number for number, parameter in enumerate(group["params"])}
            place += len(places)
            for some in alike({p: number for p, number in places.items() if p.grad is not None}):
                self._step_some(some, group)
        return loss

    def _step_some(self, places: dict[Tensor, int], group: dict[str, Any]) -> None:
        """Update matrices of one shape or its transpose; of each its place among all, which its noise follows from."""
        updates = [self._follow(parameter, group["momentum"], place) for parameter, place in places.items()]
        blocks = torch.cat([lying(update) for update in updates])
        directions = orthogonalise(blocks).split([row_blocks(update) for update in updates])
        for (parameter, place), direction in zip(places.items(), directions, strict=True):
            self._move(parameter, standing(direction, parameter), group, place)

    def _follow(self, parameter: Tensor, momentum: float, place: int) -> Tensor:
        """Let the momentum follow a gradient; Nesterov's mixture of both, (A, B) float32, whole also of a shard."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            half = self._half_momentum
            state |= {"step": 0, BUFFER: torch.zeros_like(parameter, dtype=torch.bfloat16 if half else torch.float32)}
        # Ahead of the truth once an update is held back on a GPU: nothing is saved from there on.
        state["step"] += 1
        gradient = local(parameter.grad).float()
        mean = local(state[BUFFER]).float().lerp(gradient, 1 - momentum)
        self._write(state[BUFFER], mean, (state["step"], place, 0))
        update = gradient.lerp(mean, momentum)
        if isinstance(parameter, DTensor):
            placed = DTensor.from_local(
                update, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
            )
            return placed.full_tensor()
        return update

    def _move(self, parameter: Tensor, direction: Tensor, group: dict[str, Any], place: int) -> None:
        """Let a parameter decay and go in a direction, (A, B) bfloat16."""
        rate, step = group["lr"], self.state[parameter]["step"]
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            direction = distribute_tensor(direction, mesh, placements, src_data_rank=None).to_local()
        factor = RMS_OF_ADAMW * rate * math.sqrt(max(block_shape(parameter)))
        weights = local(parameter.detach()).float() * (1 - rate * group["weight_decay"])
        self._write(parameter.detach(), weights.add_(direction, alpha=-factor), (step, place, 1))

    def _write(self, tensor: Tensor, values: Tensor, key: tuple[int, int, int]) -> None:
        """Keep float32 values where they belong, rounded by chance if that is bfloat16."""
        kept = local(tensor)
        if kept.dtype == torch.bfloat16:
            step, place, which = key
            generator = self._noise.at(kept.device, step, place, *shard_of(tensor), STREAM, which)
            noise = draw(generator, 1, values.numel()).view(values.shape)
            values = round_stochastically(values.contiguous(), noise)
        kept.copy_(values if self.found_inf is None else torch.where(self.found_inf > 0, kept, values))


def alike(places: dict[Tensor, int]) -> list[dict[Tensor, int]]:
    """Sort matrices by the shape of their blocks, a transpose being the same, as many together as may be."""
    found: dict[tuple[Any, ...], list[dict[Tensor, int]]] = {}
    for parameter, place in places.items():
        low, high = sorted(block_shape(parameter))
        batches = found.setdefault((low, high, parameter.device), [{}])
        # Of three blocks at most.
        if 3 * low * high * len(batches[-1]) >= AT_ONCE:
            batches.append({})
        batches[-1][parameter] = place
    return [batch for batches in found.values() for batch in batches]


def block_shape(matrix: Tensor) -> tuple[int, int]:
    """A and B of each matrix of a parameter."""
    rows, columns = matrix.shape
    return rows // row_blocks(matrix), columns


def lying(update: Tensor) -> Tensor:
    """Map (A or 3 A, B) to its matrices, (1 or 3, A, B), or (…, B, A) where that is wider than high; bfloat16."""
    blocks = update.bfloat16().view(row_blocks(update), *block_shape(update))
    return blocks.mT if blocks.shape[-2] > blocks.shape[-1] else blocks


def standing(blocks: Tensor, parameter: Tensor) -> Tensor:
    """Undo ``lying``: (A or 3 A, B)."""
    rows, columns = block_shape(parameter)
    return (blocks.mT if rows > columns else blocks).reshape(parameter.shape)


def orthogonalise(blocks: Tensor) -> Tensor:
    """Move singular values near 1 (0.7 to 1.2, Jordan et al. 2024) by a polynomial, without a decomposition.

        X ← X / ‖X‖        five times:  X ← a X + (b G + c G²) X,   G = X Xᵀ

    Args:
        blocks: (K, A, B) bfloat16 or wider, A ≤ B.

    Returns:
        (K, A, B) of the same type: U S Vᵀ → about U Vᵀ.
    """
    a, b, c = COEFFICIENTS
    blocks = blocks / blocks.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = blocks @ blocks.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        blocks = torch.baddbmm(blocks, polynomial, blocks, beta=a)
    return blocks

"""Weights between two models: what fine-tuning has gained, with less of what it has lost.

Weight-space ensembling of the start and the end of a fine-tuning run (WiSE-FT, Wortsman et al., arXiv 2109.01903).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from train_clip.errors import UserError

OF_LOSS = ("logit_scale", "logit_bias")


def interpolate(start: Mapping[str, Tensor], tuned: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """The line between two state dicts.

        θ = (1 - w) θ_start + w θ_tuned

    Running statistics of BatchNorm lie on the line too; whole numbers, such as their counts of batches, are the tuned
    model's.

    Args:
        start: any tensors.
        tuned: of the same names and shapes.
        weight: w, in [0, 1].

    Returns:
        Tensors of the tuned model's dtypes. At 0 and at 1 they are the one's and the other's, bit for bit.

    Raises:
        UserError: names or shapes that differ, or a weight beyond the ends.
    """
    require_weight(weight)
    require_one_model(start, tuned)
    return {
        name: _between(start[name], end, weight) if end.is_floating_point() else end.clone()
        for name, end in tuned.items()
    }


def of_one_loss(start: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The start with the tuned model's temperature and bias, where one was trained with the sigmoid loss alone.

    A temperature means another thing in each loss. Which caption fits best depends on neither of the two.

    Args:
        start: as for ``interpolate``.
        tuned: likewise.
    """
    if ("logit_bias" in start) == ("logit_bias" in tuned):
        return dict(start)
    towers = {name: tensor for name, tensor in start.items() if name not in OF_LOSS}
    return towers | {name: tuned[name] for name in OF_LOSS if name in tuned}


def require_weight(weight: float) -> None:
    """Refuse a weight beyond the ends.

    Raises:
        UserError: it is none from 0 to 1.
    """
    if not 0 <= weight <= 1:
        raise UserError(f"--weight {weight:g}: expected from 0, the first checkpoint, to 1, the second.")


def require_one_model(start: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
    """Refuse state dicts that have no line between them.

    Raises:
        UserError: names or shapes that differ.
    """
    if lone := sorted(start.keys() ^ tuned.keys()):
        raise UserError(f"{lone[0]} is in one of the checkpoints only; expected two of one model.")
    for name, end in tuned.items():
        if start[name].shape != end.shape:
            raise UserError(
                f"{name} has the shapes {tuple(start[name].shape)} and {tuple(end.shape)}; expected one model."
            )


def _between(begin: Tensor, end: Tensor, weight: float) -> Tensor:
    wide = torch.promote_types(end.dtype, torch.float32)
    # lerp is exact at both ends.
    return begin.to(wide).lerp(end.to(wide), weight).to(end.dtype)

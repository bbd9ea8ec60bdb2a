"""Which captions are equal, told by their tokens.

B  captions      L  tokens of the longest
"""

from __future__ import annotations

import torch
from torch import Tensor


def caption_ids(ids: Tensor, mask: Tensor) -> Tensor:
    """A number for each caption, equal for equal captions: a random linear hash of its tokens.

    Args:
        ids: (B, L) int64, at least 0.
        mask: (B, L) bool, which of them make up the caption; padding may stand on either side.

    Returns:
        (B,) int64.
    """
    # Products wrap around: two captions collide once in about 2⁶³ pairs.
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (ids.shape[1],), generator=generator).to(ids.device)
    places = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return ((ids + 1) * mask * weights[places]).sum(dim=1)

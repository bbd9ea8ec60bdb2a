"""Which towers leave out blocks by chance (stochastic depth, Huang et al. 2016, arXiv 1603.09382)."""

from __future__ import annotations

from train_clip.errors import UserError
from train_clip.models.blocks import Transformer
from train_clip.models.dual_encoder import DualEncoder


def skip_blocks(model: DualEncoder, highest: float) -> None:
    """Have the towers that are trained leave out blocks in train mode.

    Args:
        model: its transformers are changed.
        highest: the share of rows that the last block of each is left out for; 0 for none.

    Raises:
        UserError: a tower is no transformer of this package.
    """
    if not highest:
        return
    for name, tower in (("image", model.visual), ("text", model.transformer)):
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            continue
        stacks = [module for module in tower.modules() if isinstance(module, Transformer)]
        if not stacks:
            raise UserError(
                f"stochastic_depth is {highest}; the {name} tower is {type(tower).__name__}, whose blocks cannot be "
                "left out: a ResNet's end in more than a sum, and a library's are its own. Expected CLIP's own "
                f"transformers, such as ViT-B/32's. Leave stochastic_depth out, or keep that tower: lock_{name}."
            )
        for stack in stacks:
            stack.stochastic_depth = highest

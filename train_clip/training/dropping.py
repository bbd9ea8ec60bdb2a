"""Which towers leave out blocks by chance (stochastic depth, Huang et al. 2016, arXiv 1603.09382).

Images of which a step looks at some patches alone (FLIP, Li et al. 2022, arXiv 2212.00794).

P  patches of an image      K  patches that a step keeps of each
"""

from __future__ import annotations

from train_clip.errors import UserError
from train_clip.models.blocks import Transformer
from train_clip.models.clip import DualEncoder
from train_clip.models.vit import VisionTransformer
from train_clip.options import ObjectiveOptions


class PatchDropping:
    """How many patches of each image the steps of a run keep: some, and at its end all.

        K = round((1 - mask_ratio) · P)

    Args:
        model: whose image tower, in train mode, leaves patches out.
        tuning: the share, and when it ends.

    Raises:
        UserError: the image tower is no vision transformer of this package, or would have no patch to look at.
    """

    def __init__(self, model: DualEncoder, tuning: ObjectiveOptions) -> None:
        self._unmasked_share = tuning.unmasked_share
        self._kept: list[tuple[VisionTransformer, int]] = []
        if not tuning.mask_ratio:
            return
        tower = model.visual
        if not isinstance(tower, VisionTransformer):
            raise UserError(
                f"mask_ratio is {tuning.mask_ratio}; the image tower is {type(tower).__name__}, of which no patches "
                "can be left out. Expected CLIP's own vision transformer, such as ViT-B/32. Leave mask_ratio out."
            )
        patches = len(tower.positional_embedding) - 1
        kept = round((1 - tuning.mask_ratio) * patches)
        if not kept:
            raise UserError(
                f"mask_ratio is {tuning.mask_ratio}: nothing is left of the {patches:,} patches of an image. Expected "
                "at least one to be: a lower ratio."
            )
        self._kept.append((tower, kept))

    def begin_step(self, step: int, num_steps: int) -> None:
        """Have the tower keep what this step is to see, in the recomputation of its backward pass too.

        Args:
            step: optimizer steps before it.
            num_steps: those of the whole run.
        """
        masked = step < num_steps - round(self._unmasked_share * num_steps)
        for tower, kept in self._kept:
            tower.kept_patches = kept if masked else 0

    def end(self) -> None:
        """Give the tower back as it was found."""
        for tower, _ in self._kept:
            tower.kept_patches = 0


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

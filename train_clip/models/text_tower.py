"""CLIP's text tower by itself, as an encoder to be joined with another image encoder.

B  captions      L  tokens      D  embedding width
"""

from __future__ import annotations

from torch import Tensor, nn

from train_clip.models.clip import CLIP


class TextTower(nn.Module):
    """The part of a CLIP that embeds captions.

    Args:
        clip: its image tower, temperature and bias are taken off.
    """

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        clip.visual = nn.Identity()
        clip.register_parameter("logit_scale", None)
        clip.register_parameter("logit_bias", None)
        self.clip = clip

    def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
        """Embed captions.

        Args:
            input_ids: (B, L) int64 of CLIP's tokenizer. What follows the end token is never looked at.

        Returns:
            (B, D) float, not normalised.
        """
        return self.clip.encode_text(input_ids)
